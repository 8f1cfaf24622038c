"""A group of learner ranks with real Ray, and ranks that only pretend to learn: who is lost, what failed, restarts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from cluster.faults import LearnersLostError, ProcessError
from cluster.learners import RankGroup
from cluster.placement import Plan, reserve
from cluster.processes import Placement
from cluster.recoveries import Recoveries
from cluster.session import process_environment
from conf.schema import ClusterConfig
from learner.ranks import Ranks

pytestmark = pytest.mark.ray
LIMITS = ClusterConfig(heartbeat_s=5.0, replace_timeout_s=60.0, start_timeout_s=60.0, max_recoveries=1)


class Pretender:
    """A rank whose export does what its number tells it to."""

    def __init__(self, deeds: tuple[str, ...], ranks: Ranks) -> None:
        self.deed, self.ranks = deeds[ranks.rank], ranks

    def export(self, folder: Path) -> None:
        match self.deed:
            case "die":
                os._exit(1)
            case "be silent":
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(120)  # another thread may take the signal, and this one return before it is stopped
            case "fail":
                raise RuntimeError("the disk is on fire")
            case "hear that another is gone":
                time.sleep(0.5)
                raise RuntimeError("connection reset by peer")
            case "wait for another":
                time.sleep(120)


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    planned = Plan.apart([("learner", 0, 1)] * 2)
    yield Placement(reserve(planned, timeout_s=30), planned, process_environment("cpu"))
    ray.shutdown()


@pytest.fixture
def make(placement: Placement) -> Iterator[Callable[..., RankGroup]]:
    made: list[RankGroup] = []

    def group(*deeds: str) -> RankGroup:
        recoveries = Recoveries(limit=1, note=lambda text: None)
        made.append(RankGroup(placement, Pretender, deeds, limits=LIMITS, recoveries=recoveries))
        made[-1].wait_started()
        return made[-1]

    yield group
    for one in made:
        one.end()


@pytest.mark.parametrize(
    ("deeds", "said"),
    [
        (("hear that another is gone", "die"), "export: learner rank 1 is lost: it died"),
        (("be silent", "wait for another"), "export: learner rank 0 is lost: it has not answered for 5 s"),
    ],
)
def test_a_rank_that_is_lost_is_the_cause_whatever_the_others_say(
    make: Callable[..., RankGroup], deeds: tuple[str, ...], said: str
) -> None:
    with pytest.raises(LearnersLostError, match=said):
        make(*deeds).export(Path())


def test_a_rank_that_fails_is_an_error_though_the_others_wait_for_it(
    make: Callable[..., RankGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.learners.SETTLE_S", 3.0)
    start = time.monotonic()
    with pytest.raises(ProcessError, match=r"learner rank 1 failed: RuntimeError.'the disk is on fire'") as caught:
        make("wait for another", "fail").export(Path())
    assert not isinstance(caught.value, LearnersLostError)
    assert time.monotonic() - start < 60


def test_a_group_that_is_restarted_has_new_ranks_and_not_endlessly(make: Callable[..., RankGroup]) -> None:
    group = make("export", "export")
    before = ray.get([handle.ping.remote() for handle in group.members.handles], timeout=60)
    group.restart("a rank was lost")
    after = ray.get([handle.ping.remote() for handle in group.members.handles], timeout=60)
    assert not set(before) & set(after)
    group.export(Path())
    with pytest.raises(ProcessError, match="the first was: a rank was lost"):
        group.restart("another rank was lost")


def test_a_rank_that_dies_while_the_group_starts_is_a_loss(placement: Placement) -> None:
    recoveries = Recoveries(limit=1, note=lambda text: None)
    group = RankGroup(placement, Pretender, ("export", "export"), limits=LIMITS, recoveries=recoveries)
    threading.Timer(0.0, group.members.end, args=(0,)).start()
    with pytest.raises(LearnersLostError, match=r"start of the learner: learner rank [01] is lost"):
        group.wait_started()
    group.end()
