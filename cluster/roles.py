"""Which processes each stage of a run needs."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.generators import GeneratorProcess
from cluster.learners import RankProcess
from cluster.processes import Process
from cluster.rewards import RewardProcess
from conf.schema import Config


def processes_of(stage: str, config: Config) -> Mapping[str, type[Process]]:
    """Return what stands in the places of each role, in the order in which places are reserved."""
    learner, generator, reward = {"learner": RankProcess}, {"generator": GeneratorProcess}, {"reward": RewardProcess}
    match stage:
        case "sft" | "reward":
            return learner
        case "ppo":
            return learner | generator | reward
        case "eval":  # without a reference there is nothing to measure a KL from
            return generator | reward | ({} if config.model.reference is None else learner)
    raise ValueError(f"unknown stage {stage!r}")
