"""The KL-reward frontier of a run: what score it reached for how much KL, as frontier.csv, frontier.png and a table.

Gao et al. 2022, "Scaling laws for reward model overoptimization" (arXiv 2210.10760): score over the square root of the
KL from the initial policy. Reads evaluations as cluster/report.py reads them from metrics.jsonl and knows nothing of
how they were made. Draws without pyplot, as cluster/report.py does.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich import box
from rich.table import Table

from cluster.report import HELD_OUT, OTHER, STYLE, Step

CSV_FILE = "frontier.csv"
PICTURE_FILE = "frontier.png"
FRONTIER_STYLE = {"axes.spines.top": True, "axes.titlelocation": "center"}  # KL has a scale on top
_COLUMNS = ("step", "kl", "score", "accuracy", "win_rate", "on_frontier")
_LABEL_OFFSETS = [  # in points from the centre of a marker on the frontier; of the others, the other way
    (distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle)))
    for distance in (10, 13, 16)
    for angle in (135, 90, 180, 45, 315, 270, 225, 0)
]


@dataclass(frozen=True)
class FrontierPoint:
    """One evaluation; `kl` in nats per response, as measured: an estimate of a small KL may be negative."""

    step: int
    kl: float
    score: float
    accuracy: float | None
    win_rate: float | None
    on_frontier: bool  # no other point has at most this KL and at least this score, one of the two strictly

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.kl) and math.isfinite(self.score)


def frontier_points(rows: Iterable[Step]) -> list[FrontierPoint]:
    """Return a point for each evaluation that has both `eval/kl` and `eval/score_mean`, by step.

    Looks at the stage ppo, of what cluster.report.read_metrics returns: the eval stage is one point. Points that are
    alike are all on the frontier or none. One whose KL or score is not finite is kept, compares with nothing and is not
    on the frontier.
    """
    points = sorted(
        (
            FrontierPoint(
                row.step,
                kl=row.figures["eval/kl"],
                score=row.figures["eval/score_mean"],
                accuracy=row.figures.get("eval/accuracy"),
                win_rate=row.figures.get("eval/win_rate"),
                on_frontier=False,
            )
            for row in rows
            if row.stage == "ppo" and row.figures.keys() >= {"eval/kl", "eval/score_mean"}
        ),
        key=lambda point: point.step,
    )
    return [
        replace(point, on_frontier=point.is_finite and not any(_dominates(other, point) for other in points))
        for point in points
    ]


def _dominates(other: FrontierPoint, point: FrontierPoint) -> bool:
    no_worse = other.is_finite and other.kl <= point.kl and other.score >= point.score
    return no_worse and (other.kl < point.kl or other.score > point.score)


def frontier_table(points: Sequence[FrontierPoint]) -> Table:
    """Return the points as a table for the console; accuracy and win rate only if a point has them."""
    judged = [name for name in ("accuracy", "win_rate") if any(getattr(point, name) is not None for point in points)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Held-out score and KL", title_justify="left")
    for column in ("step", "KL, nats", "score", *(name.replace("_", " ") for name in judged)):
        table.add_column(column, justify="right")
    table.add_column("on the frontier")
    for point in points:
        shares = (getattr(point, name) for name in judged)
        table.add_row(
            str(point.step),
            f"{point.kl:.3f}",
            f"{point.score:.3f}",
            *("" if share is None else f"{share:.1%}" for share in shares),
            "yes" if point.on_frontier else "",
        )
    return table


def write_frontier(points: Sequence[FrontierPoint], folder: Path) -> None:
    """Write frontier.csv, every point in full precision, and frontier.png to an existing folder.

    In the CSV, what was not measured is empty and `on_frontier` is true or false. Raises ValueError for no points.
    """
    if not points:
        raise ValueError("there is no evaluation with KL and score to draw a frontier of")
    with (folder / CSV_FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for point in points:
            *figures, on_frontier = (getattr(point, name) for name in _COLUMNS)
            writer.writerow([*figures, str(on_frontier).lower()])
    draw_frontier(points, folder / PICTURE_FILE)


def signed_root(kl: ArrayLike) -> NDArray[np.float64]:
    """Return sqrt(kl), and -sqrt(-kl) of a negative one: the scale of the picture, which has room for both."""
    values = np.asarray(kl, dtype=np.float64)
    root: NDArray[np.float64] = np.sign(values) * np.sqrt(np.abs(values))
    return root


def signed_square(root: ArrayLike) -> NDArray[np.float64]:
    """Return the KL at a place on that scale: the inverse of `signed_root`."""
    values = np.asarray(root, dtype=np.float64)
    kl: NDArray[np.float64] = np.sign(values) * np.square(values)
    return kl


def draw_frontier(points: Sequence[FrontierPoint], out_path: Path) -> None:
    """Draw the points to a PNG: score over sqrt(KL), KL along the top, the frontier as the best score for a KL.

    A negative KL stands as far left of zero as its size asks for. Points are labelled with their step where there is
    room, those on the frontier first; how many are not, and how many points are not finite, is written above.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    finite = [point for point in points if point.is_finite]
    with rc_context(STYLE | FRONTIER_STYLE):
        figure = Figure(figsize=(7.0, 4.8), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        FigureCanvasAgg(figure)  # measures text
        axes = figure.add_subplot()
        frontier = _draw_points(axes, finite)
        _draw_scales(axes, finite)
        if finite:
            figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        note = axes.set_title(" ", loc="right", fontsize=9, fontweight="normal", color="#777777")
        figure.draw_without_rendering()  # from here on everything stands where it will be
        bare = len(finite) - _label_points(axes, finite, frontier)
        note.set_text(_note(num_bare=bare, num_lost=len(points) - len(finite)))
        figure.savefig(out_path, format="png", facecolor="white")


def _draw_points(axes: Any, points: Sequence[FrontierPoint]) -> Any:
    """Draw the markers and the frontier through them, and return the line of the frontier."""
    best = sorted((float(signed_root(point.kl)), point.score) for point in points if point.on_frontier)
    others = [(float(signed_root(point.kl)), point.score) for point in points if not point.on_frontier]
    x, y = np.array(best).reshape(-1, 2).T
    # The best score within a KL rises where a point is and nowhere between; every second corner is a point.
    (line,) = axes.plot(np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1], "o-", markevery=2, color=HELD_OUT, zorder=3)
    line.set(linewidth=1.2, label="frontier: the best score within a KL")
    if others:
        x, y = np.array(others).T
        axes.plot(x, y, "o", color=OTHER, markerfacecolor="white", label="others")
    return line


def _draw_scales(axes: Any, points: Sequence[FrontierPoint]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title("Held-out score against KL", loc="left")
    axes.margins(0.09)
    if len({point.kl for point in points}) < 2:  # without a range to show, one nat around what there is
        middle = float(signed_root(points[0].kl)) if points else 0.0
        axes.set_xlim(middle - 1, middle + 1)
    axes.grid(True)
    axes.ticklabel_format(style="plain", useOffset=False)
    axes.set_ylabel("held-out score, mean")
    axes.set_xlabel("√KL(policy ‖ reference)")
    if any(point.kl < 0 for point in points):
        axes.set_xlabel("√KL(policy ‖ reference);  −√|KL| where the estimate is negative")
        axes.axvline(0, color="#b0b0b0", linewidth=0.8, zorder=1)
    top = axes.secondary_xaxis("top", functions=(signed_square, signed_root))
    top.xaxis.set_major_locator(MaxNLocator(nbins=6))
    top.set_xlabel("KL, nats per response")


def _label_points(axes: Any, points: Sequence[FrontierPoint], frontier: Any) -> int:
    """Label points with their step where nothing else stands, those on the frontier first; return how many."""
    from matplotlib.transforms import Bbox

    frame = axes.get_window_extent()
    line = frontier.get_transform().transform_path(frontier.get_path())
    at = [(float(signed_root(point.kl)), point.score) for point in points]
    places = axes.transData.transform(at)  # in pixels, as all that follows
    taken = [Bbox.from_extents(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    if any(point.kl < 0 for point in points):
        zero, _ = axes.transData.transform((0, 0))
        taken.append(Bbox.from_extents(zero - 1, frame.y0, zero + 1, frame.y1))
    num_labels = 0
    for i in sorted(range(len(points)), key=lambda i: not points[i].on_frontier):
        color = HELD_OUT if points[i].on_frontier else "#666666"
        text = {"ha": "center", "va": "center", "fontsize": 9, "color": color}
        label = axes.annotate(str(points[i].step), at[i], (0, 0), textcoords="offset points", **text)
        away = 1 if points[i].on_frontier else -1  # from the line
        for dx, dy in _LABEL_OFFSETS:
            label.xyann = away * dx, away * dy
            box = label.get_window_extent().padded(2)
            inside = (box.min >= frame.min).all() and (box.max <= frame.max).all()
            gaps = np.hypot(*(places - np.clip(places, box.min, box.max)).T)
            its_own = gaps[i] <= gaps.min()  # next to its own point and no other
            if inside and its_own and not box.count_overlaps(taken) and not line.intersects_bbox(box, filled=False):
                taken.append(box)
                num_labels += 1
                break
        else:
            label.remove()
    return num_labels


def _note(*, num_bare: int, num_lost: int) -> str:
    bare = f" ({num_bare} without room)" if num_bare else ""
    lost = f"; {num_lost} not finite" if num_lost else ""
    return f"number: the step{bare}{lost}"
