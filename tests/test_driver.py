"""The driver with partners that only take notes: what it asks of whom, in which order, and with what. About a second
beside the imports.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest

from actors.reward import Judged
from cluster.driver import (
    Chunk,
    PPODriver,
    RolloutInfo,
    Rollouts,
    Sampling,
    Scoring,
    Stopwatch,
    TrainBatch,
    derived_seed,
    describe,
)
from cluster.faults import ProcessError, RolloutsLostError
from cluster.learners import addressed, scored_rollouts
from cluster.ppo_stage import samples
from cluster.recoveries import Recoveries
from cluster.rollouts import SampledAgain, SampledRollouts, WithGreedyBaselines
from cluster.shaping import ScoreShaping
from conf.schema import AlgorithmConfig, ShapingConfig
from tests.stand_ins import NumberedPrompts, StandIns, prompt, rollout, rollouts_of, scored_handle

ALGORITHM = AlgorithmConfig(num_steps=3, prompts_per_step=4, samples_per_prompt=2, mini_batch_size=4, kl_coef=0.1)
SAMPLING = Sampling(num_samples=2, temperature=0.7, max_new_tokens=5, seed=3)


def make_driver(
    partners: StandIns,
    *,
    rollouts: Callable[[SampledRollouts], Rollouts] = lambda sampled: sampled,
    shaping: ShapingConfig | None = None,
    **changes: object,
) -> PPODriver:
    sampled = SampledRollouts(
        NumberedPrompts(), partners, partners, evaluate=partners.evaluate, sampling=SAMPLING, prompts_per_step=4
    )
    return PPODriver(
        algorithm=replace(ALGORITHM, **changes),  # type: ignore[arg-type]
        rollouts=rollouts(sampled),
        shaping=ScoreShaping(shaping or ShapingConfig(), max_new_tokens=5),
        learners=partners,
        sync=partners,
        seed=3,
    )


# The order of things --------------------------------------------------------------------------------------------------


def test_an_iteration_asks_in_the_order_of_the_algorithm() -> None:
    partners = StandIns()
    driver = make_driver(partners)
    driver.start()
    driver.iterate()
    assert partners.asked == ["push 0", "sample 4 x 2", *["chunk", "score"] * 4, "update", "push 1"]
    driver.iterate()
    assert partners.asked[-2:] == ["update", "push 2"]


def test_nothing_is_counted_as_done_when_the_sync_fails() -> None:
    partners = StandIns(fail_sync_at=1, kl=12.0)
    driver = make_driver(partners, kl_target=6.0)
    driver.start()
    with pytest.raises(RuntimeError, match="the sync failed"):
        driver.iterate()
    assert (driver.step, driver.kl.coef) == (0, 0.1)


def test_the_learner_is_told_how_many_iterations_came_before_and_draws_otherwise_in_each() -> None:
    partners = StandIns()
    driver = make_driver(partners)
    iterations = [driver.iterate().step for _ in range(3)]
    assert (partners.steps, iterations) == ([0, 1, 2], [1, 2, 3])
    assert len(set(partners.seeds)) == 3
    again = StandIns()
    make_driver(again).iterate()
    assert again.seeds == partners.seeds[:1]


def test_seeds_are_a_function_of_their_parts() -> None:
    assert derived_seed(1, 2) == derived_seed(1, 2)
    assert len({derived_seed(1, 2), derived_seed(2, 1), derived_seed(1, 3), derived_seed(1)}) == 4
    assert 0 <= derived_seed(5, 6) < 2**63


# The KL controller ----------------------------------------------------------------------------------------------------


def test_the_kl_coefficient_follows_its_target() -> None:
    """error = clip(12 / 6 - 1, -0.2, 0.2) = 0.2, with 8 rollouts of a horizon of 80 (PPO details 15)."""
    partners = StandIns(kl=12.0)
    driver = make_driver(partners, kl_target=6.0, kl_horizon=80)
    driver.iterate()
    driver.iterate()
    assert partners.kl_coefs == pytest.approx([0.1, 0.1 * (1 + 0.2 * 8 / 80)])


def test_the_kl_coefficient_waits_for_the_policy_to_move() -> None:
    """In the critic's warm-up the KL is that of a policy that stands still (PPO details 15)."""
    partners = StandIns(kl=12.0)
    driver = make_driver(partners, kl_target=6.0, kl_horizon=80, critic_warmup_steps=1)
    for _ in range(3):
        driver.iterate()
    assert partners.kl_coefs == pytest.approx([0.1, 0.1, 0.1 * (1 + 0.2 * 8 / 80)])


def test_the_kl_controller_counts_the_rollouts_that_there_were() -> None:
    """Of 8 rollouts the two of prompt 1 are dropped in the first iteration (PPO details 15)."""
    partners = StandIns(kl=12.0, script=lambda number, sample, _: None if number == 1 else 0.0)
    driver = make_driver(partners, kl_target=6.0, kl_horizon=80)
    driver.iterate()
    driver.iterate()
    assert partners.kl_coefs[1] == pytest.approx(0.1 * (1 + 0.2 * 6 / 80))


# Scores and their rollouts --------------------------------------------------------------------------------------------


def own_score(number: int, sample: int, temperature: float) -> float:
    """Different for every rollout, and for the greedy response to a prompt another one again."""
    return 1000.0 + number if temperature == 0 else 10.0 * number + sample


def in_any_order(seed: int) -> Callable[[list[Chunk]], Iterable[Chunk]]:
    return lambda chunks: random.Random(seed).sample(chunks, len(chunks))


@pytest.mark.parametrize("seed", range(4))
def test_a_rollout_reaches_the_learner_with_its_own_score_and_baseline(seed: int) -> None:
    """Through shaping, dealing and the addresses that travel, whatever order the chunks come in."""
    partners = StandIns(own_score, chunk_size=3, order_of_chunks=in_any_order(seed), num_hands=3)
    shaping = ShapingConfig(normalise=True)
    driver = make_driver(partners, rollouts=WithGreedyBaselines, shaping=shaping, estimator="remax")
    driver.iterate()
    drawn = [10.0 * number + sample for number in range(4) for sample in range(2)]
    mean, std = np.mean(drawn), np.std(drawn, ddof=1)
    arrived = []
    for hand in partners.updates[0]:
        chunks, places = addressed(hand)
        for of_mini_batch in places:
            for item in scored_rollouts(of_mini_batch, [rollouts_of(chunk) for chunk in chunks]):
                number, sample = item.rollout.key
                assert item.score == pytest.approx((10 * number + sample - mean) / std)
                assert item.baseline == pytest.approx((1000 + number - mean) / std)
                arrived.append(item.rollout.key)
    assert sorted(arrived) == [(number, sample) for number in range(4) for sample in range(2)]


def test_the_order_in_which_chunks_finish_changes_nothing() -> None:
    dealt = []
    for order in (lambda chunks: chunks, reversed, in_any_order(1), in_any_order(2)):
        partners = StandIns(own_score, chunk_size=3, order_of_chunks=order)
        make_driver(partners).iterate()
        dealt.append(
            [
                [[(s.handle.info, s.handle.row, s.score) for s in mini_batch] for mini_batch in hand]
                for hand in partners.updates[0]
            ]
        )
    assert dealt[1:] == dealt[:1] * 3


def test_the_table_of_samples_shows_each_with_its_own_score() -> None:
    partners = StandIns(own_score, chunk_size=3, order_of_chunks=in_any_order(5))
    handles = make_driver(partners, shaping=ShapingConfig(clip=0.5)).iterate().handles
    rows = samples(partners, random.Random(6).sample(handles, len(handles)))
    assert len(rows) == 8
    for row in rows:
        number, sample = row["prompt_id"], row["sample"]
        assert row["question"] == f"prompt {number}"
        assert row["response"] == f"response {number}.{sample}"
        assert row["score"] == row["parts"]["model"] == 10 * number + sample


def test_scores_stand_with_their_rows_in_the_order_of_prompt_and_sample() -> None:
    """A rollout without a score is left out and counted, never given one (PPO details 13)."""
    parts = [[(2, 1), (0, 1)], [(0, 0), (2, 0), (1, 0)]]
    chunks = [
        Chunk(tuple(RolloutInfo.of(rollout(prompt(number), sample, length=1)) for number, sample in part), None)
        for part in parts
    ]
    judged = [
        [Judged(21.0), Judged(1.0)],
        [Judged(0.0), Judged(None, fault="gone"), Judged(10.0, {"model": 5.0})],
    ]
    scoring = Scoring.of(chunks, judged, num_retries=4)
    found = [(h.info.prompt_id, h.info.sample, h.score, chunks.index(h.chunk), h.row) for h in scoring.handles]
    assert found == [(0, 0, 0.0, 1, 0), (0, 1, 1.0, 0, 1), (1, 0, 10.0, 1, 2), (2, 1, 21.0, 0, 0)]
    assert scoring.handles[2].parts == {"model": 5.0}
    assert (scoring.num_dropped, scoring.num_retries) == (1, 4)


# Dealing --------------------------------------------------------------------------------------------------------------


def test_rollouts_are_dealt_whole_and_mini_batches_do_not_depend_on_the_ranks() -> None:
    members = {}
    for num_hands in (1, 2, 3):
        partners = StandIns(num_hands=num_hands)
        make_driver(partners).iterate()
        hands = partners.updates[0]
        assert len(hands) == num_hands
        mini_batches = [
            sorted((s.handle.info.prompt_id, s.handle.info.sample) for hand in hands for s in hand[index])
            for index in range(2)
        ]
        assert [len(mini_batch) for mini_batch in mini_batches] == [4, 4]
        assert sorted(mini_batches[0] + mini_batches[1]) == [(p, s) for p in range(4) for s in range(2)]
        members[num_hands] = mini_batches
    assert members[1] == members[2] == members[3]


def test_fewer_rollouts_than_planned_make_mini_batches_that_are_nearly_equal() -> None:
    """Three of eight are dropped: five rollouts, of which no mini-batch may have more than four."""
    gone = {(0, 0), (2, 1), (3, 0)}
    partners = StandIns(lambda number, sample, _: None if (number, sample) in gone else 1.0)
    iteration = make_driver(partners).iterate()
    hands = partners.updates[0]
    assert sorted(sum(len(hand[index]) for hand in hands) for index in range(2)) == [2, 3]
    dealt = Counter((s.handle.info.prompt_id, s.handle.info.sample) for hand in hands for part in hand for s in part)
    assert dealt == Counter({(p, s) for p in range(4) for s in range(2)} - gone)
    assert iteration.metrics["rollout/num_rollouts"] == 5
    assert iteration.metrics["rollout/num_dropped"] == 3


# Figures --------------------------------------------------------------------------------------------------------------


def test_metrics_of_an_iteration() -> None:
    partners = StandIns(num_retries=2)
    iteration = make_driver(partners, shaping=ShapingConfig(clip=1.0)).iterate()
    metrics = iteration.metrics
    assert iteration.step == 1
    assert metrics["reward/score_mean"] == metrics["reward/model_mean"] == 1.5  # of 0, 1, 2, 3: as the source gave it
    assert metrics["reward/shaped_mean"] == 0.75
    assert metrics["reward/num_retries"] == 2
    assert metrics["rollout/response_length_mean"] == pytest.approx(np.mean([1, 2, 3, 1]))
    assert metrics["rollout/num_rollouts"] == 8
    assert metrics["sync/version"] == 1
    assert {"timing/step_s", "timing/learn_s", "timing/wait_for_generators_s", "throughput/rollouts_per_s"} <= set(
        metrics
    )


def test_figures_of_rollouts_by_hand() -> None:
    handles = [
        scored_handle(0, score=1.0, length=2),
        scored_handle(1, score=4.0, length=5, truncated=True),
        scored_handle(2, score=4.0, length=2),
    ]
    assert describe(handles, prefix="eval") == pytest.approx(
        {
            "eval/score_mean": 3.0,
            "eval/score_std": 2**0.5,
            "eval/model_mean": 3.0,
            "eval/model_std": 2**0.5,
            "eval/response_length_mean": 3.0,
            "eval/response_length_max": 5.0,
            "eval/truncated_fraction": 1 / 3,
            "eval/num_rollouts": 3.0,
            "eval/num_tokens": 18.0,
        }
    )


def test_the_driver_never_reads_a_rollout() -> None:
    partners = StandIns()
    handles = make_driver(partners).iterate().handles
    assert "read" not in partners.asked
    assert rollouts_of(handles[0].chunk)[handles[0].row].key == (0, 0)


# Going on from a state ------------------------------------------------------------------------------------------------


def test_a_driver_that_takes_up_a_state_goes_on_as_the_first_would_have() -> None:
    partners = StandIns(kl=12.0)
    first = make_driver(partners, kl_target=6.0)
    first.start()
    first.iterate()
    state, drawn = first.state(), 4
    first.iterate()
    others = StandIns(kl=12.0)
    second = make_driver(others, kl_target=6.0)
    second.rollouts.prompts.drawn = drawn  # type: ignore[attr-defined]
    second.load_state(state)
    second.start()
    second.iterate()
    assert others.asked[0] == "push 1"
    assert (others.steps, others.seeds, others.kl_coefs) == (
        partners.steps[1:],
        partners.seeds[1:],
        partners.kl_coefs[1:],
    )
    assert second.state() == first.state()


def test_rollouts_that_are_lost_are_sampled_again_from_the_same_prompts() -> None:
    class Losing(SampledRollouts):
        losses = 1

        def next_batch(self, step: int, watch: Stopwatch) -> TrainBatch:
            batch = super().next_batch(step, watch)
            if self.losses:
                self.losses -= 1
                raise RolloutsLostError("gone with their node")
            return batch

    partners, prompts = StandIns(), NumberedPrompts()
    sampled = Losing(prompts, partners, partners, evaluate=partners.evaluate, sampling=SAMPLING, prompts_per_step=4)
    recoveries = Recoveries(limit=1, note=lambda text: None)
    again = SampledAgain(sampled, recoveries)
    assert [of.id for of in again.next_batch(0, Stopwatch()).prompts] == [0, 1, 2, 3]
    assert [of.id for of in again.next_batch(0, Stopwatch()).prompts] == [4, 5, 6, 7]
    assert partners.sampled == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert recoveries.metrics()["recoveries/rollouts"] == 1
    sampled.losses = 2
    with pytest.raises(ProcessError, match="gone with their node"):
        again.next_batch(0, Stopwatch())
