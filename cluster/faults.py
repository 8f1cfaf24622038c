"""What can happen to the processes of a run, as errors. No Ray in here."""

from __future__ import annotations


class ProcessError(RuntimeError):
    """A process of the run failed, and the run with it; says which and why."""


class ProcessLostError(ProcessError):
    """A process died, or does not answer; another may take its place. `why` says it without saying which."""

    def __init__(self, message: str, *, why: str | None = None) -> None:
        super().__init__(message)
        self.why = message if why is None else why


class LearnersLostError(ProcessLostError):
    """The learner group has lost a rank, and with it what it had learnt since the last checkpoint."""


class RolloutsLostError(ProcessError):
    """Rollouts are gone with the node that held them; the same prompts and seeds give them again."""
