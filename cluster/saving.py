"""Writing checkpoints beside the run: the learner is copied, and while the run goes on the copy is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from cluster.checkpoints import Checkpoint, CheckpointError, Checkpoints, Draft
from cluster.driver import Metrics
from cluster.faults import LearnersLostError, ProcessError
from cluster.learners import RankGroup
from conf.schema import ConfigError

Position = tuple[str, int | None]  # a stage, and how many steps of it are done


@dataclass(frozen=True)
class Writing:
    """A checkpoint that is being written."""

    draft: Draft
    state: Mapping[str, Any]
    best: bool
    learners: RankGroup | None
    calls: list[Any]  # of the ranks; each returns the files that it has written


class Saver:
    """Saves the run, one checkpoint at a time, and knows whether the last step is in one.

    A checkpoint that cannot be written, because the disk is full for example, is said and counted, and the run goes
    on: those before it are whole.
    """

    def __init__(self, checkpoints: Checkpoints, *, note: Callable[[str], None]) -> None:
        self.checkpoints, self.note = checkpoints, note
        self._at: Position | None = None
        self._published: Position | None = None
        self._num_failed, self._stood_still_s = 0, 0.0
        self._writing: Writing | None = None

    @property
    def is_current(self) -> bool:
        """Whether a checkpoint holds every step that is done."""
        return self._at == self._published

    def reached(self, stage: str, step: int | None) -> None:
        """Take note of how far the run is."""
        self._at = stage, step

    def went_back_to(self, checkpoint: Checkpoint) -> None:
        """Take note that the run goes on from a checkpoint."""
        self._at = self._published = checkpoint.stage, checkpoint.step

    def save(
        self,
        stage: str,
        step: int | None,
        state: Callable[[], Mapping[str, Any]],
        *,
        learners: RankGroup | None = None,
        best: bool = False,
    ) -> None:
        """Copy everything and begin to write it. Raises LearnersLostError if a rank is lost in copying."""
        start = time.perf_counter()
        self.finish()
        self.reached(stage, step)
        try:
            self._begin(stage, step, state(), learners, best)
        except (CheckpointError, ConfigError) as error:  # the latter: it cannot be copied
            self._failed(error)
        self._stood_still_s += time.perf_counter() - start

    def metrics(self) -> Metrics:
        """Return how long the run has stood still for checkpoints since this was last asked, and how many failed."""
        seconds, self._stood_still_s = self._stood_still_s, 0.0
        return {"timing/checkpoint_s": seconds, "recoveries/checkpoints_failed": float(self._num_failed)}

    def _begin(
        self, stage: str, step: int | None, state: Mapping[str, Any], learners: RankGroup | None, best: bool
    ) -> None:
        draft = self.checkpoints.begin(stage, step)
        calls = []
        try:
            if learners is not None:
                learners.take_snapshot()
                calls = learners.write_snapshot(draft.learner)
        except BaseException:
            self._discard(draft)
            raise
        self._writing = Writing(draft, state, best, learners, calls)
        if learners is None:
            self.finish()

    def look(self) -> None:
        """Publish what is written by now."""
        if self._writing is None:
            return
        calls = self._writing.calls
        if len(ray.wait(calls, num_returns=len(calls), timeout=0)[0]) == len(calls):
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written and publish it. Raises LearnersLostError if a rank is lost meanwhile."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            shards = [] if writing.learners is None else writing.learners.written(writing.calls)
            writing.draft.publish(writing.state, shards=shards, best=writing.best)
            self._published = writing.draft.stage, writing.draft.step
        except LearnersLostError:
            self._discard(writing.draft)
            raise
        except (CheckpointError, ProcessError, ConfigError) as error:
            self._failed(error)
            self._discard(writing.draft)
        else:
            self._drop_old()

    def give_up(self) -> None:
        """Let go of what is being written, by ranks that are no more."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self._discard(writing.draft)

    def _drop_old(self) -> None:
        try:
            self.checkpoints.drop_old()
        except (CheckpointError, ConfigError) as error:  # the latter: it was written by another version
            self.note(f"a checkpoint that is no longer needed stays: {error}")

    def _discard(self, draft: Draft) -> None:
        try:
            draft.discard()
        except CheckpointError as error:  # a later start removes it
            self.note(str(error))

    def _failed(self, error: Exception) -> None:
        self._num_failed += 1
        self.note(f"no checkpoint this time; the one before stays: {error}")
