"""What a person sees of a run: a progress bar for each stage, messages, and the report at its end.

All of it goes to standard output. Where that is not a terminal (a log file, `ray job submit`, CI) a bar becomes one
plain line now and then. Nothing is said by colour alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import rich.console
from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_COMPARED = (  # what it is called, its name in summary.json without _before and _after, how it is written
    ("held-out accuracy", "eval/accuracy", "{:.1%}"),
    ("reward score, mean", "reward/score", "{:.3f}"),
    ("KL to the reference, nats", "objective/kl", "{:.3f}"),
    ("response length, tokens", "rollout/response_length", "{:.1f}"),
    ("responses cut off", "rollout/truncated_fraction", "{:.1%}"),
)
_PATHS = (
    ("trained weights", "export"),
    ("best policy", "export/best"),
    ("checkpoints", "checkpoints"),
    ("curves", "curves.png"),
    ("score against KL", "frontier.png"),
    ("summary", "summary.json"),
    ("every figure", "metrics.jsonl"),
    ("samples", "samples.jsonl"),
)
_LONGEST_TEXT = 160  # characters of a prompt or a response in the report


class StageProgress(Protocol):
    """How far one stage is."""

    def advance(self, **numbers: float) -> None:
        """One step is done; `numbers` are shown beside it, each until it is given anew."""
        ...

    def at(self, done: int) -> None:
        """So many steps are done, of a stage that is taken up again or goes back."""
        ...


class Console:
    """Writes to standard output, or to the rich console that it is given."""

    def __init__(self, out: rich.console.Console | None = None, *, line_every_s: float = 10.0) -> None:
        self._out = out or rich.console.Console(highlight=False)
        self._line_every_s = line_every_s

    def note(self, text: str) -> None:
        """Print a message as it is, above the progress bar if there is one."""
        self._out.print(text, markup=False, highlight=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        """Print a table, below an empty line."""
        self._out.print()
        self._out.print(table)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[StageProgress]:
        """Show the progress of a stage of `total` steps for as long as the block lasts."""
        # FORCE_COLOR makes rich take any file for a terminal; a bar needs a real one.
        if not (self._out.is_interactive and self._out.file.isatty()):
            yield _Lines(self, name, total, self._line_every_s)
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=max(8, min(40, self._out.width - 70))),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        with Progress(*columns, console=self._out) as progress:
            yield _Bar(progress, progress.add_task(name, total=total, numbers="starting"))

    def report(self, summary: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], run_dir: Path) -> None:
        """Print what the run achieved and where its results are.

        `summary` is that of summary.json, and what it does not hold is left out. Each of `examples` has `prompt`,
        `before` and `after`, and may have `score_` and `right_` of both.
        """
        self._out.print()
        self._out.rule(Text(f"{summary['experiment']}, seed {summary['seed']}", style="bold"))
        compared = _comparison(summary)
        if compared.row_count:
            self._out.print(compared)
        if "reward_model/eval_accuracy" in summary:
            share = summary["reward_model/eval_accuracy"]
            self.note(f"The reward model orders {share:.1%} of the held-out pairs right.")
        spent = [f"{stage} {_duration(summary[f'timing/{stage}_s'])}" for stage in summary["stages"]]
        self.note(f"Time: {', '.join(spent)}.")
        if examples:
            self._print_heading("Held-out prompts and their answers, before and after")
            for example in examples:
                self._out.print(_example(example))
        self._print_heading("Results")
        for what, name in _PATHS:
            if (run_dir / name).exists():
                self.note(f"  {what:<17}{run_dir / name}")

    def _print_heading(self, text: str) -> None:
        self._out.print()
        self._out.print(Text(text, style="bold"))


class _Bar:
    """A bar in a terminal."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._numbers: dict[str, float] = {}

    def advance(self, **numbers: float) -> None:
        self._numbers |= numbers
        self._progress.update(self._task, advance=1, numbers=_written(self._numbers))

    def at(self, done: int) -> None:
        self._progress.update(self._task, completed=done)


class _Lines:
    """A line at the start, after the first step and the last, and every `every_s` seconds between."""

    def __init__(self, console: Console, name: str, total: int, every_s: float) -> None:
        self._console, self._name, self._total, self._every_s = console, name, total, every_s
        self._numbers: dict[str, float] = {}
        self._done = 0
        self._started = self._last_line = time.monotonic()
        console.note(f"{name}: starting, {total} steps")

    def at(self, done: int) -> None:
        if done != self._done:
            self._console.note(f"{self._name}: goes on after step {done}")
        self._done = done

    def advance(self, **numbers: float) -> None:
        self._numbers |= numbers
        self._done += 1
        now = time.monotonic()
        if self._done in (1, self._total) or now - self._last_line >= self._every_s:
            self._last_line = now
            count = f"{self._done:>{len(str(self._total))}}/{self._total}"
            elapsed = _duration(now - self._started)
            self._console.note(f"{self._name} {count}  {elapsed}  {_written(self._numbers)}".rstrip())


def _written(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {_figure(value)}" for name, value in numbers.items())


def _figure(value: float) -> str:
    """Three significant digits, of large numbers all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _comparison(summary: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    for what, name, pattern in _COMPARED:
        if f"{name}_before" in summary and f"{name}_after" in summary:
            table.add_row(what, *(pattern.format(summary[f"{name}_{when}"]) for when in ("before", "after")))
    return table


def _example(example: Mapping[str, Any]) -> Group:
    """One prompt over its two answers, with the verdict on each in words."""
    answers = Table.grid(padding=(0, 2, 0, 0))
    answers.add_column(width=6)
    answers.add_column(width=5)
    answers.add_column()
    for when in ("before", "after"):
        verdict = Text()
        if f"right_{when}" in example:
            verdict = Text("right", style="green") if example[f"right_{when}"] else Text("wrong", style="red")
        score = f"  (score {_figure(example[f'score_{when}'])})" if f"score_{when}" in example else ""
        answers.add_row(when, verdict, Text(_one_line(example[when]) or "(nothing)").append(score, style="dim"))
    prompt = Text(_one_line(example["prompt"]), style="italic")
    return Group(Padding(prompt, (0, 0, 0, 2)), Padding(answers, (0, 0, 0, 6), expand=False))


def _one_line(text: str) -> str:
    """The text on one line, its middle left out if it is long; what cannot be printed is written as an escape.

    A model may well answer with the control characters of a terminal.
    """
    words = " ".join(text.split())
    if len(words) > _LONGEST_TEXT:
        words = f"{words[: _LONGEST_TEXT // 2]} ... {words[-_LONGEST_TEXT // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
