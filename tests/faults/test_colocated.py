"""Generators and learner ranks that take turns: the whole system on CPU, where an engine sleeps without giving memory.

What runs is the code of shared GPUs: the order of turns, vLLM's own sleeping and waking, ranks that leave and come
back, a sender for each generator.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import SETTINGS
from tests.runs import launched, metrics_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

TWO_OF_EACH = ("cluster.placement=colocated", "cluster.num_generators=2", "cluster.num_learners=2")


def test_taking_turns_changes_nothing_of_what_is_learnt_even_if_a_generator_is_killed(
    undisturbed: Path, tmp_path: Path
) -> None:
    """Beside a run whose one generator and one rank take no turns: the same up to the order of sums."""
    policy = ("stages=[ppo]", "model.init_config=null", f"model.path={undisturbed / 'export' / 'sft'}")
    with launched(tmp_path / "shared", *SETTINGS, *policy, *TWO_OF_EACH) as run:
        run.await_step("ppo", 1)
        os.kill(run.pids("ray::GeneratorProcess")[0], signal.SIGKILL)
        run.succeed()
        run.assert_nothing_left()
    shared = metrics_of(tmp_path / "shared")
    apart = [row for row in metrics_of(undisturbed) if row["stage"] == "ppo"]
    assert [row["sync/version"] for row in shared] == list(range(len(apart)))
    assert shared[-1]["recoveries/generator"] + shared[-1]["recoveries/sync"] >= 1
    for row, other in zip(shared, apart, strict=True):
        assert row["timing/turns_s"] > 0
        assert "timing/turns_s" not in other
        for key in ("reward/score_mean", "policy/loss", "critic/loss", "objective/kl", "eval/score_mean"):
            if key in row:
                assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), (row["step"], key)
        if row["step"]:
            assert row["sync/logprob_gap_max"] < 1e-4, "each generator has the weights of its own rank"
