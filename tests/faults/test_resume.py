"""A run that is killed, wherever it is, and resumed: the numbers and the weights of one that never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import SETTINGS
from tests.runs import launched, metrics_of, reached, reproducible, weights_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(2400)]


def test_a_run_that_is_killed_again_and_again_is_the_same_run(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "killed"
    deaths = [
        ("sft", 2, None),  # between steps
        ("ppo", 1, "GeneratorProcess.sample"),
        ("ppo", 2, "RankProcess.update"),
        ("ppo", 3, "GeneratorProcess.receive_weights"),
        ("ppo", 4, "RankProcess.write_snapshot"),
    ]
    for stage, step, method in deaths:
        with launched(run_dir, *SETTINGS, "resume=auto") as run:
            run.await_step(stage, step)
            if method is not None:
                run.await_call(method)
            run.kill()
        assert not reached(run_dir, "ppo", 9), f"killed in time, in {method}"
    with launched(run_dir, *SETTINGS, "resume=auto") as run:
        run.succeed()
        assert "goes on after step" in run.output
    assert reproducible(metrics_of(run_dir)) == reproducible(metrics_of(undisturbed))
    assert weights_of(run_dir) == weights_of(undisturbed)
