"""A stage carried from step to step, with a stand-in for the training: going back, and being stopped meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from cluster.carrying import carry
from cluster.checkpoints import Checkpoint, Checkpoints
from cluster.console import Console
from cluster.faults import LearnersLostError
from cluster.identity import identity_of
from cluster.recoveries import Recoveries
from cluster.report import read_metrics
from cluster.run import Handover, Run
from cluster.saving import Saver
from cluster.signals import Stopped, StopRequest
from cluster.tracking import Tracker
from conf.schema import AlgorithmConfig, CheckpointConfig, Config, ModelConfig

NUM_STEPS = 5
BEFORE = Handover(ModelConfig(path="policy", tokenizer="policy"))


@dataclass
class Ranks:
    """Learner ranks that have nothing to save."""

    restarted: int = 0
    in_restart: Callable[[], None] = lambda: None

    def end(self) -> None: ...

    def restart(self, why: str) -> None:
        self.in_restart()
        self.restarted += 1

    def take_snapshot(self) -> None: ...

    def write_snapshot(self, folder: Path) -> list[Any]:
        return []

    def written(self, calls: list[Any]) -> list[Any]:
        return []


@dataclass
class Counting:
    """Takes steps; what happens in one of them is given by its number, and happens once."""

    tracker: Tracker
    happens: dict[int, Callable[[], None]]
    learners: Any = field(default_factory=Ranks)
    name: str = "ppo"
    step: int = 0
    begun: int = 0

    @property
    def done(self) -> bool:
        return self.step >= NUM_STEPS

    @property
    def has_best(self) -> bool:
        return False

    def begin(self) -> None:
        self.begun += 1
        self.tracker.log("ppo", 0, {"policy/loss": 0.0})

    def take_up(self, state: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        self.step = state["step"]

    def advance(self) -> None:
        self.happens.pop(self.step + 1, lambda: None)()
        self.step += 1
        self.tracker.log("ppo", self.step, {"policy/loss": float(self.step)})

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def finish(self) -> Handover:
        return BEFORE


def lose_the_learner() -> None:
    raise LearnersLostError("a rank died")


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    config = Config(algorithm=AlgorithmConfig(num_steps=NUM_STEPS), checkpoint=CheckpointConfig(every=0))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    console = Console()
    saver = Saver(Checkpoints(tmp_path / "checkpoints", keep=2, identity=identity_of(config)), note=console.note)
    stop = StopRequest(grace_s=60, note=console.note)
    with Tracker(tmp_path, config.tracking, name="a run", resolved_config={}) as tracker, stop.listening():
        recoveries = Recoveries(limit=1, note=console.note)
        yield Run(config, tmp_path, cast(Any, None), tracker, console, saver, recoveries, stop)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def steps_recorded(run: Run) -> list[int]:
    return [row.step for row in read_metrics(run.dir / "metrics.jsonl")]


def test_a_lost_learner_is_restarted_and_the_steps_are_taken_again(run: Run) -> None:
    training = Counting(run.tracker, {3: lose_the_learner})
    assert carry(run, training, BEFORE, None).model == BEFORE.model
    assert (training.begun, training.learners.restarted) == (1, 1)
    assert steps_recorded(run) == list(range(NUM_STEPS + 1)), "each once"
    assert run.saver.is_current


def test_a_sigterm_while_the_learner_is_restarted_costs_nothing_more(run: Run) -> None:
    training = Counting(run.tracker, {3: lose_the_learner}, Ranks(in_restart=sigterm))
    with pytest.raises(Stopped) as stopped:
        carry(run, training, BEFORE, None)
    assert stopped.value.exit_code(saved=run.saver.is_current) == 0
    assert steps_recorded(run) == [0], "those of the checkpoint that the run goes on from"


def test_a_sigterm_in_a_step_in_which_the_learner_is_lost_does_not_wait_for_its_restart(run: Run) -> None:
    def both() -> None:
        sigterm()
        lose_the_learner()

    training = Counting(run.tracker, {3: both})
    with pytest.raises(Stopped) as stopped:
        carry(run, training, BEFORE, None)
    assert stopped.value.exit_code(saved=run.saver.is_current) == 0
    assert training.learners.restarted == 0
    assert steps_recorded(run) == [0]


def test_a_sigterm_in_a_step_is_heard_after_it_with_a_checkpoint(run: Run) -> None:
    training = Counting(run.tracker, {3: sigterm})
    with pytest.raises(Stopped):
        carry(run, training, BEFORE, None)
    newest = run.saver.checkpoints.newest(print)
    assert newest is not None
    assert (newest.step, newest.state["stage"]) == (3, {"step": 3})
    assert steps_recorded(run) == [0, 1, 2, 3]
