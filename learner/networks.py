"""The networks of a rank as the settings ask for them: policy, reference and critic in their engines, an average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from actors.four_bits import four_bits
from actors.rollout import IntArray
from conf.schema import NF4, AlgorithmConfig, GeneratorConfig, LearnerConfig, ModelConfig, ShapingConfig
from learner import lora, models, zero
from learner.costs import Costs, PassCost
from learner.critics import Critic, SeparateCritic, SharedCritic
from learner.distribution import SampledFrom
from learner.ema import PolicyEMA
from learner.experience import Batch


@dataclass(frozen=True)
class LearnerSetup:
    """What every rank of the learner is built from."""

    model: ModelConfig  # `path` and `tokenizer` are set
    algorithm: AlgorithmConfig
    shaping: ShapingConfig
    learner: LearnerConfig
    generator: GeneratorConfig
    critic_path: str | None  # what a critic of its own starts from
    ptx_rows: tuple[IntArray, ...]
    device: str
    seed: int
    collective_timeout_s: float = 1800.0

    @property
    def sampled_from(self) -> SampledFrom:
        return SampledFrom(self.generator.temperature, self.generator.top_k, self.generator.top_p)


class Reference(Protocol):
    def __call__(self, batch: Batch, *, temperature: float) -> Tensor:
        """Return the reference's log-probabilities [B, T], without gradient. A collective.

        They are of the whole vocabulary: what top-p cuts off for the policy, the reference may well say.
        """
        ...


class FrozenReference:
    """A model of its own, never trained."""

    def __init__(self, engine: Any) -> None:
        """`engine` is a models.PolicyModel in an engine of DeepSpeed's, or by itself if every rank has the whole."""
        self.engine = engine

    def __call__(self, batch: Batch, *, temperature: float) -> Tensor:
        return models.PolicyOutput.of(self.engine(batch, sampled_from=SampledFrom(temperature))).logprobs


class PolicyWithoutAdapters:
    """The policy with its adapters switched off: no second model."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __call__(self, batch: Batch, *, temperature: float) -> Tensor:
        with lora.switched_off(self.policy.module.model):
            return models.PolicyOutput.of(self.policy(batch, sampled_from=SampledFrom(temperature))).logprobs


@dataclass(frozen=True)
class Networks:
    """What a rank evaluates and trains. `policy` is the DeepSpeed engine of a models.PolicyModel."""

    policy: Any
    reference: Reference
    critic: Critic
    average: PolicyEMA | None  # of the policy's weights
    costs: Costs


def make_networks(setup: LearnerSetup) -> Networks:
    """Load what the settings name and put it into engines. A collective; seed torch first, the same on every rank."""
    algorithm, learner = setup.algorithm, setup.learner
    assert setup.model.path is not None
    shared = algorithm.has_critic and learner.critic_network == "shared"
    adapted = setup.model.lora.rank is not None
    model = load_causal_lm(setup, setup.model.path, "policy")
    head = models.new_value_head(model) if shared else None
    if adapted:
        model = lora.adapted(model, setup.model.lora, seed=setup.seed, task=lora.CAUSAL_LM)
    policy = zero.trained_engine(
        models.PolicyModel(model, value_head=head),
        learner,
        learner.policy,
        device=setup.device,
        num_updates=num_updates(algorithm, skipped=algorithm.critic_warmup_steps),
    )
    average = None if learner.ema_decay is None else PolicyEMA(policy.module.model, decay=learner.ema_decay)
    reference = PolicyWithoutAdapters(policy) if adapted else frozen_reference(setup)
    critic = Critic()
    if shared:
        critic = SharedCritic(policy, value_clip_eps=algorithm.value_clip_eps, value_coef=algorithm.value_coef)
    elif algorithm.has_critic:
        critic = SeparateCritic(critic_engine(setup), value_clip_eps=algorithm.value_clip_eps)
    body = policy.module.model
    own = None if critic.engine is None else critic.engine.module.model
    costs = Costs(PassCost.of(body, body.get_output_embeddings()), None if own is None else PassCost.of(own, own.score))
    return Networks(policy, reference, critic, average, costs)


def load_causal_lm(setup: LearnerSetup, path: str, network: str) -> Any:
    with zero.partitioned_loading(setup.learner, network, device=setup.device):
        return models.load_causal_lm(
            path,
            attn_implementation=setup.model.attn_implementation,
            trust_remote_code=setup.model.trust_remote_code,
        )


def frozen_reference(setup: LearnerSetup) -> FrozenReference:
    """Return `model.reference`, or the policy as it starts."""
    path = setup.model.reference or setup.model.path
    assert path is not None
    if setup.learner.reference_dtype == NF4:
        return FrozenReference(reference_in_four_bits(path, setup.model, setup.learner, device=setup.device))
    model = models.PolicyModel(load_causal_lm(setup, path, "reference"))
    return FrozenReference(zero.frozen_engine(model, setup.learner, device=setup.device))


def reference_in_four_bits(path: str, model: ModelConfig, learner: LearnerConfig, *, device: str) -> models.PolicyModel:
    """Return a reference that is not partitioned: its layers hold blocks of 4 bits, which ZeRO-3 does not know."""
    loaded = models.load_causal_lm(
        path,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        **four_bits(learner.dtype, device="cuda:0" if device == "cuda" else "cpu"),
    )
    return models.PolicyModel(loaded).requires_grad_(False).eval()


def critic_engine(setup: LearnerSetup) -> Any:
    """Return the engine of a critic of its own."""
    assert setup.critic_path is not None, "checked with the settings"
    with zero.partitioned_loading(setup.learner, "critic", device=setup.device):
        model = models.load_scalar_model(
            setup.critic_path,
            attn_implementation=setup.model.attn_implementation,
            trust_remote_code=setup.model.trust_remote_code,
        )
    return zero.trained_engine(
        models.CriticModel(model),
        setup.learner,
        setup.learner.critic,
        device=setup.device,
        num_updates=num_updates(setup.algorithm, skipped=0),
    )


def num_updates(algorithm: AlgorithmConfig, *, skipped: int) -> int:
    """Return how many optimizer steps a schedule spans, `skipped` iterations left out."""
    return (algorithm.num_steps - skipped) * algorithm.ppo_epochs * algorithm.num_mini_batches
