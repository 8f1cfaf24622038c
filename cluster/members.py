"""The processes of one role: whether they live, waiting for them, and replacing one that is lost in its place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.spans import Span
from cluster.driver import Metrics
from cluster.faults import ProcessLostError
from cluster.processes import Placement, Process, answer, reason
from cluster.reactor import Reactor
from cluster.recoveries import Recoveries
from conf.schema import ClusterConfig

LOOK_EVERY_S = 1.0  # how often a wait looks up to see whether somebody has gone silent
PING_EVERY_S = 3.0
STARTING_S = 60.0  # a process that starts may be silent for so long at least, since imports can keep it from answering
ANSWER_S = 5.0  # how long a figure that may be missing is waited for
SAY_EVERY_S = 30.0  # how often it is said that a process waits for its place


class Patience:
    """How long somebody is waited for, `limit_s` seconds at most; to be asked every second or so.

    Only time in which somebody looks counts, so nobody is lost because this process itself was busy or suspended.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self.waited_s = limit_s, 0.0
        self._looked = time.monotonic()

    def look(self) -> float:
        """Return how many seconds of it are left."""
        now = time.monotonic()
        self.waited_s += min(now - self._looked, 2 * LOOK_EVERY_S)
        self._looked = now
        return max(self.limit_s - self.waited_s, 0.0)


@dataclass
class Heartbeat:
    """Whether one process lives: it is asked now and then, and the time that it owes an answer is added up."""

    handle: Any
    question: Any = None
    waited_s: float = 0.0  # for the answer to the question, or since the last one

    def lost(self, elapsed_s: float, *, limit_s: float) -> str | None:
        """Return why the process counts as lost, None if it lives; `elapsed_s` is the time since the last look."""
        self.waited_s += elapsed_s
        if self.question is None:
            if self.waited_s >= PING_EVERY_S:
                self.question, self.waited_s = self.handle.ping.remote(), 0.0
        elif ray.wait([self.question], timeout=0)[0]:
            question, self.question, self.waited_s = self.question, None, 0.0
            try:
                ray.get(question)
            except RayError as error:
                return f"it died: {reason(error)}"
        elif self.waited_s >= limit_s:
            return f"it has not answered for {limit_s:g} s"
        return None


class Members:
    """The processes of one role, each in its place."""

    def __init__(
        self,
        placement: Placement,
        process: type[Process],
        role: str,
        *,
        begin: Callable[[Any], Any] | None,
        limits: ClusterConfig,
        recoveries: Recoveries,
        reactor: Reactor | None = None,
    ) -> None:
        """`begin` makes the first call to a new process, by its handle; `wait_begun` returns when all are done.

        None leaves the first call to the caller. `reactor` is what is attended to while a member is waited for; None:
        nothing is.
        """
        self.reactor = Reactor() if reactor is None else reactor
        self.placement, self.process, self.role, self.begin = placement, process, role, begin
        self.limits, self.recoveries = limits, recoveries
        self.places = placement.places(role)
        self.handles = [placement.start(process, place) for place in self.places]
        self._heartbeats = [Heartbeat(handle) for handle in self.handles]
        self._looked = time.monotonic()
        self._ended: set[int] = set()
        self.make_room: Callable[[], None] = lambda: None  # for processes that are about to start anew
        self._beginning: dict[int, Any] = {}
        for index in range(len(self)):
            self._begin(index)

    def __len__(self) -> int:
        return len(self.handles)

    def lost(self, of: Iterable[int], *, starting: bool = False) -> dict[int, str]:
        """Return which of the members `of` are lost, and why. To be asked every second or so while waiting."""
        now = time.monotonic()
        elapsed, self._looked = min(now - self._looked, 2 * LOOK_EVERY_S), now
        limit = self.starting_limit_s if starting else self.limits.heartbeat_s
        whys = {index: self._heartbeats[index].lost(elapsed, limit_s=limit) for index in of}
        return {index: why for index, why in whys.items() if why is not None}

    @property
    def starting_limit_s(self) -> float:
        return max(self.limits.heartbeat_s, STARTING_S)

    def wait(
        self, calls: Mapping[Any, int], *, timeout_s: float, starting: bool = False
    ) -> tuple[list[Any], dict[int, str]]:
        """Wait until a call is done or a member is lost; return the calls that are done, and the lost with the reason.

        Both are empty if nothing has happened in `timeout_s`.

        Args:
            calls: each with the number of the member that it was made to.
            starting: the calls are the first, and may keep a process from answering for longer.
        """
        patience = Patience(timeout_s)
        while True:
            left = patience.look()
            done = self.reactor.wait(list(calls), timeout_s=min(LOOK_EVERY_S, left))
            if done:
                return done, {}
            lost = self.lost(sorted(set(calls.values())), starting=starting)
            if lost or left <= 0:
                return [], lost

    def wait_or_lose(
        self, calls: Mapping[Any, int], *, timeout_s: float, starting: bool = False
    ) -> tuple[list[Any], dict[int, str]]:
        """Do as `wait`, but whoever has not finished anything in `timeout_s` is lost too."""
        done, lost = self.wait(calls, timeout_s=timeout_s, starting=starting)
        if not done and not lost:
            lost = dict.fromkeys(sorted(set(calls.values())), f"it has finished nothing for {timeout_s:g} s")
        return done, lost

    def end(self, index: int) -> None:
        """Kill a member, whatever it is doing; it is to be replaced."""
        ray.kill(self.handles[index])
        self._ended.add(index)

    def wait_begun(self) -> None:
        """Return when every process has begun; one that is lost while it begins is replaced.

        Raises ProcessError or ConfigError as `answer` does, and as `replace` does.
        """
        self.replace(self._lost_beginning(), what=f"starting {self.role} processes")

    def replace(self, lost: Mapping[int, str], *, what: str) -> None:
        """Count what is lost, and put new processes in the places; return when they have begun.

        Raises ProcessError with the reasons if that has been done too often, ProcessLostError if there is no place.
        """
        while lost:
            who = "; ".join(f"{self.role} {index} is lost: {why}" for index, why in lost.items())
            self.recoveries.count(self.role, f"{what}: {who}")
            lost = self._renewed(lost)

    def renew(self, which: Iterable[int]) -> None:
        """Do the same without counting it, whether the old ones live or not: the caller has counted, or needs it so."""
        self.replace(self._renewed(which), what=f"starting {self.role} processes again")

    def renew_dead(self) -> None:
        """Renew those that have been killed and not been replaced, and those that are found dead."""
        questions = {handle.ping.remote(): index for index, handle in enumerate(self.handles)}
        ready, _ = ray.wait(list(questions), num_returns=len(questions), timeout=ANSWER_S)
        for question in ready:
            try:
                ray.get(question)
            except RayError:
                self._ended.add(questions[question])
        if self._ended:
            self.renew(sorted(self._ended))

    def _renewed(self, which: Iterable[int]) -> dict[int, str]:
        """Put new processes in these places; return which of them were lost as they began, and why."""
        which = list(which)
        for index in which:
            self.end(index)
        self.make_room()
        for index in which:
            self.handles[index] = self._in_place(index)
            self._ended.discard(index)
            self._heartbeats[index] = Heartbeat(self.handles[index])
            self._begin(index)
        return self._lost_beginning()

    def _begin(self, index: int) -> None:
        if self.begin is not None:
            self._beginning[index] = self.begin(self.handles[index])

    def _lost_beginning(self) -> dict[int, str]:
        """Wait for the first calls; return which members were lost in them, and why."""
        calls = {ref: index for index, ref in self._beginning.items()}
        lost: dict[int, str] = {}
        self._beginning = {}
        while calls:
            done, gone = self.wait_or_lose(calls, timeout_s=self.limits.start_timeout_s, starting=True)
            lost |= gone
            for ref in done:
                index = calls[ref]
                try:
                    what = f"starting {self.role} processes"
                    answer(ref, who=f"{self.role} {index}", what=what, timeout_s=self.limits.start_timeout_s)
                except ProcessLostError as error:
                    lost[index] = error.why
            calls = {ref: index for ref, index in calls.items() if ref not in done and index not in lost}
        return lost

    def _in_place(self, index: int) -> Any:
        """Return a handle of a new process that answers.

        A place may be on a node that is dead without Ray knowing yet, so a process that dies at once, or says nothing,
        is tried again; a place whose node is gone is found anew by Ray, if there is another node for it.
        """
        begun = said = time.monotonic()
        needs, limit_s = self._needs(index), self.limits.replace_timeout_s
        trouble, handle = "", None
        while True:
            if handle is None:
                handle = self.placement.start(self.process, self.places[index])
                question, asked = handle.ping.remote(), time.monotonic()
            answered, _ = ray.wait([question], timeout=LOOK_EVERY_S)
            now = time.monotonic()
            if answered:
                try:
                    ray.get(question)
                    return handle
                except RayError as error:
                    trouble = f"; the last process that was put there died: {reason(error)}"
                    handle = None
                    time.sleep(LOOK_EVERY_S)
            elif now - asked >= self.starting_limit_s:
                trouble = f"; the last process that was put there said nothing for {self.starting_limit_s:g} s"
                ray.kill(handle)
                handle = None
            check_own_node(f"{self.role} {index} finds no place again")
            if now - begun >= limit_s:
                if handle is not None:
                    ray.kill(handle)
                raise ProcessLostError(
                    f"{self.role} {index} was lost and finds no place again within {limit_s:g} s "
                    f"(cluster.replace_timeout_s): it needs {needs} on one node; free now: {free(needs)}{trouble}"
                )
            if now - said >= SAY_EVERY_S:
                said = now
                self.recoveries.note(
                    f"{self.role} {index} waits for a place: it needs {needs} on one node, free now: {free(needs)}; "
                    f"the run gives up after {limit_s:g} s (cluster.replace_timeout_s){trouble}"
                )

    def _needs(self, index: int) -> dict[str, float]:
        """Return what has to be on one node for a member to have its place."""
        return self.placement.plan.bundle_of(self.places[index]).resources()

    def memory(self) -> Metrics:
        """Return the largest resident memory of a member so far, of those that answer at once."""
        sizes = self._answers([handle.peak_resident_mib.remote() for handle in self.handles])
        return {f"memory/{self.role}_peak_mib": max(sizes.values())} if sizes else {}

    def spans(self) -> dict[str, list[Span]]:
        """Return what each member has been busy with since the last time, of those that answer at once."""
        spans = self._answers([handle.take_spans.remote() for handle in self.handles])
        return {f"{self.role} {index}": of_member for index, of_member in spans.items()}

    @staticmethod
    def _answers(refs: list[Any]) -> dict[int, Any]:
        """Return the answers to a question to each member, by number, of those that answer at once."""
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=ANSWER_S)
        answers = {}
        for index, ref in enumerate(refs):
            if ref in ready:
                with suppress(RayError):  # whoever needs it next will find that it is dead
                    answers[index] = ray.get(ref)
        return answers


def check_own_node(what: str) -> None:
    """Raise ProcessLostError if Ray counts this process's node as dead: it lets nothing be started from there.

    So it does for good when the node's raylet has died, or has not answered for longer than Ray's health checks allow:
    more than a minute, as seen.
    """
    own = ray.get_runtime_context().get_node_id()
    if not any(node["NodeID"] == own and node["Alive"] for node in ray.nodes()):
        raise ProcessLostError(
            f"{what}: Ray has lost the node of the driver, since its raylet died or stood still for too long, and "
            "starts nothing for it any more; start the run again with resume=auto"
        )


def free(needs: Mapping[str, float]) -> dict[str, float]:
    """Return how much of these resources is free in the whole cluster."""
    available = ray.available_resources()
    return {name: available.get(name, 0.0) for name in needs}
