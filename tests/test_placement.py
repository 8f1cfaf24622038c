"""What the processes of a run ask for, and what is said when a cluster does not have it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from cluster.faults import ProcessError
from cluster.placement import Bundle, Plan, missing, plan, reserve, without_place
from cluster.processes import Placement, Process, collect
from cluster.session import process_environment
from conf.schema import ClusterConfig, ConfigError, GeneratorConfig

ROLES = ("learner", "generator", "reward")  # as the ppo stage has them


def planned(*, width: int = 1, device: str = "cuda", **settings: Any) -> Plan:
    """Return the plan of the ppo stage with these settings of the cluster; generators are `width` GPUs wide."""
    rewards = settings.pop("rewards_on_gpus", True)
    generator = GeneratorConfig(tensor_parallel_size=width)
    return plan(ClusterConfig(**settings), generator, device=device, roles=ROLES, rewards_on_gpus=rewards)


def standing(found: Plan) -> list[list[str]]:
    """Return who stands in each bundle, with the GPUs that each of them sees."""
    return [
        [
            f"{place.role} {place.index} {','.join(map(str, place.gpus))}".strip()
            for place in found.places
            if place.bundle == number
        ]
        for number in range(len(found.bundles))
    ]


def test_on_cpu_every_process_takes_one_core() -> None:
    found = planned(num_generators=2, num_learners=2, device="cpu")
    assert standing(found) == [["learner 0"], ["learner 1"], ["generator 0"], ["generator 1"], ["reward 0"]]
    assert {tuple(bundle.resources().items()) for bundle in found.bundles} == {(("CPU", 1.0),)}


@pytest.mark.parametrize(
    ("settings", "gpus"),
    [
        ({"num_generators": 2, "num_learners": 3, "width": 2}, [1, 1, 1, 2, 2, 1]),
        ({"num_generators": 3, "num_learners": 4}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"num_rewards": 2, "rewards_on_gpus": False}, [1, 1, 0, 0]),  # functions and servers need none
        ({"width": 8}, [1, 8, 1]),
    ],
)
def test_disaggregated_processes_have_gpus_of_their_own(settings: dict[str, Any], gpus: list[int]) -> None:
    found = planned(**settings)
    assert [bundle.gpus for bundle in found.bundles] == gpus
    assert all(place.gpus == tuple(range(found.bundle_of(place).gpus)) for place in found.places)
    assert all(found.has_own_gpus(place) for place in found.places)


@pytest.mark.parametrize(
    ("settings", "expected", "bundles"),
    [
        ({}, [["learner 0 0", "generator 0 0", "reward 0 0"]], [(3, 1)]),
        (
            {"num_generators": 2, "num_learners": 2, "rewards_on_gpus": False},
            [["learner 0 0", "generator 0 0", "reward 0"], ["learner 1 0", "generator 1 0"]],
            [(3, 1), (2, 1)],
        ),
        (
            {"num_generators": 2, "num_learners": 4, "num_rewards": 3, "width": 2},
            [
                ["learner 0 0", "learner 1 1", "generator 0 0,1", "reward 0 0", "reward 2 1"],
                ["learner 2 0", "learner 3 1", "generator 1 0,1", "reward 1 0"],
            ],
            [(5, 2), (4, 2)],
        ),
        (
            {"num_generators": 2, "num_learners": 2, "device": "cpu"},
            [["learner 0", "generator 0", "reward 0"], ["learner 1", "generator 1"]],
            [(3, 0), (2, 0)],
        ),
    ],
)
def test_colocated_a_generator_shares_its_gpus_with_learner_ranks(
    settings: dict[str, Any], expected: list[list[str]], bundles: list[tuple[int, int]]
) -> None:
    found = planned(placement="colocated", **settings)
    assert standing(found) == expected
    assert [(bundle.cpus, bundle.gpus) for bundle in found.bundles] == bundles
    for place in found.places:
        assert found.has_own_gpus(place) == (not place.gpus)


def test_weights_come_from_the_rank_beside_a_process_or_from_rank_0() -> None:
    apart = planned(num_generators=2, num_learners=3, width=2)
    assert apart.routes(2) == [[0, 0], [0, 0]]
    shared = planned(placement="colocated", num_generators=2, num_learners=4, width=2)
    assert shared.routes(2) == [[0, 1], [2, 3]]
    assert shared.in_node_order("ab").routes(2) == [[0, 1], [2, 3]]
    on_cpu = planned(placement="colocated", num_generators=2, num_learners=2, device="cpu")
    assert on_cpu.routes(1) == [[0], [1]]


def test_colocated_a_stage_without_generators_has_ranks_of_their_own_gpus() -> None:
    cluster = ClusterConfig(placement="colocated", num_learners=2, num_generators=2)
    found = plan(cluster, GeneratorConfig(), device="cuda", roles=("learner",))
    assert standing(found) == [["learner 0 0"], ["learner 1 0"]]


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"num_generators": 1, "num_learners": 4, "width": 2}, "set cluster.num_generators=2"),
        ({"num_generators": 2, "num_learners": 3, "width": 2}, "set cluster.num_learners=4"),
        ({"num_generators": 1, "num_learners": 1, "width": 2}, "set cluster.num_learners=2"),
    ],
)
def test_colocated_counts_that_do_not_come_out_even_are_refused(settings: dict[str, Any], advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        planned(placement="colocated", **settings)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("aaaa", [0, 1, 2, 3]),
        ("abab", [0, 2, 1, 3]),
        ("baab", [0, 2, 3, 1]),
        ("abca", [0, 2, 3, 1]),
    ],
)
def test_ranks_are_numbered_node_by_node(nodes: str, expected: list[int]) -> None:
    found = Plan.apart([("learner", 1, 1)] * 4 + [("generator", 1, 1)]).in_node_order([*nodes, "a"])
    rank_of_bundle = {place.bundle: place.index for place in found.of("learner")}
    assert [rank_of_bundle[bundle] for bundle in range(4)] == expected
    of_ranks = [nodes[place.bundle] for place in found.of("learner")]
    assert all(of_ranks.index(node) + of_ranks.count(node) > at for at, node in enumerate(of_ranks)), "in one run each"
    assert [place.bundle for place in found.of("generator")] == [4]


def bundles(*gpus: int) -> list[Bundle]:
    return [Bundle(cpus=1, gpus=count) for count in gpus]


@pytest.mark.parametrize(
    ("gpus", "nodes", "odd"),
    [
        ((2, 1), [{"CPU": 8.0, "GPU": 3.0}], None),
        ((2, 1), [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}], None),
        ((0, 0, 1), [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 2.0}], None),  # those without GPUs leave the GPU's core alone
        # as many GPUs in all as are asked for, but never two on one node
        ((1, 2), [{"CPU": 8.0, "GPU": 1.0}] * 3, 1),
        ((1, 1), [{"CPU": 1.0, "GPU": 4.0}], 1),  # enough GPUs and too few cores
        ((0,), [], 0),
    ],
)
def test_whatever_has_no_room_on_any_node_is_found(
    gpus: tuple[int, ...], nodes: list[dict[str, float]], odd: int | None
) -> None:
    assert without_place(bundles(*gpus), nodes) == odd


@pytest.mark.parametrize(
    ("settings", "nodes", "words"),
    [
        ({"width": 4}, [(8, 2), (8, 2)], ["generator 0", "lower generator.tensor_parallel_size to 2 or less"]),
        ({"num_learners": 4}, [(8, 2), (8, 2)], ["6 CPU and 6 GPU in all", "8 CPU and 2 GPU + 8 CPU and 2 GPU"]),
        ({"num_learners": 4}, [(8, 4)], ["lower cluster.num_"]),
        ({}, [], ["the cluster has no nodes"]),
        (
            {"placement": "colocated", "num_generators": 2, "num_learners": 4, "width": 2},
            [(8, 2), (8, 1)],
            ["3 CPU and 2 GPU left for learner 2 and learner 3 and generator 1"],
        ),
    ],
)
def test_what_is_missing_is_said_with_the_setting_to_change(
    settings: dict[str, Any], nodes: list[tuple[int, int]], words: list[str]
) -> None:
    error = missing(planned(**settings), [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in nodes])
    assert error is not None
    for word in words:
        assert word in str(error)


def test_what_fits_lacks_nothing() -> None:
    nodes = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}]
    assert missing(planned(num_generators=3, num_learners=4), nodes) is None


class Worker(Process):
    def answer(self, value: int) -> int:
        return value

    def refuse_setting(self) -> None:
        raise ConfigError("reward.path", "x", "set another")

    def fail(self) -> None:
        raise ValueError("something broke")

    def sleep(self) -> None:
        import time

        time.sleep(60)

    def die(self) -> None:
        import os

        os._exit(1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def workers(cluster: None) -> Iterator[list[object]]:
    two = Plan.apart([("generator", 0, 1)] * 2)
    group = reserve(two, timeout_s=30)
    placement = Placement(group, two, process_environment("cpu"))
    yield [placement.start(Worker, place) for place in placement.places("generator")]
    ray.util.remove_placement_group(group)


@pytest.mark.ray
def test_what_does_not_fit_is_named_at_once(cluster: None) -> None:
    with pytest.raises(
        ConfigError,
        match=r"3 CPU.* the cluster has 2 CPU and 0 GPU: there is no node with 1 CPU and 1 GPU left for learner 0",
    ):
        reserve(Plan.apart([("learner", 1, 1)] * 3), timeout_s=30)


@pytest.mark.ray
def test_answers_come_in_the_order_of_the_calls(workers: list[object]) -> None:
    refs = [worker.answer.remote(value) for value, worker in enumerate(workers)]  # type: ignore[attr-defined]
    assert collect(refs, what="asking", timeout_s=30) == [0, 1]


@pytest.mark.ray
def test_the_first_failure_ends_the_waiting(workers: list[object]) -> None:
    first, second = workers
    refs = [first.sleep.remote(), second.fail.remote()]  # type: ignore[attr-defined]
    with pytest.raises(ProcessError, match=r"asking: process 1 failed: ValueError.'something broke'"):
        collect(refs, what="asking", timeout_s=50)


@pytest.mark.ray
def test_a_setting_that_a_process_refuses_is_the_users_error(workers: list[object]) -> None:
    with pytest.raises(ConfigError, match=r"reward.path='x': set another") as caught:
        collect([workers[0].refuse_setting.remote()], what="starting", timeout_s=30)  # type: ignore[attr-defined]
    assert caught.value.key == "reward.path"


@pytest.mark.ray
def test_a_death_and_a_silence_say_which_process(workers: list[object]) -> None:
    first, second = workers
    refs = [first.answer.remote(1), second.die.remote()]  # type: ignore[attr-defined]
    with pytest.raises(ProcessError, match="asking: process 1 is lost: it died"):
        collect(refs, what="asking", timeout_s=30)
    with pytest.raises(ProcessError, match=r"asking: no answer from process \[0\] within 1 s"):
        collect([first.sleep.remote()], what="asking", timeout_s=1)  # type: ignore[attr-defined]


def test_learner_ranks_may_have_threads_of_their_own() -> None:
    def threads(**settings: Any) -> dict[str, int]:
        return {place.role: place.threads for place in planned(device="cpu", **settings).places}

    assert threads() == {"generator": 1, "reward": 1, "learner": 1}
    assert threads(threads=3) == {"generator": 3, "reward": 3, "learner": 3}
    assert threads(learner_threads=2) == {"generator": 1, "reward": 1, "learner": 2}
