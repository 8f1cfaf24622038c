"""What each process asks of the cluster, and where it is put.

`plan` is pure; `reserve` asks Ray for a placement group and says what is missing when it cannot have one.
"""

from __future__ import annotations

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

    def resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)} | ({"GPU": float(self.gpus)} if self.gpus else {})


def plan(
    cluster: ClusterConfig, generator: GeneratorConfig, *, device: str, roles: tuple[str, ...]
) -> tuple[Bundle, ...]:
    """Return one bundle for each process of the named roles: a core each and, on GPUs, as many GPUs as it uses."""
    gpus = {"generator": generator.tensor_parallel_size, "reward": 1, "learner": 1}
    counts = {"generator": cluster.num_generators, "reward": cluster.num_rewards, "learner": cluster.num_learners}
    return tuple(
        Bundle(role, index, cpus=1, gpus=gpus[role] if device == "cuda" else 0)
        for role in roles
        for index in range(counts[role])
    )


def reserve(bundles: tuple[Bundle, ...], *, timeout_s: float) -> Any:
    """Return a placement group with one bundle for each process, in order.

    Raises:
        ConfigError: the cluster cannot hold them, or did not within the time.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    asked: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.resources().items():
            asked[name] = asked.get(name, 0.0) + amount
    total = ray.cluster_resources()
    for name, amount in asked.items():
        if total.get(name, 0.0) < amount:
            raise ConfigError(
                "cluster",
                f"{len(bundles)} processes",
                f"they need {amount:g} {name} and the cluster has {total.get(name, 0.0):g}; lower "
                "cluster.num_generators, cluster.num_learners, cluster.num_rewards or generator.tensor_parallel_size, "
                "or add nodes",
            )
    group = placement_group([bundle.resources() for bundle in bundles], strategy="PACK")
    if not group.wait(timeout_s):
        free = {name: ray.available_resources().get(name, 0.0) for name in asked}
        remove_placement_group(group)
        raise ConfigError(
            "cluster.start_timeout_s",
            timeout_s,
            f"the cluster did not place {asked} within this time, though it has that much in all; free now: {free}",
        )
    return group
