"""Where processes stand on a cluster of several nodes with GPUs: real Ray, simulated nodes, GPUs that are made up."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.learners import RankProcess
from cluster.placement import Plan, nodes_of, plan, reserve
from cluster.processes import VISIBLE, Placement
from cluster.session import process_environment
from conf.schema import ClusterConfig, GeneratorConfig

pytestmark = pytest.mark.ray

ROLES = ("learner", "generator", "reward")
GPUS_PER_NODE = 4


class Seated(RankProcess):
    """Says where it stands and what it sees."""

    def seat(self) -> tuple[str, list[str]]:
        return ray.get_runtime_context().get_node_id(), os.environ[VISIBLE].split(",")

    def meet(self, endpoint: tuple[str, int], rank: int, world_size: int) -> list[int]:
        """Return the ranks of all who have come to the endpoint."""
        from datetime import timedelta

        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host, port = endpoint
        store = TCPStore(host, port, is_master=rank == 0, timeout=timedelta(seconds=60), wait_for_workers=False)
        store.set(f"rank {rank}", str(rank))
        ranks = [int(store.get(f"rank {other}")) for other in range(world_size)]
        store.add("met", 1)
        while rank == 0 and store.add("met", 0) < world_size:  # the others read from it
            pass
        return ranks


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "num_gpus": GPUS_PER_NODE})
    cluster.add_node(num_cpus=8, num_gpus=GPUS_PER_NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@contextmanager
def seated(width: int, **settings: Any) -> Iterator[tuple[Plan, dict[str, list[Any]]]]:
    """Yield the plan as it was placed, and the handles of the processes of each role."""
    config = GeneratorConfig(tensor_parallel_size=width)
    planned = plan(ClusterConfig(**settings), config, device="cuda", roles=ROLES)
    group = reserve(planned, timeout_s=60)
    planned = planned.in_node_order(nodes_of(group))
    placement = Placement(group, planned, process_environment("cpu"))
    try:
        yield planned, {role: [placement.start(Seated, place) for place in planned.of(role)] for role in ROLES}
    finally:
        ray.util.remove_placement_group(group)


def seats(handles: dict[str, list[Any]]) -> dict[str, list[tuple[str, list[str]]]]:
    return {role: ray.get([one.seat.remote() for one in handles[role]], timeout=120) for role in handles}


def test_disaggregated_everyone_sees_gpus_of_their_own(two_nodes: Cluster) -> None:
    with seated(2, num_generators=2, num_learners=3) as (_, handles):
        found = seats(handles)
        seen = [(node, gpu) for role in ROLES for node, gpus in found[role] for gpu in gpus]
        assert len(seen) == len(set(seen)) == 2 * GPUS_PER_NODE, "all GPUs, none of them twice"
        assert [len(gpus) for _, gpus in found["generator"]] == [2, 2]
        assert [len(gpus) for _, gpus in found["learner"]] == [1, 1, 1]
        nodes = [node for node, _ in found["learner"]]
        assert len([1 for one, other in pairwise(nodes) if one != other]) <= 1, "in node order"


def test_colocated_a_generator_sees_the_gpus_of_its_ranks(two_nodes: Cluster) -> None:
    with seated(2, placement="colocated", num_generators=3, num_learners=6, num_rewards=1) as (planned, handles):
        found = seats(handles)
        seen = [(node, gpu) for node, gpus in found["learner"] for gpu in gpus]
        assert len(seen) == len(set(seen)) == 6, "each rank one, and no two the same"
        for number, (node, gpus) in enumerate(found["generator"]):
            ranks = [
                place.index for place in planned.of("learner") if place.bundle == planned.of("generator")[number].bundle
            ]
            assert ranks == [ranks[0], ranks[0] + 1], "neighbours"
            assert [found["learner"][rank] for rank in ranks] == [(node, [gpu]) for gpu in gpus]
        assert all((node, gpus[0]) in seen for node, gpus in found["reward"])
        nodes = [node for node, _ in found["learner"]]
        assert nodes == sorted(nodes, key=nodes.index), "in node order"


def test_a_process_that_is_put_in_its_place_again_sees_the_same_gpus(two_nodes: Cluster) -> None:
    planned = plan(
        ClusterConfig(placement="colocated", num_generators=1, num_learners=2),
        GeneratorConfig(tensor_parallel_size=2),
        device="cuda",
        roles=ROLES,
    )
    group = reserve(planned, timeout_s=60)
    placement = Placement(group, planned, process_environment("cpu"))
    try:
        place = planned.of("generator")[0]
        first = placement.start(Seated, place)
        seat = ray.get(first.seat.remote(), timeout=60)
        ray.kill(first)
        assert ray.get(placement.start(Seated, place).seat.remote(), timeout=60) == seat
    finally:
        ray.util.remove_placement_group(group)


def test_ranks_meet_where_rank_0_is(two_nodes: Cluster) -> None:
    with seated(1, num_generators=1, num_learners=4, num_rewards=1) as (_, handles):
        ranks = handles["learner"]
        host, port = endpoint = ray.get(ranks[0].endpoint.remote(), timeout=60)
        socket.inet_aton(host)
        assert 1024 <= port < 65536
        met = [handle.meet.remote(endpoint, rank, len(ranks)) for rank, handle in enumerate(ranks)]
        assert ray.get(met, timeout=120) == [list(range(4))] * 4
