"""Who was busy with what: spans of processes, idle shares and the trace."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from actors.spans import Span, SpanLog, busy_seconds
from cluster.tracing import clipped, idle_shares, write_trace
from learner.phases import Phases


def test_spans_that_lie_over_each_other_count_once() -> None:
    spans = [Span("a", 1, 4), Span("b", 2, 3), Span("c", 3.5, 5), Span("d", 7, 20)]
    assert busy_seconds(spans, 0, 10) == pytest.approx(4 + 3)
    assert busy_seconds(spans, 2, 8) == pytest.approx(3 + 1)
    assert busy_seconds([], 0, 10) == 0
    assert busy_seconds(spans[::-1], 0, 10) == pytest.approx(7)


def test_what_goes_on_is_cut_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("actors.spans.now", lambda: now)
    log = SpanLog()
    with log.record("outer"):
        now = 1.0
        with log.record("inner"):
            now = 2.0
        assert log.take() == [Span("inner", 1.0, 2.0), Span("outer", 0.0, 2.0)]
        now = 5.0
    assert log.take() == [Span("outer", 2.0, 5.0)]
    assert log.take() == []


def test_what_was_timed_elsewhere_is_taken_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("actors.spans.now", lambda: now)
    monkeypatch.setattr("learner.phases.now", lambda: now)
    log, phases = SpanLog(), Phases()
    with log.record("update"):
        for name, seconds in (("policy", 2.0), ("critic", 1.0), ("policy", 0.5)):
            with phases.record(name):
                now += seconds
    assert phases.seconds() == {"evaluation": 0.0, "policy": 2.5, "critic": 1.0, "optimizer": 0.0}
    log.add(phases.spans)
    assert log.take() == [
        Span("update", 0, 3.5),
        Span("policy", 0, 2),
        Span("critic", 2, 3),
        Span("policy", 3, 3.5),
    ]
    assert log.take() == []


def test_spans_of_several_threads_are_all_kept() -> None:
    log = SpanLog()

    def work() -> None:
        for _ in range(100):
            with log.record("work"):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    taken = []
    while any(thread.is_alive() for thread in threads):
        taken += log.take()
    taken += log.take()
    assert len(taken) >= 400  # one that was open as it was taken counts twice
    assert all(span.start <= span.end for span in taken)


def test_idle_shares_are_of_the_step() -> None:
    rows = {"generator 0": [Span("sample", 0, 6)], "learner 1": [Span("update", 8, 20)], "reward 0": []}
    assert idle_shares(rows, 2, 10) == pytest.approx(
        {"idle/generator_0": 0.5, "idle/learner_1": 0.75, "idle/reward_0": 1.0}
    )


def test_a_trace_is_in_the_format_that_perfetto_opens(tmp_path: Path) -> None:
    """Trace Event Format: an object with traceEvents; complete events have ph, name, pid, tid, ts and dur in us."""
    path = tmp_path / "trace" / "step_000003.json"
    rows = {"driver": [Span("step", 100.0, 101.5)], "generator 0": clipped([Span("sample", 90, 100.25)], 100, 101.5)}
    write_trace(path, rows)
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {0: "driver", 1: "generator 0"}
    complete = [event for event in events if event["ph"] == "X"]
    assert [(e["tid"], e["name"], e["ts"], e["dur"]) for e in complete] == [
        (0, "step", 0, 1_500_000),
        (1, "sample", 0, 250_000),
    ]
    assert clipped([Span("early", 1, 2)], 3, 4) == []
