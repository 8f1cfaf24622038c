"""Scores as they are trained on, against numpy over all scores so far and penalties by hand. About a second."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from cluster.driver import ScoredHandle, TrainBatch
from cluster.shaping import RunningMoments, ScoreShaping, overlong_penalty
from conf.schema import ShapingConfig
from tests.stand_ins import scored_handle


def batch_of(scores: Sequence[float], *, greedy: Sequence[float] = ()) -> TrainBatch:
    """One sample of each of the prompts 0, 1, 2..., and their greedy responses."""
    handles = tuple(scored_handle(number, score=score) for number, score in enumerate(scores))
    return with_handles(*handles, greedy={number: scored_handle(number, score=s) for number, s in enumerate(greedy)})


def with_handles(*handles: ScoredHandle, greedy: dict[int, ScoredHandle] | None = None) -> TrainBatch:
    return TrainBatch(handles, (), {}, greedy or {})


def shaped_scores(shaping: ScoreShaping, batch: TrainBatch) -> list[float]:
    return [item.score for item in shaping(batch)[0]]


# Running moments ------------------------------------------------------------------------------------------------------

DRAWN = np.random.default_rng(5).normal(1e6, 3.0, size=60).tolist()


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 1, 30, 2, 20], [59, 1]])
def test_running_moments_are_those_of_all_values_in_any_batching(sizes: list[int]) -> None:
    moments = RunningMoments()
    for start, end in zip(np.cumsum([0, *sizes]), np.cumsum(sizes), strict=False):
        moments = moments.with_values(DRAWN[start:end])
    assert moments.count == 60
    assert moments.mean == pytest.approx(np.mean(DRAWN), rel=1e-14)
    assert moments.std == pytest.approx(np.std(DRAWN, ddof=1), rel=1e-9)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.7, -2.3])
def test_equal_values_have_a_deviation_of_exactly_zero(value: float) -> None:
    """numpy's mean of three times 0.1 is not 0.1, and dividing by that deviation would make scores of the rounding."""
    moments = RunningMoments().with_values([value] * 3).with_values([value] * 7).with_values([value])
    assert (moments.mean, moments.deviation, moments.std) == (value, 0.0, 1.0)


def test_one_value_has_no_deviation() -> None:
    assert RunningMoments().with_values([4.0]).std == 1.0
    assert RunningMoments().with_values([4.0]).with_values([6.0]).std == pytest.approx(2**0.5)


# Normalise, clip, penalties -------------------------------------------------------------------------------------------


def test_scores_are_as_they_were_unless_something_is_asked_for() -> None:
    shaping = ScoreShaping(ShapingConfig(), max_new_tokens=4)
    scores = [3.0, -100.0, 0.25]
    assert shaped_scores(shaping, batch_of(scores)) == scores
    assert [item.baseline for item in shaping(batch_of(scores))[0]] == [0.0] * 3


def test_scores_are_normalised_by_all_scores_so_far_this_batch_among_them() -> None:
    shaping = ScoreShaping(ShapingConfig(normalise=True), max_new_tokens=4)
    first, second = [1.0, 2.0, 6.0], [4.0, 7.0]
    assert shaped_scores(shaping, batch_of(first)) == pytest.approx((np.array(first) - 3) / 7**0.5)
    both = np.array(first + second)
    assert shaped_scores(shaping, batch_of(second)) == pytest.approx((np.array(second) - 4) / both.std(ddof=1))


def test_first_normalised_then_clipped_then_the_penalty() -> None:
    """Of 0 and 6 the mean is 3 and the deviation 18 ** 0.5, so both are 0.7071 off; clipped to 0.5; then 2 off."""
    config = ShapingConfig(normalise=True, clip=0.5, missing_eos_penalty=2.0)
    batch = with_handles(scored_handle(0, score=0.0), scored_handle(1, score=6.0, truncated=True))
    assert shaped_scores(ScoreShaping(config, max_new_tokens=4), batch) == [-0.5, 0.5 - 2.0]


def test_scores_are_clipped_on_both_sides() -> None:
    shaping = ScoreShaping(ShapingConfig(clip=1.5), max_new_tokens=4)
    assert shaped_scores(shaping, batch_of([-9.0, -1.5, 0.0, 1.25, 9.0])) == [-1.5, -1.5, 0.0, 1.25, 1.5]


def test_a_response_that_was_cut_pays_for_its_missing_end() -> None:
    """Whatever its score is, and another that is as long does not (PPO details 2)."""
    shaping = ScoreShaping(ShapingConfig(missing_eos_penalty=1.0), max_new_tokens=4)
    batch = with_handles(
        scored_handle(0, score=0.5, length=4, truncated=True),
        scored_handle(1, score=0.5, length=4),
        scored_handle(2, score=-3.0, truncated=True),
    )
    assert shaped_scores(shaping, batch) == [-0.5, 0.5, -4.0]


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(1, 0.0), (16384, 0.0), (16385, 1 / 4096), (17408, 0.25), (18432, 0.5), (20479, 4095 / 4096), (20480, 1.0)],
)
def test_the_overlong_penalty_is_that_of_dapo(length: int, penalty: float) -> None:
    """Equation 13 with the paper's 20480 tokens, of which the last 4096 are penalised."""
    assert overlong_penalty(length, limit=20480, buffer=4096, most=1.0) == pytest.approx(penalty, abs=1e-15)
    assert overlong_penalty(length, limit=20480, buffer=4096, most=0.5) == pytest.approx(penalty / 2, abs=1e-15)
    assert overlong_penalty(length, limit=20480, buffer=0, most=1.0) == 0.0
    assert overlong_penalty(30000, limit=20480, buffer=4096, most=1.0) == 1.0


def test_long_responses_are_penalised_by_the_limit_of_the_generator() -> None:
    config = ShapingConfig(overlong_tokens=4, overlong_penalty=2.0, missing_eos_penalty=10.0)
    batch = with_handles(
        *(scored_handle(length, score=1.0, length=length) for length in (5, 6, 7, 8)),
        scored_handle(9, score=1.0, length=10, truncated=True),
    )
    assert shaped_scores(ScoreShaping(config, max_new_tokens=10), batch) == [1.0, 1.0, 0.5, 0.0, 1.0 - 2.0 - 10.0]


# Baselines ------------------------------------------------------------------------------------------------------------


def test_a_greedy_score_is_shaped_as_those_that_it_is_compared_with() -> None:
    """By the statistics of the samples, which it is no part of, and with its own penalties."""
    config = ShapingConfig(normalise=True, clip=2.0, missing_eos_penalty=0.25)
    shaping = ScoreShaping(config, max_new_tokens=4)
    greedy = {0: scored_handle(0, score=4.0), 1: scored_handle(1, score=99.0, truncated=True)}
    shaped, metrics = shaping(
        with_handles(
            scored_handle(0, 0, score=1.0),
            scored_handle(0, 1, score=3.0),
            scored_handle(1, 0, score=5.0),
            greedy=greedy,
        )
    )
    assert [item.score for item in shaped] == [-1.0, 0.0, 1.0]  # mean 3, standard deviation 2
    assert [item.baseline for item in shaped] == [0.5, 0.5, 2.0 - 0.25]
    assert (metrics["reward/running_mean"], metrics["reward/running_std"]) == (3.0, 2.0)


def test_samples_that_are_all_equal_leave_a_baseline_of_ordinary_size() -> None:
    shaping = ScoreShaping(ShapingConfig(normalise=True), max_new_tokens=4)
    shaped, _ = shaping(batch_of([0.1, 0.1, 0.1], greedy=[1.1, 0.1, 0.1]))
    assert [item.score for item in shaped] == [0.0, 0.0, 0.0]
    assert [item.baseline for item in shaped] == pytest.approx([1.0, 0.0, 0.0])


# What is recorded and what is kept ------------------------------------------------------------------------------------


def test_figures_of_shaping_by_hand() -> None:
    config = ShapingConfig(clip=2.0, missing_eos_penalty=1.0)
    shaped, metrics = ScoreShaping(config, max_new_tokens=4)(
        with_handles(scored_handle(0, score=5.0), scored_handle(1, score=1.0, truncated=True))
    )
    assert [item.score for item in shaped] == [2.0, 0.0]
    assert [item.handle.score for item in shaped] == [5.0, 1.0]
    assert metrics == pytest.approx(
        {
            "reward/shaped_mean": 1.0,
            "reward/shaped_std": 1.0,
            "reward/running_mean": 3.0,
            "reward/running_std": 8**0.5,
            "reward/penalty_mean": 0.5,
        }
    )


def test_score_statistics_go_on_where_they_stood() -> None:
    """The state goes through JSON and back without losing a bit (PPO details 9)."""
    config = ShapingConfig(normalise=True)
    whole, before, after = (ScoreShaping(config, max_new_tokens=4) for _ in range(3))
    for part in (DRAWN[:20], DRAWN[20:45]):
        whole(batch_of(part))
        before(batch_of(part))
    after.load_state(json.loads(json.dumps(before.state())))
    assert shaped_scores(after, batch_of(DRAWN[45:])) == shaped_scores(whole, batch_of(DRAWN[45:]))
    assert after.state() == whole.state()
    assert whole.state()["count"] == 60
