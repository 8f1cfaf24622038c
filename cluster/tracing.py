"""Who was busy with what in a step: idle shares for the metrics, and a trace that Perfetto opens. No Ray in here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.spans import Span, busy_seconds
from cluster.driver import Metrics

Rows = Mapping[str, list[Span]]  # by the name of the process, "generator 0"
DRIVER = "driver"


def idle_shares(rows: Rows, start: float, end: float) -> Metrics:
    """Return the share of the time from `start` to `end` in which each process had nothing to do."""
    return {
        f"idle/{name.replace(' ', '_')}": 1 - busy_seconds(spans, start, end) / (end - start)
        for name, spans in rows.items()
    }


def write_trace(path: Path, rows: Rows) -> None:
    """Write the spans in the Trace Event Format of Chrome, which Perfetto opens: a row for each process.

    The format: complete events ("ph": "X") with times in microseconds, and the names of rows as metadata ("M").
    """
    spans = [span for of_row in rows.values() for span in of_row]
    origin = min((span.start for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for number, (name, of_row) in enumerate(rows.items()):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": name}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": number, "args": {"sort_index": number}})
        events += [complete(span, number, origin) for span in sorted(of_row, key=lambda one: (one.start, -one.end))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def complete(span: Span, row: int, origin: float) -> dict[str, Any]:
    start, end = (round((when - origin) * 1e6) for when in (span.start, span.end))
    return {"ph": "X", "name": span.name, "pid": 0, "tid": row, "ts": start, "dur": end - start}


def clipped(spans: Sequence[Span], start: float, end: float) -> list[Span]:
    """Return the parts of the spans that lie between `start` and `end`."""
    cut = [Span(span.name, max(span.start, start), min(span.end, end)) for span in spans]
    return [span for span in cut if span.end > span.start]
