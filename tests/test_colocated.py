"""Generators and learner ranks that take turns: the whole system on CPU, where an engine sleeps without giving memory.

What runs is the code of shared GPUs: the order of turns, vLLM's own sleeping and waking, ranks that leave and come
back, a sender for each generator.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import launched, metrics_of

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

SHARED = ("cluster.placement=colocated", "cluster.num_generators=2", "cluster.num_learners=2")


def test_a_colocated_run_learns_what_a_disaggregated_one_learns(tmp_path: Path) -> None:
    with launched(tmp_path / "shared", *SHARED) as run:
        run.succeed()
        run.assert_nothing_left()
    with launched(tmp_path / "apart", *SHARED[1:]) as run:
        run.succeed()
    shared, apart = (metrics_of(tmp_path / name) for name in ("shared", "apart"))
    rows = [row for row in shared if row["stage"] == "ppo"]
    assert [row["sync/version"] for row in rows] == [0, 1, 2, 3]
    for row, other in zip(rows, (row for row in apart if row["stage"] == "ppo"), strict=True):
        assert row["timing/turns_s"] > 0
        assert "timing/turns_s" not in other
        for key in ("reward/score_mean", "policy/loss", "critic/loss", "objective/kl", "eval/score_mean"):
            if key in row:
                assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key
        if row["step"]:
            assert row["sync/logprob_gap_max"] < 1e-4, "each generator has the weights of its own rank"


def test_a_generator_that_is_killed_while_it_samples_is_replaced_between_turns(tmp_path: Path) -> None:
    import os
    import signal

    with launched(tmp_path / "run", *SHARED, "algorithm.num_steps=4") as run:
        run.await_step("ppo", 1)
        os.kill(run.pids("ray::GeneratorProcess")[0], signal.SIGKILL)
        run.succeed()
        run.assert_nothing_left()
    rows = [row for row in metrics_of(tmp_path / "run") if row["stage"] == "ppo"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["sync/logprob_gap_max"] < 1e-4 for row in rows if row["step"])
    assert sum(row["recoveries/generator"] + row["recoveries/sync"] for row in rows[-1:]) >= 1
