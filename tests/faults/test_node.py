"""A node that is lost, on a cluster of several raylets on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.faults.conftest import SETTINGS
from tests.runs import launched, metrics_of, reproducible
from tests.soak.watch import stat_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]
ROLES = ("ray::GeneratorProcess", "ray::RankProcess", "ray::RewardProcess")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head node with room for two processes of a run; its raylet stays."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


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
            found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while it was looked at
    return found


def raylet_of(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def test_what_was_on_a_lost_node_moves_to_another(cluster: Any, undisturbed: Path, tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2)]
    settings = (*SETTINGS, f"cluster.address={cluster.address}", "cluster.heartbeat_s=12", "cluster.num_generators=2")
    with launched(tmp_path / "moved", *settings) as run:
        run.await_step("ppo", 2)
        lost = max(map(raylet_of, nodes), key=lambda raylet: len(processes_below(raylet)))
        there = processes_below(lost)
        assert there
        for pid in (lost, *there):  # at once, as with a machine; by themselves they might live on to the run's end
            os.kill(pid, signal.SIGKILL)
        run.succeed()
    assert "is lost" in run.output
    assert reproducible(run.metrics()) == reproducible(metrics_of(undisturbed))
