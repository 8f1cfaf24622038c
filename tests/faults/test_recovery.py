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

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

FAULTS = [  # the call in which it happens, what happens, and the kind that is counted
    ("GeneratorProcess.sample", signal.SIGKILL, "generator"),
    ("RankProcess.update", signal.SIGKILL, "learner"),
    ("RewardProcess", signal.SIGKILL, "reward"),
    ("GeneratorProcess.receive_weights", signal.SIGKILL, "sync"),
    ("GeneratorProcess.sample", signal.SIGSTOP, "generator"),
    ("RankProcess.send_weights", signal.SIGSTOP, "learner"),
    ("RewardProcess", signal.SIGSTOP, "reward"),
]


def counted(run: LaunchedRun, kind: str) -> float:
    return max((row.get(f"recoveries/{kind}", 0.0) for row in run.metrics()), default=0.0)


def more(run: LaunchedRun, kind: str, before: float) -> bool:
    return counted(run, kind) > before


def test_what_dies_or_falls_silent_is_replaced_and_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    with launched(tmp_path / "disturbed", *SETTINGS, "cluster.num_generators=2", "cluster.heartbeat_s=8") as run:
        for step, (method, signum, kind) in enumerate(FAULTS, start=1):
            run.await_step("ppo", step)
            before = counted(run, kind)
            os.kill(run.await_call(method), signum)
            run.await_that(partial(more, run, kind, before), f"recovery from {method}", seconds=120)
        run.await_step("ppo", len(FAULTS) + 1)
        lost = [counted(run, kind) for kind in ("generator", "reward", "learner")]
        run.process.send_signal(signal.SIGSTOP)
        time.sleep(12)
        run.process.send_signal(signal.SIGCONT)
        run.succeed()
        assert [counted(run, kind) for kind in ("generator", "reward", "learner")] == lost, "it was the driver"
    assert reproducible(run.metrics()) == reproducible(metrics_of(undisturbed))
    assert weights_of(run.dir) == weights_of(undisturbed)
