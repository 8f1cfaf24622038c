"""A Ray session for one run: attached to a cluster or made for it, and always taken down again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ray

from cluster.placement import plan, reserve
from cluster.processes import Placement
from conf.schema import ClusterConfig, GeneratorConfig

PROJECT = Path(__file__).resolve().parent.parent
PASSED_ON = ("MANTA_REWARD_TOKEN",)  # what reward actors on other nodes need of this process's environment
OBJECT_STORE_BYTES = 256 << 20  # of a cluster of its own on a CPU machine: rollouts are small


class Stopped(BaseException):  # a request and not an error: no `except Exception` on its way may keep it
    """The run was asked to stop: Ctrl-C or SIGTERM."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


@dataclass(frozen=True)
class Session:
    """The cluster as the stages see it."""

    cluster: ClusterConfig
    generator: GeneratorConfig
    device: str  # cpu | cuda

    @contextmanager
    def placed(self, *roles: str) -> Iterator[Placement]:
        """Reserve what the processes of the roles need; on leaving, end them and give it back."""
        bundles = plan(self.cluster, self.generator, device=self.device, roles=roles)
        group = reserve(bundles, timeout_s=self.cluster.start_timeout_s)
        try:
            yield Placement(group, bundles, process_environment(self.cluster, self.device))
        finally:
            ray.util.remove_placement_group(group)  # Ray ends the processes that stand in it


def process_environment(cluster: ClusterConfig, device: str) -> dict[str, str]:
    """Return what every process needs in its environment before it imports anything."""
    environment = {"TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": python_path()}
    if device == "cpu":
        # Spinning OpenMP threads make every process on a busy machine many times slower.
        environment |= {"OMP_NUM_THREADS": str(cluster.threads), "OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu"}
    return environment | {name: os.environ[name] for name in PASSED_ON if name in os.environ}


def python_path() -> str:
    """Return the search path with the project first, for processes that do not start in its folder."""
    return os.pathsep.join(part for part in (str(PROJECT), os.environ.get("PYTHONPATH")) if part)


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Stopped`, once; another one while the run is being taken down ends it at once."""

    asked = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        raise Stopped(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if not asked:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def ray_session(cluster: ClusterConfig, generator: GeneratorConfig) -> Iterator[Session]:
    """Attach to `cluster.address` or RAY_ADDRESS, else start a cluster of its own; end it on leaving.

    On a machine with fewer cores than the run has processes, a cluster of its own counts one core for each all the
    same: the phases of an iteration take turns.
    """
    device = chosen_device(cluster)
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address}
    if address is None:
        processes = plan(cluster, generator, device=device, roles=("generator", "reward", "learner"))
        options = {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, len(processes)),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES if device == "cpu" else None,
        }
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=True, **options)
        with stop_signals():  # after ray.init, which sets handlers of its own
            yield Session(cluster, generator, device)
    finally:
        ray.shutdown()


def chosen_device(cluster: ClusterConfig) -> str:
    """Return "cpu" or "cuda"; "auto" asks torch what this machine has."""
    if cluster.device != "auto":
        return cluster.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
