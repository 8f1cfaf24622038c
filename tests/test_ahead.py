"""Sampling ahead of the learner, with partners that take notes: who is asked when, and how old tokens may be."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cluster.driver import PPODriver, Sampling, Stopwatch, staleness
from cluster.rollouts import AheadRollouts, SampledRollouts
from cluster.shaping import ScoreShaping
from conf.schema import AlgorithmConfig, ConfigError, ShapingConfig
from tests.stand_ins import NumberedPrompts, StandIns, scored_handle

ALGORITHM = AlgorithmConfig(
    num_steps=4, prompts_per_step=4, samples_per_prompt=2, mini_batch_size=4, max_staleness=1, correction="token"
)
SAMPLING = Sampling(num_samples=2, temperature=0.7, max_new_tokens=5, seed=3)


def made(partners: StandIns, *, max_staleness: int, num_steps: int = 4) -> PPODriver:
    sampled = SampledRollouts(
        NumberedPrompts(), partners, partners, evaluate=partners.evaluate, sampling=SAMPLING, prompts_per_step=4
    )
    return PPODriver(
        algorithm=replace(ALGORITHM, max_staleness=max_staleness, num_steps=num_steps),
        rollouts=AheadRollouts(sampled, max_staleness=max_staleness, num_steps=num_steps),
        shaping=ScoreShaping(ShapingConfig(), max_new_tokens=5),
        learners=partners,
        sync=partners,
        seed=3,
    )


def trained(partners: StandIns) -> list[list[int]]:
    """The prompts of each update, sorted."""
    return [
        sorted({shaped.handle.info.prompt_id for hand in update for part in hand for shaped in part})
        for update in partners.updates
    ]


def test_the_next_batch_is_asked_for_before_the_learner_trains_and_none_after_the_last() -> None:
    partners = StandIns(chunk_size=8)
    driver = made(partners, max_staleness=1, num_steps=3)
    driver.start()
    for _ in range(3):
        driver.iterate()
    assert partners.asked == [
        "push 0",
        *("order 4 x 2", "order 4 x 2", "chunk", "score", "update", "push 1"),
        *("order 4 x 2", "chunk", "score", "update", "push 2"),
        *("chunk", "score", "update", "push 3"),
    ]
    assert trained(partners) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_whatever_finishes_first_no_token_is_older_than_allowed(max_staleness: int, seed: int) -> None:
    """Chunks of all orders finish in any order, some while the learner trains; the driver would raise."""
    rng = random.Random(seed)
    partners = StandIns(chunk_size=2, choose=rng.choice)
    update = partners.update

    def busy_update(*arguments: object, **named: object) -> dict[str, float]:
        for _ in range(rng.randrange(6)):  # as the reactor does while the learner is waited for
            if any(not order.done for order in partners.orders):
                partners.attend()
        return update(*arguments, **named)  # type: ignore[arg-type]

    partners.update = busy_update  # type: ignore[method-assign]
    driver = made(partners, max_staleness=max_staleness, num_steps=8)
    driver.start()
    iterations = [driver.iterate() for _ in range(8)]
    assert trained(partners) == [list(range(4 * step, 4 * step + 4)) for step in range(8)]
    evaluated = [[key for part in partners.evaluated[4 * s : 4 * s + 4] for key in part] for s in range(8)]
    assert [sorted(of_step) for of_step in evaluated] == [
        [(prompt, sample) for prompt in range(4 * step, 4 * step + 4) for sample in range(2)] for step in range(8)
    ]
    assert partners.evaluated_by == [step for step in range(8) for _ in range(4)], "by the policy that is then trained"
    oldest = [iteration.metrics["rollout/staleness_max"] for iteration in iterations]
    assert max(oldest) <= max_staleness
    assert all(
        iteration.step - 1 - min(version for version, _ in handle.info.versions) <= max_staleness
        for iteration in iterations
        for handle in iteration.handles
    )
    if max_staleness == 0:
        assert oldest == [0.0] * 8


def test_going_back_draws_what_was_not_trained_on_again() -> None:
    partners = StandIns(chunk_size=8)
    driver = made(partners, max_staleness=2)
    driver.start()
    driver.iterate()
    state = driver.rollouts.state()
    assert state == {"drawn": 4}  # though batches 1 and 2 are on their way
    driver.rollouts.load_state(state)
    assert all(order.done for order in partners.orders)
    driver.iterate()
    assert trained(partners)[1] == [4, 5, 6, 7]


def test_a_run_that_goes_on_from_a_state_trains_on_the_same_prompts() -> None:
    partners = StandIns(chunk_size=8)
    driver = made(partners, max_staleness=1)
    driver.load_state({"step": 2, "kl_coef": 0.1})
    driver.rollouts.load_state({"drawn": 8})
    driver.start()
    metrics = [driver.iterate().metrics for _ in range(2)]
    assert trained(partners) == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert [one["rollout/staleness_max"] for one in metrics] == [0.0, 0.0]
    assert len(partners.orders) == 2


def test_the_distribution_of_staleness_counts_tokens() -> None:
    """3 tokens of version 5, 1 of version 4, 4 of version 3, at step 5: mean (0 + 1 + 8) / 8."""
    handles = [scored_handle(score=0.0, length=3), scored_handle(score=0.0, length=5)]
    versions = (((5, 3),), ((3, 4), (4, 1)))
    handles = [
        replace(handle, info=replace(handle.info, versions=of)) for handle, of in zip(handles, versions, strict=True)
    ]
    assert staleness(handles, 5, limit=2) == {
        "rollout/staleness_mean": 9 / 8,
        "rollout/staleness_max": 2.0,
        "rollout/staleness_0": 3 / 8,
        "rollout/staleness_1": 1 / 8,
        "rollout/staleness_2": 4 / 8,
    }
    for step, limit in ((5, 1), (4, 2)):
        with pytest.raises(RuntimeError, match=r"versions old; 0 to \d is allowed \(algorithm.max_staleness\)"):
            staleness(handles, step, limit=limit)


def test_a_gap_that_nothing_corrects_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.correction='none'.*set algorithm\.correction=token"):
        AlgorithmConfig(max_staleness=1)
    AlgorithmConfig(max_staleness=1, old_logprobs="engine")
    for other in ({"estimator": "remax"}, {"filter_groups": True, "samples_per_prompt": 2}):
        with pytest.raises(ConfigError, match=r"algorithm\.max_staleness=1: .*set it to 0"):
            AlgorithmConfig(max_staleness=1, correction="token", **other)


def test_waiting_is_timed() -> None:
    watch = Stopwatch()
    partners = StandIns(chunk_size=8)
    made(partners, max_staleness=1).rollouts.next_batch(0, watch)
    assert watch.seconds.keys() == {"wait_for_generators_s"}
