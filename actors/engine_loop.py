"""A generator in a thread of its own: requests are sampled while others come, and new weights come in between steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from actors.rollout import Rollout
from actors.spans import SpanLog

if TYPE_CHECKING:
    from actors.generator import SampleRequest, VLLMGenerator

Result = TypeVar("Result")
Outbox = SimpleQueue[tuple[int, Rollout] | BaseException]


class EngineLoop:
    """Steps the engine for as long as it has requests; whatever else is asked of it is done between two steps.

    Any number of threads may call it at once. Only the thread of the loop touches the engine.
    """

    def __init__(self, make: Callable[[], VLLMGenerator], spans: SpanLog) -> None:
        """Raises what `make` raises. The time in which something is sampled is recorded in `spans`."""
        self._spans = spans
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._outboxes: dict[int, Outbox] = {}  # of requests that are not finished, by their numbers
        threading.Thread(target=self._run, name="engine", daemon=True).start()
        self.generator = self.call(make)

    def call(self, do: Callable[[], Result]) -> Result:
        """Return what `do` returns, or raise what it raises; it runs between two steps of the engine."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(do())
            except BaseException as error:  # whose it is: the caller's, not the loop's
                future.set_exception(error)

        self._inbox.put(run)
        return future.result()

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[tuple[int, Rollout]]:
        """Yield the place of each request among these and its rollout, as each is finished, in no fixed order.

        Closing the iterator drops what is unfinished. Raises as `VLLMGenerator.add` and `step` do.
        """
        outbox: Outbox = SimpleQueue()
        numbers = self.call(lambda: self._add(requests, outbox))
        places = {number: place for place, number in enumerate(numbers)}
        try:
            while places:
                item = outbox.get()
                if isinstance(item, BaseException):
                    raise item
                number, rollout = item
                yield places.pop(number), rollout
        finally:
            if places:
                self.call(lambda: self._drop(list(places)))

    def _add(self, requests: Sequence[SampleRequest], outbox: Outbox) -> list[int]:
        self.generator.check_lengths(requests)
        numbers = [self.generator.add(request) for request in requests]
        self._outboxes |= dict.fromkeys(numbers, outbox)
        return numbers

    def _drop(self, numbers: Sequence[int]) -> None:
        running = [number for number in numbers if self._outboxes.pop(number, None) is not None]
        self.generator.abort(running)

    def _run(self) -> None:
        while True:
            self._inbox.get()()  # nothing is being sampled: wait
            if self._outboxes:
                with self._spans.record("sample"):
                    self._until_idle()

    def _until_idle(self) -> None:
        while self._outboxes:
            if self.generator.awake:
                self._step()
            else:
                self._inbox.get()()  # nothing is sampled until it wakes
            while not self._inbox.empty():
                self._inbox.get()()

    def _step(self) -> None:
        try:
            finished = self.generator.step()
        except BaseException as error:  # whoever waits for a rollout hears it, and nobody waits for ever
            for outbox in {id(outbox): outbox for outbox in self._outboxes.values()}.values():
                outbox.put(error)
            self._outboxes.clear()
            return
        for number, rollout in finished:
            self._outboxes.pop(number).put((number, rollout))
