"""Signs of reward hacking: correlation, drift and the limits on them. Takes less than a second."""

from __future__ import annotations

import math
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest

from cluster.monitors import (
    WATCHES,
    alarm_lines,
    alarms,
    describe_alarm,
    length_correlation,
    monitored,
    score_drift,
)
from conf.schema import MonitorConfig

NO_LIMITS = MonitorConfig(**{setting.name: None for setting in fields(MonitorConfig)})


def slow_correlation(x: list[float], y: list[float]) -> float:
    """Pearson's from its definition, sums in exact fractions."""
    a, b = [Fraction(v) for v in x], [Fraction(v) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    together = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    alone = sum((p - mean_a) ** 2 for p in a) * sum((q - mean_b) ** 2 for q in b)
    return float(together) / math.sqrt(alone)


# Figures


def test_the_length_correlation_by_hand() -> None:
    assert length_correlation([1.0, 2.0, 3.0], [10, 20, 30]) == pytest.approx(1.0)
    assert length_correlation([3.0, 2.0, 1.0], [10, 20, 30]) == pytest.approx(-1.0)
    assert length_correlation([1.0, 0.0, 1.0], [10, 20, 30]) == pytest.approx(0.0, abs=1e-15)
    # Off their means (2, 3): -1 0 1 and -2 1 1; 3 / sqrt(2 x 6).
    assert length_correlation([1.0, 2.0, 3.0], [1, 4, 4]) == pytest.approx(math.sqrt(3) / 2)


def test_the_length_correlation_is_that_of_exact_fractions() -> None:
    rng = np.random.default_rng(0)
    for size in (2, 3, 50):
        lengths = rng.integers(1, 500, size)
        scores = 0.01 * lengths + rng.normal(size=size)
        expected = slow_correlation(scores.tolist(), lengths.tolist())
        assert length_correlation(scores, lengths) == pytest.approx(expected, abs=1e-12)
        for scale, shift in ((1e-200, 0.0), (1e6, -1e7), (3.0, 40.0)):
            assert length_correlation(scale * scores + shift, lengths) == pytest.approx(expected, abs=1e-7), scale


def test_without_variation_there_is_no_correlation() -> None:
    assert length_correlation([0.1] * 7, range(1, 8)) == 0.0  # the mean of seven 0.1 is not quite 0.1
    assert length_correlation(range(7), [12] * 7) == 0.0
    assert length_correlation([0.3] * 3, [12] * 3) == 0.0
    assert length_correlation([2.5], [12]) == 0.0


def test_no_rounding_takes_the_correlation_beyond_one() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        lengths = rng.integers(1, 9, 5)
        assert abs(length_correlation(lengths / 3, lengths)) <= 1.0


def test_what_is_watched_by_hand() -> None:
    figures = monitored(
        [1.0, 2.0, 3.0, 2.0], [1, 2, 3, 2], repetition=[0.0, 0.5, 0.25, 0.0], ended=[True, True, False, True]
    )
    assert figures == {
        "monitor/length_correlation": pytest.approx(1.0),
        "monitor/repetition": pytest.approx(0.1875),
        "monitor/eos_rate": pytest.approx(0.75),
    }
    with pytest.raises(AssertionError):
        monitored([1.0, 2.0], [1, 2], repetition=[0.0], ended=[True, True])


def test_the_score_drift_is_the_largest_difference_either_way() -> None:
    assert score_drift([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0.0
    assert score_drift([1.0, 2.0, -3.0], [1.5, 2.0, -5.0]) == 2.0
    assert score_drift([1.0, 2.0], [1.25, 2.125]) == 0.25
    assert math.isnan(score_drift([1.0, 2.0, 3.0], [1.0, math.nan, 3.0]))
    with pytest.raises(AssertionError):
        score_drift([1.0, 2.0], [1.0])
    with pytest.raises(AssertionError, match="no responses"):
        score_drift([], [])


# Alarms


def test_every_limit_is_watched_once() -> None:
    assert sorted(watch.setting for watch in WATCHES) == sorted(setting.name for setting in fields(MonitorConfig))
    assert len({watch.name for watch in WATCHES}) == len({watch.metric for watch in WATCHES}) == len(WATCHES)
    assert {watch.metric for watch in WATCHES} >= monitored([1.0], [1], repetition=[0.0], ended=[True]).keys()


@pytest.mark.parametrize(
    ("setting", "limit", "metric", "alarm", "good", "bad"),
    [
        ("max_length_correlation", 0.9, "monitor/length_correlation", "alarm/length_correlation", 0.9, 0.91),
        ("max_length_correlation", 0.9, "monitor/length_correlation", "alarm/length_correlation", -0.9, -0.91),
        ("max_repetition", 0.5, "monitor/repetition", "alarm/repetition", 0.5, 0.51),
        ("min_eos_rate", 0.8, "monitor/eos_rate", "alarm/eos_rate", 0.8, 0.79),
        ("max_score_drift", 1e-3, "monitor/score_drift", "alarm/score_drift", 1e-3, 1.1e-3),
        ("max_kl", 20.0, "objective/kl", "alarm/kl", 20.0, 20.1),
        ("max_kl", 20.0, "objective/kl", "alarm/kl", -50.0, 20.1),
    ],
)
def test_a_limit_is_kept_up_to_itself_and_broken_beyond(
    setting: str, limit: float, metric: str, alarm: str, good: float, bad: float
) -> None:
    limits = MonitorConfig(**{**vars(NO_LIMITS), setting: limit})
    assert alarms({metric: good, "policy/loss": 1e9}, limits) == {alarm: 0.0, "alarm/any": 0.0}
    assert alarms({metric: bad}, limits) == {alarm: 1.0, "alarm/any": 1.0}
    assert alarms({metric: math.nan}, limits) == {alarm: 1.0, "alarm/any": 1.0}, "NaN keeps no limit"
    assert alarm_lines({metric: good}, limits) == []
    assert alarm_lines({metric: bad}, limits) == [describe_alarm(alarm, bad, limit)]
    assert alarm_lines({metric: bad}, limits, known=alarms({metric: bad}, limits)) == [], "it is said once"
    assert alarm_lines({metric: bad}, limits, known=alarms({metric: good}, limits)) != [], "and again when it is back"


def test_only_limits_that_are_set_and_have_their_metric_are_compared() -> None:
    broken = {"monitor/length_correlation": 1.0, "monitor/repetition": 1.0, "monitor/eos_rate": 0.0}
    assert alarms(broken, NO_LIMITS) == {"alarm/any": 0.0}
    assert alarms({}, MonitorConfig(min_eos_rate=1.0, max_kl=0.0)) == {"alarm/any": 0.0}
    assert alarms(broken, MonitorConfig(max_length_correlation=1.0)) == {
        "alarm/length_correlation": 0.0,
        "alarm/repetition": 1.0,
        "alarm/any": 1.0,
    }
    assert alarms({"objective/kl": 0.1}, MonitorConfig(max_kl=0.0))["alarm/kl"] == 1.0, "a limit of 0 is one"
    assert alarm_lines(broken, NO_LIMITS) == []
    assert len(alarm_lines(broken, MonitorConfig(min_eos_rate=0.5))) == 3


def test_an_alarm_is_described_in_one_line_with_figure_limit_and_setting() -> None:
    assert describe_alarm("repetition", 0.61234, 0.5) == (
        "alarm: responses repeat themselves: the share of their 4-grams that occurred before is 0.6123, above the "
        "limit of 0.5 (monitors.max_repetition)"
    )
    assert "is 0.25, below the limit of 0.8 (monitors.min_eos_rate)" in describe_alarm("eos_rate", 0.25, 0.8)
    assert "is -0.95, beyond the limit of 0.9" in describe_alarm("alarm/length_correlation", -0.95, 0.9)
    assert "is not a number; the limit of 0.001 (monitors.max_score_drift)" in describe_alarm(
        "score_drift", math.nan, 1e-3
    )
    for watch in WATCHES:
        assert "\n" not in describe_alarm(watch.name, 1.0, 0.5)
