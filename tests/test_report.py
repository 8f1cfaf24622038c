"""The picture and the summary that a run leaves, made from metrics.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.report import PANELS, before_and_after, draw_curves, moving_mean, read_metrics, write_summary
from cluster.tracking import Tracker
from conf.schema import TrackingConfig


def record(run_dir: Path, *logged: tuple[str, int, dict[str, float]]) -> Path:
    """A metrics.jsonl made by the tracker itself."""
    with Tracker(run_dir, TrackingConfig(), name="x", resolved_config={}) as tracker:
        for stage, step, metrics in logged:
            tracker.log(stage, step, metrics)
    return run_dir / "metrics.jsonl"


def size_of(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def drawn_text(monkeypatch: pytest.MonkeyPatch, metrics: Path, out: Path) -> list[str]:
    """Draws, and returns every text of the figure that is not a tick label."""
    from matplotlib.axis import Tick
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figures: list[Any] = []
    save = Figure.savefig

    def keep(figure: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        draw_curves(metrics, out)
    (figure,) = figures
    ticks = {text for tick in figure.findobj(Tick) for text in (tick.label1, tick.label2)}
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text not in ticks]


def test_only_the_panels_that_have_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = record(
        tmp_path,
        *(("sft", step, {"sft/loss": 3 / step, "sft/lr": 1e-3}) for step in range(1, 20)),
        *(("ppo", step, {"eval/accuracy": step / 10}) for step in range(0, 10, 5)),
    )
    texts = drawn_text(monkeypatch, metrics, tmp_path / "curves.png")
    titles = {panel.title for panel in PANELS}
    assert [text for text in texts if text in titles] == ["SFT: loss", "PPO: held-out accuracy"]
    assert {"nats per token", "prompts answered right", "step"} <= set(texts)
    assert "held out" not in texts, "a panel with one curve needs no legend"


def test_a_run_of_all_stages_gives_nine_panels_in_three_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keys: dict[str, list[str]] = {}
    for panel in PANELS:
        keys.setdefault(panel.stage, []).extend(curve.key for curve in panel.curves)
    logged = [(stage, step, {key: float(rng.random()) for key in keys[stage]}) for stage in keys for step in range(100)]
    draw_curves(record(tmp_path, *logged), tmp_path / "all.png")
    one = ("ppo", 1, {"eval/accuracy": 0.5})
    draw_curves(record(tmp_path / "one", one), tmp_path / "one.png")
    width, height = size_of(tmp_path / "all.png")
    assert width == 3 * size_of(tmp_path / "one.png")[0]
    assert 2.5 < height / size_of(tmp_path / "one.png")[1] < 3.5


def test_a_long_curve_is_smoothed_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caption = "pale: each step; bold: its moving mean"
    for steps, expected in ((50, False), (200, True)):
        metrics = record(tmp_path / str(steps), *(("ppo", s, {"objective/kl": s * 0.01}) for s in range(steps)))
        assert (caption in drawn_text(monkeypatch, metrics, tmp_path / "c.png")) is expected


def test_lost_figures_are_counted_in_their_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.1, math.nan, 0.2, math.inf, 0.3]
    metrics = record(tmp_path, *(("ppo", step, {"objective/kl": value}) for step, value in enumerate(values)))
    assert "2 not finite" in drawn_text(monkeypatch, metrics, tmp_path / "curves.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [math.nan] * 3, [1e-7, 0.0, 1e-6]])
def test_a_gap_of_zero_or_no_number_is_drawn_without_complaint(tmp_path: Path, values: list[float]) -> None:
    metrics = record(tmp_path, *(("ppo", step, {"sync/logprob_gap_max": v}) for step, v in enumerate(values)))
    draw_curves(metrics, tmp_path / "curves.png")
    assert size_of(tmp_path / "curves.png")[0] > 400


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no figures to draw"):
        draw_curves(record(tmp_path, ("ppo", 1, {"memory/learner_rss_mib": 5.0})), tmp_path / "curves.png")


def test_the_moving_mean_is_that_of_a_slow_loop() -> None:
    rng = np.random.default_rng(1)
    for length, window in ((1, 5), (3, 5), (40, 5), (41, 8)):
        values = rng.normal(size=length)
        values[rng.random(length) < 0.2] = np.nan
        expected = []
        for i in range(length):
            near = values[max(0, i - window // 2) : i + (window - 1) // 2 + 1]
            near = near[np.isfinite(near)]
            expected.append(near.mean() if len(near) else np.nan)
        np.testing.assert_allclose(moving_mean(values, window), expected, atol=1e-12)


def test_a_torn_last_line_is_left_out_and_any_other_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "ppo", "step": 1, "policy/loss": 0.5}\n{"stage": "ppo", "st')
    (step,) = read_metrics(path)
    assert (step.stage, step.step, step.figures) == ("ppo", 1, {"policy/loss": 0.5})
    for torn in ('{"stage": "ppo", "st', '{"step": 2}', '{"stage": "ppo", "step": 2, "policy/loss": null}', "[1]"):
        path.write_text(f'{{"stage": "ppo", "step": 1}}\n{torn}\n{{"stage": "ppo", "step": 3}}\n')
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            read_metrics(path)


def test_a_step_that_was_run_again_counts_as_it_was_run_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"stage": "ppo", "step": {step}, "policy/loss": {loss}}}\n' for step, loss in ((1, 1), (2, 2), (2, 3))]
    path.write_text("".join(lines))
    assert [(step.step, step.figures["policy/loss"]) for step in read_metrics(path)] == [(1, 1.0), (2, 3.0)]


def test_two_evaluations_become_the_summary_names() -> None:
    before = {"eval/accuracy": 0.2, "eval/score_mean": -1.0, "eval/kl": 0.0, "eval/response_length_mean": 9.0}
    after = {"eval/score_mean": 2.0, "eval/kl": 3.0, "eval/response_length_mean": 8.0, "eval/accuracy": 0.9}
    assert before_and_after(before | {"timing/evaluate_s": 1.0}, after) == {
        "eval/accuracy_before": 0.2,
        "eval/accuracy_after": 0.9,
        "reward/score_before": -1.0,
        "reward/score_after": 2.0,
        "objective/kl_before": 0.0,
        "objective/kl_after": 3.0,
        "rollout/response_length_before": 9.0,
        "rollout/response_length_after": 8.0,
    }


def test_the_summary_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"seed": 1, "eval/accuracy_after": np.float64(0.5), "reward/score_after": math.nan})
    written = {"seed": 1, "eval/accuracy_after": 0.5, "reward/score_after": "nan"}
    assert json.loads(path.read_text()) == written
    with pytest.raises(TypeError):
        write_summary(path, {"seed": 2, "broken": object()})
    assert json.loads(path.read_text()) == written
    write_summary(path, {"seed": 3})
    assert json.loads(path.read_text()) == {"seed": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
