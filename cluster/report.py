"""What is left of a run when it is over: curves.png and summary.json, made from the figures it recorded.

Reads metrics.jsonl as cluster/tracking.py writes it. Draws with matplotlib's own objects, never through pyplot, so that
nothing global is left behind and no display is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.tracking import to_json

TRAIN, HELD_OUT, OTHER = "#2a6fbb", "#d1495b", "#8a8d91"
# What all pictures look like, as matplotlib's rcParams.
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#444444",
    "axes.edgecolor": "#b0b0b0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "xtick.color": "#b0b0b0",
    "ytick.color": "#b0b0b0",
    "xtick.labelcolor": "#444444",
    "ytick.labelcolor": "#444444",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.7,
    "legend.fontsize": 9,
}
_COLUMNS = 3
_PANEL_INCHES = (3.7, 2.6)
_SMOOTH_ABOVE = 60  # points from which a curve is drawn pale with its moving mean over it


@dataclass(frozen=True)
class Step:
    """The figures of one step of one stage."""

    stage: str
    step: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """One line of a panel; `points` for a figure that is measured only now and then."""

    key: str
    label: str
    color: str = TRAIN
    points: bool = False


@dataclass(frozen=True)
class Panel:
    stage: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    scale: str = "linear"  # linear | log | percent | share: percent, the whole range from 0 to 100 %


PANELS = (
    Panel(
        "sft",
        "SFT: loss",
        "nats per token",
        (Curve("sft/loss", "training"), Curve("sft/eval_loss", "held out", HELD_OUT, points=True)),
    ),
    Panel(
        "reward",
        "Reward model: loss",
        "nats per pair",
        (Curve("reward_model/loss", "training"), Curve("reward_model/eval_loss", "held out", HELD_OUT, points=True)),
    ),
    Panel(
        "reward",
        "Reward model: accuracy",
        "pairs ordered right",
        (
            Curve("reward_model/accuracy", "training"),
            Curve("reward_model/eval_accuracy", "held out", HELD_OUT, points=True),
        ),
        "share",
    ),
    Panel(
        "ppo",
        "PPO: reward score",
        "mean score",
        (Curve("reward/score_mean", "training"), Curve("eval/score_mean", "held out", HELD_OUT, points=True)),
    ),
    Panel(
        "ppo",
        "PPO: held-out accuracy",
        "prompts answered right",
        (Curve("eval/accuracy", "held out", HELD_OUT, points=True),),
        "share",
    ),
    Panel(
        "ppo",
        "PPO: KL to the reference",
        "nats per response",
        (Curve("objective/kl", "training"), Curve("eval/kl", "held out", HELD_OUT, points=True)),
    ),
    Panel(
        "ppo",
        "PPO: response length",
        "tokens",
        (
            Curve("rollout/response_length_mean", "training"),
            Curve("eval/response_length_mean", "held out", HELD_OUT, points=True),
        ),
    ),
    Panel(
        "ppo",
        "PPO: clipped",
        "share of tokens",
        (Curve("policy/clipfrac", "policy"), Curve("critic/clipfrac", "critic", OTHER)),
        "percent",
    ),
    Panel(
        "ppo",
        "PPO: engine against learner",
        "|Δ log-probability|",
        (Curve("sync/logprob_gap_max", "largest", OTHER), Curve("sync/logprob_gap_mean", "mean")),
        "log",
    ),
)


def read_metrics(path: Path) -> list[Step]:
    """Every step in metrics.jsonl, in the order written, the parts of one step joined.

    A step that was run again, after a restart, counts as it was run last. A torn last line, left by a run that was
    killed while it wrote, is left out; any other line that is not as cluster/tracking.py writes it is a ValueError
    that names its number.
    """
    steps: dict[tuple[str, int], dict[str, float]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or the torn line
        try:
            row = json.loads(line)
            stage, step = str(row.pop("stage")), int(row.pop("step"))
            figures = {key: float(value) for key, value in row.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a line of metrics: {error!r}") from error
        steps.setdefault((stage, step), {}).update(figures)
    return [Step(stage, step, figures) for (stage, step), figures in steps.items()]


def draw_curves(metrics_path: Path, out_path: Path) -> None:
    """Draw what metrics.jsonl holds to a PNG: one panel a subject, only the panels that have figures.

    Raises ValueError if there is no figure to draw.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    steps = read_metrics(metrics_path)
    panels = [panel for panel in PANELS if any(len(_series(steps, panel.stage, c.key)[0]) for c in panel.curves)]
    if not panels:
        raise ValueError(f"{metrics_path} holds no figures to draw")
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        size = (columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1] + 0.15)
        figure = Figure(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        smoothed = [
            _draw_panel(figure.add_subplot(rows, columns, place), panel, steps)
            for place, panel in enumerate(panels, start=1)
        ]
        if any(smoothed):
            figure.supxlabel("pale: each step; bold: its moving mean", x=0.99, ha="right", fontsize=9, color="#777777")
        figure.savefig(out_path, format="png", facecolor="white")


def before_and_after(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """The figures of two evaluations (keys `eval/...`) under the names that summary.json gives them."""
    names = {
        "eval/accuracy": "eval/accuracy",
        "eval/score_mean": "reward/score",
        "eval/kl": "objective/kl",
        "eval/response_length_mean": "rollout/response_length",
        "eval/truncated_fraction": "rollout/truncated_fraction",
    }
    return {
        f"{name}_{when}": figures[key]
        for key, name in names.items()
        for when, figures in (("before", before), ("after", after))
        if key in figures
    }


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json whole or not at all: a reader never finds half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(
        json.dumps(to_json(summary), indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    part.replace(path)


def _series(steps: Sequence[Step], stage: str, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of one figure, in the order of the steps."""
    found = sorted((s.step, s.figures[key]) for s in steps if s.stage == stage and key in s.figures)
    return np.array([at for at, _ in found], dtype=np.float64), np.array([v for _, v in found], dtype=np.float64)


def moving_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of the `window` values around each value, of fewer at the ends; NaN where none of them is finite."""
    finite = np.isfinite(values)
    ones = np.ones(window)
    total = np.convolve(np.where(finite, values, 0.0), ones, mode="full")
    count = np.convolve(finite.astype(np.float64), ones, mode="full")
    start = (window - 1) // 2
    inside = slice(start, start + len(values))
    means: NDArray[np.float64] = np.full(len(values), np.nan)
    np.divide(total[inside], count[inside], out=means, where=count[inside] > 0)
    return means


def _draw_panel(axes: Any, panel: Panel, steps: Sequence[Step]) -> bool:
    """Draw one panel; True if one of its curves is smoothed."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    series = [(curve, *_series(steps, panel.stage, curve.key)) for curve in panel.curves]
    drawn = [(curve, at, values) for curve, at, values in series if len(at)]
    smoothed = [_draw_curve(axes, curve, at, values) for curve, at, values in drawn]
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
    if panel.scale in ("percent", "share"):
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        top = 1.03 if panel.scale == "share" else axes.get_ylim()[1]
        axes.set_ylim(bottom=-0.02 * top, top=top)  # a curve at 0 is to be seen above the axis
    if panel.scale == "log" and any((values > 0).any() for _, _, values in drawn):
        axes.set_yscale("log")
    if len(drawn) > 1:
        axes.legend(handlelength=1.4)
    if lost := sum(int((~np.isfinite(values)).sum()) for _, _, values in drawn):
        axes.text(0.98, 0.05, f"{lost} not finite", transform=axes.transAxes, ha="right", color=HELD_OUT, weight="bold")
    return any(smoothed)


def _draw_curve(axes: Any, curve: Curve, at: NDArray[np.float64], values: NDArray[np.float64]) -> bool:
    """Draw one curve; True if it is drawn smoothed over its own points."""
    if curve.points or len(at) == 1:
        axes.plot(at, values, color=curve.color, label=curve.label, marker="o", markersize=4, linewidth=1.4, zorder=3)
        return False
    if len(at) <= _SMOOTH_ABOVE:
        axes.plot(at, values, color=curve.color, label=curve.label, linewidth=1.4)
        return False
    axes.plot(at, values, color=curve.color, linewidth=0.8, alpha=0.3)
    smooth = moving_mean(values, max(5, len(at) // 20))
    axes.plot(at, smooth, color=curve.color, label=curve.label, linewidth=1.6)
    return True
