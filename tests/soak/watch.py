"""What is seen of a run from outside while it is disturbed: the steps as they are recorded, and its memory."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.checkpoint_files import position
from tests.runs import LaunchedRun, title_of

ROLES = {"generator": "ray::GeneratorProcess", "reward": "ray::RewardProcess", "learner": "ray::RankProcess"}
LOOK_S, MEMORY_S, LIST_S = 0.5, 5.0, 1.0


@dataclass(frozen=True)
class Seen:
    """A row of metrics.jsonl as it appeared; rows that are recorded again after a fault appear again."""

    at_s: float
    leg: int  # how often the run had been started again
    stage: str
    step: int
    recoveries: dict[str, float]  # since the leg began

    def is_after(self, at_s: float) -> bool:
        """Return whether it was recorded after that, and not only seen later."""
        return self.at_s > at_s + LOOK_S


@dataclass(frozen=True)
class MemorySample:
    """The resident memory of one process, without the pages of files: what it has alone, and its share of the rest.

    Pages of files, such as those of torch's libraries, come and go with how many processes map them, and with what the
    system takes back from one that stands still.
    """

    at_s: float
    leg: int
    pid: int
    age_s: float
    kind: str  # driver, generator, reward, learner, spare (workers that Ray keeps ready), ray (its own processes)
    mib: float
    suspended: bool = False


@dataclass(frozen=True)
class Injected:
    """A fault as it was done."""

    name: str
    at_s: float
    outcome: str
    step: str  # the last that was recorded by then
    leg: int = 0  # the one in which the run goes on after it
    details: str = ""


@dataclass
class Observed:
    """All that was seen of a run and done to it."""

    steps: list[Seen] = field(default_factory=list)
    memory: list[MemorySample] = field(default_factory=list)
    faults: list[Injected] = field(default_factory=list)


class Rows:
    """Follows metrics.jsonl, which is cut when a run goes back."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset = path, 0

    def new(self) -> list[dict[str, Any]]:
        """Return the rows that were written since this was last asked, whole ones only."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            self._offset = min(self._offset, os.fstat(file.fileno()).st_size)
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]


class Watch:
    """Writes down what is seen of a run, in a thread of its own. Times are seconds since the watch began."""

    def __init__(self, run: LaunchedRun, observed: Observed) -> None:
        self.run, self.observed, self.leg = run, observed, 0
        self.recorded_s = self.furthest_s = 0.0
        self.furthest = (-1, -1)
        self._rows = Rows(run.dir / "metrics.jsonl")
        self._began = time.monotonic()
        self._listed: tuple[float, dict[int, str]] = (-LIST_S, {})
        self._done = threading.Event()
        pool = ThreadPoolExecutor(1)
        self._watching = pool.submit(self._watch)
        pool.shutdown(wait=False)

    def now(self) -> float:
        return time.monotonic() - self._began

    def follow(self, run: LaunchedRun) -> None:
        """Look at the processes of another leg from now on; the run folder is the same."""
        self.run, self.leg, self._listed = run, self.leg + 1, (-LIST_S, {})

    def stop(self) -> None:
        """End the thread; raises what it has raised."""
        self._done.set()
        self._watching.result()

    def check(self) -> None:
        """Raise what the thread has raised, if it has."""
        if self._watching.done():
            self._watching.result()

    def has_reached(self, stage: str, step: int) -> bool:
        return self.furthest >= position(stage, step)

    def pids(self, title: str) -> list[int]:
        """Return the processes whose title begins so at this moment, but for suspended ones.

        Quick enough to be asked all the time: which processes the run has is looked up only now and then.
        """
        now = time.monotonic()
        if now - self._listed[0] >= LIST_S:
            self._listed = (now, {pid: name for pid, name in self.run.processes().items() if name.startswith("ray::")})
        role = title.partition(".")[0]
        found = [
            pid for pid, name in self._listed[1].items() if name.startswith(role) and title_of(pid).startswith(title)
        ]
        return [pid for pid in found if state_of(pid) not in ("T", "Z", "X")]

    def _watch(self) -> None:
        due = 0.0
        while not self._done.wait(LOOK_S):
            now = self.now()
            for row in self._rows.new():
                recoveries = {key: value for key, value in row.items() if key.startswith("recoveries/")}
                self.observed.steps.append(Seen(now, self.leg, row["stage"], row["step"], recoveries))
                self.recorded_s = now
                if (here := position(row["stage"], row["step"])) > self.furthest:
                    self.furthest, self.furthest_s = here, now
            if now >= due:
                due = now + MEMORY_S
                self.observed.memory += memory_of(self.run, now, self.leg)


def memory_of(run: LaunchedRun, at_s: float, leg: int) -> list[MemorySample]:
    """Return the memory of every process of the run."""
    samples = []
    for pid, title in run.processes().items():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            kind = "driver" if pid == run.process.pid else kind_of(title)
            samples.append(MemorySample(at_s, leg, pid, age_of(pid), kind, own_mib(pid), state_of(pid) == "T"))
    return samples


def kind_of(title: str) -> str:
    """Return what a process other than the driver is, by its title."""
    if title.startswith("ray::IDLE"):
        return "spare"
    return next((role for role, name in ROLES.items() if title.startswith(name)), "ray")


def own_mib(pid: int) -> float:
    """Return the proportional set size without files, in MiB; 0 for a process that has ended and has no memory left."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024


def age_of(pid: int) -> float:
    """Return the seconds since the process was started."""
    ticks = int(stat_of(pid)[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def state_of(pid: int) -> str:
    """Return the letter of the state of a process; X for one that is not there."""
    try:
        return stat_of(pid)[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def stat_of(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third one on, the state."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
