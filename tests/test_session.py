"""A cluster of a run's own: processes that start ahead, and what goes when one is killed. With real Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import ray

from cluster.processes import Placement, Process
from cluster.session import ray_session
from conf.schema import ClusterConfig, GeneratorConfig
from tests.runs import wait_for
from tests.soak.watch import state_of

pytestmark = pytest.mark.ray


class Parent:
    """As a generator on a GPU, whose engine is a process of its own."""

    def child(self) -> tuple[int, int]:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        return os.getpid(), child.pid


def test_with_a_process_that_is_killed_its_children_go() -> None:
    with ray_session(ClusterConfig(device="cpu"), GeneratorConfig()):
        killed, ended = (ray.remote(Parent).remote() for _ in range(2))
        (pid, one), (_, other) = ray.get([killed.child.remote(), ended.child.remote()], timeout=60)
        os.kill(pid, signal.SIGKILL)
        ray.kill(ended)
        assert wait_for(lambda: all(state_of(child) in ("Z", "X") for child in (one, other)), seconds=60)


class Prepared(Process):
    """Remembers what it was asked to prepare for."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: tuple[str, bool] | None = None

    def prepare(self, device: str, *, reward_models: bool) -> None:
        self.prepared = device, reward_models

    def prepared_for(self) -> tuple[str, bool] | None:
        return self.prepared


def who(placement: Placement) -> list[tuple[int, tuple[str, bool] | None]]:
    handles = [placement.start(Prepared, bundle) for bundle in placement.places("learner")]
    return [(ray.get(handle.ping.remote()), ray.get(handle.prepared_for.remote())) for handle in handles]


def reserved_cores() -> float:
    return float(ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0))


def test_a_later_stage_takes_over_what_was_started_ahead() -> None:
    cluster = ClusterConfig(device="cpu", num_learners=2)
    with ray_session(cluster, GeneratorConfig(), reward_models=False) as session:
        with session.placed({"learner": Prepared}) as first:
            now = who(first)
            session.start_ahead({"learner": Prepared})
            session.start_ahead({"learner": Prepared})  # a stage that goes back to its checkpoint asks once more
            assert wait_for(lambda: reserved_cores() == 4, seconds=60), "two stages of two ranks, and no third"
        assert [what for _, what in now] == [None, None]
        with session.placed({"learner": Prepared}) as second:
            later = who(second)
            assert [what for _, what in later] == [("cpu", False), ("cpu", False)]
            assert {pid for pid, _ in later}.isdisjoint(pid for pid, _ in now)
            assert [what for _, what in who(second)] == [None, None], "whoever comes after them is new"
        assert wait_for(lambda: reserved_cores() == 0, seconds=60)
