"""A node that is lost, on a cluster of several raylets on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.faults.conftest import SETTINGS
from tests.nodes import kill_node, processes_below, raylet_of
from tests.runs import launched, metrics_of, reproducible

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head node with room for two processes of a run; its raylet stays."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def test_what_was_on_a_lost_node_moves_to_another(cluster: Any, undisturbed: Path, tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2)]
    settings = (*SETTINGS, f"cluster.address={cluster.address}", "cluster.heartbeat_s=12", "cluster.num_generators=2")
    with launched(tmp_path / "moved", *settings) as run:
        run.await_step("ppo", 2)
        lost = max(map(raylet_of, nodes), key=lambda raylet: len(processes_below(raylet)))
        assert kill_node(lost)
        run.succeed()
    assert "is lost" in run.output
    assert reproducible(run.metrics()) == reproducible(metrics_of(undisturbed))
