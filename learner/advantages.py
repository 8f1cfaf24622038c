"""Advantages and returns from token rewards, and their whitening.

Pure functions of torch tensors, [B responses, T response tokens], with a mask that is True where the policy wrote the
token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) by generalised advantage estimation.

    Schulman et al. 2016 (arXiv 1506.02438), equation 16: A_t = delta_t + gamma lambda A_{t+1} with
    delta_t = r_t + gamma V_{t+1} - V_t; returns are A_t + V_t. The value after the last token is zero, for a response
    that was cut as for one that ended. Tokens that the policy did not write are no time steps: the recursion carries
    over them.

    Args:
        rewards: [B, T].
        values: [B, T]; V_t is the value of the state in which token t is chosen.
        mask: [B, T] bool.
        gamma: discount.
        gae_lambda: lambda; 1 gives the discounted return minus the value, 0 the one-step error.

    Returns:
        Two tensors [B, T] in the dtype of `values`, zero where the mask is False.
    """
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        written = mask[:, t]
        advantages[:, t] = torch.where(written, advantage, 0.0)
        next_advantage = torch.where(written, advantage, next_advantage)
        next_value = torch.where(written, values[:, t], next_value)
    returns = torch.where(mask, advantages + values, torch.zeros_like(values))
    return advantages, returns


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Return [count, sum, sum of squares] over the masked tokens, float64, to be added over micro-batches and ranks."""
    chosen = values[mask].double()
    return torch.stack([chosen.new_tensor(float(chosen.numel())), chosen.sum(), chosen.square().sum()])


def mean_and_std(total: Tensor) -> tuple[float, float]:
    """Return the mean and the population standard deviation that `moments`, summed, describe."""
    count, first, second = total.tolist()
    assert count > 0, "no tokens"
    mean = first / count
    return mean, max(second / count - mean * mean, 0.0) ** 0.5


def whiten(values: Tensor, mask: Tensor, *, mean: float, std: float) -> Tensor:
    """Return (values - mean) / (std + 1e-8) where the mask is True and zero elsewhere.

    The moments are those of all response tokens of the whole train batch on all ranks.
    """
    return torch.where(mask, (values - mean) / (std + 1e-8), torch.zeros_like(values))
