"""learner.training, guard and record: what keeps a step from being taken, and what is left then. About a minute.

The judgement and the figures by hand; the rest on two real ranks, where each scenario is compared, bit for bit, with an
update that never saw what was refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.rollout import Prompt, Rollout, ScoredRollout
from conf.schema import (
    AlgorithmConfig,
    GeneratorConfig,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    ShapingConfig,
)
from learner.guard import UpdateGuard, Verdict
from learner.networks import LearnerSetup
from learner.ranks import Ranks
from learner.record import Record
from learner.training import visits
from tests.learner_ranks import on_ranks
from tests.tiny_models import tiny_checkpoint

# Judging


@pytest.mark.parametrize(
    ("losses", "mean_ratio", "approx_kl", "expected"),
    [
        ([1.0, -2.0], 1.0, 0.0, Verdict.STEP),
        ([1.0], 10.0, 0.15, Verdict.STEP),  # at the limits
        ([1.0], 10.01, 0.0, Verdict.RATIO),
        ([1.0], 10.01, 0.2, Verdict.RATIO),
        ([1.0], 1.0, 0.151, Verdict.EARLY_STOP),
        ([1.0, math.nan], 1.0, 0.0, Verdict.NONFINITE),
        ([-math.inf], 11.0, 0.0, Verdict.NONFINITE),
        ([1.0], math.nan, 0.0, Verdict.NONFINITE),
        ([1.0], 1.0, math.inf, Verdict.NONFINITE),
    ],
)
def test_verdicts_by_hand(losses: list[float], mean_ratio: float, approx_kl: float, expected: Verdict) -> None:
    guard = UpdateGuard.of(AlgorithmConfig(early_stop_kl=0.1))
    assert guard.verdict(losses, mean_ratio=mean_ratio, approx_kl=approx_kl) is expected


def test_without_limits_only_what_is_not_finite_is_refused() -> None:
    guard = UpdateGuard.of(AlgorithmConfig(max_mean_ratio=None))
    assert guard.verdict([1e30], mean_ratio=1e9, approx_kl=1e9) is Verdict.STEP
    assert guard.verdict([math.inf], mean_ratio=1.0, approx_kl=0.0) is Verdict.NONFINITE


def test_the_first_epoch_is_in_order_and_the_others_are_shuffled_by_the_seed() -> None:
    one, again, other = (list(visits(8, epochs=3, seed=seed)) for seed in (0, 0, 1))
    assert one == again != other
    assert one[:8] == [(0, index) for index in range(8)]
    for epoch in (1, 2):
        visited = one[8 * epoch : 8 * epoch + 8]
        assert [number for number, _ in visited] == [epoch] * 8
        assert sorted(index for _, index in visited) == list(range(8)) != [index for _, index in visited]


def test_metrics_of_a_record_by_hand() -> None:
    record = Record()
    record.add({"approx_kl": 1.0, "policy_loss": 2.0, "critic_loss": 30.0}, 10.0)
    record.add({"approx_kl": 2.0, "policy_loss": 4.0, "critic_loss": 30.0}, 20.0)
    record.grad_norms["policy"] += [1.0, 2.0]
    record.verdicts.update([Verdict.STEP, Verdict.RATIO, Verdict.RATIO, Verdict.EMPTY])
    assert record.metrics() == {
        "policy/approx_kl": 0.1,  # of a token
        "critic/loss": 2.0,
        "policy/loss": 3.0,  # of a mini-batch
        "policy/grad_norm": 1.5,
        "policy/skipped_ratio": 2.0,
        "policy/skipped_empty": 1.0,
        "policy/skipped_nonfinite": 0.0,
        "policy/early_stops": 0.0,
    }


# On two ranks

OPTIMIZER = OptimizerConfig(lr=1e-2, scheduler="linear")  # over the 8 steps that ALGORITHM has
CONSTANT = OptimizerConfig(lr=1e-2)
ALGORITHM = AlgorithmConfig(
    num_steps=4,
    prompts_per_step=8,
    mini_batch_size=4,
    whiten_advantages=False,  # else a rollout has its part in the advantages of the others
    kl_coef=0.0,
)
REMAX = replace(ALGORITHM, estimator="remax")
MiniBatches = list[list[ScoredRollout]]


def rollouts() -> MiniBatches:
    """Two mini-batches of four."""
    rng = np.random.default_rng(0)
    every = []
    for index in range(8):
        rollout = Rollout(
            prompt=Prompt(index, rng.integers(4, 64, 3).astype(np.int32), "", ()),
            sample=0,
            response_ids=rng.integers(4, 64, 4).astype(np.int32),
            rollout_logprobs=np.full(4, -5.5, dtype=np.float32),
            response_mask=np.ones(4, dtype=np.bool_),
            policy_versions=np.zeros(4, dtype=np.int32),
            finish_reason="stop",
            text="",
        )
        every.append(ScoredRollout(rollout, float(rng.normal())))
    return [every[:4], every[4:]]


def changed(mini_batch: Sequence[ScoredRollout], number: int = 0, **changes: Any) -> list[ScoredRollout]:
    """The mini-batch with one of its rollouts changed, or all of them for -1."""
    result = []
    for index, scored in enumerate(mini_batch):
        if number in (index, -1):
            of_rollout = {name: value for name, value in changes.items() if name != "score"}
            new = replace(scored.rollout, **of_rollout)
            scored = ScoredRollout(new, changes.get("score", scored.score))
        result.append(scored)
    return result


class Rank:
    """Makes learners, and tells what came of their updates."""

    def __init__(self, ranks: Ranks, checkpoint: str) -> None:
        self.ranks, self.checkpoint = ranks, checkpoint

    def worker(self, algorithm: AlgorithmConfig, optimizer: OptimizerConfig = OPTIMIZER) -> Any:
        from learner.worker import LearnerWorker

        model = ModelConfig(path=self.checkpoint, tokenizer=self.checkpoint)
        learner = LearnerConfig(dtype="float32", policy=optimizer, critic=optimizer)
        setup = LearnerSetup(
            model, algorithm, ShapingConfig(), learner, GeneratorConfig(), self.checkpoint, (), "cpu", 0, 60.0
        )
        return LearnerWorker(setup, self.ranks)

    def update(self, worker: Any, mini_batches: MiniBatches) -> dict[str, float]:
        mine = [part[self.ranks.rank :: self.ranks.world_size] for part in mini_batches]
        metrics: dict[str, float] = worker.update(mine, kl_coef=0.0, seed=0, step=0)
        return metrics

    def weights(self, worker: Any) -> dict[str, Any]:
        from learner import zero

        engines = {"policy": worker.policy, "critic": worker.networks.critic.engine}
        return {
            f"{which}/{name}": tensor.numpy()
            for which, engine in engines.items()
            if engine is not None
            for name, tensor in zero.full_state(engine.module.model, dtype="float32").items()
        }

    def after(
        self, algorithm: AlgorithmConfig, *updates: MiniBatches, optimizer: OptimizerConfig = OPTIMIZER
    ) -> dict[str, Any]:
        worker = self.worker(algorithm, optimizer)
        start = self.weights(worker)
        metrics = [self.update(worker, one) for one in updates]
        return {"start": start, "metrics": metrics, "weights": self.weights(worker)}


def run(ranks: Ranks, checkpoint: str) -> dict[str, Any]:
    first, second = rollouts()
    rank = Rank(ranks, checkpoint)
    engine, stopping = replace(ALGORITHM, old_logprobs="engine"), replace(ALGORITHM, early_stop_kl=1e-6, ppo_epochs=3)
    unlikely = np.full(4, -15.0, dtype=np.float32)  # by the engine: the ratio is far above 10
    masking = replace(ALGORITHM, mask_truncated=True)
    return {
        "ratio": rank.after(engine, [changed(first, -1, rollout_logprobs=unlikely), second]),
        "ratio, all": rank.after(engine, [changed(part, -1, rollout_logprobs=unlikely) for part in (first, second)]),
        "ratio, without": rank.after(engine, [second]),
        "early stop": rank.after(stopping, [first], optimizer=CONSTANT),
        "early stop, without": rank.after(ALGORITHM, [first], optimizer=CONSTANT),
        "loss": rank.after(ALGORITHM, [changed(first, 1, score=math.inf), second]),
        "loss, without": rank.after(ALGORITHM, [second]),
        "gradient": rank.after(REMAX, [changed(first, 1, score=3e38), second]),
        "gradient, without": rank.after(REMAX, [second]),
        "masked": rank.after(masking, [changed(first, -1, finish_reason="length"), second]),
        "masked, without": rank.after(masking, [second]),
        "masked, all": rank.after(masking, [changed(part, -1, finish_reason="length") for part in (first, second)]),
        "in a row": in_a_row(rank),
    }


def in_a_row(rank: Rank) -> dict[str, Any]:
    """Two bad mini-batches, a good one, two bad ones and then one more, with three in a row as the limit."""
    worker = rank.worker(replace(REMAX, max_nonfinite=3))
    good, other = rollouts()
    bad = [changed(good, 0, score=math.nan), changed(other, 0, score=math.inf)]
    metrics = [rank.update(worker, one) for one in (bad, [good], bad)]
    before = rank.weights(worker)
    with pytest.raises(FloatingPointError, match=r"3 optimizer steps in a row.*algorithm\.max_nonfinite") as raised:
        rank.update(worker, [bad[0], good])
    return {"metrics": metrics, "before": before, "weights": rank.weights(worker), "message": str(raised.value)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return on_ranks(run, 2, str(checkpoint))


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(params=[0, 1])
def done(request: pytest.FixtureRequest, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What came of the scenarios on one of the ranks."""
    of_rank: dict[str, Any] = results[request.param]
    return of_rank


@pytest.mark.ranks
def test_a_mini_batch_whose_mean_ratio_is_too_large_takes_no_step(done: dict[str, Any]) -> None:
    (metrics,) = done["ratio"]["metrics"]
    assert metrics["policy/skipped_ratio"] == 1
    assert metrics["policy/ratio_mean"] > 10
    assert equal(done["ratio"]["weights"], done["ratio, without"]["weights"])
    assert not equal(done["ratio"]["weights"], done["ratio"]["start"])


@pytest.mark.ranks
def test_the_scheduler_ticks_for_steps_that_are_taken_and_for_no_others(done: dict[str, Any]) -> None:
    """(PPO details 10)"""
    assert done["ratio, all"]["metrics"][0]["policy/skipped_ratio"] == 2
    assert equal(done["ratio, all"]["weights"], done["ratio, all"]["start"])
    for name, ticks in (("ratio, all", 0), ("ratio", 1), ("loss", 1), ("masked", 1), ("gradient", 1)):
        for network in ("policy", "critic") if name != "gradient" else ("policy",):
            rate = done[name]["metrics"][-1][f"{network}/lr"]
            assert rate == pytest.approx((1 - ticks / 8) * 1e-2), (name, network)


@pytest.mark.ranks
def test_an_update_that_goes_too_far_ends_before_the_step(done: dict[str, Any]) -> None:
    (metrics,) = done["early stop"]["metrics"]
    assert metrics["policy/early_stops"] == 1
    assert metrics["policy/approx_kl"] > 1e-5
    assert equal(done["early stop"]["weights"], done["early stop, without"]["weights"])
    assert not equal(done["early stop"]["weights"], done["early stop"]["start"])


@pytest.mark.ranks
def test_a_loss_that_is_not_finite_takes_no_step(done: dict[str, Any]) -> None:
    (metrics,) = done["loss"]["metrics"]
    assert metrics["policy/skipped_nonfinite"] == 1
    assert not math.isfinite(metrics["policy/loss"]), "it is seen"
    assert equal(done["loss"]["weights"], done["loss, without"]["weights"])
    assert not equal(done["loss"]["weights"], done["loss"]["start"])


@pytest.mark.ranks
def test_a_gradient_that_is_not_finite_takes_no_step(done: dict[str, Any]) -> None:
    (metrics,) = done["gradient"]["metrics"]
    assert metrics["policy/skipped_nonfinite"] == 1
    assert math.isfinite(metrics["policy/loss"])
    assert metrics["policy/grad_norm"] == math.inf
    assert equal(done["gradient"]["weights"], done["gradient, without"]["weights"])
    assert not equal(done["gradient"]["weights"], done["gradient"]["start"])


@pytest.mark.ranks
def test_a_mini_batch_without_a_token_in_the_losses_takes_no_step(done: dict[str, Any]) -> None:
    (metrics,) = done["masked"]["metrics"]
    assert metrics["policy/skipped_empty"] == 1
    assert metrics["policy/masked_rollouts"] == 4
    assert equal(done["masked"]["weights"], done["masked, without"]["weights"])


@pytest.mark.ranks
def test_a_train_batch_without_a_token_in_the_losses_is_no_fault(done: dict[str, Any]) -> None:
    (metrics,) = done["masked, all"]["metrics"]
    assert metrics["policy/skipped_empty"] == 2
    assert math.isnan(metrics["advantages/mean"])
    assert equal(done["masked, all"]["weights"], done["masked, all"]["start"])


@pytest.mark.ranks
def test_too_many_in_a_row_stop_the_run_and_leave_the_weights_whole(done: dict[str, Any]) -> None:
    """They are counted over updates, and a step that is taken ends the row."""
    row = done["in a row"]
    assert [one["policy/skipped_nonfinite"] for one in row["metrics"]] == [2, 0, 2]
    assert equal(row["weights"], row["before"])
    assert all(np.isfinite(tensor).all() for tensor in row["weights"].values())


@pytest.mark.ranks
def test_every_rank_judges_alike(results: list[dict[str, Any]]) -> None:
    first, second = results
    for name in first:
        assert repr(first[name]["metrics"]) == repr(second[name]["metrics"]), name  # NaN is not equal to itself
        assert equal(first[name]["weights"], second[name]["weights"]), name
