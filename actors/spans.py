"""What a process was busy with, and when: spans of time with names."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

_BEGAN = time.time() - time.monotonic()  # so that spans of several nodes stand beside each other


def now() -> float:
    """Return the seconds since the epoch, by a clock that goes on evenly when that of the node is set."""
    return _BEGAN + time.monotonic()


class Span(NamedTuple):
    """Something that took from `start` to `end`, in seconds since the epoch as `now` has them."""

    name: str
    start: float
    end: float


class SpanLog:
    """Spans of this process, from any of its threads. One that goes on as they are taken is cut in two there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: list[Span] = []
        self._open: dict[int, tuple[str, float]] = {}
        self._numbers = count()

    @contextmanager
    def record(self, name: str) -> Iterator[None]:
        """Record how long the block takes."""
        number = next(self._numbers)
        with self._lock:
            self._open[number] = name, now()
        try:
            yield
        finally:
            with self._lock:
                self._done.append(Span(*self._open.pop(number), now()))

    def add(self, spans: Iterable[Span]) -> None:
        """Record what has been done, and was timed elsewhere."""
        with self._lock:
            self._done += spans

    def take(self) -> list[Span]:
        """Return what has been recorded since the last time, up to now."""
        with self._lock:
            cut = now()
            spans = self._done + [Span(name, start, cut) for name, start in self._open.values()]
            self._done = []
            self._open = {number: (name, cut) for number, (name, _) in self._open.items()}
            return spans


def busy_seconds(spans: list[Span], start: float, end: float) -> float:
    """Return how much of the time from `start` to `end` lies in one span or more."""
    busy, until = 0.0, start
    for span in sorted(spans, key=lambda one: one.start):
        begin, finish = max(span.start, until), min(span.end, end)
        if finish > begin:
            busy += finish - begin
            until = finish
    return busy
