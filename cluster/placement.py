"""What each process asks of the cluster, and where it is put.

`plan` is pure; `reserve` asks Ray for a placement group and says what is missing when it cannot have one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conf.schema import ClusterConfig, ConfigError, GeneratorConfig


@dataclass(frozen=True)
class Bundle:
    """One process: its role, its number within the role, and what it needs on one node."""

    role: str  # generator | reward | learner
    index: int
    cpus: int
    gpus: int
    threads: int = 1  # of OpenMP, on a CPU

    def resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)} | ({"GPU": float(self.gpus)} if self.gpus else {})


def plan(
    cluster: ClusterConfig, generator: GeneratorConfig, *, device: str, roles: tuple[str, ...]
) -> tuple[Bundle, ...]:
    """Return one bundle for each process of the named roles: a core each and, on GPUs, as many GPUs as it uses."""
    gpus = {"generator": generator.tensor_parallel_size, "reward": 1, "learner": 1}
    counts = {"generator": cluster.num_generators, "reward": cluster.num_rewards, "learner": cluster.num_learners}
    threads = dict.fromkeys(gpus, cluster.threads) | {"learner": cluster.learner_threads or cluster.threads}
    return tuple(
        Bundle(role, index, cpus=1, gpus=gpus[role] if device == "cuda" else 0, threads=threads[role])
        for role in roles
        for index in range(counts[role])
    )


def without_place(bundles: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> Bundle | None:
    """Return a process that no node has room for beside the others, None if all can stand somewhere. Pure.

    The largest are placed first, each on the first node with room: what this fits, a scheduler can fit.

    Args:
        nodes: what each node has in all, by resource.
    """
    free = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda one: (one.gpus, one.cpus), reverse=True):
        needs = bundle.resources()
        room = next((node for node in free if all(node.get(name, 0.0) >= needs[name] for name in needs)), None)
        if room is None:
            return bundle
        for name, amount in needs.items():
            room[name] -= amount
    return None


def reserve(bundles: tuple[Bundle, ...], *, timeout_s: float) -> Any:
    """Return a placement group with one bundle for each process, in order.

    Raises:
        ConfigError: the cluster cannot hold them, which is said at once, or did not within the time.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    asked: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.resources().items():
            asked[name] = asked.get(name, 0.0) + amount
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has = [{name: node.get(name, 0.0) for name in asked} for node in nodes]
    odd = without_place(bundles, has)
    if odd is not None:
        raise ConfigError(
            "cluster",
            f"{len(bundles)} processes",
            f"they need {amounts(asked)} in all, and the cluster has {' + '.join(map(amounts, has))}: there is no node "
            f"with {amounts(odd.resources())} left for {odd.role} {odd.index}; lower cluster.num_{odd.role}s or "
            f"{'generator.tensor_parallel_size' if odd.role == 'generator' else 'the number of other processes'}, or "
            "add nodes",
        )
    group = placement_group([bundle.resources() for bundle in bundles], strategy="PACK")
    if not group.wait(timeout_s):
        free = {name: ray.available_resources().get(name, 0.0) for name in asked}
        remove_placement_group(group)
        raise ConfigError(
            "cluster.start_timeout_s",
            timeout_s,
            f"the cluster did not place {amounts(asked)} within this time, though it has that much in all; free now: "
            f"{amounts(free)}; others may be using it",
        )
    return group


def amounts(resources: Mapping[str, float]) -> str:
    """Return resources as words, such as 2 CPU and 1 GPU."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"
