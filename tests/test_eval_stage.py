"""The eval stage is begun again when something is lost, with stand-ins: each loss is made good once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from cluster.eval_stage import judged
from cluster.faults import LearnersLostError, RolloutsLostError
from cluster.recoveries import Recoveries


@dataclass
class Learners:
    restarts: list[str] = field(default_factory=list)

    def restart(self, why: str) -> None:
        self.restarts.append(why)

    def wait_started(self) -> None: ...


@dataclass
class Evaluator:
    """Raises these, one after the other, and then returns."""

    errors: list[Exception]

    def evaluate(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "the result"


def test_rollouts_that_are_lost_later_do_not_restart_a_learner_again() -> None:
    learners, recoveries = Learners(), Recoveries(limit=1, note=lambda text: None)
    evaluator = Evaluator([LearnersLostError("a rank died"), RolloutsLostError("a node died")])
    assert judged(cast(Any, evaluator), cast(Any, learners), recoveries) == cast(Any, "the result")
    assert learners.restarts == ["a rank died"]
    assert recoveries.total == {"rollouts": 1}
