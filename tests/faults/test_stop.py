"""How a run ends that is asked to, and one that fails: with a word, an exit code, a checkpoint, and no process left."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.conftest import SETTINGS
from tests.runs import launched, metrics_of, reproducible

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]
ONE_OF_EACH = (
    *SETTINGS,
    "checkpoint.every=0",
)


@pytest.fixture
def ppo_alone(undisturbed: Path) -> tuple[str, ...]:
    """Settings for the ppo stage by itself, on the policy that the other run has fine-tuned."""
    return (*ONE_OF_EACH, "stages=[ppo]", "model.init_config=null", f"model.path={undisturbed / 'export' / 'sft'}")


def test_sigterm_and_ctrl_c_save_first_and_a_second_ctrl_c_leaves_at_once(
    ppo_alone: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    """The run is taken up with twice as many ranks, so that its steps are the same up to the order of sums."""
    run_dir = tmp_path / "run"
    with launched(run_dir, *ppo_alone) as run:
        run.await_step("ppo", 2)
        for pid in run.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        assert run.end(seconds=60) == 0, run.output
        run.assert_nothing_left()
    assert "everything up to here is saved" in run.output
    assert "Traceback" not in run.output
    before = reproducible(metrics_of(run_dir))
    last = before[-1]["step"]
    assert (run_dir / "checkpoints" / f"ppo-{last:06d}").is_dir(), "of the last step that is recorded"

    more = ("cluster.num_learners=2", "resume=auto")
    with launched(run_dir, *ppo_alone, *more) as again:
        again.await_step("ppo", last + 1)
        os.kill(again.pids("ray::GeneratorProcess")[0], signal.SIGSTOP)  # the step at hand will not be done
        again.process.send_signal(signal.SIGINT)
        again.await_that(lambda: "Ctrl-C again leaves at once" in again.output, "an answer to Ctrl-C", seconds=10)
        again.process.send_signal(signal.SIGINT)
        assert again.end(seconds=5) == -signal.SIGINT
    rows = reproducible(metrics_of(run_dir))
    assert rows[: len(before)] == before
    following = rows[len(before)]
    assert (following["stage"], following["step"]) == ("ppo", last + 1)
    (expected,) = [row for row in metrics_of(undisturbed) if (row["stage"], row["step"]) == ("ppo", last + 1)]
    for key in ("reward/score_mean", "objective/kl", "policy/loss", "critic/loss", "policy/grad_norm"):
        assert following[key] == pytest.approx(expected[key], rel=0.02, abs=1e-3), key


@pytest.mark.parametrize("sign", ["gcs_server", "ray::RankProcess"], ids=["while Ray starts", "while ranks start"])
def test_sigterm_before_the_first_step_leaves_nothing(sign: str, tmp_path: Path) -> None:
    with launched(tmp_path / "run", *ONE_OF_EACH) as run:
        run.await_that(lambda: any(sign in title for title in run.processes().values()), sign, seconds=240)
        run.process.terminate()
        assert run.end(seconds=60) == 0, run.output
        assert "stopped by SIGTERM" in run.output
        assert "Traceback" not in run.output
        run.assert_nothing_left()


def test_a_reward_function_that_raises_ends_the_run_with_its_name(undisturbed: Path, tmp_path: Path) -> None:
    settings = (
        "stages=[eval]",
        "model.init_config=null",
        f"model.path={undisturbed / 'export' / 'sft'}",
        "reward.sources=[{type: function, function: tests.faulty:raises}]",
    )
    with launched(tmp_path / "run", *settings) as run:
        assert run.end() == 1, run.output
        assert "tests.faulty" in run.output
        assert "no score for this one" in run.output
        assert "the run failed" in run.output
        run.assert_nothing_left()
