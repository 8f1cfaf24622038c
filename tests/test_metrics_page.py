"""docs/metrics.md explains what runs record; the whole-system test compares it with the metrics.jsonl of a real run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cluster.driver import Chunk, RolloutInfo, ScoredHandle, Stopwatch, describe, staleness, timings
from cluster.report import PANELS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
_ROW = re.compile(r"\| `([a-z0-9_]+(?:/[a-z0-9_]+)+)` \|")


def documented_keys(page: Path) -> set[str]:
    """The metrics that a page explains: the first cell of each table row, where that is a key between backticks."""
    return {match[1] for line in page.read_text(encoding="utf-8").splitlines() if (match := _ROW.match(line))}


def conditional_keys(page: Path) -> set[str]:
    """Those of them that only some settings record: the tables under the heading that says so."""
    _, _, rest = page.read_text(encoding="utf-8").partition("\n## Only with some settings\n")
    assert rest, "the heading is there"
    return {match[1] for line in rest.splitlines() if (match := _ROW.match(line))}


def logged_keys(metrics: Path) -> set[str]:
    """The metrics that a metrics.jsonl holds."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return {key for row in rows for key in row} - {"stage", "step"}


def test_only_keys_in_the_first_cell_of_a_table_count(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "About `text/key`.\n\n| Key | What |\n|---|---|\n| `a/b_1` | not `c/d` |\n| `a/b/c` | |\n| none | `e/f` |\n"
    )
    assert documented_keys(page) == {"a/b_1", "a/b/c"}


def test_the_keys_of_a_metrics_file_are_those_of_all_its_lines(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"stage": "sft", "step": 1, "a/b": 1}\n{"stage": "ppo", "step": 0, "c/d": "nan"}\n')
    assert logged_keys(metrics) == {"a/b", "c/d"}


def test_no_key_is_explained_twice() -> None:
    keys = [match[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if (match := _ROW.match(line))]
    assert sorted(keys) == sorted(set(keys))


def test_every_row_says_what_it_is_its_unit_and_what_is_healthy() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if _ROW.match(line)]
    assert len(rows) > 40
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4, row
        assert all(cells), row


def test_every_curve_that_is_drawn_is_explained() -> None:
    drawn = {curve.key for panel in PANELS for curve in panel.curves}
    assert drawn - documented_keys(PAGE) == set()


@pytest.mark.parametrize("prefix", ["rollout", "eval"])
def test_the_figures_of_rollouts_and_of_time_are_explained(prefix: str) -> None:
    info = RolloutInfo(
        prompt_id=0,
        sample=0,
        num_tokens=5,
        num_response_tokens=2,
        truncated=False,
        repetition=0.0,
        versions=((3, 2),),
    )
    handles = [ScoredHandle(info, Chunk((info,), payload=None), row=0, score=1.0)]
    watch = Stopwatch(dict.fromkeys(("step_s", "generate_s", "wait_for_generators_s", "learn_s", "sync_s"), 1.0))
    recorded = describe(handles, prefix=prefix) | timings(watch, handles) | staleness(handles, 4, limit=2)
    assert recorded.keys() - documented_keys(PAGE) == set()
