"""What a train batch looks like before it is trained on, in figures over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from learner import advantages as adv
from learner import ppo
from learner.collective import collective_device, concatenated, summed, summed_stats
from learner.experience import Experience


def describe(experience: Sequence[Experience], *, kl_coef: float) -> dict[str, float]:
    """Return the metrics of a train batch before the update, over all ranks. A collective.

    Args:
        experience: this rank's micro-batches, advantages not yet whitened; may be empty.
        kl_coef: what the KL in the token rewards was multiplied by.
    """
    zeros = torch.zeros(3, dtype=torch.float64, device=collective_device())
    advantages, returns, errors, values = zeros.clone(), zeros.clone(), zeros.clone(), zeros.clone()
    stats = dict.fromkeys(("rollouts", "tokens", "kl", "entropy", "score"), 0.0)
    gaps = [np.zeros(0, dtype=np.float32)]
    for item in experience:
        batch, seen = item.batch, item.evaluation
        advantages += adv.moments(item.advantages, batch.mask)
        returns += adv.moments(item.returns, batch.mask)
        errors += adv.moments(item.returns - seen.values, batch.mask)
        values += adv.moments(seen.values, batch.mask)
        stats["rollouts"] += float(batch.mask.shape[0])
        stats["tokens"] += float(batch.mask.sum())
        stats["kl"] += float(ppo.masked_sum(seen.old_logprobs - seen.ref_logprobs, batch.mask))
        stats["entropy"] += float(ppo.masked_sum(seen.entropy, batch.mask))
        stats["score"] += float(batch.scores.sum())
        gaps.append((seen.old_logprobs - batch.rollout_logprobs)[batch.mask].abs().float().cpu().numpy())
    total = summed_stats(stats)
    gap = concatenated(np.concatenate(gaps))
    adv_mean, adv_std = adv.mean_and_std(summed(advantages))
    returns_mean, returns_std = adv.mean_and_std(summed(returns))
    _, error_std = adv.mean_and_std(summed(errors))
    kl = total["kl"] / total["rollouts"]
    return {
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/rlhf_reward": total["score"] / total["rollouts"] - kl_coef * kl,
        "policy/entropy": total["entropy"] / total["tokens"],
        "advantages/mean": adv_mean,
        "advantages/std": adv_std,
        "critic/value_mean": adv.mean_and_std(summed(values))[0],
        "critic/return_mean": returns_mean,
        "critic/explained_variance": 1.0 - error_std**2 / returns_std**2 if returns_std > 0 else 0.0,
        "sync/logprob_gap_mean": float(gap.mean()),
        "sync/logprob_gap_p99": float(np.quantile(gap, 0.99)),
        "sync/logprob_gap_max": float(gap.max()),
    }
