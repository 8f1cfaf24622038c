"""What a train batch looks like before it is trained on, in figures over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from learner import policy_losses, ppo
from learner.collective import concatenated, summed_stats, token_moments
from learner.experience import Experience, sampled_by_both

SUMS = ("rollouts", "masked_rollouts", "tokens", "inside", "trained", "score", "kl", "entropy", "weight", "engine_kl")


def describe(experience: Sequence[Experience], *, kl_coef: float, cap: float) -> dict[str, float]:
    """Return the metrics of a train batch before the update, over all ranks. A collective.

    A mean over no tokens is NaN.

    Args:
        experience: this rank's micro-batches, advantages not yet whitened; may be empty.
        kl_coef: what the KL in the token rewards was multiplied by.
        cap: the ratio of learner to engine above which a token is counted.
    """
    sums = dict.fromkeys(SUMS, 0.0)
    for item in experience:
        for name, value in sums_of(item).items():
            sums[name] += value
    total = summed_stats(sums)
    advantages = token_moments([item.advantages for item in experience], [item.mask for item in experience])
    kl = total["kl"] / total["rollouts"]
    return {
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/rlhf_reward": total["score"] / total["rollouts"] - kl_coef * kl,
        "policy/entropy": total["entropy"] / total["tokens"],
        "policy/masked_rollouts": total["masked_rollouts"],
        "advantages/mean": advantages.mean,
        "advantages/std": advantages.std,
        **critic_figures(experience),
        **engine_gap(experience, cap=cap),
        "offpolicy/kl": mean(total["engine_kl"], total["inside"]),
        "offpolicy/weight_mean": mean(total["weight"], total["trained"]),
        "offpolicy/outside_fraction": 1.0 - total["inside"] / total["tokens"],
    }


def sums_of(item: Experience) -> dict[str, float]:
    """Return the figures of a micro-batch that are added up, `SUMS`."""
    batch, seen = item.batch, item.evaluation
    inside = sampled_by_both(batch, seen.old_logprobs)
    sums: dict[str, Tensor | int] = {
        "rollouts": len(batch.scores),
        "masked_rollouts": (~item.mask.any(-1)).sum(),
        "tokens": batch.mask.sum(),
        "inside": inside.sum(),
        "trained": item.mask.sum(),
        "score": batch.scores.sum(),
        "kl": ppo.masked_sum(seen.old_logprobs - seen.ref_logprobs, inside),
        "entropy": ppo.masked_sum(seen.entropy, batch.mask),
        "weight": ppo.masked_sum(item.importance, item.mask),
        "engine_kl": ppo.masked_sum(policy_losses.approx_kl(seen.old_logprobs, batch.rollout_logprobs), inside),
    }
    return {name: float(value) for name, value in sums.items()}


def engine_gap(experience: Sequence[Experience], *, cap: float) -> dict[str, float]:
    """Return how far the engine's log-probabilities are from the learner's, token by token. A collective."""
    gaps = [np.zeros(0, dtype=np.float32)]
    for item in experience:
        inside = sampled_by_both(item.batch, item.evaluation.old_logprobs)
        gaps.append((item.evaluation.old_logprobs - item.batch.rollout_logprobs)[inside].cpu().numpy())
    gap, _ = concatenated(np.concatenate(gaps))
    if gap.size == 0:
        gap = np.full(1, np.nan, dtype=np.float32)
    ratio, size = np.exp(np.minimum(gap, ppo.MAX_LOG_RATIO)), np.abs(gap)
    return {
        "sync/logprob_gap_mean": float(size.mean(dtype=np.float64)),
        "sync/logprob_gap_p99": float(np.quantile(size, 0.99)),
        "sync/logprob_gap_max": float(size.max()),
        "offpolicy/ratio_max": float(ratio.max()),
        "offpolicy/above_cap_fraction": float((ratio > cap).mean()),
    }


def critic_figures(experience: Sequence[Experience]) -> dict[str, float]:
    """Return the figures of the values before the update, none where there is no critic. A collective."""
    learnt = [
        (item.evaluation.values.tokens, item.returns, item.batch.mask)
        for item in experience
        if item.evaluation.values is not None and item.returns is not None
    ]
    masks = [mask for _, _, mask in learnt]
    values = token_moments([tokens for tokens, _, _ in learnt], masks)
    returns = token_moments([of_batch for _, of_batch, _ in learnt], masks)
    errors = token_moments([of_batch - tokens for tokens, of_batch, _ in learnt], masks)
    if values.count == 0:
        return {}
    return {
        "critic/value_mean": values.mean,
        "critic/return_mean": returns.mean,
        "critic/explained_variance": 0.0 if returns.std == 0 else 1.0 - errors.std**2 / returns.std**2,
    }


def mean(total: float, count: float) -> float:
    return total / count if count else math.nan
