"""Signs that the reward is being exploited and not served: what is measured, and which limits it breaks.

Pure functions of arrays, metrics and `monitors.*`. Knows nothing of where the figures come from or what is done about
an alarm; an alarm stops nothing by itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from conf.schema import MonitorConfig


def _size_at_most(value: float, limit: float) -> bool:
    return abs(value) <= limit


@dataclass(frozen=True)
class Watch:
    """One metric and how its limit is kept."""

    name: str  # the alarm is alarm/<name>
    metric: str
    setting: str  # field of MonitorConfig
    sign: str  # what an alarm means; the figure follows
    kept: Callable[[float, float], bool] = operator.le  # of value and limit
    side: str = "above"  # where a value is that does not keep its limit


WATCHES = (
    Watch(
        "length_correlation",
        "monitor/length_correlation",
        "max_length_correlation",
        "the score goes with the length of the response: their correlation is",
        kept=_size_at_most,
        side="beyond",
    ),
    Watch(
        "repetition",
        "monitor/repetition",
        "max_repetition",
        "responses repeat themselves: the share of their 4-grams that occurred before is",
    ),
    Watch(
        "eos_rate",
        "monitor/eos_rate",
        "min_eos_rate",
        "responses do not come to an end: the share that the policy ended is",
        kept=operator.ge,
        side="below",
    ),
    Watch(
        "score_drift",
        "monitor/score_drift",
        "max_score_drift",
        "the reward gives the same responses other scores than before: the largest difference is",
    ),
    Watch(
        "kl",
        "objective/kl",
        "max_kl",
        "the policy is far from the reference: the KL in nats per response is",
    ),
)


def length_correlation(scores: ArrayLike, lengths: ArrayLike) -> float:
    """Return Pearson's correlation of the scores of responses with their lengths, in [-1, 1].

    0.0 when either does not vary, where the correlation is not defined: nothing follows from a length that all share.
    Near 1, the reward pays for length; near -1, for being brief.

    Args:
        scores: [B], B at least 1.
        lengths: [B], in tokens.
    """
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    assert x.shape == y.shape == (x.size,), (x.shape, y.shape)
    assert x.size > 0, "no responses"
    if np.ptp(x) == 0 or np.ptp(y) == 0:  # before the means are taken off, which may leave rounding behind
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # so that no square underflows
    return float(np.clip((x @ y) / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def monitored(scores: ArrayLike, lengths: ArrayLike, *, repetition: ArrayLike, ended: ArrayLike) -> dict[str, float]:
    """Return the figures of a batch of responses that are watched.

    `monitor/length_correlation`, `monitor/repetition`, the mean share of n-grams that occurred before, and
    `monitor/eos_rate`, the share of responses that the policy ended itself.

    Args:
        scores: [B], B at least 1.
        lengths: [B], in tokens.
        repetition: [B], of actors.repetition.
        ended: [B] bool, False for a response that was cut.
    """
    repeated, stopped = np.asarray(repetition, dtype=np.float64), np.asarray(ended, dtype=np.float64)
    assert repeated.shape == stopped.shape == np.shape(scores), (repeated.shape, stopped.shape)
    return {
        "monitor/length_correlation": length_correlation(scores, lengths),
        "monitor/repetition": float(repeated.mean()),
        "monitor/eos_rate": float(stopped.mean()),
    }


def score_drift(before: ArrayLike, now: ArrayLike) -> float:
    """Return the largest absolute difference between two scorings of the same responses; NaN if a score is NaN.

    A reward model is frozen and a reward function should remember nothing, so anything above rounding means that PPO
    no longer climbs what it climbed before. Both are [B], in the same order, B at least 1.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(now, dtype=np.float64)
    assert first.shape == second.shape == (first.size,), (first.shape, second.shape)
    assert first.size > 0, "no responses"
    return float(np.abs(second - first).max())


def alarms(metrics: Mapping[str, float], limits: MonitorConfig) -> dict[str, float]:
    """Return `alarm/<name>`, 1.0 or 0.0, for each limit that is set and whose metric is there, and `alarm/any`.

    A value that equals its limit keeps it; of the correlation the size counts. A metric that is NaN raises its alarm,
    since it cannot be said to keep the limit. `alarm/any` is always there, 0.0 if there was nothing to compare.
    """
    raised = {
        f"alarm/{watch.name}": float(not watch.kept(metrics[watch.metric], limit))
        for watch, limit in _compared(metrics, limits)
    }
    return raised | {"alarm/any": max(raised.values(), default=0.0)}


def alarm_lines(
    metrics: Mapping[str, float], limits: MonitorConfig, *, known: Mapping[str, float] | None = None
) -> list[str]:
    """Return what is to be said of each alarm that `alarms` raises, one line each.

    `known` is what `alarms` returned the last time: an alarm that stood then is not said again.
    """
    return [
        describe_alarm(watch.name, metrics[watch.metric], limit)
        for watch, limit in _compared(metrics, limits)
        if not watch.kept(metrics[watch.metric], limit) and not (known or {}).get(f"alarm/{watch.name}")
    ]


def describe_alarm(name: str, value: float, limit: float) -> str:
    """Return one plain line about an alarm: what it is a sign of, the figure, the limit and its setting.

    `name` is that of a Watch, or its key in what `alarms` returns.
    """
    (watch,) = (watch for watch in WATCHES if watch.name == name.removeprefix("alarm/"))
    side = "not a number;" if math.isnan(value) else f"{value:.4g}, {watch.side}"
    return f"alarm: {watch.sign} {side} the limit of {limit:g} (monitors.{watch.setting})"


def _compared(metrics: Mapping[str, float], limits: MonitorConfig) -> list[tuple[Watch, float]]:
    limited = [(watch, getattr(limits, watch.setting)) for watch in WATCHES]
    return [(watch, limit) for watch, limit in limited if limit is not None and watch.metric in metrics]
