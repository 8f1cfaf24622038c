"""What is printed while a run goes on and at its end, in a file and in a real (pseudo) terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
from pathlib import Path
from typing import Any

import pytest
import rich.console
import rich.table

from cluster.console import Console

SUMMARY = {
    "experiment": "quickstart",
    "seed": 3,
    "stages": ["sft", "ppo"],
    "timing/sft_s": 41.2,
    "timing/ppo_s": 3725.0,
    "reward_model/eval_accuracy": 0.9731,
    "eval/accuracy_before": 0.214,
    "eval/accuracy_after": 0.921,
    "reward/score_before": -2.97,
    "reward/score_after": 4.61,
    "objective/kl_before": 0.0,
    "objective/kl_after": 5.33,
    "rollout/response_length_before": 4.5,
    "rollout/response_length_after": 4.38,
}


def printed(out: io.StringIO) -> list[str]:
    return [line.rstrip() for line in out.getvalue().splitlines()]


def to_file(**settings: Any) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(rich.console.Console(file=out, width=80, highlight=False), **settings), out


def without_times(line: str) -> str:
    return re.sub(r"\d+:\d\d", "M:SS", line)


def test_a_log_file_gets_the_first_and_the_last_step_and_few_between() -> None:
    console, out = to_file(line_every_s=3600)
    with console.stage("ppo", 100) as progress:
        for step in range(100):
            progress.advance(score=step / 8, **({"accuracy": 0.25} if step == 50 else {}))
    assert [without_times(line) for line in printed(out)] == [
        "ppo: starting, 100 steps",
        "ppo   1/100  M:SS  score 0",
        "ppo 100/100  M:SS  score 12.4  accuracy 0.25",
    ]


def test_a_log_file_gets_a_line_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("cluster.console.time.monotonic", lambda: now)
    console, out = to_file(line_every_s=50.0)
    with console.stage("sft", 12) as progress:
        for _ in range(12):
            now += 20.0
            progress.advance(loss=float("nan"))
    lines = printed(out)
    assert [line.split()[1] for line in lines[1:]] == ["1/12", "4/12", "7/12", "10/12", "12/12"]
    assert all(line.endswith("loss nan") for line in lines[1:])


def test_force_color_does_not_put_a_bar_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console, out = to_file()
    with console.stage("sft", 1) as progress:
        progress.advance(loss=0.5)
    assert [without_times(line) for line in printed(out)] == ["sft: starting, 1 steps", "sft 1/1  M:SS  loss 0.5"]


def test_a_terminal_of_80_columns_gets_a_bar_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w", encoding="utf-8") as terminal:
        out = rich.console.Console(file=terminal, width=80, _environ={"TERM": "xterm", "NO_COLOR": "1"})
        console = Console(out)
        with console.stage("reward", 120) as progress:
            for _ in range(120):
                progress.advance(score=-2.1234, kl=10.5432, length=14.532, accuracy=0.912)
            console.note("said [in] between")
        terminal.flush()
        text = ""
        while "120/120" not in text:  # a terminal hands over what it has so far, not all of it
            text += os.read(reader, 1 << 16).decode()
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            text += os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert "\x1b[3" not in text, "colours in spite of NO_COLOR"
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip() for line in re.split(r"[\r\n]+", text)]
    assert "said [in] between" in lines
    bars = [line for line in lines if line.startswith("reward")]
    assert re.fullmatch(r"reward ━+ 120/120 score -2\.12  kl 10\.5  length 14\.5  accuracy 0\.912 \d\d:\d\d", bars[-1])
    assert len(bars[-1]) <= 80


def test_the_report_shows_before_and_after_answers_and_paths(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "best").mkdir(parents=True)
    for name in ("curves.png", "frontier.png"):
        (tmp_path / name).touch()
    examples: list[dict[str, Any]] = [
        {
            "prompt": "Spell backward:\napple",
            "before": "elpa",
            "after": "elppa",
            "score_before": -2.1,
            "score_after": 4.25,
            "right_before": False,
            "right_after": True,
        },
        {"prompt": "[bold]x", "before": "", "after": "\x1b[31mred"},
    ]
    console, out = to_file()
    console.report(SUMMARY, examples, tmp_path)
    lines = printed(out)
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    words = [line.split() for line in lines]
    assert ["held-out", "accuracy", "21.4%", "92.1%"] in words
    assert ["reward", "score,", "mean", "-2.970", "4.610"] in words
    assert ["KL", "to", "the", "reference,", "nats", "0.000", "5.330"] in words
    assert ["response", "length,", "tokens", "4.5", "4.4"] in words
    assert "The reward model orders 97.3% of the held-out pairs right." in lines
    assert "Time: sft 0:41, ppo 1:02:05." in lines
    at = lines.index("  Spell backward: apple")
    assert lines[at + 1].split() == ["before", "wrong", "elpa", "(score", "-2.1)"]
    assert lines[at + 2].split() == ["after", "right", "elppa", "(score", "4.25)"]
    assert lines[at + 3] == "  [bold]x"
    assert lines[at + 4].split() == ["before", "(nothing)"]
    assert lines[at + 5].split() == ["after", r"\x1b[31mred"]
    assert f"  trained weights  {tmp_path / 'export'}" in lines
    assert f"  best policy      {tmp_path / 'export' / 'best'}" in lines
    assert f"  curves           {tmp_path / 'curves.png'}" in lines
    assert f"  score against KL {tmp_path / 'frontier.png'}" in lines
    assert not any("samples.jsonl" in line for line in lines), "there is no such file"


def test_a_run_without_ppo_reports_what_it_has(tmp_path: Path) -> None:
    console, out = to_file()
    console.report({"experiment": "x", "seed": 0, "stages": ["sft"], "timing/sft_s": 5.0}, (), tmp_path)
    text = out.getvalue()
    assert "before" not in text
    assert "Time: sft 0:05." in text


def test_a_table_stands_below_an_empty_line() -> None:
    console, out = to_file()
    table = rich.table.Table("kl", "score", box=None)
    table.add_row("0.5", "2")
    console.note("before it")
    console.table(table)
    assert [line.split() for line in printed(out)] == [["before", "it"], [], ["kl", "score"], ["0.5", "2"]]


def test_a_long_answer_loses_its_middle(tmp_path: Path) -> None:
    console, out = to_file()
    console.report(SUMMARY, [{"prompt": "p", "before": "first " + "x " * 500 + "last", "after": "y"}], tmp_path)
    text = out.getvalue()
    assert "first" in text
    assert "last" in text
    assert text.count("x") < 100
    assert " ... " in text
