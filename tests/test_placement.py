"""What the processes of a run ask for, and what is said when a cluster does not have it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray

from cluster.faults import ProcessError
from cluster.placement import Bundle, plan, reserve, without_place
from cluster.processes import Placement, Process, collect
from cluster.session import process_environment
from conf.schema import ClusterConfig, ConfigError, GeneratorConfig

ROLES = ("generator", "reward", "learner")


def test_on_cpu_every_process_takes_one_core() -> None:
    bundles = plan(ClusterConfig(num_generators=2, num_learners=2), GeneratorConfig(), device="cpu", roles=ROLES)
    assert [(b.role, b.index) for b in bundles] == [
        ("generator", 0),
        ("generator", 1),
        ("reward", 0),
        ("learner", 0),
        ("learner", 1),
    ]
    assert {tuple(b.resources().items()) for b in bundles} == {(("CPU", 1.0),)}


def test_on_gpus_a_generator_takes_as_many_as_its_tensor_parallel_size() -> None:
    cluster = ClusterConfig(num_generators=2, num_rewards=1, num_learners=3)
    bundles = plan(cluster, GeneratorConfig(tensor_parallel_size=2), device="cuda", roles=ROLES)
    assert [bundle.gpus for bundle in bundles] == [2, 2, 1, 1, 1, 1]
    assert [b.role for b in plan(cluster, GeneratorConfig(), device="cuda", roles=("learner",))] == ["learner"] * 3


def bundles(*shapes: tuple[str, int]) -> list[Bundle]:
    return [Bundle(role, index, cpus=1, gpus=gpus) for index, (role, gpus) in enumerate(shapes)]


@pytest.mark.parametrize(
    ("shapes", "nodes", "odd"),
    [
        ([("generator", 2), ("learner", 1)], [{"CPU": 8.0, "GPU": 3.0}], None),
        ([("generator", 2), ("learner", 1)], [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}], None),
        # as many GPUs in all as are asked for, but never two on one node
        ([("learner", 1), ("generator", 2)], [{"CPU": 8.0, "GPU": 1.0}] * 3, "generator"),
        ([("learner", 1)] * 2, [{"CPU": 1.0, "GPU": 4.0}], "learner"),  # enough GPUs and too few cores
        ([("reward", 0)], [], "reward"),
    ],
)
def test_whatever_has_no_room_on_any_node_is_found(
    shapes: list[tuple[str, int]], nodes: list[dict[str, float]], odd: str | None
) -> None:
    found = without_place(bundles(*shapes), nodes)
    assert (found and found.role) == odd


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
    bundles = (Bundle("generator", 0, 1, 0), Bundle("generator", 1, 1, 0))
    group = reserve(bundles, timeout_s=30)
    placement = Placement(group, bundles, process_environment("cpu"))
    yield [placement.start(Worker, bundle) for bundle in placement.places("generator")]
    ray.util.remove_placement_group(group)


@pytest.mark.ray
def test_what_does_not_fit_is_named_at_once(cluster: None) -> None:
    bundles = tuple(Bundle("learner", index, 1, 1) for index in range(3))
    with pytest.raises(
        ConfigError,
        match=r"3 CPU.* the cluster has 2 CPU and 0 GPU: there is no node with 1 CPU and 1 GPU left for learner 0",
    ):
        reserve(bundles, timeout_s=30)


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
        roles = ("generator", "reward", "learner")
        bundles = plan(replace(ClusterConfig(), **settings), GeneratorConfig(), device="cpu", roles=roles)
        return {bundle.role: bundle.threads for bundle in bundles}

    assert threads() == {"generator": 1, "reward": 1, "learner": 1}
    assert threads(threads=3) == {"generator": 3, "reward": 3, "learner": 3}
    assert threads(learner_threads=2) == {"generator": 1, "reward": 1, "learner": 2}
