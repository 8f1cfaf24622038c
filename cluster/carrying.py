"""Carrying a stage to its end: step by step, saving now and then, going back when the learner is lost.

The same for every stage that trains. A stage that is taken up from a checkpoint, in this run or a later one, goes on
as if it had never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cluster.best import BEST_EXPORT, taken_over
from cluster.checkpoints import Checkpoint, CheckpointError
from cluster.faults import LearnersLostError, ProcessError, RolloutsLostError
from cluster.learners import RankGroup
from cluster.run import Handover, Run
from cluster.tracking import Tracker
from conf.schema import Config, ConfigError


class Training(Protocol):
    """A stage while it trains."""

    name: str

    @property
    def learners(self) -> RankGroup: ...

    @property
    def step(self) -> int:
        """How many steps are done."""
        ...

    @property
    def done(self) -> bool:
        """Whether there is no further step to take."""
        ...

    @property
    def has_best(self) -> bool:
        """Whether the last step gave the best policy so far."""
        ...

    def begin(self) -> None:
        """Do what comes before the first step."""
        ...

    def take_up(self, state: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; the learner is new, the other processes may be in any state."""
        ...

    def advance(self) -> None:
        """Take a step and record it."""
        ...

    def state(self) -> dict[str, Any]:
        """Return, as JSON can hold it, all that `take_up` needs beside the learner's shards."""
        ...

    def finish(self) -> Handover:
        """Do what comes after the last step, and return what the stage leaves."""
        ...


def carry(run: Run, training: Training, before: Handover, resume: Checkpoint | None) -> Handover:
    """Return what the stage leaves, of which `before` is what it found.

    `resume` is a checkpoint of this stage that holds a state, or None to begin it.

    Raises:
        Stopped: the run was asked to stop.
        ProcessError: something failed, or was lost too often.
    """
    start = time.perf_counter()
    lost: ProcessError | None = None

    def save(*, best: bool = False) -> None:
        run.saver.save(
            training.name,
            training.step,
            lambda: saved_state(
                run,
                training.name,
                before.with_seconds(training.name, time.perf_counter() - start),
                training.state(),
            ),
            learners=training.learners if training.step > 0 else None,
            best=best,
        )

    while True:
        try:
            if lost is not None:
                training.learners.end()
                resume = gone_back(run, training.name, lost)
                if run.stop.signum is not None:  # in the step that was lost
                    raise run.stop.stop()
                training.learners.restart(str(lost))
                lost = None
            if resume is None or resume.state["stage"] is None:
                training.begin()
                save()
            else:
                training.take_up(resume.state["stage"], resume)
            with run.stop.deferred():
                while not training.done and run.stop.signum is None:
                    training.advance()
                    run.saver.reached(training.name, training.step)
                    run.recoveries.reached(training.name, training.step)
                    run.saver.look()
                    if is_due(training.step, run.config.checkpoint.every) or training.done or training.has_best:
                        save(best=training.has_best)
                run.saver.finish()
                if run.stop.signum is not None:
                    if not run.saver.is_current:
                        save()
                        run.saver.finish()
                    raise run.stop.stop()
            return training.finish().with_seconds(training.name, time.perf_counter() - start)
        except (LearnersLostError, RolloutsLostError) as error:
            lost = error


def gone_back(run: Run, stage: str, lost: ProcessError) -> Checkpoint:
    """Return the checkpoint that a stage goes back to, everything that came after it forgotten.

    Raises ProcessError if there is none.
    """
    run.saver.give_up()
    checkpoints = run.saver.checkpoints
    try:
        checkpoint = checkpoints.newest(run.console.note)
        if checkpoint is None or checkpoint.stage != stage:
            raise ProcessError(f"{lost}\nThere is no checkpoint of this stage to go back to.") from lost
        checkpoints.forget_after(checkpoint)
    except (CheckpointError, ConfigError) as error:
        raise ProcessError(f"{lost}\nThe run cannot go back to a checkpoint: {error}") from error
    run.tracker.rewind(checkpoint.state["tracker"])
    run.saver.went_back_to(checkpoint)
    return checkpoint


def saved_state(run: Run, stage: str, handover: Handover, inner: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a checkpoint holds beside the learner's shards.

    `inner` is the state of the stage itself, None at its start; `handover` is what the stages before it left.
    """
    return {
        "run_dir": str(run.dir),
        "asked_steps": asked_steps(run.config, stage),
        "handover": handover.to_plain(),
        "tracker": run.tracker.position(),
        "stage": inner,
    }


def adopted_state(run_dir: Path, tracker: Tracker, checkpoint: Checkpoint, handover: Handover) -> dict[str, Any]:
    """Return the state of another run's checkpoint as that of this run, whose record begins with it.

    The best policy so far is taken over with it, if the other run still has that one.
    """
    inner = checkpoint.state["stage"]
    if inner is not None and "best" in inner:
        others = checkpoint.folder.parent.parent / BEST_EXPORT
        inner = inner | {"best": taken_over(inner["best"], others, run_dir / BEST_EXPORT)}
    own = {"run_dir": str(run_dir), "handover": handover.to_plain(), "tracker": tracker.position(), "stage": inner}
    return checkpoint.state | own


def asked_steps(config: Config, stage: str) -> int:
    """Return how many steps a stage is to take; 0 for one that does not train."""
    steps = {"sft": config.sft.num_steps, "reward": config.reward_training.num_steps, "ppo": config.algorithm.num_steps}
    return steps.get(stage, 0)


def is_due(step: int, every: int, *, last_step: int | None = None) -> bool:
    """Return whether `step` is a multiple of `every` (never for 0) or the last one."""
    return step == last_step or (every > 0 and step % every == 0)
