"""Which advantages a train batch gets: the formulas of `advantages` on a rank's micro-batches, groups over all ranks.

An estimator is a function of all micro-batches of a rank at once, since the samples of a prompt may lie in different
micro-batches and on different ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from conf.schema import AlgorithmConfig
from learner import advantages as adv
from learner.collective import concatenated
from learner.experience import Batch, Values
from learner.ppo import masked

GroupBaseline = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Rewarded:
    """A micro-batch with its token rewards."""

    batch: Batch
    values: Values | None
    rewards: Tensor  # [B, T] float32


@dataclass(frozen=True, eq=False)
class Estimate:
    """The advantages of a micro-batch, and what its critic learns."""

    advantages: Tensor  # [B, T] float32, not whitened
    returns: Tensor | None  # [B, T] float32; None without a critic


class Estimator(Protocol):
    def __call__(self, items: Sequence[Rewarded]) -> list[Estimate]:
        """Return the estimate of each micro-batch of this rank. May be a collective; `items` may be empty."""
        ...


def make_estimator(algorithm: AlgorithmConfig) -> Estimator:
    """Return the estimator that `algorithm.estimator` names."""
    match algorithm.estimator:
        case "gae":
            return partial(from_critic, algorithm=algorithm)
        case "grpo":
            return partial(from_groups, baseline=adv.grpo)
        case "dr_grpo" | "reinforce_pp_baseline":  # the second whitens over the train batch, the first does not
            return partial(from_groups, baseline=adv.dr_grpo)
        case "rloo":
            return partial(from_groups, baseline=adv.rloo)
        case "reinforce_pp" | "remax":  # a greedy response's score is the baseline of the second, zero of the first
            return partial(from_single_samples, gamma=algorithm.gamma)
    raise ValueError(f"unknown estimator {algorithm.estimator!r}")


def from_critic(items: Sequence[Rewarded], *, algorithm: AlgorithmConfig) -> list[Estimate]:
    """Return GAE with the lambdas of policy and critic.

    The critic's targets have a lambda of their own where one is set (Yuan et al. 2025, arXiv 2503.01491), and the
    policy's may follow the length of the response (Yue et al. 2025, arXiv 2504.05118).
    """
    estimates = []
    for item in items:
        values, mask = item.values, item.batch.mask
        assert values is not None, "GAE needs a critic"
        final = None
        if algorithm.bootstrap_truncated:
            final = torch.where(item.batch.truncated, values.final, torch.zeros_like(values.final))
        gae = partial(adv.gae, item.rewards, values.tokens, mask, gamma=algorithm.gamma, final_values=final)
        of_policy: float | Tensor = algorithm.gae_lambda
        if algorithm.length_adaptive_alpha is not None:
            of_policy = adv.length_adaptive_lambda(mask, alpha=algorithm.length_adaptive_alpha)
        of_critic = algorithm.gae_lambda if algorithm.critic_gae_lambda is None else algorithm.critic_gae_lambda
        advantages, _ = gae(gae_lambda=of_policy)
        _, returns = gae(gae_lambda=of_critic)
        estimates.append(Estimate(advantages, returns))
    return estimates


def from_groups(items: Sequence[Rewarded], *, baseline: GroupBaseline) -> list[Estimate]:
    """Return, on every token of a response, its total reward against the rest of its group. A collective.

    The total is the score less the KL penalty, so that with a KL in the reward RLOO is that of its paper; with the KL
    as a loss, GRPO and Dr. GRPO are those of theirs.
    """
    totals = [masked(item.rewards, item.batch.mask).double().sum(-1).cpu().numpy() for item in items]
    groups = [item.batch.groups.cpu().numpy() for item in items]
    all_totals, mine = concatenated(np.concatenate([np.zeros(0), *totals]))
    all_groups, _ = concatenated(np.concatenate([np.zeros(0, dtype=np.int64), *groups]))
    advantages = baseline(torch.from_numpy(all_totals), torch.from_numpy(all_groups))[mine].float()
    sizes = [len(of_item) for of_item in totals]
    return [
        Estimate(adv.spread(of_item.to(item.rewards.device), item.batch.mask), None)
        for item, of_item in zip(items, advantages.split(sizes), strict=True)
    ]


def from_single_samples(items: Sequence[Rewarded], *, gamma: float) -> list[Estimate]:
    """Return the reward from each token on, less the response's baseline.

    REINFORCE++ (Hu et al. 2025, arXiv 2501.03262) has no baseline and whitens over the train batch; ReMax (Li et al.
    2024, arXiv 2310.10505) takes off what the greedy response to the same prompt scores.
    """
    return [
        Estimate(
            adv.returns_to_go(item.rewards, item.batch.mask, gamma=gamma)
            - adv.spread(item.batch.baselines, item.batch.mask),
            None,
        )
        for item in items
    ]
