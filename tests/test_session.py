"""A cluster of a run's own: what goes when one of its processes is killed. Ten seconds, with real Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import ray

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
