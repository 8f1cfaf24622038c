"""Where an iteration's rollouts come from, against rewards that follow a script. About a second beside the imports."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.driver import Chunk, Sampling, Stopwatch, TrainBatch
from cluster.rollouts import NothingToLearnError, SampledRollouts, VariedGroups, WithGreedyBaselines, groups_of, timed
from tests.stand_ins import NumberedPrompts, Script, StandIns

SAMPLING = Sampling(num_samples=3, temperature=0.7, max_new_tokens=5, seed=3)


def sampled(script: Script, **settings: int) -> tuple[SampledRollouts, StandIns]:
    partners = StandIns(script, **settings)  # type: ignore[arg-type]
    return SampledRollouts(
        NumberedPrompts(), partners, partners, evaluate=partners.evaluate, sampling=SAMPLING, prompts_per_step=4
    ), partners


def varied_where(is_varied: Callable[[int], bool]) -> Script:
    """Scores 0, 1, 2 for the samples of some prompts and 5 for every sample of the others."""
    return lambda number, sample, _: float(sample) if is_varied(number) else 5.0


def keys(batch: TrainBatch) -> list[tuple[int, int]]:
    return [(handle.info.prompt_id, handle.info.sample) for handle in batch.handles]


def whole(*numbers: int) -> list[tuple[int, int]]:
    return [(number, sample) for number in numbers for sample in range(3)]


# Sampled --------------------------------------------------------------------------------------------------------------


def test_every_iteration_takes_the_next_prompts_in_the_order_of_prompt_and_sample() -> None:
    rollouts, partners = sampled(lambda number, sample, _: 10.0 * number + sample)
    first, second = rollouts.next_batch(0, Stopwatch()), rollouts.next_batch(0, Stopwatch())
    assert partners.sampled == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert partners.samplings == [SAMPLING] * 2
    assert keys(first) == whole(0, 1, 2, 3)
    assert [handle.score for handle in second.handles] == [10.0 * n + s for n, s in whole(4, 5, 6, 7)]
    assert [prompt.id for prompt in second.prompts] == [4, 5, 6, 7]
    assert first.metrics == {"rollout/num_dropped": 0.0, "reward/num_retries": 0.0}
    assert first.greedy == {}


def test_a_rollout_without_a_score_is_left_out_and_counted() -> None:
    """It is never trained on as a reward of zero (PPO details 13)."""
    rollouts, _ = sampled(lambda number, sample, _: None if sample == number else 1.0, num_retries=5)
    batch = rollouts.next_batch(0, Stopwatch())
    assert keys(batch) == [key for key in whole(0, 1, 2, 3) if key[0] != key[1]]
    assert all(handle.score == 1.0 for handle in batch.handles)
    assert batch.metrics == {"rollout/num_dropped": 3.0, "reward/num_retries": 5.0}


def test_each_chunk_is_evaluated_once_as_it_comes_and_a_greedy_one_never() -> None:
    rollouts, partners = sampled(lambda number, sample, _: 1.0, chunk_size=3)
    WithGreedyBaselines(rollouts).next_batch(0, Stopwatch())
    assert partners.evaluated == [whole(number) for number in (3, 2, 1, 0)]  # the order in which they are finished


def test_a_batch_of_which_nothing_is_left_is_an_error_that_says_what_to_do() -> None:
    rollouts, _ = sampled(lambda *_: None)
    with pytest.raises(NothingToLearnError, match=r"no response to 4 prompts is left.*reward\.on_failure=stop"):
        rollouts.next_batch(0, Stopwatch())


def test_waiting_for_generators_is_timed_apart_from_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    watch = Stopwatch()

    def slow() -> object:
        nonlocal now
        for wait in (2.0, 3.0):
            now += wait
            yield Chunk((), None)

    for _ in timed(slow(), watch, "wait"):  # type: ignore[arg-type]
        now += 100.0  # scoring
    assert watch.seconds == {"wait": 5.0}


# Until groups differ --------------------------------------------------------------------------------------------------


def test_prompts_are_replaced_until_the_batch_is_full() -> None:
    """Of 0..3 two are kept; a half was, so 4 more are drawn for the 2 missing; 3 of 8 were, so 3 more for the last."""
    rollouts, partners = sampled(varied_where(lambda number: number % 3 == 0))
    batch = VariedGroups(rollouts, max_rounds=10).next_batch(0, Stopwatch())
    assert partners.sampled == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert keys(batch) == whole(0, 3, 6, 9)
    assert [prompt.id for prompt in batch.prompts] == [0, 3, 6, 9]
    assert [handle.score for handle in batch.handles] == [0.0, 1.0, 2.0] * 4
    assert batch.metrics["rollout/filter_rounds"] == 3
    assert batch.metrics["rollout/num_filtered_prompts"] == 7


def test_no_prompt_is_asked_twice_over_rounds_and_iterations() -> None:
    rollouts, partners = sampled(varied_where(lambda number: number % 5 == 1))
    groups = VariedGroups(rollouts, max_rounds=50)
    numbers = [number for _ in range(3) for number, sample in keys(groups.next_batch(0, Stopwatch())) if sample == 0]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 12
    asked = [number for part in partners.sampled for number in part]
    assert asked == list(range(len(asked)))


def test_a_round_never_asks_for_more_than_an_iteration_takes() -> None:
    """One of 4 is kept: 3 are missing, and 12 more would be needed if the share stayed."""
    rollouts, partners = sampled(varied_where(lambda number: number in (3, 4, 5, 6)))
    VariedGroups(rollouts, max_rounds=10).next_batch(0, Stopwatch())
    assert partners.sampled == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_what_is_too_many_is_left_out_the_last_drawn_first() -> None:
    rollouts, _ = sampled(varied_where(lambda number: number >= 2))
    batch = VariedGroups(rollouts, max_rounds=10).next_batch(0, Stopwatch())
    assert keys(batch) == whole(2, 3, 4, 5)  # 6 and 7 were drawn too, and differ
    assert batch.metrics["rollout/num_filtered_prompts"] == 2


def test_after_the_last_round_there_is_what_there_is() -> None:
    rollouts, partners = sampled(varied_where(lambda number: number == 5))
    batch = VariedGroups(rollouts, max_rounds=3).next_batch(0, Stopwatch())
    assert keys(batch) == whole(5)
    assert len(partners.sampled) == batch.metrics["rollout/filter_rounds"] == 3
    assert batch.metrics["rollout/num_filtered_prompts"] == 11


def test_groups_that_never_differ_are_an_error_that_says_what_to_do() -> None:
    rollouts, partners = sampled(varied_where(lambda number: False))
    with pytest.raises(NothingToLearnError, match=r"none of 8 prompts, drawn in 2 rounds") as caught:
        VariedGroups(rollouts, max_rounds=2).next_batch(0, Stopwatch())
    assert "(0 rollouts have none" in str(caught.value)
    for remedy in ("samples_per_prompt", "filter_max_rounds", "filter_groups=false"):
        assert f"algorithm.{remedy}" in str(caught.value)
    assert partners.sampled == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(NothingToLearnError, match=r"\(24 rollouts have none and were dropped\)"):
        VariedGroups(sampled(lambda *_: None)[0], max_rounds=2).next_batch(0, Stopwatch())


def test_groups_are_compared_without_what_was_dropped() -> None:
    """A group of one cannot differ, and of two it depends on those two (PPO details 13)."""
    gone = {(0, 1), (0, 2), (1, 0), (2, 0)}  # leaves 1 sample of prompt 0, 2 of prompts 1 and 2
    scores = {(2, 1): 7.0, (2, 2): 7.0}
    rollouts, _ = sampled(
        lambda number, sample, _: None if (number, sample) in gone else scores.get((number, sample), float(sample)),
        num_retries=1,
    )
    batch = VariedGroups(rollouts, max_rounds=10).next_batch(0, Stopwatch())
    assert keys(batch) == [(1, 1), (1, 2), *whole(3, 4, 5)]
    assert batch.metrics["rollout/num_dropped"] == 4
    assert batch.metrics["reward/num_retries"] == batch.metrics["rollout/filter_rounds"] == 2
    assert batch.metrics["rollout/num_filtered_prompts"] == 2


def test_groups_stand_in_the_order_of_the_prompts_those_without_a_sample_too() -> None:
    rollouts, _ = sampled(lambda number, sample, _: None if number == 2 else float(sample))
    groups = groups_of(rollouts.draw(4, Stopwatch()))
    assert [group.prompt.id for group in groups] == [0, 1, 2, 3]
    assert [len(group.handles) for group in groups] == [3, 3, 0, 3]
    assert [group.is_varied for group in groups] == [True, True, False, True]


# With greedy baselines ------------------------------------------------------------------------------------------------


def greedy_script(number: int, sample: int, temperature: float) -> float | None:
    return 100.0 + number if temperature == 0 else float(sample)


def test_each_prompt_is_answered_greedily_once() -> None:
    rollouts, partners = sampled(greedy_script)
    batch = WithGreedyBaselines(rollouts).next_batch(0, Stopwatch())
    drawn, greedy = partners.samplings
    assert drawn == SAMPLING
    assert (greedy.num_samples, greedy.temperature, greedy.max_new_tokens) == (1, 0.0, 5)
    assert partners.sampled == [[0, 1, 2, 3]] * 2
    assert keys(batch) == whole(0, 1, 2, 3)
    assert [handle.score for handle in batch.handles] == [0.0, 1.0, 2.0] * 4
    assert {number: handle.score for number, handle in batch.greedy.items()} == {n: 100.0 + n for n in range(4)}


def test_prompts_without_a_greedy_score_are_left_out() -> None:
    """Their samples have nothing to be compared with, and count as dropped beside the response (PPO details 13)."""

    def script(number: int, sample: int, temperature: float) -> float | None:
        gone = (number == 1 and temperature == 0) or (number == 2 and sample == 0 and temperature > 0)
        return None if gone else greedy_script(number, sample, temperature)

    rollouts, _ = sampled(script, num_retries=1)
    batch = WithGreedyBaselines(rollouts).next_batch(0, Stopwatch())
    assert keys(batch) == [*whole(0), (2, 1), (2, 2), *whole(3)]
    assert batch.metrics == {"rollout/num_dropped": 5.0, "reward/num_retries": 2.0}


def test_without_any_greedy_score_there_is_an_error() -> None:
    rollouts, _ = sampled(lambda number, sample, temperature: None if temperature == 0 else 1.0)
    with pytest.raises(NothingToLearnError, match="no response to 4 prompts"):
        WithGreedyBaselines(rollouts).next_batch(0, Stopwatch())
