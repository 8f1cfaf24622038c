"""What a soak draws, and what it makes of what it has seen; no run is started here."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.soak.drawing import CALLS, TORN, WEIGHTS, Fault, Strike, drawn, next_fitting
from tests.soak.picture import draw
from tests.soak.report import (
    Growth,
    by_name,
    compared,
    growths,
    judged,
    machine,
    recoveries,
    seconds_to_next_step,
    spread,
    summary_of,
    table,
)
from tests.soak.watch import (
    Injected,
    MemorySample,
    Observed,
    Rows,
    Seen,
    age_of,
    kind_of,
    own_mib,
    state_of,
)

ALL = {"generator", "reward", "learner"}
MINUTES = 60.0


def first(seed: int, count: int = 2000) -> list[Fault]:
    return list(islice(drawn(seed), count))


def test_faults_are_a_function_of_the_seed() -> None:
    assert first(1) == first(1)
    assert first(1) != first(2)


def test_every_kind_and_every_call_is_drawn() -> None:
    faults = first(0)
    assert {fault.kind for fault in faults} == set(WEIGHTS)
    single = {(one.role, one.call, one.signum) for fault in faults if fault.kind == "process" for one in fault.strikes}
    signals = (signal.SIGKILL, signal.SIGSTOP)
    assert single == {(role, call, signum) for role, calls in CALLS.items() for call in calls for signum in signals}


def test_a_burst_strikes_two_roles() -> None:
    bursts = [fault for fault in first(0) if fault.kind == "burst"]
    assert all(len({strike.role for strike in fault.strikes}) == 2 for fault in bursts)


def test_a_fault_is_done_only_where_it_fits() -> None:
    def fits(call: str, roles: set[str]) -> bool:
        return Fault("process", (Strike("learner", signal.SIGKILL, call),)).fits(roles, num_checkpoints=2)

    assert fits("update", ALL)
    assert not fits("update", {"learner"})
    assert fits("train_step", {"learner"})
    assert not fits("train_step", ALL)
    assert fits("write_snapshot", {"learner"})
    assert not fits("write_snapshot", set())
    assert Fault(TORN).fits(ALL, num_checkpoints=2)
    assert not Fault(TORN).fits(ALL, num_checkpoints=1), "there is none before it"


def test_each_sort_of_fault_has_its_share_in_every_stage() -> None:
    for roles in ({"learner"}, ALL):
        faults = drawn(0)
        done = [next_fitting(faults, roles, num_checkpoints=1) for _ in range(2000)]
        assert all(fault.fits(roles, num_checkpoints=1) for fault in done)
        to_processes = sum(bool(fault.strikes) for fault in done) / len(done)
        assert to_processes == pytest.approx((WEIGHTS["process"] + WEIGHTS["burst"]) / sum(WEIGHTS.values()), abs=0.04)


def test_the_name_of_a_fault_says_what_is_done() -> None:
    assert Fault("process", (Strike("reward", signal.SIGSTOP, "score"),)).name == "reward SIGSTOP in score"
    assert Fault("burst", (Strike("reward", signal.SIGSTOP), Strike("learner", signal.SIGKILL))).name == "burst"


def test_rows_are_seen_as_they_come_and_again_after_the_file_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = Rows(path)
    assert rows.new() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert rows.new() == [{"step": 1}, {"step": 2}]
    assert rows.new() == []
    path.write_text('{"step": 1}\n')
    assert rows.new() == []
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert rows.new() == [{"step": 2}]


def test_processes_are_looked_at_in_proc() -> None:
    assert own_mib(os.getpid()) > 5
    assert 0 < age_of(os.getpid()) < 3600 * 24
    assert state_of(os.getpid()) == "R"
    assert state_of(2**22 + 1) == "X"
    assert [kind_of(f"ray::{name}") for name in ("GeneratorProcess.sample", "IDLE", "DashboardAgent")] == [
        "generator",
        "spare",
        "ray",
    ]


def test_rows_are_compared_bit_by_bit() -> None:
    rows = [{"stage": "ppo", "step": step, "policy/loss": step / 3, "eval/x": float("nan")} for step in range(3)]
    further = [*rows, {"stage": "ppo", "step": 3, "policy/loss": 1.0}]
    same = compared(rows, json.loads(json.dumps(further)))
    assert dataclasses.astuple(same) == (3, 3, 6, None)
    other = [dict(row) for row in rows]
    other[1]["policy/loss"] = 1 / 3 + 2**-54
    different = compared(rows, other)
    assert (different.rows, different.equal) == (3, 2)
    assert str(different.first_difference).startswith("row 2 (ppo 1): policy/loss is 0.333")


def test_a_row_or_a_figure_that_is_absent_is_a_difference() -> None:
    rows = [{"stage": "ppo", "step": step, "policy/loss": 0.5} for step in range(2)]
    assert compared(rows, rows[:1]).equal == 1
    assert compared(rows, [{"stage": "ppo", "step": step} for step in range(2)]).equal == 0


def memory(
    kind: str, mib: list[float], *, leg: int = 0, pid: int = 1, age_s: float = 60.0, begin: float = 0.0
) -> list[MemorySample]:
    """Samples of one process, a minute apart."""
    return [MemorySample(begin + 60.0 * at, leg, pid, age_s + 60.0 * at, kind, size) for at, size in enumerate(mib)]


def test_memory_is_that_of_minutes_10_to_20_beside_the_last_ten() -> None:
    samples = memory("generator", [900.0] * 10 + [100.0] * 10 + [900.0] * 30 + [104.0] * 10)
    assert growths(samples, begin_s=600.0, end_s=60 * MINUTES)["generator"].percent == pytest.approx(4.0)
    young = memory("generator", [5000.0] * 60, pid=2)
    young = [dataclasses.replace(sample, age_s=29.0) for sample in young]
    assert growths(samples + young, begin_s=600.0, end_s=60 * MINUTES)["generator"].percent == pytest.approx(4.0)


def test_what_comes_before_the_last_stage_and_what_is_suspended_does_not_count() -> None:
    samples = memory("learner", [400.0] * 15 + [500.0] * 45)
    assert growths(samples, begin_s=900.0, end_s=60 * MINUTES)["learner"].percent == pytest.approx(0.0)
    still = [dataclasses.replace(sample, suspended=True) for sample in memory("learner", [50.0] * 25, pid=2)]
    assert growths(samples + still, begin_s=900.0, end_s=60 * MINUTES)["learner"].percent == pytest.approx(0.0)


def test_a_process_fewer_is_no_less_memory_but_one_of_rays_own_is() -> None:
    for kind, percent in (("generator", 0.0), ("ray", 100.0)):
        second = memory(kind, [100.0] * 20, pid=2, begin=60.0 * 40)
        samples = memory(kind, [100.0] * 60) + second
        assert growths(samples, begin_s=600.0, end_s=60 * MINUTES)[kind].percent == pytest.approx(percent)


def test_a_driver_is_followed_within_its_longest_life() -> None:
    before = memory("driver", [50.0] * 10, leg=0)
    longest = memory("driver", [100.0] * 5 + [105.0] * 10 + [110.0] * 5, leg=1, begin=600.0)
    after = memory("driver", [300.0] * 10, leg=2, begin=1800.0)
    growth = growths(before + longest + after, begin_s=600.0, end_s=60 * MINUTES)["driver"]
    assert (growth.early_mib, growth.late_mib) == (100.0, 110.0)
    assert growth.percent == pytest.approx(10.0)


def test_a_short_soak_says_nothing_of_growth() -> None:
    samples = memory("generator", [100.0] * 4) + memory("driver", [100.0] * 4)
    assert [growth.percent for growth in growths(samples, begin_s=600.0, end_s=240.0).values()] == [None, None]


def observed() -> Observed:
    return Observed(
        steps=[
            Seen(10.0, 0, "ppo", 1, {"recoveries/generator": 0.0}),
            Seen(20.0, 0, "ppo", 2, {"recoveries/generator": 2.0}),
            Seen(60.0, 1, "ppo", 2, {"recoveries/generator": 0.0, "recoveries/sync": 1.0}),
            Seen(65.0, 1, "ppo", 3, {"recoveries/generator": 1.0, "recoveries/sync": 1.0}),
        ],
        memory=memory("generator", [100.0] * 60),
        faults=[
            Injected("generator SIGKILL", 12.0, "done", "ppo 1"),
            Injected("generator SIGKILL", 61.0, "done", "ppo 2"),
            Injected("generator SIGKILL", 62.0, "not met", "ppo 2"),
            Injected("driver SIGKILL", 70.0, "done", "ppo 3"),
        ],
    )


def test_a_row_that_may_only_have_been_seen_later_does_not_count_as_the_next_step() -> None:
    seen = [Seen(at_s, 0, "sft", 1, {}) for at_s in (10.4, 10.6)]
    assert seconds_to_next_step(Injected("learner SIGSTOP", 10.0, "done", "sft 0"), seen) == pytest.approx(0.6)


def test_the_step_that_a_driver_still_takes_before_it_stops_is_not_the_next_one() -> None:
    seen = [Seen(12.0, 0, "sft", 1, {}), Seen(40.0, 1, "sft", 2, {})]
    assert seconds_to_next_step(Injected("driver SIGTERM", 10.0, "done", "sft 0", leg=1), seen) == 30.0


def test_recoveries_are_added_over_the_legs() -> None:
    assert recoveries(observed().steps) == {"recoveries/generator": 3, "recoveries/sync": 1}


def test_each_fault_is_followed_to_the_next_step() -> None:
    assert by_name(observed()) == {
        "driver SIGKILL": {"count": 1, "median_s": None, "longest_s": None},
        "generator SIGKILL": {"count": 2, "median_s": 6.0, "longest_s": 8.0},
    }


def summary(**changes: Any) -> dict[str, Any]:
    rows = [
        {"stage": "sft", "step": 9, "sft/loss": 1.0},
        {"stage": "ppo", "step": 0, "eval/accuracy": 0.25, "eval/score_mean": -1.5},
        {"stage": "ppo", "step": 3},
    ]
    asked: dict[str, Any] = {
        "minutes": MINUTES,
        "seed": 7,
        "every_s": 30.0,
        "failure": None,
        "compared": None,
        "leaked": [],
    }
    seen = summary_of(observed(), rows, num_legs=2, end_s=60 * MINUTES)
    return asked | seen | {"undisturbed_s": None, "machine": machine(), "wrong": []} | changes


def test_the_summary_counts() -> None:
    counts = summary()
    assert counts["reached"] == {"sft": 9, "ppo": 3}
    assert (counts["num_faults"], counts["num_not_met"], counts["resumes"]) == (3, 1, 1)
    assert (counts["rows"], counts["rows_recorded"]) == (3, 4)
    assert counts["longest_without_step_s"] == 59 * 60 - 65.0, "from the last step to the end"
    assert counts["curve"] == [[0, 0.25, -1.5]]
    assert counts["memory"] == {"generator": {"early_mib": 100.0, "late_mib": 100.0, "percent": 0.0}}


def test_the_table_is_markdown_with_every_kind_of_figure() -> None:
    comparison = {"rows": 3, "equal": 3, "figures": 4, "first_difference": None}
    lines = table(summary(compared=comparison)).splitlines()
    assert "| rows equal to the undisturbed run's | 3 of 3 (4 figures) |" in lines
    assert "| recoveries | generator 3, sync 1 |" in lines
    assert "| generator SIGKILL | 2 | 6.0 | 8.0 |" in lines
    assert "| generator | 100.0 | 100.0 | +0.0 |" in lines
    assert "| 0 | 25.0% | -1.50 |" in lines
    assert "| outcome | passed |" in lines


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"failure": "no step"}, "no step"),
        ({"leaked": ["ray::IDLE"]}, "outlive"),
        ({"compared": {"rows": 3, "equal": 2, "figures": 4, "first_difference": "row 2"}}, "row 2"),
        ({"compared": None}, "nothing was compared"),
        ({"memory": {"ray": dataclasses.asdict(Growth(100.0, 106.0)) | {"percent": 6.0}}}, "memory of ray has grown"),
    ],
)
def test_whatever_is_wrong_is_said(changes: dict[str, Any], word: str) -> None:
    good = {"rows": 3, "equal": 3, "figures": 4, "first_difference": None}
    assert judged(summary(compared=good), comparing=True) == []
    (line,) = judged(summary(compared=good) | changes, comparing=True)
    assert word in line


def test_without_a_comparison_none_is_missed() -> None:
    assert judged(summary(), comparing=False) == []


def test_what_is_shown_of_a_long_list_has_both_ends() -> None:
    assert spread(list(range(71)), 8) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert spread([1, 2], 8) == [1, 2]


def test_the_picture_is_drawn_also_of_a_soak_that_came_to_nothing(tmp_path: Path) -> None:
    for number, seen in enumerate((observed(), Observed())):
        out = tmp_path / f"{number}.png"
        draw(summary_of(seen, [], num_legs=1, end_s=240.0), dataclasses.asdict(seen), out)
        assert out.read_bytes().startswith(b"\x89PNG")
