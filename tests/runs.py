"""Runs of the whole system as a user starts them, for tests that look at them from outside and do them harm."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
# what two equal runs may differ in
VARYING = ("timing/", "throughput/", "idle/", "memory/", "recoveries/", "sync/bytes_per_s")
SMALL = [
    "experiment=quickstart",
    "sft.num_steps=3",
    "sft.batch_size=8",
    "reward_training.num_steps=3",
    "reward_training.batch_size=8",
    "algorithm.num_steps=3",
    "algorithm.prompts_per_step=8",
    "algorithm.samples_per_prompt=2",
    "algorithm.mini_batch_size=8",
    "evaluation.every=2",
    "evaluation.num_prompts=16",
    "data.task.num_train=200",
    "data.task.num_eval=32",
    "reward.batch_size=4",
]
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # who look for a dead driver for a minute before they end
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}


class LaunchedRun:
    """A run of launch.py in a process of its own, with everything that it has started."""

    def __init__(
        self,
        run_dir: Path,
        *overrides: str,
        settings: Sequence[str] = SMALL,
        environment: dict[str, str] | None = None,
    ) -> None:
        """`overrides` come after `settings`, and win."""
        self.dir, self.mark = run_dir, new_mark()
        self.log = run_dir.with_name(f"{run_dir.name}.{self.mark}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    "prlimit",
                    f"--msgqueue={self.mark}",
                    sys.executable,
                    "launch.py",
                    *settings,
                    f"run.dir={run_dir}",
                    *overrides,
                ],
                cwd=PROJECT,
                env=os.environ | ENVIRONMENT | (environment or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, *, seconds: float = 900) -> int:
        """Return its exit code. Raises AssertionError with its output if it does not end."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output}") from None

    def succeed(self, *, seconds: float = 900) -> None:
        assert self.end(seconds=seconds) == 0, self.output

    def processes(self) -> dict[int, str]:
        """Return the processes of the run: the driver, Ray's, vLLM's, the ranks, and whatever these start."""
        return marked_processes(self.mark)

    def pids(self, kind: str) -> list[int]:
        """Return the processes whose title begins so, such as ray::GeneratorProcess, the oldest first."""
        return sorted(pid for pid, title in self.processes().items() if title.startswith(kind))

    def await_step(self, stage: str, step: int, *, seconds: float = 240) -> None:
        """Return when the step is recorded."""
        self.await_that(lambda: reached(self.dir, stage, step), f"step {step} of {stage}", seconds=seconds)

    def await_call(self, method: str, *, seconds: float = 240) -> int:
        """Return the process in which a method runs, such as RankProcess.update, as soon as one is seen in it.

        Which processes of that kind there are is looked up only every second, so that looking costs the run little.
        """
        kind, listed_s = f"ray::{method.partition('.')[0]}", 0.0
        there: list[int] = []
        found: list[int] = []

        def seen() -> bool:
            nonlocal listed_s
            if time.monotonic() - listed_s >= 1:
                there[:], listed_s = self.pids(kind), time.monotonic()
            found[:] = [pid for pid in there if title_of(pid).startswith(f"ray::{method}")]
            return bool(found)

        self.await_that(seen, f"a call of {method}", seconds=seconds, every=0.002)
        return found[0]

    def await_that(self, condition: Callable[[], bool], what: str, *, seconds: float, every: float = 0.05) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{self.output}"
            time.sleep(every)

    def kill(self) -> None:
        """Kill the driver on the spot, and see that nothing of the run outlives it."""
        self.process.kill()
        self.process.wait(30)
        self.assert_nothing_left(but=AGENTS)

    def assert_nothing_left(self, *, but: tuple[str, ...] = (), seconds: float = 90) -> None:
        def left() -> list[str]:
            return [title for title in self.processes().values() if not title.startswith(but or "\n")]

        assert wait_for(lambda: not left(), seconds=seconds), left()

    def metrics(self) -> list[dict[str, Any]]:
        return metrics_of(self.dir)


@contextmanager
def launched(
    run_dir: Path,
    *overrides: str,
    settings: Sequence[str] = SMALL,
    environment: dict[str, str] | None = None,
) -> Iterator[LaunchedRun]:
    """Start a run, and leave nothing of it when the block is left."""
    run = LaunchedRun(run_dir, *overrides, settings=settings, environment=environment)
    try:
        yield run
    finally:
        for pid in run.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait(30)


def new_mark() -> int:
    """Return a number that no other run has now: as a limit of message queues, which nobody uses, all inherit it.

    An environment variable would not do: a process that gives itself a title, as Ray's do, writes over them.
    """
    taken = {mark_of(int(folder.name)) for folder in Path("/proc").iterdir() if folder.name.isdigit()}
    return random.SystemRandom().choice([mark for mark in range(100_000, 800_000) if mark not in taken])


def mark_of(pid: int) -> int | None:
    """Return the limit of message queues of a process, in bytes; None if it ends, has ended, or has no limit."""
    try:
        limits = Path(f"/proc/{pid}/limits").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    found = re.search(r"^Max msgqueue size +(\d+) ", limits, re.MULTILINE)  # of a process that ends there is no text
    return None if found is None else int(found[1])


def marked_processes(mark: int) -> dict[int, str]:
    """Return the processes with the mark, with their titles; not those that have ended and are not waited for yet."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and mark_of(int(folder.name)) == mark:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
    return {pid: command for pid, command in found.items() if command}


def title_of(pid: int) -> str:
    """Return the title of a process, which for Ray's names the call that runs; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl that are whole."""
    path = run_dir / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )


def reached(run_dir: Path, stage: str, step: int) -> bool:
    return any(row["stage"] == stage and row["step"] >= step for row in metrics_of(run_dir))


def reproducible(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without what two equal runs may differ in."""
    return [{key: value for key, value in row.items() if not key.startswith(VARYING)} for row in rows]


def weights_of(run_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of weights that the run has exported."""
    files = sorted((run_dir / "export").rglob("*.safetensors"))
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_for(condition: Callable[[], bool], *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False
