"""The losses of the policy, token by token, and the weights with which tokens are added up.

Pure functions of torch tensors, [B responses, T response tokens]. `mask` is True on the tokens in the loss. The caller
must leave out of it every token whose log-probability, old or new, is not a finite number (one that top-k or top-p
removed has -inf); what stands outside the mask, NaN included, changes neither a loss nor a gradient.

Each loss is a function of (logprobs, old_logprobs, advantages, mask); a variant is another function, with its numbers
bound by `functools.partial`. Nothing here adds up: that is `token_weights`, with counts over all ranks, so that no
result depends on how a batch was cut into micro-batches and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from learner.ppo import MAX_LOG_RATIO, masked


@dataclass(frozen=True, eq=False)
class TokenLoss:
    """The loss of each token, and what the clip did to it. Zero (False) where the mask is False."""

    loss: Tensor  # [B, T], with gradient
    ratio: Tensor  # [B, T], detached: new probability over old; of the whole sequence, on each token, in `gspo_loss`
    clipped: Tensor  # [B, T] bool: the clip removed this token's gradient; in `cispo_loss`, it cut its weight


class PolicyLoss(Protocol):
    """What an update needs of a policy loss."""

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
        """Return the loss of each token.

        Args:
            logprobs: [B, T], with gradient.
            old_logprobs: [B, T], of the policy before the update.
            advantages: [B, T].
            mask: [B, T] bool: the tokens in the loss; finite log-probabilities there.
        """
        ...


def clipped_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    low: float,
    high: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """Return -min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(logprobs - old_logprobs), for each token.

    Schulman et al. 2017 (arXiv 1707.06347), equation 7, with low = high there; a larger `high` is the clip-higher of
    DAPO (Yu et al. 2025, arXiv 2503.14476, section 3.1). With `dual_clip` c, the loss of a token of negative advantage
    is at most -c A (Ye et al. 2020, arXiv 1912.09729).

    Args:
        logprobs, old_logprobs, advantages, mask: see `PolicyLoss`.
        low, high: how far the ratio may move below and above 1 and still gain.
        dual_clip: c, above 1; None for no bound.
    """
    ratio = _ratio(masked(logprobs - old_logprobs, mask))
    return _clipped(ratio, masked(advantages, mask), mask, low=low, high=high, dual_clip=dual_clip)


def gspo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float
) -> TokenLoss:
    """Return -min(s A, clip(s, 1 - low, 1 + high) A) with s the ratio of the whole response, on each of its tokens.

    Zheng et al. 2025 (arXiv 2507.18071), equations 5 and 7: s = exp(mean over the response of the log ratio), with
    gradient through s. The paper has one advantage for a response and adds up with the weights "sequence"; the
    advantage of each token stands here, so that their mean counts where they differ. The mean is over the mask.

    Args:
        logprobs, old_logprobs, advantages, mask: see `PolicyLoss`.
        low, high: the clip range; the paper has 3e-4 and 4e-4, far smaller than for a token's ratio.
    """
    total = masked(logprobs - old_logprobs, mask).sum(-1, keepdim=True)
    ratio = _ratio(total / mask.sum(-1, keepdim=True).clamp(min=1)).expand(mask.shape)
    return _clipped(ratio, masked(advantages, mask), mask, low=low, high=high, dual_clip=None)


def cispo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float
) -> TokenLoss:
    """Return -stopgrad(clip(r, 1 - low, 1 + high)) A logprobs, for each token.

    CISPO: MiniMax-M1 2025 (arXiv 2506.13585), section 3.1. A token whose ratio is out of range keeps a gradient, with a
    weight that is cut. The value of this loss means nothing; its gradient does.

    Args:
        logprobs, old_logprobs, advantages, mask: see `PolicyLoss`.
        low, high: how far the weight may be from 1; the paper sets no lower bound, which is low = 1.
    """
    with torch.no_grad():
        ratio = _ratio(masked(logprobs - old_logprobs, mask))
        weight = ratio.clamp(1.0 - low, 1.0 + high)
    loss = -weight * masked(advantages, mask) * masked(logprobs, mask)
    return TokenLoss(loss, masked(ratio, mask), mask & (weight != ratio))


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return the k3 estimate of KL(old || new) for each token, (r - 1) - log r: [B, T], detached, never negative.

    Schulman, "Approximating KL Divergence" (2020). What stands outside a mask comes out as it may.
    """
    log_ratio = (logprobs - old_logprobs).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() - 1.0 - log_ratio


def token_weights(mask: Tensor, aggregation: str, *, num_tokens: float, num_sequences: float, budget: int) -> Tensor:
    """Return w such that the sum of w * loss, over all ranks and micro-batches of a mini-batch, is its loss.

    "token": 1 / num_tokens, every token counts alike (DAPO, arXiv 2503.14476); "sequence": 1 / (num_sequences times the
    tokens of the row), every response counts alike (GRPO, arXiv 2402.03300); "constant": 1 / (num_sequences * budget),
    which gives no response an advantage by its length (Dr. GRPO, arXiv 2503.20783).

    Args:
        mask: [B, T] bool, the tokens in the loss; a row without any gets weights of zero.
        aggregation: "token", "sequence" or "constant".
        num_tokens: tokens in the loss, of the mini-batch over all ranks.
        num_sequences: responses of the mini-batch over all ranks.
        budget: the most tokens that a response can have.

    Returns:
        [B, T] float32, zero where the mask is False.
    """
    ones = mask.to(torch.float32)
    match aggregation:
        case "token":
            return ones / max(num_tokens, 1.0)  # no tokens at all: zeros
        case "sequence":
            return ones / (max(num_sequences, 1.0) * ones.sum(-1, keepdim=True).clamp(min=1.0))
        case "constant":
            return ones / (max(num_sequences, 1.0) * budget)
    raise ValueError(f"unknown aggregation {aggregation!r}")


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clipped(
    ratio: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float, dual_clip: float | None
) -> TokenLoss:
    """Return the clipped loss of ratios and advantages, [B, T], free of NaN; advantages are zero outside the mask."""
    unclipped = -advantages * ratio
    loss = torch.maximum(unclipped, -advantages * ratio.clamp(1.0 - low, 1.0 + high))
    if dual_clip is not None:
        assert dual_clip > 1.0, dual_clip
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return TokenLoss(loss, masked(ratio.detach(), mask), loss.detach() != unclipped.detach())
