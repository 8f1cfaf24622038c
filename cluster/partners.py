"""The processes of a stage that samples: generators, reward actors and learner ranks, started side by side."""

from __future__ import annotations

from actors.preflight import starts_at_reference
from actors.reward_http import reward_token
from actors.rollout import IntArray
from actors.spans import Span
from actors.weight_transport import HOST, IPC, NCCL
from cluster.colocation import SharedGPUs
from cluster.driver import Metrics
from cluster.generators import GeneratorGroup, GeneratorSetup
from cluster.learners import LearnerGroup
from cluster.placement import COLOCATED
from cluster.processes import Placement
from cluster.reactor import Reactor
from cluster.recoveries import Recoveries
from cluster.rewards import RewardGroup, RewardSetup
from cluster.run import Handover
from cluster.weight_sync import VerifiedWeightSync
from conf.schema import ClusterConfig, Config
from learner.networks import LearnerSetup
from learner.worker import LearnerWorker


def start_generators(
    config: Config,
    before: Handover,
    placement: Placement,
    *,
    model_path: str,
    device: str,
    recoveries: Recoveries,
    reactor: Reactor,
) -> GeneratorGroup:
    """Return generators of the checkpoint `model_path`, starting."""
    model = before.model
    assert model.tokenizer is not None
    assert model.path is not None
    setup = GeneratorSetup(
        model_path,
        model.path,
        model.tokenizer,
        config.generator,
        device,
        config.seed,
        model.trust_remote_code,
        shares_gpus=config.cluster.placement == COLOCATED and "ppo" in config.stages,
    )
    return GeneratorGroup(
        placement,
        setup,
        chunk_size=config.reward.batch_size,
        limits=config.cluster,
        recoveries=recoveries,
        reactor=reactor,
    )


def start_rewards(
    config: Config,
    before: Handover,
    placement: Placement,
    *,
    device: str,
    recoveries: Recoveries,
    reactor: Reactor,
) -> RewardGroup:
    """Return the reward actors, starting."""
    setup = RewardSetup(
        config.reward,
        before.reward_path,
        config.evaluation.verifier,
        device,
        before.model.trust_remote_code,
        reward_token(),
    )
    return RewardGroup(placement, setup, limits=config.cluster, recoveries=recoveries, reactor=reactor)


class Partners:
    """The three groups of processes of the ppo stage, and the weight sync between two of them."""

    def __init__(
        self,
        config: Config,
        before: Handover,
        placement: Placement,
        *,
        ptx_rows: tuple[IntArray, ...],
        device: str,
        recoveries: Recoveries,
    ) -> None:
        """Let all of them start; `wait_started` returns when they are up. On shared GPUs the engines come first."""
        cluster, model = config.cluster, before.model
        assert model.path is not None
        setup = learner_setup(config, before, ptx_rows=ptx_rows, device=device)
        reactor = Reactor()
        shared = cluster.placement == COLOCATED

        def start_learners() -> LearnerGroup:
            return LearnerGroup(
                placement,
                LearnerWorker,
                setup,
                limits=cluster,
                recoveries=recoveries,
                reactor=reactor,
                sequence_parallel_size=config.learner.sequence_parallel_size,
            )

        if not shared:
            self.learners = start_learners()
        first = model.reference if model.reference is not None and starts_at_reference(config) else model.path
        self.generators = start_generators(
            config, before, placement, model_path=first, device=device, recoveries=recoveries, reactor=reactor
        )
        if shared:  # an engine measures what is free on its GPU as it starts: before the ranks are there
            self.generators.members.wait_begun()
            self.generators.all_turn("sleep")
            self.learners = start_learners()
        self.rewards = start_rewards(config, before, placement, device=device, recoveries=recoveries, reactor=reactor)
        self.sync = VerifiedWeightSync(
            self.learners,
            self.generators,
            dtype=config.generator.dtype,
            routes=placement.plan.routes(config.generator.tensor_parallel_size),
            wire=wire_of(device, cluster),
            bucket_bytes=cluster.sync_bucket_mib << 20,
            timeout_s=cluster.sync_timeout_s,
        )
        if shared:
            SharedGPUs(self.generators, self.learners, self.sync)

    def wait_started(self) -> None:
        """Return when all are up and the generators have joined the weight sync; a new learner is joined anew.

        Raises LearnersLostError, ProcessError or ConfigError for what cannot be started.
        """
        self.rewards.members.wait_begun()
        self.generators.members.wait_begun()
        self.learners.wait_started()
        self.sync.connect()

    def put_generators_back(self) -> None:
        """See that the generators hold what they started from, with new ones if they hold anything else."""
        if not self.sync.untouched:
            self.generators.members.renew(range(len(self.generators.members)))
            self.sync.untouched, self.sync.version = True, None
            self.sync.connect()

    def spans(self) -> dict[str, list[Span]]:
        """Return what each process has been busy with since the last time."""
        groups = (self.generators.members, self.rewards.members, self.learners.members)
        return {name: spans for members in groups for name, spans in members.spans().items()}

    def memory(self) -> Metrics:
        return self.learners.memory() | self.generators.memory() | self.rewards.memory()


def wire_of(device: str, cluster: ClusterConfig) -> str:
    """Return the transport of the weight sync: between CPUs, between GPUs, or between two processes on one."""
    if device == "cpu":
        return HOST
    return IPC if cluster.placement == COLOCATED else NCCL


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
