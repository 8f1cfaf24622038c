"""How a run ends that is asked to, and one that fails: with a word, an exit code, a checkpoint, and no process left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import SETTINGS
from tests.runs import LaunchedRun, launched, metrics_of, reproducible

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
ONE_OF_EACH = (
    *SETTINGS,
    "algorithm.num_steps=10000",
    "cluster.num_learners=1",
    "checkpoint.every=0",
)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[LaunchedRun]:
    """A run that has taken two steps of PPO, and no checkpoint of them."""
    with launched(tmp_path / "run", *ONE_OF_EACH) as run:
        run.await_step("ppo", 2)
        yield run


def test_sigterm_to_every_process_costs_nothing(running: LaunchedRun) -> None:
    for pid in running.processes():
        os.kill(pid, signal.SIGTERM)
    assert running.end(seconds=40) == 0, running.output
    running.assert_nothing_left()
    assert "everything up to here is saved" in running.output
    assert "Traceback" not in running.output
    steps = [row["step"] for row in metrics_of(running.dir) if row["stage"] == "ppo"]
    checkpoint = running.dir / "checkpoints" / f"ppo-{steps[-1]:06d}"
    assert checkpoint.is_dir(), "of the last step that is recorded"
    before = reproducible(metrics_of(running.dir))
    with launched(running.dir, *ONE_OF_EACH, "resume=auto") as again:
        again.await_step("ppo", steps[-1] + 1)
    rows = reproducible(metrics_of(running.dir))
    assert rows[: len(before)] == before
    assert [row["step"] for row in rows if row["stage"] == "ppo"][: len(steps) + 1] == [*steps, steps[-1] + 1]


@pytest.mark.parametrize("sign", ["gcs_server", "ray::RankProcess"], ids=["while Ray starts", "while ranks start"])
def test_sigterm_before_the_first_step_leaves_nothing(sign: str, tmp_path: Path) -> None:
    with launched(tmp_path / "run", *ONE_OF_EACH) as run:
        run.await_that(lambda: any(sign in title for title in run.processes().values()), sign, seconds=60)
        run.process.terminate()
        assert run.end(seconds=60) == 0, run.output
        assert "stopped by SIGTERM" in run.output
        assert "Traceback" not in run.output
        run.assert_nothing_left()


def test_ctrl_c_saves_and_a_second_one_leaves_at_once(running: LaunchedRun) -> None:
    (generator,) = running.pids("ray::GeneratorProcess")
    os.kill(generator, signal.SIGSTOP)  # the step will not be done
    running.process.send_signal(signal.SIGINT)
    running.await_that(lambda: "Ctrl-C again leaves at once" in running.output, "an answer to Ctrl-C", seconds=10)
    running.process.send_signal(signal.SIGINT)
    assert running.end(seconds=5) == -signal.SIGINT


def test_a_reward_function_that_raises_ends_the_run_with_its_name(tmp_path: Path) -> None:
    raising = "reward.sources=[{type: function, function: tests.faulty:raises}]"
    with launched(tmp_path / "run", *ONE_OF_EACH, raising, "stages=[sft,ppo]") as run:
        assert run.end() == 1, run.output
        assert "tests.faulty" in run.output
        assert "no score for this one" in run.output
        assert "the run failed" in run.output
        run.assert_nothing_left()
