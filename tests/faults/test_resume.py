"""A run that is killed, wherever it is, and resumed: the numbers and the weights of one that never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import SETTINGS
from tests.runs import launched, metrics_of, reproducible, weights_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(2400)]


def test_a_run_that_is_killed_again_and_again_is_the_same_run(undisturbed: Path, tmp_path: Path) -> None:
    """Each death leaves something else behind; one while generating or in the update leaves what the first one does."""
    run_dir = tmp_path / "killed"
    deaths = [
        ("sft", 1, None),  # rows after the last checkpoint
        ("ppo", 2, "GeneratorProcess.receive_weights"),  # a file in shared memory
        ("ppo", 4, "RankProcess.write_snapshot"),  # half a checkpoint
    ]
    for stage, step, method in deaths:
        with launched(run_dir, *SETTINGS, "resume=auto") as run:
            run.await_step(stage, step)
            if method is not None:
                run.await_call(method)
            run.kill()
        assert not (run_dir / "summary.json").exists(), f"killed in time, in {method}"
    with launched(run_dir, *SETTINGS, "resume=auto") as run:
        run.succeed()
        assert "goes on after step" in run.output
    assert reproducible(metrics_of(run_dir)) == reproducible(metrics_of(undisturbed))
    assert weights_of(run_dir) == weights_of(undisturbed)
