"""Generators and learner ranks that take turns: the whole system on CPU, where an engine sleeps without giving memory.

What runs is the code of shared GPUs: the order of turns, vLLM's own sleeping and waking, ranks that leave and come
back, a sender for each generator.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.runs import launched, metrics_of
from tests.tiny_models import tiny_checkpoint

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

SETTINGS = (
    "stages=[ppo]",
    "model.init_config=null",
    "data.max_prompt_tokens=128",
    "reward.sources=[{type: function, function: examples.functions:brevity}]",
    "learner.critic_init=policy",
    "algorithm.num_steps=4",
)


def test_taking_turns_changes_nothing_of_what_is_learnt_even_if_a_generator_is_killed(tmp_path: Path) -> None:
    settings = (*SETTINGS, f"model.path={tiny_checkpoint(tmp_path / 'policy')}")
    colocated = ("cluster.placement=colocated", "cluster.num_generators=2", "cluster.num_learners=2")
    with launched(tmp_path / "shared", *settings, *colocated) as run:
        run.await_step("ppo", 1)
        os.kill(run.pids("ray::GeneratorProcess")[0], signal.SIGKILL)
        run.succeed()
        run.assert_nothing_left()
    with launched(tmp_path / "apart", *settings) as run:
        run.succeed()
    shared, apart = (
        [row for row in metrics_of(tmp_path / name) if row["stage"] == "ppo"] for name in ("shared", "apart")
    )
    assert [row["sync/version"] for row in shared] == [0, 1, 2, 3, 4]
    assert shared[-1]["recoveries/generator"] + shared[-1]["recoveries/sync"] >= 1
    for row, other in zip(shared, apart, strict=True):
        assert row["timing/turns_s"] > 0
        assert "timing/turns_s" not in other
        for key in ("reward/score_mean", "policy/loss", "critic/loss", "objective/kl", "eval/score_mean"):
            if key in row:
                assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key
        if row["step"]:
            assert row["sync/logprob_gap_max"] < 1e-4, "each generator has the weights of its own rank"
