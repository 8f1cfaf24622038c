"""Processes that die, fall silent or find no place, with real Ray: who is lost, and what takes their place."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.faults import ProcessError, ProcessLostError
from cluster.members import Members, Patience
from cluster.placement import Plan, reserve
from cluster.processes import Placement, Process
from cluster.recoveries import Recoveries
from cluster.session import process_environment
from conf.schema import ClusterConfig
from tests.runs import wait_for
from tests.soak.watch import state_of

pytestmark = pytest.mark.ray
LIMITS = ClusterConfig(heartbeat_s=5.0, replace_timeout_s=60.0, start_timeout_s=120.0, max_recoveries=2)


class Worker(Process):
    def begin(self, marker: str | None) -> None:
        """Die the first time; the marker remembers that it was."""
        if marker is not None and not Path(marker).exists():
            Path(marker).touch()
            os._exit(1)

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    planned = Plan.apart([("reward", 0, 1)] * 2)
    yield Placement(reserve(planned, timeout_s=30), planned, process_environment("cpu"))
    ray.shutdown()


@pytest.fixture
def make(placement: Placement) -> Iterator[Callable[..., Members]]:
    made: list[Members] = []

    def members(marker: Path | None = None, limit: int = 2, limits: ClusterConfig = LIMITS) -> Members:
        begin = lambda handle: handle.begin.remote(None if marker is None else str(marker))  # noqa: E731
        recoveries = Recoveries(limit=limit, note=lambda text: None)
        made.append(Members(placement, Worker, "reward", begin=begin, limits=limits, recoveries=recoveries))
        return made[-1]

    yield members
    for one in made:
        for index in range(len(one)):
            one.end(index)


def pid_of(members: Members, index: int) -> int:
    pid: int = ray.get(members.handles[index].ping.remote(), timeout=120)
    return pid


def is_suspended(pid: int) -> bool:
    """Return whether all threads are: the one that makes the calls may run on for a moment."""
    return {state_of(int(thread.name)) for thread in Path(f"/proc/{pid}/task").iterdir()} == {"T"}


def test_time_in_which_nobody_looks_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("cluster.members.time.monotonic", lambda: now)
    patience = Patience(10.0)
    now += 1.5
    assert patience.look() == 8.5
    now += 3600.0  # this process was suspended
    assert patience.look() == 6.5
    now += 1.0
    assert (patience.look(), patience.waited_s) == (5.5, 4.5)


def test_a_process_that_works_is_not_lost_unless_it_takes_too_long(make: Callable[..., Members]) -> None:
    members = make()
    members.wait_begun()
    call = members.handles[0].sleep.remote(7.0)
    done, lost = members.wait({call: 0}, timeout_s=20)
    assert (done, lost) == ([call], {}), "seven seconds of work, more than the heartbeat allows for silence"
    done, lost = members.wait_or_lose({members.handles[0].sleep.remote(60.0): 0}, timeout_s=1.0)
    assert (done, lost) == ([], {0: "it has finished nothing for 1 s"})


def test_a_dead_and_a_silent_process_are_replaced_in_their_places(make: Callable[..., Members]) -> None:
    members = make()
    members.wait_begun()
    first, second = pid_of(members, 0), pid_of(members, 1)
    os.kill(first, signal.SIGKILL)
    calls: dict[Any, int] = {handle.sleep.remote(0.0): index for index, handle in enumerate(members.handles)}
    while calls:
        done, _ = members.wait(calls, timeout_s=20)
        for ref in done:
            if calls.pop(ref) == 0:
                with pytest.raises(ray.exceptions.RayActorError):
                    ray.get(ref)
    os.kill(second, signal.SIGSTOP)
    assert wait_for(lambda: is_suspended(second), seconds=30)
    start = time.monotonic()
    done, lost = members.wait({members.handles[1].sleep.remote(0.0): 1}, timeout_s=60)
    assert (done, lost) == ([], {1: "it has not answered for 5 s"})
    assert time.monotonic() - start < 30
    members.replace({0: "it died", **lost}, what="testing")
    assert not {first, second} & {pid_of(members, 0), pid_of(members, 1)}
    assert members.recoveries.metrics()["recoveries/reward"] == 1, "lost together, counted once"


def test_one_that_dies_while_it_starts_is_started_again(make: Callable[..., Members], tmp_path: Path) -> None:
    members = make(marker=tmp_path / "died")
    members.wait_begun()
    assert members.recoveries.metrics()["recoveries/reward"] >= 1
    assert ray.get([handle.sleep.remote(0.0) for handle in members.handles], timeout=60) == [0.0, 0.0]


def test_one_that_dies_too_often_ends_the_run_with_the_cause(make: Callable[..., Members]) -> None:
    members = make(limit=0)
    members.wait_begun()
    with pytest.raises(ProcessError, match="reward 0 is lost: it died of thirst"):
        members.replace({0: "it died of thirst"}, what="testing")


def test_one_that_finds_no_place_is_given_up_and_says_what_it_needs(
    make: Callable[..., Members], placement: Placement
) -> None:
    members = make(limits=replace(LIMITS, replace_timeout_s=4.0))
    members.wait_begun()
    members.end(0)
    squatter = placement.start(Worker, placement.plan.places[0])
    try:
        assert ray.get(squatter.ping.remote(), timeout=120)
        with pytest.raises(ProcessLostError, match=r"finds no place again within 4 s .*needs \{'CPU': 1.0\}"):
            members.replace({0: "it died"}, what="testing")
    finally:
        ray.kill(squatter)


def test_a_place_where_every_process_dies_at_once_is_given_up_with_the_cause(
    placement: Placement, tmp_path: Path
) -> None:
    marker = tmp_path / "broken"

    class Fragile(Process):
        def __init__(self) -> None:
            if marker.exists():
                raise OSError("no file or folder of this name on this node")

    limits = replace(LIMITS, replace_timeout_s=20.0)
    recoveries = Recoveries(limit=2, note=lambda text: None)
    members = Members(placement, Fragile, "reward", begin=None, limits=limits, recoveries=recoveries)
    try:
        for index in range(len(members)):
            pid_of(members, index)
        marker.touch()
        with pytest.raises(ProcessLostError, match=r"finds no place again within 20 s .*died: .*no file or folder"):
            members.replace({0: "it died"}, what="testing")
    finally:
        for index in range(len(members)):
            members.end(index)
