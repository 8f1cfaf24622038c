"""Whatever process of a run dies or falls silent is replaced, and the numbers are those of a run without the fault."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.faults.conftest import SETTINGS
from tests.runs import LaunchedRun, launched, metrics_of, reproducible, weights_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(2400)]

SAMPLE, RECEIVE, REWARD = "GeneratorProcess.sample", "GeneratorProcess.receive_weights", "RewardProcess"
FAULTS = [  # what is done to whom, in which call; and the kinds that are counted for it
    ({SAMPLE: signal.SIGKILL, REWARD: signal.SIGSTOP}, ["generator", "reward"]),
    ({REWARD: signal.SIGKILL, "RankProcess.update": signal.SIGKILL}, ["reward", "learner"]),
    ({RECEIVE: signal.SIGKILL}, ["sync"]),
    ({SAMPLE: signal.SIGSTOP, "RankProcess.send_weights": signal.SIGSTOP}, ["generator", "learner"]),
]


def counted(run: LaunchedRun, kinds: list[str]) -> list[float]:
    return [max((row.get(f"recoveries/{kind}", 0.0) for row in run.metrics()), default=0.0) for kind in kinds]


def all_more(run: LaunchedRun, kinds: list[str], before: list[float]) -> bool:
    return all(now > then for now, then in zip(counted(run, kinds), before, strict=True))


def test_what_dies_or_falls_silent_is_replaced_and_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    with launched(tmp_path / "disturbed", *SETTINGS, "cluster.num_generators=2", "cluster.heartbeat_s=12") as run:
        for step, (deeds, kinds) in enumerate(FAULTS, start=1):
            run.await_step("ppo", step)
            before = counted(run, kinds)
            for method, signum in deeds.items():
                os.kill(run.await_call(method), signum)
            run.await_that(partial(all_more, run, kinds, before), f"recovery from {deeds}", seconds=400)
        run.await_step("ppo", len(FAULTS) + 1)
        kinds = ["generator", "reward", "learner"]
        lost = counted(run, kinds)
        run.process.send_signal(signal.SIGSTOP)
        time.sleep(15)
        run.process.send_signal(signal.SIGCONT)
        run.succeed()
        assert counted(run, kinds) == lost, "it was the driver"
    assert reproducible(run.metrics()) == reproducible(metrics_of(undisturbed))
    assert weights_of(run.dir) == weights_of(undisturbed)
