"""How often what is lost is made good, and when that is too often."""

from __future__ import annotations

import pytest

from cluster.faults import ProcessError
from cluster.recoveries import Recoveries


def test_a_fault_that_repeats_ends_the_run_with_its_first_cause() -> None:
    notes: list[str] = []
    recoveries = Recoveries(limit=2, note=notes.append)
    recoveries.count("generator", "out of memory")
    recoveries.count("generator", "connection reset")
    with pytest.raises(ProcessError, match=r"(?s)reset again.*number 3 of its kind.*the first was: out of memory"):
        recoveries.count("generator", "connection reset again")
    assert notes == [f"{cause}; it is made good and the run goes on" for cause in ("out of memory", "connection reset")]


def test_a_step_beyond_the_furthest_makes_room_for_more() -> None:
    recoveries = Recoveries(limit=1, note=lambda text: None)
    recoveries.reached("ppo", 4)
    recoveries.count("learner", "first")
    recoveries.reached("ppo", 5)
    recoveries.count("learner", "second")
    assert recoveries.metrics()["recoveries/learner"] == 2


def test_a_step_that_is_only_run_again_makes_no_room() -> None:
    recoveries = Recoveries(limit=1, note=lambda text: None)
    recoveries.reached("ppo", 6)
    recoveries.count("learner", "dies at step 7")
    recoveries.reached("ppo", 5)
    recoveries.reached("ppo", 6)
    with pytest.raises(ProcessError, match="first was: dies at step 7"):
        recoveries.count("learner", "dies at step 7 again")


def test_the_steps_of_another_stage_are_counted_from_their_own_beginning() -> None:
    recoveries = Recoveries(limit=1, note=lambda text: None)
    recoveries.reached("sft", 400)
    recoveries.count("learner", "first")
    recoveries.reached("ppo", 1)
    recoveries.count("learner", "second")
    assert recoveries.metrics()["recoveries/learner"] == 2


def test_kinds_are_counted_apart() -> None:
    recoveries = Recoveries(limit=1, note=lambda text: None)
    recoveries.count("reward", "one")
    recoveries.count("generator", "another")
    counts = {name: value for name, value in recoveries.metrics().items() if value}
    assert counts == {"recoveries/reward": 1.0, "recoveries/generator": 1.0}


def test_no_recovery_at_all_if_none_is_allowed() -> None:
    with pytest.raises(ProcessError, match="max_recoveries=0"):
        Recoveries(limit=0, note=lambda text: None).count("sync", "stalled")
