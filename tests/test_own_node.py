"""The driver's own node is lost to Ray: the run is told so at once, since nothing can be put anywhere again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import ray

from cluster.faults import ProcessLostError
from cluster.members import Members
from cluster.placement import Plan, reserve
from cluster.processes import Placement, Process
from cluster.recoveries import Recoveries
from cluster.session import process_environment
from conf.schema import ClusterConfig
from tests.runs import wait_for

pytestmark = pytest.mark.ray
LIMITS = ClusterConfig(heartbeat_s=5.0, replace_timeout_s=600.0, start_timeout_s=120.0, max_recoveries=2)
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 500}


@pytest.fixture
def raylet() -> Iterator[int]:
    """The process of the raylet of a cluster that is quick to find a node dead."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _system_config=QUICK)
    yield ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    ray.shutdown()


def test_a_driver_whose_node_is_lost_gives_up_at_once_and_says_what_to_do(raylet: int) -> None:
    planned = Plan.apart([("reward", 0, 1)])
    placement = Placement(reserve(planned, timeout_s=60), planned, process_environment("cpu"))
    recoveries = Recoveries(limit=2, note=lambda text: None)
    members = Members(placement, Process, "reward", begin=None, limits=LIMITS, recoveries=recoveries)
    assert ray.get(members.handles[0].ping.remote(), timeout=120)
    os.kill(raylet, signal.SIGSTOP)
    try:
        assert wait_for(lambda: not any(node["Alive"] for node in ray.nodes()), seconds=60)
        with pytest.raises(
            ProcessLostError, match=r"reward 0 finds no place again: Ray has lost the node of the driver"
        ):
            members.replace({0: "it died"}, what="testing")
    finally:
        os.kill(raylet, signal.SIGKILL)
