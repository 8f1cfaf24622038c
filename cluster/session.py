"""A Ray session for one run: attached to a cluster or made for it, and always taken down again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from cluster.placement import plan, reserve
from cluster.processes import Placement
from cluster.ray_access import check_reachable, own_token, refusal
from cluster.signals import kept_from_children
from conf.schema import ClusterConfig, GeneratorConfig

PROJECT = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 256 << 20  # of a cluster of its own on a CPU machine: rollouts are small


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
            yield Placement(group, bundles, process_environment(self.device))
        finally:
            ray.util.remove_placement_group(group)  # Ray ends the processes that stand in it


def process_environment(device: str) -> dict[str, str]:
    """Return what every process needs in its environment before it imports anything, beside its number of threads.

    Ray writes it to its logs and shows it on its pages, so nothing secret may be in it.
    """
    environment = {"TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": python_path()}
    if device == "cpu":
        # Spinning OpenMP threads make every process on a busy machine many times slower.
        environment |= {"OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
        environment["MALLOC_ARENA_MAX"] = "1"  # calls run beside the main thread, and it alone can keep freed memory
    return environment


def python_path() -> str:
    """Return the search path with the project first, for processes that do not start in its folder."""
    return os.pathsep.join(part for part in (str(PROJECT), os.environ.get("PYTHONPATH")) if part)


@contextmanager
def ray_session(cluster: ClusterConfig, generator: GeneratorConfig) -> Iterator[Session]:
    """Attach to `cluster.address` or RAY_ADDRESS, else start a cluster of its own; end it on leaving.

    On a machine with fewer cores than the run has processes, a cluster of its own counts one core for each all the
    same: the phases of an iteration take turns. It answers only those who have its token, unless RAY_AUTH_MODE says
    otherwise.

    Raises:
        ConfigError: there is no cluster at the address, or it does not let us in.
    """
    device = chosen_device(cluster)
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    with _started(cluster, generator, device) if address is None else _joined(address):
        yield Session(cluster, generator, device)


@contextmanager
def _started(cluster: ClusterConfig, generator: GeneratorConfig, device: str) -> Iterator[None]:
    processes = plan(cluster, generator, device=device, roles=("generator", "reward", "learner"))
    # With a process that is killed its own children go, such as vLLM's engine, which else keeps the memory of its GPU.
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")
    with own_token():
        try:
            _init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, len(processes)),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES if device == "cpu" else None,
            )
            yield
        finally:
            ray.shutdown()


@contextmanager
def _joined(address: str) -> Iterator[None]:
    check_reachable(address)
    try:
        try:
            _init(address=address)
        except (ConnectionError, AuthenticationError) as error:
            raise refusal(address, error) from error
        yield
    finally:
        ray.shutdown()


def _init(**options: Any) -> None:
    # When a process is lost, the calls of others fail with it: whoever waits for them says what there is to say.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    with kept_from_children():
        ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=True, **options)


def chosen_device(cluster: ClusterConfig) -> str:
    """Return "cpu" or "cuda"; "auto" asks torch what this machine has."""
    if cluster.device != "auto":
        return cluster.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
