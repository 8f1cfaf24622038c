"""The processes of a stage that samples: generators, reward actors and learner ranks, started side by side."""

from __future__ import annotations

from typing import Any

from actors.preflight import starts_at_reference
from actors.rollout import IntArray
from cluster.driver import Metrics
from cluster.generators import GeneratorGroup, GeneratorSetup
from cluster.learners import LearnerGroup
from cluster.processes import Placement, collect
from cluster.rewards import RewardGroup, RewardSetup
from cluster.run import Handover
from cluster.weight_sync import VerifiedWeightSync
from conf.schema import Config
from learner.networks import LearnerSetup
from learner.worker import LearnerWorker


def start_generators(
    config: Config, before: Handover, placement: Placement, *, model_path: str, device: str
) -> GeneratorGroup:
    """Return generators of the checkpoint `model_path`, starting."""
    model = before.model
    assert model.tokenizer is not None
    assert model.path is not None
    setup = GeneratorSetup(
        model_path, model.path, model.tokenizer, config.generator, device, config.seed, model.trust_remote_code
    )
    return GeneratorGroup(placement, setup, chunk_size=config.reward.batch_size, limits=config.cluster)


def start_rewards(config: Config, before: Handover, placement: Placement, *, device: str) -> RewardGroup:
    """Return the reward actors, starting."""
    setup = RewardSetup(
        config.reward, before.reward_path, config.evaluation.verifier, device, before.model.trust_remote_code
    )
    return RewardGroup(placement, setup, limits=config.cluster)


class Partners:
    """The three groups of processes of the ppo stage."""

    def __init__(
        self,
        config: Config,
        before: Handover,
        placement: Placement,
        *,
        ptx_rows: tuple[IntArray, ...],
        device: str,
    ) -> None:
        cluster, model = config.cluster, before.model
        assert model.path is not None
        setup = learner_setup(config, before, ptx_rows=ptx_rows, device=device)
        self.learners = LearnerGroup(placement, LearnerWorker, setup, limits=cluster)
        first = model.reference if model.reference is not None and starts_at_reference(config) else model.path
        self.generators = start_generators(config, before, placement, model_path=first, device=device)
        self.rewards = start_rewards(config, before, placement, device=device)
        starting: list[Any] = [*self.learners.starting, *self.generators.starting, *self.rewards.starting]
        collect(starting, what="starting the processes of the ppo stage", timeout_s=cluster.start_timeout_s)
        self.sync = VerifiedWeightSync(
            self.learners,
            self.generators,
            dtype=config.generator.dtype,
            processes_per_generator=config.generator.tensor_parallel_size,
            timeout_s=cluster.sync_timeout_s,
        )

    def memory(self) -> Metrics:
        return self.learners.memory() | self.generators.memory() | self.rewards.memory()


def learner_setup(config: Config, before: Handover, *, ptx_rows: tuple[IntArray, ...], device: str) -> LearnerSetup:
    assert before.model.path is not None
    critics = {"reward": before.critic_start, "policy": before.model.path}
    return LearnerSetup(
        model=before.model,
        algorithm=config.algorithm,
        shaping=config.reward.shaping,
        learner=config.learner,
        generator=config.generator,
        critic_path=critics.get(config.learner.critic_init, config.learner.critic_init),
        ptx_rows=ptx_rows,
        device=device,
        seed=config.seed,
        collective_timeout_s=config.cluster.call_timeout_s,
    )
