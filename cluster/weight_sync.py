"""Learner weights into every generator: one verified, versioned operation.

The learner gathers a layer group at a time, and rank 0 sends it to every generator, or each rank to the one that it
shares a GPU with; every generator receives, loads and verifies it (actors/weight_receiver.py). Both sides run at once,
so neither is waited for alone. A generator that is lost in it, or whose update failed, is replaced, and the whole is
done again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.driver import Metrics
from cluster.faults import LearnersLostError, ProcessError, ProcessLostError
from cluster.generators import WRONG_AGAIN, GeneratorGroup
from cluster.learners import LearnerGroup
from cluster.members import Members, Patience
from cluster.processes import reason
from cluster.turns import SAMPLING, SYNCING, OwnGPUs, Turns

LOOK_S = 0.2  # how long one side is looked at before the other
GRACE_S = 10.0  # who waits for another longer than the timeout has this long to say so itself
_ADVICE = re.compile(r" This is typically caused by .*?GLHF!\s*\S*")  # that gloo gives with each broken connection


@dataclass(frozen=True)
class Failures:
    """Who could not take part, by number, and why."""

    generators: dict[int, BaseException] = field(default_factory=dict)
    ranks: dict[int, BaseException] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.generators or self.ranks)

    def __str__(self) -> str:
        parts = [f"generator {index}: {why}" for index, why in self.generators.items()]
        parts += [f"learner rank {rank}: {why}" for rank, why in self.ranks.items()]
        return _ADVICE.sub("", "; ".join(parts))


class VerifiedWeightSync:
    """Pushes the learner group's weights to the generator group."""

    def __init__(
        self,
        learners: LearnerGroup,
        generators: GeneratorGroup,
        *,
        dtype: str,
        routes: Sequence[Sequence[int]],
        wire: str,
        bucket_bytes: int,
        timeout_s: float,
    ) -> None:
        """`routes` has for each generator the rank that sends to each of its processes; `wire` is the transport's."""
        self.learners, self.generators = learners, generators
        self.dtype, self.routes, self.wire, self.timeout_s = dtype, routes, wire, timeout_s
        self.bucket_bytes = bucket_bytes
        self.measured: Metrics = {}  # in the last update: of each figure the largest that anyone had
        self.version: int | None = None  # what every generator holds; None: what it started from
        self.untouched = True  # no generator has been sent anything
        self.turns: Turns = OwnGPUs()
        generators.restore = self.restore

    def connect(self) -> None:
        """Return when every generator has joined the learner's transport.

        Raises as `push` does.
        """
        self.turns.take(SYNCING)
        self._repeated(Failures, what="joining the weight sync")

    def push(self, version: int) -> Metrics:
        """Return when every generator holds the weights under `version`, verified.

        Raises:
            LearnersLostError: a learner rank is lost.
            ProcessError: generators had to be replaced too often, or the learner failed by itself.
        """
        start = time.perf_counter()
        self.turns.take(SYNCING)
        failures = self._sent(version)
        if failures:
            self._mend(failures, what=f"weight sync of version {version}")
            self._repeated(lambda: self._sent(version), what=f"weight sync of version {version}, repeated")
        self.version = version
        seconds = time.perf_counter() - start
        self.turns.take(SAMPLING)
        return (
            self.measured
            | self.turns.metrics()
            | {
                "sync/version": float(version),
                "sync/bytes_per_s": self.measured["sync/bytes"] / seconds,
                "timing/weight_sync_s": seconds,
            }
        )

    def restore(self) -> None:
        """Bring generators that are new, or have a new learner, to the weights that the others hold."""
        version = self.version
        self.turns.take(SYNCING)
        if version is None:
            self.connect()
        else:
            self._repeated(lambda: self._sent(version), what=f"weight sync of version {version}, restored")
        self.turns.take(SAMPLING)

    def _repeated(self, send: Callable[[], Failures], *, what: str) -> None:
        """Connect and send, until nobody fails in it; whoever does is replaced, as often as is allowed."""
        while failures := self._joined() or send():
            self._mend(failures, what=what)
            self.turns.take(SYNCING)

    def _mend(self, failures: Failures, *, what: str) -> None:
        """Replace the generators that failed; raise where it is the learner, or would be the same again."""
        text = f"{what} failed: {failures}"
        if any(isinstance(why, ProcessLostError) for why in failures.ranks.values()):
            raise LearnersLostError(text)
        if not failures.generators or any(isinstance(why, WRONG_AGAIN) for why in failures.generators.values()):
            raise ProcessError(text)
        self.generators.members.recoveries.count("sync", text)
        self.generators.members.renew(failures.generators)

    def _joined(self) -> Failures:
        self.generators.members.renew_dead()  # nobody can join without all
        senders = [rank for route in self.routes for rank in route]
        infos = self.learners.open_sync(
            dtype=self.dtype,
            wire=self.wire,
            num_receivers=[senders.count(rank) for rank in range(self.learners.num_ranks)],
            bucket_bytes=self.bucket_bytes,
            timeout_s=self.timeout_s,
        )
        seats = [iter(of_rank) for of_rank in infos]
        joining = [[next(seats[rank]) for rank in route] for route in self.routes]
        return self._together(self.generators.join_sync(joining), self.learners.connect_sync())

    def _sent(self, version: int) -> Failures:
        self.untouched = False
        return self._together(self.generators.receive_weights(version), self.learners.send_weights(version))

    def _together(self, receiving: Sequence[Any], sending: Sequence[Any]) -> Failures:
        """Wait for both sides and return everyone who failed.

        A failure on one side breaks the other's connection, so the first error to arrive is seldom the cause. Whoever
        does not answer is killed, and so is a generator that failed, which has to be replaced: the others are free of
        it at once, and not only after the transport's own timeout.
        """
        receivers = Waiting(self.generators.members, receiving, kill_failed=True)
        senders = Waiting(self.learners.members, sending, kill_failed=False)
        patience, late = Patience(self.timeout_s), f"it has not finished in {self.timeout_s:g} s"
        while receivers.calls or senders.calls:
            receivers.look()
            senders.look()
            patience.look()
            if patience.waited_s > self.timeout_s + GRACE_S:
                receivers.give_up(late)  # whereupon the senders hear that the connection is broken
            if patience.waited_s > self.timeout_s + 2 * GRACE_S:
                senders.give_up(late)
        figures = [figure for side in (senders, receivers) for told in side.told for figure in told.items()]
        self.measured = {name: max(value for key, value in figures if key == name) for name, _ in figures}
        return Failures(*(dict(sorted(side.failed.items())) for side in (receivers, senders)))


class Waiting:
    """The calls of one side that are still waited for, and who has failed."""

    def __init__(self, members: Members, refs: Sequence[Any], *, kill_failed: bool) -> None:
        self.members, self.kill_failed = members, kill_failed
        self.calls = {ref: number for number, ref in enumerate(refs)}
        self.failed: dict[int, BaseException] = {}
        self.told: list[Metrics] = []

    def look(self) -> None:
        """Take note of what is done, for a short time."""
        if not self.calls:
            return
        done, lost = self.members.wait(self.calls, timeout_s=LOOK_S)
        for ref in done:
            number = self.calls.pop(ref)
            try:
                self.told.append(ray.get(ref) or {})  # who joins has nothing to tell
            except RayTaskError as error:  # of any kind: `_mend` judges it with everyone else's
                self.failed[number] = error.cause or error
            except RayError as error:
                self.failed[number] = ProcessLostError(f"it died: {reason(error)}")
            if self.kill_failed and number in self.failed:
                self.members.end(number)
        self._lose(lost)

    def give_up(self, why: str) -> None:
        """Count everyone who is still waited for as lost."""
        self._lose(dict.fromkeys(self.calls.values(), why))

    def _lose(self, lost: Mapping[int, str]) -> None:
        for number, why in lost.items():
            self.members.end(number)
            self.failed[number] = ProcessLostError(why)
        self.calls = {ref: number for ref, number in self.calls.items() if number not in lost}
