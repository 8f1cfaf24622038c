"""Being asked to stop: Ctrl-C, and the SIGTERM of a scheduler that takes the machine back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

TEARDOWN_S = 5.0  # of the grace time, for ending the processes


class Stopped(KeyboardInterrupt):  # the one exception that Ray's own waits let through; no error, so nothing keeps it
    """The run was asked to stop by a signal."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)

    def exit_code(self, *, saved: bool) -> int:
        """Return 0 after a SIGTERM that has cost nothing, else 128 and the number of the signal, as a shell has it."""
        return 0 if saved and self.signum == signal.SIGTERM else 128 + self.signum


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Keep SIGTERM from processes that are started in this block, and from theirs; they ignore it for good.

    A scheduler or `timeout` sends it to every process of a run. Only the driver is to hear it: it needs the others for
    the checkpoint, and ends them itself. A handler that the block sets for this process, as Ray does, is undone before
    a SIGTERM that came meanwhile is let through.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # else it was set outside of Python, which cannot set it again
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """Turns signals into `Stopped`: at once, or where steps are taken, when the step at hand is done and saved.

    Within `deferred` the loop looks at `signum` after every step, and raises what `stop` returns. A SIGTERM leaves it
    `grace_s` seconds less what the end takes; then `Stopped` is raised wherever the run is. A second Ctrl-C ends the
    process on the spot.

    Ray makes a KeyboardInterrupt of its own of what is raised in its waits; so `stopped` holds the one that was meant.
    """

    def __init__(self, *, grace_s: float, note: Callable[[str], None]) -> None:
        self.limit_s, self.note = max(grace_s - TEARDOWN_S, grace_s / 2), note
        self.signum: int | None = None
        self.stopped: Stopped | None = None
        self._deferring = self._limited = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals in this block."""
        handlers = {signal.SIGINT: self._asked, signal.SIGTERM: self._asked, signal.SIGALRM: self._late}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if self.signum is None:  # else a further Ctrl-C still has to find `_asked`, until the process is over
                for number, handler in before.items():
                    signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block itself look at `signum` between its steps."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def stop(self) -> Stopped:
        """Return what is to be raised, and let no time limit come between."""
        assert self.signum is not None
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.stopped = Stopped(self.signum)
        return self.stopped

    def _asked(self, signum: int, frame: FrameType | None) -> None:
        first, self.signum = self.signum is None, signum if self.signum is None else self.signum
        if not first and signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if first and not self._deferring:
            raise self.stop()
        if self._deferring and signum == signal.SIGTERM and not self._limited:
            self._limited = True
            signal.setitimer(signal.ITIMER_REAL, self.limit_s)
        if first and signum == signal.SIGTERM:
            self.note("SIGTERM: the run stops after this step, with a checkpoint")
        elif first:
            self.note("Ctrl-C: the run stops after this step, with a checkpoint; Ctrl-C again leaves at once")

    def _late(self, signum: int, frame: FrameType | None) -> None:
        self.note(f"the step was not done {self.limit_s:g} s after SIGTERM (cluster.grace_s): it is given up")
        raise self.stop()
