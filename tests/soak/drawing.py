"""Which faults are done to a run, in which order: a function of the seed."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass

TORN, SUSPENDED_DRIVER = "driver SIGKILL, checkpoint torn", "driver SIGSTOP for 20 s"
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
CALLS: dict[str, tuple[str | None, ...]] = {  # by role: wherever it is, or in one of these
    "generator": (None, "sample", "receive_weights"),
    "reward": (None, "score"),
    "learner": (None, "update", "send_weights", "train_step", "write_snapshot"),
}
WEIGHTS = {  # one fault in five costs a start of the whole run, which takes about as long as half a minute
    "process": 24,
    "burst": 4,
    "driver SIGKILL": 3,
    TORN: 2,
    "driver SIGTERM": 2,
    "all SIGTERM": 1,
    SUSPENDED_DRIVER: 2,
}


@dataclass(frozen=True)
class Strike:
    """A signal to one process of a role: wherever it is (`call` None), or as soon as it is seen in a call."""

    role: str
    signum: signal.Signals
    call: str | None = None

    def __str__(self) -> str:
        return f"{self.role} {self.signum.name}" + (f" in {self.call}" if self.call else "")


@dataclass(frozen=True)
class Fault:
    """One fault; `strikes` of the kinds `process` (one) and `burst` (two, of different roles, at once)."""

    kind: str
    strikes: tuple[Strike, ...] = ()

    @property
    def name(self) -> str:
        return str(self.strikes[0]) if self.kind == "process" else self.kind

    def fits(self, roles: set[str], *, num_checkpoints: int) -> bool:
        """Return whether it can be done to a run that has processes of these roles and so many checkpoints."""
        calls = {strike.call for strike in self.strikes}
        if not {strike.role for strike in self.strikes} <= roles:
            return False
        if calls & {"update", "send_weights"} and "generator" not in roles:  # a supervised stage
            return False
        if "train_step" in calls and "generator" in roles:
            return False
        return self.kind != TORN or num_checkpoints >= 2


def next_fitting(faults: Iterator[Fault], roles: set[str], *, num_checkpoints: int) -> Fault:
    """Return the next fault; in place of one that does not fit, the next that does and is of the same sort.

    Of two sorts, to single processes or to the run, so that each has its share in every stage.
    """
    fault = next(faults)
    while not fault.fits(roles, num_checkpoints=num_checkpoints):
        to_processes = bool(fault.strikes)
        fault = next(each for each in faults if bool(each.strikes) == to_processes)
    return fault


def drawn(seed: int) -> Iterator[Fault]:
    """Yield faults without end, the same for the same seed. Not every one fits where the run is by then."""
    rng = random.Random(seed)
    while True:
        (kind,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if kind == "process":
            role = rng.choice(list(CALLS))
            yield Fault(kind, (Strike(role, rng.choice(SIGNALS), rng.choice(CALLS[role])),))
        elif kind == "burst":
            yield Fault(kind, tuple(Strike(role, rng.choice(SIGNALS)) for role in rng.sample(list(CALLS), 2)))
        else:
            yield Fault(kind)
