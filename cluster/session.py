"""A Ray session for one run: attached to a cluster or made for it, and always taken down again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from cluster.placement import nodes_of, plan, reserve
from cluster.processes import Placement, Process
from cluster.ray_access import check_reachable, own_token, refusal
from cluster.signals import kept_from_children
from conf.schema import ClusterConfig, GeneratorConfig

PROJECT = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 256 << 20  # of a cluster of its own on a CPU machine: rollouts are small


@dataclass
class Session:
    """The cluster as the stages see it."""

    cluster: ClusterConfig
    generator: GeneratorConfig
    device: str  # cpu | cuda
    has_room: bool  # for the processes of two stages at a time
    reward_models: bool = True  # whether reward actors hold any
    _ahead: dict[tuple[str, ...], Placement] = field(default_factory=dict, init=False)  # by their roles

    @contextmanager
    def placed(self, processes: Mapping[str, type[Process]]) -> Iterator[Placement]:
        """Reserve what these processes, by their roles, need; on leaving, end them and give it back."""
        placement = self._ahead.pop(tuple(processes), None) or self._reserved(processes)
        try:
            yield placement
        finally:
            ray.util.remove_placement_group(placement.group)  # Ray ends the processes that stand in it

    def start_ahead(self, processes: Mapping[str, type[Process]]) -> None:
        """Let the processes of a later stage start and import while this one trains, if there is room; at once.

        They know nothing yet, so that a stage is the same with them and without.
        """
        if self.has_room and tuple(processes) not in self._ahead:
            placement = self._reserved(processes)
            placement.start_ahead(processes, self.device, reward_models=self.reward_models)
            self._ahead[tuple(processes)] = placement

    def _reserved(self, processes: Mapping[str, type[Process]]) -> Placement:
        limit_s = self.cluster.start_timeout_s
        planned = plan(
            self.cluster,
            self.generator,
            device=self.device,
            roles=tuple(processes),
            rewards_on_gpus=self.reward_models,
        )
        group = reserve(planned, timeout_s=limit_s)
        return Placement(group, planned.in_node_order(nodes_of(group)), process_environment(self.device), limit_s)


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
def ray_session(cluster: ClusterConfig, generator: GeneratorConfig, *, reward_models: bool = True) -> Iterator[Session]:
    """Attach to `cluster.address` or RAY_ADDRESS, else start a cluster of its own; end it on leaving.

    On a machine with fewer cores than the run has processes, a cluster of its own counts one core for each all the
    same, and for the ranks of a supervised stage beside them: the phases of an iteration take turns. It answers only
    those who have its token, unless RAY_AUTH_MODE says otherwise.

    Raises:
        ConfigError: there is no cluster at the address, or it does not let us in.
    """
    device = chosen_device(cluster)
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    with _started(cluster, generator, device) if address is None else _joined(address):
        has_room = address is None and device == "cpu"
        yield Session(cluster, generator, device, has_room=has_room, reward_models=reward_models)


@contextmanager
def _started(cluster: ClusterConfig, generator: GeneratorConfig, device: str) -> Iterator[None]:
    processes = plan(cluster, generator, device=device, roles=("generator", "reward", "learner"))
    # With a process that is killed its own children go, such as vLLM's engine, which else keeps the memory of its GPU.
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")
    os.environ.setdefault(
        "RAY_prestart_worker_first_driver", "0"
    )  # who stand in places have an environment of their own
    with own_token():
        try:
            _init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, len(processes.places) + cluster.num_learners),
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
