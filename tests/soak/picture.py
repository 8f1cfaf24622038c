"""The picture of a soak: what was learned, and beside it the memory with the faults."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from cluster.report import HELD_OUT, OTHER, STYLE, TRAIN

LINE = {"linewidth": 1.4, "marker": "o", "markersize": 3}
COLORS = {"driver": HELD_OUT, "generator": TRAIN, "learner": "#3a9d5d", "reward": "#e0a030", "ray": OTHER}


def draw(summary: dict[str, Any], observed: dict[str, Any], out: Path) -> None:
    """Draw a summary and what was observed, both as they are written to JSON, to a PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.6), dpi=150, layout="constrained")
        draw_learning(figure.add_subplot(1, 2, 1), summary["curve"])
        draw_memory(figure.add_subplot(1, 2, 2), observed)
        figure.savefig(out, format="png", facecolor="white")


def draw_learning(axes: Any, curve: list[list[float]]) -> None:
    from matplotlib.ticker import PercentFormatter

    steps = [step for step, _, _ in curve]
    lines = axes.plot(steps, [accuracy for _, accuracy, _ in curve], color=HELD_OUT, label="accuracy", **LINE)
    axes.set(
        title="Held-out accuracy and score", xlabel="ppo step", ylabel="prompts answered right", ylim=(-0.02, 1.03)
    )
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    scores = axes.twinx()
    scores.grid(visible=False)
    scores.spines["right"].set_visible(True)
    scores.set_ylabel("mean score")
    lines += scores.plot(steps, [score for _, _, score in curve], color=TRAIN, label="score", **LINE)
    axes.legend(handles=lines, loc="lower right", handlelength=1.4)


def draw_memory(axes: Any, observed: dict[str, Any]) -> None:
    """Draw the sum over the processes of each kind, and a mark for each fault."""
    moments = sorted({sample["at_s"] for sample in observed["memory"]})
    sums: dict[tuple[str, float], float] = defaultdict(float)
    for sample in observed["memory"]:
        kind = sample["kind"] if sample["kind"] in COLORS else "ray"
        sums[kind, sample["at_s"]] += sample["mib"]
    for kind, color in COLORS.items():
        sizes = [sums[kind, at_s] for at_s in moments]
        axes.plot([at_s / 60 for at_s in moments], sizes, color=color, label=kind, linewidth=0.9)
    top = 1.12 * max(sums.values(), default=1.0)
    for mark, restarted in (("|", False), ("v", True)):
        at = [fault["at_s"] / 60 for fault in observed["faults"] if ends_driver(fault) == restarted]
        axes.plot(at, [top] * len(at), mark, color="#444444", markersize=4, linestyle="none")
    axes.set(title="Memory, and faults (▾ ends the driver)", xlabel="minutes", ylabel="of all of a kind, MiB")
    axes.set_ylim(bottom=0, top=1.05 * top)
    axes.legend(handlelength=1.4, loc="center left", bbox_to_anchor=(1.0, 0.5))


def ends_driver(fault: dict[str, Any]) -> bool:
    name: str = fault["name"]
    return name.startswith(("driver SIGKILL", "driver SIGTERM", "all SIGTERM"))


def draw_folder(folder: Path) -> None:
    """Draw soak.png from soak.json and observed.json, which are in the folder."""
    summary, observed = (json.loads((folder / name).read_text()) for name in ("soak.json", "observed.json"))
    draw(summary, observed, folder / "soak.png")
