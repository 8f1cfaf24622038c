"""Nodes of a Ray cluster that is simulated on this machine: one raylet each, and the processes below it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from tests.soak.watch import stat_of

ROLES = ("ray::GeneratorProcess", "ray::RankProcess", "ray::RewardProcess")


def processes_below(raylet: int) -> list[int]:
    """Return the run's processes on a node, which are children of its raylet."""
    return [pid for pid, title in all_processes().items() if title.startswith(ROLES) and parent_of(pid) == raylet]


def parent_of(pid: int) -> int:
    """Return the parent's number, 0 for a process that has ended."""
    try:
        return int(stat_of(pid)[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def all_processes() -> dict[int, str]:
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while it was looked at
    return found


def raylet_of(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def kill_node(raylet: int) -> list[str]:
    """Kill a node and the run's processes on it; return what these were.

    At once, as with a machine: by themselves they might live on to the run's end.
    """
    titles, there = all_processes(), processes_below(raylet)
    for pid in (raylet, *there):
        os.kill(pid, signal.SIGKILL)
    return [titles[pid] for pid in there]
