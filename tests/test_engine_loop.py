"""The loop around an engine, with one that counts to the length of each request: threads, commands, errors."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from actors.engine_loop import EngineLoop
from actors.spans import SpanLog


class Counting:
    """Finishes a request, which is a number, after as many steps."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.given = 0
        self.threads: set[str] = set()
        self.steps = 0
        self.fail_at: int | None = None
        self.held = threading.Event()
        self.held.set()
        self.awake = True

    def check_lengths(self, requests: list[int]) -> None:
        if any(request < 1 for request in requests):
            raise ValueError("too short")

    def add(self, request: int) -> int:
        self.given += 1
        self.left[self.given] = request
        return self.given

    def step(self) -> list[tuple[int, Any]]:
        self.held.wait()
        self.threads.add(threading.current_thread().name)
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("the engine broke")
        self.left = {number: left - 1 for number, left in self.left.items()}
        done = [number for number, left in self.left.items() if left == 0]
        return [(number, f"rollout {number}") for number in done if self.left.pop(number) == 0]

    def abort(self, numbers: list[int]) -> None:
        for number in numbers:
            del self.left[number]


def made() -> tuple[EngineLoop, Counting]:
    engine = Counting()
    return EngineLoop(lambda: engine, SpanLog()), engine  # type: ignore[arg-type, return-value]


def test_each_request_is_answered_by_its_place_as_it_finishes() -> None:
    loop, engine = made()
    assert [place for place, _ in loop.sample([3, 1, 2])] == [1, 2, 0]  # type: ignore[list-item]
    assert engine.threads == {"engine"}
    assert list(loop.sample([])) == []


def test_many_threads_sample_at_once_and_each_gets_its_own() -> None:
    loop, engine = made()
    with ThreadPoolExecutor(8) as pool:
        asked = [[1 + (i * j) % 7 for j in range(1, 9)] for i in range(1, 9)]
        answers = list(pool.map(lambda lengths: sorted(place for place, _ in loop.sample(lengths)), asked))
    assert answers == [list(range(8))] * 8
    assert engine.given == 64
    assert engine.left == {}


def test_a_command_runs_between_steps_while_requests_run() -> None:
    loop, engine = made()
    stream = loop.sample([1, 10**6])  # type: ignore[list-item]
    next(stream)
    before, thread = loop.call(lambda: (engine.steps, threading.current_thread().name))
    assert thread == "engine"
    assert before < 10**6
    stream.close()  # type: ignore[attr-defined]
    assert loop.call(lambda: dict(engine.left)) == {}


def test_an_error_of_a_command_is_its_callers() -> None:
    loop, _ = made()
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda: 1 / 0)
    with pytest.raises(ValueError, match="too short"):
        list(loop.sample([1, 0]))  # type: ignore[list-item]
    assert len(list(loop.sample([1]))) == 1  # type: ignore[list-item]


def test_an_engine_that_breaks_is_heard_by_all_who_wait() -> None:
    loop, engine = made()
    engine.held.clear()
    engine.fail_at = 2
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(lambda: list(loop.sample([5, 6]))) for _ in range(2)]  # type: ignore[list-item]
        engine.held.set()
        for one in waiting:
            with pytest.raises(RuntimeError, match="the engine broke"):
                one.result(30)


def test_what_making_the_engine_raises_is_raised() -> None:
    def broken() -> Any:
        raise FileNotFoundError("no such model")

    with pytest.raises(FileNotFoundError, match="no such model"):
        EngineLoop(broken, SpanLog())


def test_an_engine_that_sleeps_takes_no_steps_and_goes_on_when_it_wakes() -> None:
    loop, engine = made()

    def sleep(awake: bool) -> int:
        engine.awake = awake
        return engine.steps

    loop.call(lambda: sleep(False))
    found: list[tuple[int, object]] = []
    thread = threading.Thread(target=lambda: found.extend(loop.sample([3, 1])), daemon=True)  # type: ignore[list-item]
    thread.start()
    while loop.call(lambda: len(engine.left)) < 2:
        pass
    assert loop.call(lambda: engine.steps) == loop.call(lambda: sleep(True)) == 0
    thread.join(20)
    assert sorted(place for place, _ in found) == [0, 1]
    assert engine.steps == 3
