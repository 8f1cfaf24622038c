"""The loss of the policy on a micro-batch: what the settings put together out of `policy_losses` and `ppo`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from conf.schema import AlgorithmConfig
from learner import policy_losses, ppo
from learner.experience import Experience


@dataclass(frozen=True)
class Counts:
    """How much of a mini-batch is in the losses, over all ranks."""

    tokens: float
    sequences: float  # responses of which some token is


def make_policy_loss(algorithm: AlgorithmConfig) -> policy_losses.PolicyLoss:
    """Return the policy loss that `algorithm.policy_loss` names, with its clip range."""
    low = algorithm.clip_eps
    high = low if algorithm.clip_eps_high is None else algorithm.clip_eps_high
    match algorithm.policy_loss:
        case "clip":
            return partial(policy_losses.clipped_loss, low=low, high=high, dual_clip=algorithm.dual_clip)
        case "gspo":
            return partial(policy_losses.gspo_loss, low=low, high=high)
        case "cispo":
            return partial(policy_losses.cispo_loss, low=low, high=high)
    raise ValueError(f"unknown policy loss {algorithm.policy_loss!r}")


class PolicyObjective:
    """Policy loss with importance weights, less the entropy bonus, plus the KL as a loss."""

    def __init__(self, algorithm: AlgorithmConfig, *, budget: int) -> None:
        """`budget` is the most tokens that a response can have."""
        self.algorithm, self.budget = algorithm, budget
        self.policy_loss = make_policy_loss(algorithm)
        self.needs_entropy = algorithm.entropy_coef > 0
        self.has_kl = algorithm.kl_loss_coef > 0

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of the statistics, of which all but the losses are sums over tokens."""
        names = ("policy_loss", "approx_kl", "clipfrac", "ratio", "outside")
        return (*names, "kl_loss") if self.has_kl else names

    def __call__(self, logprobs: Tensor, entropy: Tensor, item: Experience, counts: Counts) -> ppo.LossTerms:
        """Return this micro-batch's share of the loss of its mini-batch, and its share of the statistics.

        A token that has left what top-k and top-p keep since it was sampled adds nothing to the loss. It is counted as
        `outside`, and as one that has not moved. A log-probability that is not a number makes the loss none either.

        Args:
            logprobs: [B, T] of the policy as it stands, with gradient.
            entropy: [B, T] of the same, with gradient; of no account if `needs_entropy` is False.
            item: the micro-batch.
            counts: of the whole mini-batch.
        """
        algorithm = self.algorithm
        outside = item.mask & torch.isneginf(logprobs.detach())
        mask = item.mask & ~outside
        logprobs = ppo.masked(logprobs, mask)
        weights = policy_losses.token_weights(
            item.mask,
            algorithm.loss_aggregation,
            num_tokens=counts.tokens,
            num_sequences=counts.sequences,
            budget=self.budget,
        )
        token = self.policy_loss(logprobs, item.anchor_logprobs, item.advantages, mask)
        loss = ppo.masked_sum(weights * item.importance * token.loss, mask)
        if self.needs_entropy:
            loss = loss - algorithm.entropy_coef * ppo.masked_sum(weights * entropy, mask)
        stats = {}
        if self.has_kl:
            kl = ppo.kl_penalty(logprobs, item.evaluation.ref_logprobs, estimator=algorithm.kl_loss_estimator)
            stats["kl_loss"] = ppo.masked_sum(weights * kl, mask)
            loss = loss + algorithm.kl_loss_coef * stats["kl_loss"]
        stats |= {
            "policy_loss": loss,
            "approx_kl": ppo.masked_sum(policy_losses.approx_kl(logprobs, item.anchor_logprobs), mask),
            "clipfrac": token.clipped.sum(),
            "ratio": ppo.masked_sum(token.ratio, mask) + outside.sum(),
            "outside": outside.sum(),
        }
        return ppo.LossTerms(loss, {name: value.detach() for name, value in stats.items()})
