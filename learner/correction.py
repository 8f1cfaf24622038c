"""Importance weights for the gap between the engine, which sampled a token, and the learner, which trains on it.

The two compute the probabilities of the same weights with different kernels and dtypes, so a rollout is slightly
off-policy before the first update. A weight multiplies a token's policy loss and carries no gradient. Pure functions of
torch tensors, [B responses, T response tokens]; nothing here knows of engines or losses.

Each correction is a function of (old_logprobs, rollout_logprobs, mask); its numbers are bound by `functools.partial`.
Log-probabilities are finite in the mask; what stands outside it, NaN included, changes nothing.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from learner.ppo import MAX_LOG_RATIO, masked


class Correction(Protocol):
    """What an update needs of a correction."""

    def __call__(self, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
        """Return the weight of each token's loss.

        Args:
            old_logprobs: [B, T] float, of the learner before the update.
            rollout_logprobs: [B, T] float, of the engine while sampling.
            mask: [B, T] bool: the tokens in the loss; finite log-probabilities there.

        Returns:
            [B, T] in the dtype of `old_logprobs`, detached, zero where the mask is False.
        """
        ...


def uncorrected(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return ones in the mask: the gap is left as it is."""
    return mask.to(old_logprobs.dtype)


def truncated_by_token(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """Return min(exp(old - rollout), cap) for each token.

    Truncated importance sampling: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training".
    """
    return masked(_ratio(masked(old_logprobs - rollout_logprobs, mask)).clamp(max=cap), mask)


def truncated_by_sequence(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """Return min(exp(sum over the response of old - rollout), cap) on every token of the response.

    The same truncation of the ratio of whole responses, which has less bias and more variance. The sum is over the
    mask, and is clamped once, not token by token.
    """
    total = masked(old_logprobs - rollout_logprobs, mask).sum(-1, keepdim=True)
    return masked(_ratio(total).clamp(max=cap).expand(mask.shape), mask)


def icepop(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, low: float, high: float) -> Tensor:
    """Return exp(old - rollout) where it is in [low, high], and zero elsewhere: a token beyond takes no part.

    IcePop: Ling team 2025 (arXiv 2510.18855).
    """
    ratio = _ratio(masked(old_logprobs - rollout_logprobs, mask))
    return masked(ratio, mask & (ratio >= low) & (ratio <= high))


def _ratio(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
