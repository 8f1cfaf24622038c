"""What each process asks of the cluster, and where it is put.

`plan` is pure: settings in, bundles and places out. `reserve` asks Ray for a placement group, and says what is
missing when it cannot have one. A bundle is what Ray reserves on one node as a whole; a place is where one process
stands in it.

- **disaggregated**: every process has a bundle of its own, with all the GPUs that it uses. So the processes of a
  tensor-parallel generator are on one node.
- **colocated**: a generator of n GPUs shares a bundle of these with n learner ranks, which take turns with it; reward
  models stand on the first of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from conf.check import check_even
from conf.schema import ClusterConfig, ConfigError, GeneratorConfig

COLOCATED = "colocated"


@dataclass(frozen=True)
class Bundle:
    """What is reserved on one node."""

    cpus: int
    gpus: int = 0

    def resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)} | ({"GPU": float(self.gpus)} if self.gpus else {})


@dataclass(frozen=True)
class Place:
    """One process: its role, its number within the role, and where it stands."""

    role: str  # generator | reward | learner
    index: int
    bundle: int  # the number of it among the plan's bundles
    gpus: tuple[int, ...] = ()  # which of the bundle's GPUs it sees
    threads: int = 1  # of OpenMP, on a CPU


@dataclass(frozen=True)
class Plan:
    """The bundles of a group of processes, and the place of each of them."""

    bundles: tuple[Bundle, ...]
    places: tuple[Place, ...]

    @staticmethod
    def apart(processes: Iterable[tuple[str, int, int]]) -> Plan:
        """Return a plan in which each has a bundle of its own, and a core; `processes` are role, GPUs, threads."""
        bundles: list[Bundle] = []
        places: list[Place] = []
        counts = Counter[str]()
        for role, gpus, threads in processes:
            places.append(Place(role, counts[role], len(bundles), tuple(range(gpus)), threads))
            bundles.append(Bundle(cpus=1, gpus=gpus))
            counts[role] += 1
        return Plan(tuple(bundles), tuple(places))

    def of(self, role: str) -> list[Place]:
        """Return the places of a role, by their numbers."""
        return sorted((place for place in self.places if place.role == role), key=lambda place: place.index)

    def bundle_of(self, place: Place) -> Bundle:
        return self.bundles[place.bundle]

    def has_own_gpus(self, place: Place) -> bool:
        """Return whether nobody else sees the GPUs of the place; true of one without any."""
        seen = (other.gpus for other in self.places if other.bundle == place.bundle and other != place)
        return not any(set(place.gpus) & set(gpus) for gpus in seen)

    def routes(self, width: int) -> list[list[int]]:
        """Return, for each generator of `width` processes, the learner rank that sends weights to each of these.

        It is the one that a process shares its GPU with, or rank 0 where they share none.
        """
        routes = []
        for generator in self.of("generator"):
            beside = [place.index for place in self.of("learner") if place.bundle == generator.bundle]
            routes.append(beside or [0] * width)
        return routes

    def in_node_order(self, nodes: Sequence[str]) -> Plan:
        """Return the plan with learner ranks numbered node by node, so that neighbours are near each other. Pure.

        Args:
            nodes: where Ray has put each bundle, in any form that tells nodes apart.
        """
        first = {node: number for number, node in reversed(list(enumerate(nodes)))}  # where each node is met first
        ordered = sorted(self.of("learner"), key=lambda place: (first[nodes[place.bundle]], place.index))
        numbered = {id(place): replace(place, index=rank) for rank, place in enumerate(ordered)}
        return replace(self, places=tuple(numbered.get(id(place), place) for place in self.places))


def plan(
    cluster: ClusterConfig,
    generator: GeneratorConfig,
    *,
    device: str,
    roles: tuple[str, ...],
    rewards_on_gpus: bool = True,
) -> Plan:
    """Return a place for each process of the named roles: a core each and, on GPUs, as many GPUs as it uses.

    `rewards_on_gpus` is whether a reward actor holds a model; one that only calls functions needs no GPU. Where a stage
    has no generators there is nobody to share GPUs with, and every rank has its own.

    Raises:
        ConfigError: colocated generators and learner ranks do not come out even.
    """
    on_gpus = device == "cuda"
    width = generator.tensor_parallel_size
    gpus = {"generator": width, "reward": int(rewards_on_gpus), "learner": 1}
    counts = {"generator": cluster.num_generators, "reward": cluster.num_rewards, "learner": cluster.num_learners}
    threads = dict.fromkeys(gpus, cluster.threads) | {"learner": cluster.learner_threads or cluster.threads}
    if cluster.placement == COLOCATED and {"generator", "learner"} <= set(roles):
        return _colocated(counts, gpus if on_gpus else dict.fromkeys(gpus, 0), threads, roles=roles, width=width)
    return Plan.apart(
        (role, gpus[role] if on_gpus else 0, threads[role]) for role in roles for _ in range(counts[role])
    )


def _colocated(
    counts: Mapping[str, int],
    gpus: Mapping[str, int],
    threads: Mapping[str, int],
    *,
    roles: tuple[str, ...],
    width: int,
) -> Plan:
    """Return bundles of a generator and the `width` learner ranks that it shares its GPUs with, and rewards among them.

    `gpus` of each role are 0 on a CPU.
    """
    check_even(counts["generator"], width, counts["learner"])
    places: list[Place] = []
    for number in range(counts["generator"]):
        places += [
            Place("learner", number * width + rank, number, (rank,) if gpus["learner"] else (), threads["learner"])
            for rank in range(width)
        ]
        places.append(Place("generator", number, number, tuple(range(gpus["generator"])), threads["generator"]))
    if "reward" in roles:
        for index in range(counts["reward"]):
            place, turn = index % counts["generator"], index // counts["generator"]
            seen = (turn % width,) if gpus["reward"] else ()
            places.append(Place("reward", index, place, seen, threads["reward"]))
    standing = Counter(place.bundle for place in places)
    bundles = tuple(Bundle(cpus=standing[number], gpus=gpus["generator"]) for number in range(counts["generator"]))
    return Plan(bundles, tuple(places))


def without_place(bundles: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> int | None:
    """Return the number of a bundle that no node has room for beside the others, None if all can stand somewhere. Pure.

    The largest are placed first, each on the fullest node with room: what this fits, a scheduler can fit.

    Args:
        nodes: what each node has in all, by resource.
    """
    free = [dict(node) for node in nodes]
    largest_first = sorted(range(len(bundles)), key=lambda n: (bundles[n].gpus, bundles[n].cpus), reverse=True)
    for number in largest_first:
        needs = bundles[number].resources()
        fitting = [node for node in free if all(node.get(name, 0.0) >= needs[name] for name in needs)]
        if not fitting:
            return number
        room = min(fitting, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)))
        for name, amount in needs.items():
            room[name] -= amount
    return None


def missing(planned: Plan, nodes: Sequence[Mapping[str, float]]) -> ConfigError | None:
    """Return what a cluster of these nodes lacks for the plan and what to change, None if it lacks nothing. Pure."""
    number = without_place(planned.bundles, nodes)
    if number is None:
        return None
    asked = total(bundle.resources() for bundle in planned.bundles)
    has = [{name: node.get(name, 0.0) for name in asked} for node in nodes]
    bundle = planned.bundles[number]
    standing = [place for place in planned.places if place.bundle == number]
    who = " and ".join(f"{place.role} {place.index}" for place in standing)
    # A generator is never wider than a node; else what is too many is processes.
    widest = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    generators = [place for place in standing if place.role == "generator"]
    if generators and len(generators[0].gpus) > widest > 0:
        remedy = f"no node has so many; lower generator.tensor_parallel_size to {widest:g} or less"
    else:
        remedy = f"lower cluster.num_{standing[0].role}s or the number of other processes, or add nodes"
    return ConfigError(
        "cluster",
        f"{len(planned.places)} processes",
        f"they need {amounts(asked)} in all, and the cluster has {' + '.join(map(amounts, has)) or 'no nodes'}: there "
        f"is no node with {amounts(bundle.resources())} left for {who}; {remedy}",
    )


def reserve(planned: Plan, *, timeout_s: float) -> Any:
    """Return a placement group with the plan's bundles, in order.

    Raises:
        ConfigError: the cluster cannot hold them, which is said at once, or did not within the time.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    error = missing(planned, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if error is not None:
        raise error
    group = placement_group([bundle.resources() for bundle in planned.bundles], strategy="PACK")
    if not group.wait(timeout_s):
        asked = total(bundle.resources() for bundle in planned.bundles)
        free = {name: ray.available_resources().get(name, 0.0) for name in asked}
        remove_placement_group(group)
        raise ConfigError(
            "cluster.start_timeout_s",
            timeout_s,
            f"the cluster did not place {amounts(asked)} within this time, though it has that much in all; free now: "
            f"{amounts(free)}; others may be using it",
        )
    return group


def nodes_of(group: Any) -> list[str]:
    """Return the node of each bundle of a placement group that is placed."""
    from ray.util import placement_group_table

    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return [nodes[number] for number in sorted(nodes)]


def total(resources: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the sum of resources, by name."""
    added: dict[str, float] = {}
    for one in resources:
        for name, amount in one.items():
            added[name] = added.get(name, 0.0) + amount
    return added


def amounts(resources: Mapping[str, float]) -> str:
    """Return resources as words, such as 2 CPU and 1 GPU."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"
