"""How far a policy is from its reference, on rollouts that it sampled; and a rank that only measures that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors.rollout import ScoredRollout
from conf.schema import NF4, GeneratorConfig, LearnerConfig, ModelConfig
from learner import models, ppo, zero
from learner.batching import micro_batches
from learner.collective import evened, summed_stats
from learner.distribution import SampledFrom
from learner.experience import blank_batch, collate
from learner.models import PolicyOutput
from learner.networks import FrozenReference, Reference, reference_in_four_bits
from learner.packing import is_padded
from learner.ranks import Ranks


@torch.no_grad()
def mean_kl(
    rollouts: Sequence[ScoredRollout],
    policy: Any,
    reference: Reference,
    *,
    sampled_from: SampledFrom,
    max_tokens: int,
    padded: bool,
) -> float:
    """Return the mean over all ranks' rollouts of log p - log p_ref summed over the response. A collective.

    Args:
        rollouts: this rank's.
        policy: the engine of a models.PolicyModel.
        reference: see `Reference`.
        sampled_from: how they were sampled, or this is no estimate of a KL.
        max_tokens: tokens in one forward pass; padding counts if `padded`.
    """
    cut = micro_batches([scored.rollout.num_tokens for scored in rollouts], max_tokens=max_tokens, padded=padded)
    batches = [collate([rollouts[i] for i in part]) for part in cut]
    stats = {"kl": 0.0, "rollouts": float(len(rollouts))}
    for batch in evened(batches):
        seen = (blank_batch() if batch is None else batch).to(policy.device)
        logprobs = PolicyOutput.of(policy(seen, sampled_from=sampled_from)).logprobs
        ref_logprobs = reference(seen, temperature=sampled_from.temperature)
        if batch is not None:
            inside = seen.mask & ~torch.isneginf(logprobs)  # outside top-k and top-p; NaN has to be seen
            stats["kl"] += float(ppo.masked_sum(logprobs - ref_logprobs, inside))
    total = summed_stats(stats)
    return total["kl"] / total["rollouts"]


@dataclass(frozen=True)
class JudgeSetup:
    """What every judging rank is built from."""

    model: ModelConfig  # `path` and `reference` are set
    learner: LearnerConfig
    generator: GeneratorConfig
    device: str
    collective_timeout_s: float = 1800.0


class JudgeWorker:
    """One rank that holds a policy and a reference, both frozen."""

    def __init__(self, setup: JudgeSetup, ranks: Ranks) -> None:
        self.setup = setup
        zero.join(ranks, device=setup.device, timeout_s=setup.collective_timeout_s)
        assert setup.model.path is not None
        assert setup.model.reference is not None
        self.policy = self._frozen(setup.model.path, "policy")
        if setup.learner.reference_dtype == NF4:
            reference: Any = reference_in_four_bits(
                setup.model.reference, setup.model, setup.learner, device=setup.device
            )
        else:
            reference = self._frozen(setup.model.reference, "reference")
        self.reference = FrozenReference(reference)

    def kl_to_reference(self, rollouts: Sequence[ScoredRollout], *, temperature: float) -> float:
        """Return the mean KL of all ranks' rollouts, sampled at that temperature. A collective."""
        generator = self.setup.generator
        return mean_kl(
            rollouts,
            self.policy,
            self.reference,
            sampled_from=SampledFrom(temperature, generator.top_k, generator.top_p),
            max_tokens=self.setup.learner.micro_batch_tokens,
            padded=is_padded(self.setup.model),
        )

    def _frozen(self, path: str, network: str) -> Any:
        with zero.partitioned_loading(self.setup.learner, network, device=self.setup.device):
            model = models.load_causal_lm(
                path,
                attn_implementation=self.setup.model.attn_implementation,
                trust_remote_code=self.setup.model.trust_remote_code,
            )
        return zero.frozen_engine(models.PolicyModel(model), self.setup.learner, device=self.setup.device)
