"""The KL-reward frontier: which points are on it, and what is written and drawn of it. Takes under ten seconds."""

from __future__ import annotations

import csv
import io
import math
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cluster.frontier import (
    FrontierPoint,
    frontier_points,
    frontier_table,
    signed_root,
    signed_square,
    write_frontier,
)
from cluster.report import Step, read_metrics
from cluster.tracking import Tracker
from conf.schema import TrackingConfig


def evaluations(*kl_and_score: tuple[float, float], every: int = 10) -> list[Step]:
    """Evaluations at steps 0, 10, 20, ..."""
    return [
        Step("ppo", every * i, {"eval/kl": kl, "eval/score_mean": score}) for i, (kl, score) in enumerate(kl_and_score)
    ]


def on_frontier(*kl_and_score: tuple[float, float]) -> list[bool]:
    return [point.on_frontier for point in frontier_points(evaluations(*kl_and_score))]


# Points


def test_the_frontier_by_hand() -> None:
    assert on_frontier((0, 0), (1, 2), (2, 1), (3, 3), (3, 2.5), (4, 3)) == [True, True, False, True, False, False]
    assert on_frontier((0, 5), (1, 4), (2, 3)) == [True, False, False], "nothing was worth its KL"
    assert on_frontier((5.0, 1.0)) == [True]
    assert on_frontier((1, 1), (1, 1), (2, 1)) == [True, True, False], "equal points do not beat each other"
    assert on_frontier((-0.1, 0.5), (0, 0.4), (0.1, 0.6)) == [True, False, True], "KL counts as it was measured"


def test_the_frontier_is_that_of_its_definition_by_slow_loop() -> None:
    rng = np.random.default_rng(0)
    for levels in (3, 10**6):
        pairs = [(int(kl), int(score)) for kl, score in rng.integers(0, levels, (40, 2))]
        expected = []
        for kl, score in pairs:
            beaten = False
            for other_kl, other_score in pairs:
                if other_kl <= kl and other_score >= score and (other_kl, other_score) != (kl, score):
                    beaten = True
            expected.append(not beaten)
        assert on_frontier(*pairs) == expected


def test_along_the_frontier_the_score_only_rises() -> None:
    rng = np.random.default_rng(1)
    points = frontier_points(evaluations(*rng.normal(size=(60, 2)).tolist()))
    best = sorted((p.kl, p.score) for p in points if p.on_frontier)
    assert 1 < len(best) < 60
    assert all(before[1] < after[1] for before, after in pairwise(best))
    for point in points:
        assert max(score for kl, score in best if kl <= point.kl) >= point.score


def test_points_that_are_not_finite_compare_with_nothing() -> None:
    assert on_frontier((0, math.nan), (1, 2), (math.nan, 9), (0.5, math.inf), (-math.inf, 3)) == [
        False,
        True,
        False,
        False,
        False,
    ]


def test_points_come_from_the_evaluations_of_metrics_jsonl(tmp_path: Path) -> None:
    with Tracker(tmp_path, TrackingConfig(), name="x", resolved_config={}) as tracker:
        tracker.log("sft", 5, {"eval/kl": 0.0, "eval/score_mean": 100.0})
        tracker.log("ppo", 0, {"eval/kl": 0.0, "eval/score_mean": -1.0, "eval/accuracy": 0.25})
        tracker.log("ppo", 1, {"objective/kl": 0.1, "reward/score_mean": 3.0})
        tracker.log("ppo", 2, {"eval/score_mean": 4.0})
        tracker.log("ppo", 10, {"eval/kl": math.inf, "eval/score_mean": 1.0})
        tracker.log("ppo", 20, {"eval/kl": 4.0, "eval/win_rate": 0.75})
        tracker.log("ppo", 20, {"eval/score_mean": 2.0})  # the other part of the step
        tracker.log("eval", 7, {"eval/kl": 5.0, "eval/score_mean": 1.5})
    assert frontier_points(read_metrics(tmp_path / "metrics.jsonl")) == [
        FrontierPoint(0, 0.0, -1.0, accuracy=0.25, win_rate=None, on_frontier=True),
        FrontierPoint(10, math.inf, 1.0, accuracy=None, win_rate=None, on_frontier=False),
        FrontierPoint(20, 4.0, 2.0, accuracy=None, win_rate=0.75, on_frontier=True),
    ]


# Table and CSV


def test_the_table_shows_what_was_measured() -> None:
    def shown(points: list[FrontierPoint]) -> str:
        out = io.StringIO()
        Console(file=out, width=100).print(frontier_table(points))
        return out.getvalue()

    judged = [
        FrontierPoint(0, 0.0, -1.25, accuracy=0.5, win_rate=None, on_frontier=True),
        FrontierPoint(30, 2.5, -2.0, accuracy=None, win_rate=None, on_frontier=False),
    ]
    lines = [line.split() for line in shown(judged).splitlines()]
    assert ["step", "KL,", "nats", "score", "accuracy", "on", "the", "frontier"] in lines
    assert ["0", "0.000", "-1.250", "50.0%", "yes"] in lines
    assert ["30", "2.500", "-2.000"] in lines
    assert "accuracy" not in shown(judged[1:])
    assert "win rate" in shown([FrontierPoint(0, 0.0, 1.0, accuracy=None, win_rate=0.5, on_frontier=True)])


def test_the_csv_gives_every_point_back(tmp_path: Path) -> None:
    points = [
        FrontierPoint(0, -0.1 / 3, 1 / 3, accuracy=2 / 3, win_rate=0.5, on_frontier=True),
        FrontierPoint(10, math.nan, 1e-17, accuracy=None, win_rate=None, on_frontier=False),
    ]
    write_frontier(points, tmp_path)
    with (tmp_path / "frontier.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == ["step", "kl", "score", "accuracy", "win_rate", "on_frontier"]
    assert [float(first[name]) for name in ("step", "kl", "score", "accuracy", "win_rate")] == [
        0,
        -0.1 / 3,
        1 / 3,
        2 / 3,
        0.5,
    ]
    assert first["on_frontier"] == "true"
    assert list(second.values()) == ["10", "nan", "1e-17", "", "", "false"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["frontier.csv", "frontier.png"]


def test_without_a_point_there_is_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no evaluation with KL and score"):
        write_frontier([], tmp_path)
    assert list(tmp_path.iterdir()) == []


# Picture


def test_a_negative_kl_stands_as_far_from_zero_as_its_size() -> None:
    assert signed_root([-4.0, -0.25, 0.0, 0.25, 9.0]).tolist() == [-2.0, -0.5, 0.0, 0.5, 3.0]
    values = np.random.default_rng(2).normal(size=100)
    np.testing.assert_allclose(signed_square(signed_root(values)), values, rtol=1e-14)
    assert (np.diff(signed_root(np.sort(values))) > 0).all()


def drawn(monkeypatch: pytest.MonkeyPatch, points: list[FrontierPoint], folder: Path) -> Any:
    """Writes, and returns the axes that were drawn."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def keep(figure: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        write_frontier(points, folder)
    assert (folder / "frontier.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return figures[0].axes[0]


def test_the_frontier_is_the_best_score_within_a_kl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = frontier_points(evaluations((4, 2), (0, 0), (1, 1), (9, 1.5), (-0.25, -1)))
    axes = drawn(monkeypatch, points, tmp_path)
    line, others = axes.lines[:2]
    assert line.get_xydata().tolist() == [[-0.5, -1], [0, -1], [0, 0], [1, 0], [1, 1], [2, 1], [2, 2]]
    assert line.get_markevery() == 2
    assert others.get_xydata().tolist() == [[3, 1.5]]
    labels = {label.get_text(): tuple(label.xy) for label in axes.texts}
    assert labels == {"0": (2, 2), "10": (0, 0), "20": (1, 1), "30": (3, 1.5), "40": (-0.5, -1)}
    assert "negative" in axes.get_xlabel()
    assert axes.get_title(loc="right") == "number: the step"


CROWD = np.random.default_rng(3).normal(size=(60, 2)) + np.linspace(0, 4, 60)[:, None]


@pytest.mark.parametrize(
    ("pairs", "every"),
    [
        ([(0, -1.17), (0.7, 1.25), (1.005, 1.96), (1.034, 2.13), (1.002, 2.45), (1.058, 2.64), (1.022, 2.731)], 10),
        (CROWD.tolist(), 10),
        ([(0.0, 1.0)] * 3, 10),
        ([(0.0, 1.0), (1.0, 2.0), (4.0, 1.5), (4.0, 0.9)], 10**12),
    ],
    ids=["cluster", "crowd", "one place", "long numbers at the edge"],
)
def test_no_label_stands_on_anything(
    pairs: list[tuple[float, float]], every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = frontier_points(evaluations(*pairs, every=every))
    axes = drawn(monkeypatch, points, tmp_path)
    boxes = {label.get_text(): label.get_window_extent() for label in axes.texts}
    assert 1 <= len(boxes) <= len(points)
    places = {str(p.step): axes.transData.transform((float(signed_root(p.kl)), p.score)) for p in points}
    line = axes.lines[0].get_transform().transform_path(axes.lines[0].get_path())
    frame = axes.get_window_extent()
    for one, other in combinations(boxes.values(), 2):
        assert not one.overlaps(other)
    for step, box in boxes.items():
        assert not line.intersects_bbox(box, filled=False)
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        assert frame.y0 <= box.y0
        assert box.y1 <= frame.y1
        gaps = {at: math.dist(place, np.clip(place, box.min, box.max)) for at, place in places.items()}
        assert min(gaps.values()) > 6.0, "a marker is 6.25 pixels in radius"
        assert gaps[step] <= min(gaps.values()) + 2.0, "a label stands next to its own point"
    bare = len(points) - len(boxes)
    assert axes.get_title(loc="right") == "number: the step" + (f" ({bare} without room)" if bare else "")


@pytest.mark.parametrize("pairs", [[(math.nan, 1.0)], [(0.0, 0.0), (math.nan, 1.0)]], ids=["alone", "beside another"])
def test_points_that_cannot_be_drawn_are_counted(
    pairs: list[tuple[float, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = drawn(monkeypatch, frontier_points(evaluations(*pairs)), tmp_path)
    assert axes.get_title(loc="right") == "number: the step; 1 not finite"
    assert len(axes.texts) == len(pairs) - 1
