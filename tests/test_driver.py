"""The driver with partners that only take notes: what it asks of whom, in which order, and with what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from actors.rollout import Prompt, Rollout
from cluster.driver import Chunk, Metrics, PPODriver, RolloutInfo, Sampling, ScoredHandle, derived_seed
from conf.schema import AlgorithmConfig, EvaluationConfig, GeneratorConfig

ALGORITHM = AlgorithmConfig(num_steps=3, prompts_per_step=4, samples_per_prompt=2, mini_batch_size=4, kl_coef=0.1)


class NumberedPrompts:
    def __init__(self) -> None:
        self.drawn = 0

    def next_batch(self, count: int) -> list[Prompt]:
        self.drawn += count
        return [prompt(number) for number in range(self.drawn - count, self.drawn)]


def prompt(number: int) -> Prompt:
    return Prompt(number, np.arange(3, dtype=np.int32), f"prompt {number}", ())


@dataclass
class Partners:
    """All four partners in one, with one list of what was asked."""

    num_ranks: int = 2
    kl: float = 0.0
    fail_sync_at: int | None = None
    asked: list[str] = field(default_factory=list)
    hands: list[Sequence[Sequence[Sequence[ScoredHandle]]]] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)
    kl_coefs: list[float] = field(default_factory=list)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Chunk]:
        self.asked.append(f"sample {len(prompts)} x {sampling.num_samples}")
        self.samplings.append(sampling)
        chunks = [
            Chunk(
                tuple(
                    RolloutInfo(
                        p.id, sample, num_tokens=4 + p.id % 3, num_response_tokens=1 + p.id % 3, truncated=False
                    )
                    for sample in range(sampling.num_samples)
                ),
                f"rollouts of prompt {p.id}",
            )
            for p in prompts
        ]
        for chunk in reversed(chunks):  # they finish in any order
            self.asked.append("chunk")
            yield chunk

    def read(self, handles: Sequence[ScoredHandle]) -> list[Rollout]:
        raise AssertionError("the driver holds handles; it never reads a rollout")

    def score(self, chunks: Iterable[Chunk]) -> list[ScoredHandle]:
        handles = []
        for chunk in chunks:
            self.asked.append("score")
            for row, info in enumerate(chunk.infos):
                handles.append(ScoredHandle(info, chunk, row, score=float(info.prompt_id)))
        return sorted(handles, key=lambda handle: (handle.info.prompt_id, handle.info.sample))

    def verify(self, handles: Sequence[ScoredHandle]) -> list[float]:
        self.asked.append("verify")
        return [1.0 if handle.info.prompt_id % 2 else 0.5 for handle in handles]

    def update(self, hands: Sequence[Sequence[Sequence[ScoredHandle]]], *, kl_coef: float, seed: int) -> Metrics:
        self.asked.append("update")
        self.hands.append(hands)
        self.kl_coefs.append(kl_coef)
        return {"objective/kl": self.kl}

    def kl_to_reference(self, hands: Sequence[Sequence[ScoredHandle]], *, temperature: float) -> float:
        self.asked.append(f"kl at {temperature}")
        self.hands.append([[hand] for hand in hands])
        return 0.25

    def export(self, folder: Path) -> None:
        self.asked.append("export")

    def push(self, version: int) -> Metrics:
        self.asked.append(f"push {version}")
        if version == self.fail_sync_at:
            raise RuntimeError("the sync failed")
        return {"sync/version": float(version)}


def make_driver(partners: Partners, **changes: object) -> PPODriver:
    return PPODriver(
        algorithm=replace(ALGORITHM, **changes),  # type: ignore[arg-type]
        generator=GeneratorConfig(temperature=0.7, max_new_tokens=5),
        evaluation=EvaluationConfig(verifier="module:function", temperature=0.9, threshold=0.99),
        prompts=NumberedPrompts(),
        generators=partners,
        rewards=partners,
        learners=partners,
        sync=partners,
        seed=3,
    )


def test_an_iteration_asks_in_the_order_of_the_algorithm() -> None:
    partners = Partners()
    driver = make_driver(partners)
    driver.start()
    driver.iterate()
    assert partners.asked == ["push 0", "sample 4 x 2", *["chunk", "score"] * 4, "update", "push 1"]
    driver.iterate()
    assert partners.asked[-2:] == ["update", "push 2"]


def test_nothing_is_counted_as_done_when_the_sync_fails() -> None:
    partners = Partners(fail_sync_at=1)
    driver = make_driver(partners)
    driver.start()
    with pytest.raises(RuntimeError, match="the sync failed"):
        driver.iterate()
    assert driver.step == 0


def test_rollouts_are_dealt_whole_and_mini_batches_do_not_depend_on_the_ranks() -> None:
    members = {}
    for num_ranks in (1, 2, 3):
        partners = Partners(num_ranks=num_ranks)
        make_driver(partners).iterate()
        hands = partners.hands[0]
        assert len(hands) == num_ranks
        mini_batches = [
            sorted((h.info.prompt_id, h.info.sample) for hand in hands for h in hand[index]) for index in range(2)
        ]
        assert [len(mini_batch) for mini_batch in mini_batches] == [4, 4]
        assert sorted(mini_batches[0] + mini_batches[1]) == [(p, s) for p in range(4) for s in range(2)]
        members[num_ranks] = mini_batches
    assert members[1] == members[2] == members[3]


def test_scores_stay_with_their_rollouts() -> None:
    partners = Partners()
    make_driver(partners).iterate()
    for hand in partners.hands[0]:
        for handle in (handle for mini_batch in hand for handle in mini_batch):
            assert handle.score == float(handle.info.prompt_id)
            assert handle.chunk.payload == f"rollouts of prompt {handle.info.prompt_id}"
            assert handle.chunk.infos[handle.row] == handle.info


def test_training_and_evaluation_are_sampled_as_their_settings_say() -> None:
    partners = Partners()
    driver = make_driver(partners)
    driver.iterate()
    driver.evaluate([prompt(number) for number in range(6)])
    training, evaluation = partners.samplings
    assert (training.num_samples, training.temperature, training.max_new_tokens) == (2, 0.7, 5)
    assert (evaluation.num_samples, evaluation.temperature, evaluation.max_new_tokens) == (1, 0.9, 5)
    assert training.seed != evaluation.seed


def test_every_evaluation_draws_with_the_same_seeds() -> None:
    partners = Partners()
    driver = make_driver(partners)
    driver.evaluate([prompt(0)])
    driver.iterate()
    driver.evaluate([prompt(0)])
    assert partners.samplings[0] == partners.samplings[2]


def test_evaluation_counts_what_the_verifier_finds_right() -> None:
    partners = Partners()
    result = make_driver(partners).evaluate([prompt(number) for number in range(6)])
    assert result.metrics["eval/accuracy"] == 0.5
    assert result.metrics["eval/score_mean"] == 2.5
    assert result.metrics["eval/kl"] == 0.25
    assert partners.asked[-1] == "kl at 0.9"
    assert result.verdicts == (0.5, 1.0, 0.5, 1.0, 0.5, 1.0)
    assert sorted(h.info.prompt_id for hand in partners.hands[0] for h in hand[0]) == list(range(6))


def test_the_kl_coefficient_follows_its_target() -> None:
    partners = Partners(kl=12.0)
    driver = make_driver(partners, kl_target=6.0, kl_horizon=80)
    driver.iterate()
    driver.iterate()
    # error = clip(12 / 6 - 1, -0.2, 0.2) = 0.2; 8 rollouts of a horizon of 80
    assert partners.kl_coefs == pytest.approx([0.1, 0.1 * (1 + 0.2 * 8 / 80)])


def test_metrics_of_an_iteration() -> None:
    partners = Partners()
    iteration = make_driver(partners).iterate()
    metrics = iteration.metrics
    assert iteration.step == 1
    assert metrics["reward/score_mean"] == 1.5
    assert metrics["rollout/response_length_mean"] == pytest.approx(np.mean([1, 2, 3, 1]))
    assert metrics["rollout/num_rollouts"] == 8
    assert metrics["sync/version"] == 1
    assert {"timing/step_s", "timing/learn_s", "throughput/rollouts_per_s"} <= metrics.keys()


def test_seeds_are_a_function_of_their_parts() -> None:
    assert derived_seed(1, 2) == derived_seed(1, 2)
    assert len({derived_seed(1, 2), derived_seed(2, 1), derived_seed(1, 3), derived_seed(1)}) == 4
    assert 0 <= derived_seed(5, 6) < 2**63
