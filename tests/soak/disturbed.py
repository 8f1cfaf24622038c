"""A run that is disturbed, leg by leg, and the faults that are done to it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from cluster.checkpoint_files import parsed_name, position
from tests.runs import AGENTS, LaunchedRun, wait_for
from tests.soak.drawing import SUSPENDED_DRIVER, TORN, Fault, Strike, drawn, next_fitting
from tests.soak.watch import LOOK_S, ROLES, Injected, Observed, Watch, state_of

# With so many steps the learning rate, which falls to zero over them, is as good as constant after its warm-up. The
# undisturbed run is given the same number and is stopped in the same way, so no figure depends on where that is.
SETTINGS = (
    "experiment=quickstart",
    "cluster.num_generators=2",
    "cluster.heartbeat_s=10",
    "cluster.start_timeout_s=90",  # a process that is suspended while it starts is noticed only then
    "checkpoint.every=2",  # a copy costs a tenth of a second, and something dies every half minute
    "algorithm.num_steps=100000",
)
HANG_S = 180.0  # without a step that is recorded
STALL_S = 300.0  # without a step beyond the furthest so far
STOP_S = 60.0  # from SIGTERM to the end: cluster.grace_s is 30, and Python takes a moment to end
SEEN_S = 40.0  # how long a process in a call is looked for before the fault is given up
SUSPENDED_S = 20.0  # the driver
GONE_S = 120.0  # the longest that a process that was suspended may stay
REPLACED = "and the run goes on"  # what the run says of everyone whom it declares lost
NOT_MET = "not met"  # the fault was not done


class DisturbedRun:
    """The processes of the run so far, what is seen of it, and what is done to it.

    Every method raises AssertionError as soon as the run does what no fault excuses.
    """

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(f"{seed}: which process, which byte")
        self.observed = Observed()
        self.legs = [LaunchedRun(folder / "run", *SETTINGS, settings=())]
        self.watch = Watch(self.run, self.observed)
        self.suspended: dict[int, float] = {}  # processes, and when
        self.struck_s = 0.0

    @property
    def run(self) -> LaunchedRun:
        """The leg that runs now."""
        return self.legs[-1]

    def disturb(self, *, minutes: float, every: float, seed: int) -> None:
        """Do a fault every so many seconds.

        One may well meet the run in the middle of a recovery; but if it has not got any further since the last two,
        the next one waits until it has.
        """
        faults, due, watch = drawn(seed), every, self.watch
        while due < 60 * minutes:
            self.until(lambda: False, seconds=due - watch.now())
            self.until(lambda: watch.now() - watch.furthest_s < 2 * every, seconds=STALL_S)
            roles, count = self.roles(), len(self.checkpoints())
            self.inject(next_fitting(faults, roles, num_checkpoints=count))
            due = max(due + every, every * (watch.now() // every + 1))

    def inject(self, fault: Fault) -> None:
        """Do a fault and write down how it went."""
        last = self.observed.steps[-1] if self.observed.steps else None
        at_step = "before the first step" if last is None else f"{last.stage} {last.step}"
        details = ", ".join(map(str, fault.strikes)) if len(fault.strikes) > 1 else ""
        self.struck()
        outcome = "the run did not stand it"
        try:
            outcome = FAULTS[fault.kind](self, fault)
        finally:
            self.observed.faults.append(Injected(fault.name, self.struck_s, outcome, at_step, self.watch.leg, details))
            print(f"{self.struck_s:6.0f} s  {at_step:12}  {fault.name}  {details}  {outcome}", flush=True)
        late = [pid for pid, at_s in self.suspended.items() if self.watch.now() - at_s > GONE_S]
        assert all(state_of(pid) != "T" for pid in late), f"suspended, and still there: {late} of {self.run.log}"

    def struck(self) -> None:
        """Take note that harm is done now."""
        self.struck_s = self.watch.now()

    def check(self) -> None:
        """Raise AssertionError if the run has ended by itself, hangs, or does not get any further."""
        self.watch.check()
        code, now = self.run.process.poll(), self.watch.now()
        assert code is None, f"the run ended by itself with exit code {code}: {self.run.log}"
        assert now - self.watch.recorded_s < HANG_S, f"no step recorded for {HANG_S:g} s: {self.run.log}"
        assert now - self.watch.furthest_s < STALL_S, f"no step beyond the furthest for {STALL_S:g} s: {self.run.log}"

    def until(self, condition: Callable[[], bool], *, seconds: float, every: float = 0.2) -> bool:
        """Wait for something while the run goes on; return whether it came."""
        deadline, checked = time.monotonic() + seconds, 0.0
        while not condition():
            now = time.monotonic()
            if now >= deadline:
                return False
            if now - checked >= 1:
                self.check()
                checked = now
            time.sleep(every)
        return True

    def go_on(self) -> None:
        """Start the run again where it stood."""
        time.sleep(2 * LOOK_S)  # the last rows are to be seen as those of the leg before
        self.legs.append(LaunchedRun(self.folder / "run", *SETTINGS, "resume=auto", settings=()))
        self.watch.follow(self.run)

    def finish(self) -> None:
        """Stop the run, once it has got over the last fault."""
        assert self.until(lambda: self.steps_since_fault(2), seconds=HANG_S), f"no step: {self.run.log}"
        self.stop([self.run.process.pid])

    def stop(self, pids: Sequence[int]) -> str:
        """Send SIGTERM, wait for the end, and return how it went. Raises AssertionError for a wrong exit code."""
        recovering = not self.steps_since_fault(1)
        self.struck()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        code = self.run.end(seconds=STOP_S)
        self.run.assert_nothing_left(but=AGENTS)
        if recovering and code == 128 + signal.SIGTERM and "it is given up" in self.run.output:
            return "it came in the middle of a recovery, which took longer than the grace time"
        assert code == 0, f"exit code {code} after SIGTERM: {self.run.log}"
        return f"exit code 0 after {self.watch.now() - self.struck_s:.0f} s"

    def steps_since_fault(self, count: int) -> bool:
        """Return whether so many steps have been recorded since the last fault."""
        done = [fault.at_s for fault in self.observed.faults if fault.outcome != NOT_MET]
        last = done[-1] if done else 0.0
        return sum(seen.is_after(last) for seen in self.observed.steps[-count:]) >= count

    def roles(self) -> set[str]:
        """Return the roles of which there are processes, as soon as there are any; suspended ones do not count."""
        found: set[str] = set()

        def there() -> bool:
            found.update(role for role, title in ROLES.items() if self.watch.pids(title))
            return bool(found)

        assert self.until(there, seconds=HANG_S), f"no process was started: {self.run.log}"
        return found

    def checkpoints(self) -> list[Path]:
        """Return the folders of the checkpoints, the oldest first."""
        found = [(parsed_name(path.name), path) for path in (self.folder / "run" / "checkpoints").glob("*-*")]
        return [path for _, path in sorted((position(*name), path) for name, path in found if name is not None)]

    def victims(self, strikes: Sequence[Strike]) -> list[int]:
        """Return a process for each of the strikes, as soon as all are seen; none if they are not."""
        titles = [ROLES[strike.role] + (f".{strike.call}" if strike.call else "") for strike in strikes]
        pids: list[int] = []

        def seen() -> bool:
            pids[:] = [self.rng.choice(found) for found in map(self.watch.pids, titles) if found]
            return len(pids) == len(strikes)

        return pids if self.until(seen, seconds=SEEN_S, every=0.002) else []

    def end_everything(self) -> list[str]:
        """End every process of the run; return the titles of those that outlive a driver that has ended by itself."""
        ended = self.run.process.poll() is not None

        def left() -> dict[int, str]:
            return {pid: title for leg in self.legs for pid, title in leg.processes().items()}

        if ended:
            wait_for(lambda: not left(), seconds=90)
        still_there = left()
        for pid in still_there:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.watch.stop()
        return sorted(still_there.values()) if ended else []


def strike(run: DisturbedRun, fault: Fault) -> str:
    """Send its signal to one process, or to two at once."""
    pids = run.victims(fault.strikes)
    if not pids:
        return NOT_MET
    run.struck()
    for pid, one in zip(pids, fault.strikes, strict=True):
        try:
            os.kill(pid, one.signum)
        except ProcessLookupError:
            return NOT_MET  # it has ended since it was seen
        if one.signum == signal.SIGSTOP:
            run.suspended[pid] = run.watch.now()
    return "done"


def kill_driver(run: DisturbedRun, fault: Fault) -> str:
    run.run.kill()
    run.go_on()
    return "done"


def tear_checkpoint(run: DisturbedRun, fault: Fault) -> str:
    """Kill the driver and spoil a file of the newest checkpoint: the one before it has to be used."""
    run.run.kill()
    before, newest = run.checkpoints()[-2:]
    path = run.rng.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
    at = run.rng.randrange(path.stat().st_size)
    how = run.rng.choice(("truncated", "a byte flipped"))
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content[:at] if how == "truncated" else content)
    run.go_on()
    assert run.until(lambda: "going on from" in run.run.output, seconds=HANG_S), f"it did not go on: {run.run.log}"
    for line in (f"{newest.resolve()} is torn and is passed over", f"going on from {before.resolve()}\n"):
        assert line in run.run.output, f"{path} {how}, and no {line!r}: {run.run.log}"
    return f"{path.relative_to(newest.parent)} {how}, {before.name} used"


def stop_driver(run: DisturbedRun, fault: Fault) -> str:
    outcome = run.stop([run.run.process.pid])
    run.go_on()
    return outcome


def stop_all(run: DisturbedRun, fault: Fault) -> str:
    outcome = run.stop(list(run.run.processes()))
    run.go_on()
    return outcome


def suspend_driver(run: DisturbedRun, fault: Fault) -> str:
    """Suspend the driver for a while: nobody may be declared dead for that."""
    # Two steps: the first may have been past the process that the last fault was done to.
    if not run.until(lambda: run.steps_since_fault(2), seconds=SEEN_S):
        return NOT_MET
    driver, lost = run.run.process, run.run.output.count(REPLACED)
    run.struck()
    driver.send_signal(signal.SIGSTOP)
    time.sleep(SUSPENDED_S)
    enough = len(run.observed.steps) + 2
    driver.send_signal(signal.SIGCONT)
    assert run.until(lambda: len(run.observed.steps) >= enough, seconds=HANG_S), f"no step after it: {run.run.log}"
    assert run.run.output.count(REPLACED) == lost, f"declared dead while the driver was suspended: {run.run.log}"
    return "done"


FAULTS: dict[str, Callable[[DisturbedRun, Fault], str]] = {
    "process": strike,
    "burst": strike,
    "driver SIGKILL": kill_driver,
    TORN: tear_checkpoint,
    "driver SIGTERM": stop_driver,
    "all SIGTERM": stop_all,
    SUSPENDED_DRIVER: suspend_driver,
}
