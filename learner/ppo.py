"""The mathematics of PPO for language models: KL, token rewards and the loss of the critic.

Pure functions of torch tensors. The loss of the critic and its statistic are sums over tokens; the caller divides by a
global count, so that no result depends on how a batch was cut into micro-batches and ranks. The policy's losses are in
`policy_losses`. Shapes: B responses, T response tokens (padded); a mask is True where the policy wrote the token.
Nothing here knows of models, ranks or configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 10.0  # differences of log-probabilities are clamped to +- this before exp, so that one cannot overflow


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str) -> Tensor:
    """Return a per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    Schulman, "Approximating KL Divergence" (2020), with d = log p - log p_ref:
    k1 = d (unbiased); k2 = d^2 / 2 (biased, low variance); k3 = exp(-d) - 1 + d (unbiased, never negative).
    d is clamped to +-MAX_LOG_RATIO inside exp.

    Args:
        logprobs: [B, T] of the policy.
        ref_logprobs: [B, T] of the reference.
        estimator: "k1", "k2" or "k3".

    Returns:
        [B, T].
    """
    difference = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            return torch.exp((-difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) - 1.0 + difference
    raise ValueError(f"unknown KL estimator {estimator!r}")


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Return -kl_coef * kl on every token the policy wrote, plus the score on the last of them.

    Ziegler et al. 2019 (arXiv 1909.08593), equation 2, per token. The score stands on the last written token exactly
    once, found by position, never by comparing with a pad id.

    Args:
        scores: [B], one per response.
        kl: [B, T] per-token KL penalty.
        mask: [B, T] bool; every row has at least one True.
        kl_coef: beta of the paper.

    Returns:
        [B, T], zero where the mask is False.
    """
    assert bool(mask.any(-1).all()), "a response has at least one token of the policy"
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    rows = torch.arange(mask.shape[0], device=mask.device)
    rewards[rows, last_position(mask)] += scores.to(rewards.dtype)
    return rewards


def last_position(mask: Tensor) -> Tensor:
    """Return the index of the last True of each row: [B, T] bool -> [B] int64."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).max(-1).values


@dataclass(frozen=True)
class LossTerms:
    """A loss summed over tokens, with gradient, and detached sums of its statistics by name."""

    loss_sum: Tensor  # scalar
    stats: Mapping[str, Tensor]  # scalars


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, value_clip_eps: float | None
) -> LossTerms:
    """Return the sum over tokens of max((v - R)^2, (v_clip - R)^2) / 2, v_clip within +- eps of the old value.

    The value clipping of OpenAI's baselines (Dhariwal et al. 2017, `ppo2`), which the PPO paper leaves out.
    Statistic: `clipfrac`, tokens where the clipped error is the larger.

    Args:
        values: [B, T], with gradient.
        old_values: [B, T], before the update.
        returns: [B, T], the regression targets.
        mask: [B, T] bool, the tokens in the loss.
        value_clip_eps: how far a value may move, in units of the return; None for plain regression.
    """
    errors = masked(values - returns, mask).square()
    if value_clip_eps is None:
        return LossTerms(0.5 * errors.sum(), {"clipfrac": values.new_zeros(())})
    # Not old + clamp(values - old): its rounding would count tokens that are inside the range as clipped.
    clipped_values = values.clamp(old_values - value_clip_eps, old_values + value_clip_eps)
    clipped_errors = masked(clipped_values - returns, mask).square()
    with torch.no_grad():
        moved = (values - old_values).abs() > value_clip_eps  # inside the interval the two differ by rounding alone
        stats = {"clipfrac": (moved & (clipped_errors > errors)).sum().to(values.dtype)}
    return LossTerms(0.5 * torch.maximum(errors, clipped_errors).sum(), stats)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return the values where the mask is True and zero elsewhere; no gradient, not even NaN, comes from elsewhere."""
    return torch.where(mask, values, torch.zeros_like(values))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum where the mask is True, a scalar; what stands elsewhere, NaN included, has no influence."""
    return masked(values, mask).sum()
