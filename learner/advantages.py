"""Advantages and returns: from token rewards, with or without a critic, or from the responses to one prompt.

Pure functions of torch tensors. Over time: [B responses, T response tokens], with a mask that is True where the policy
wrote the token. Over a group of responses: [N], one total for each response, with the ids of their groups. Which of
them make an algorithm is the caller's affair.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Over time


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    gae_lambda: float | Tensor,
    final_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) by generalised advantage estimation.

    Schulman et al. 2016 (arXiv 1506.02438), equation 16: A_t = delta_t + gamma lambda A_{t+1} with
    delta_t = r_t + gamma V_{t+1} - V_t; returns are A_t + V_t. Tokens that the policy did not write are no time steps:
    the recursion carries over them. Decoupled lambdas (VC-PPO, Yuan et al. 2025, arXiv 2503.01491) are two calls: the
    advantages of one, the returns of the other.

    Args:
        rewards: [B, T].
        values: [B, T]; V_t is the value of the state in which token t is chosen.
        mask: [B, T] bool.
        gamma: discount.
        gae_lambda: lambda, one number or [B]; 1 gives the discounted return minus the value, 0 the one-step error.
        final_values: [B], the value of the state after the last written token: of a response that was cut, where it is
            to stand for what would have followed; zero for one that ended. None: zero for all, cut or ended.

    Returns:
        Two tensors [B, T] in the dtype of `values`, zero where the mask is False.
    """
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0]) if final_values is None else final_values
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        written = mask[:, t]
        advantages[:, t] = torch.where(written, advantage, 0.0)
        next_advantage = torch.where(written, advantage, next_advantage)
        next_value = torch.where(written, values[:, t], next_value)
    returns = torch.where(mask, advantages + values, torch.zeros_like(values))
    return advantages, returns


def length_adaptive_lambda(mask: Tensor, *, alpha: float) -> Tensor:
    """Return a lambda for each response, max(0, 1 - 1 / (alpha * length)): mask [B, T] -> [B] float32.

    VAPO, Yue et al. 2025 (arXiv 2504.05118), section 4.2: the weights of the one-step errors then add up to about
    alpha * length, whatever the length. The length is the number of tokens that the policy wrote.
    """
    length = mask.sum(-1).to(torch.float32)
    return (1.0 - 1.0 / (alpha * length)).clamp(min=0.0)  # 1 - 1/0 is -inf: zero for an empty row


def returns_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Return sum over s >= t of gamma^(s - t) r_s, counting the written tokens alone: [B, T], zero outside the mask."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, gae_lambda=1.0)[1]


def spread(per_sequence: Tensor, mask: Tensor) -> Tensor:
    """Return one number for each response on every token of it: [B] -> [B, T], zero where the mask is False."""
    return torch.where(mask, per_sequence.unsqueeze(-1), torch.zeros_like(per_sequence).unsqueeze(-1))


# Over a group of responses


def grpo(totals: Tensor, groups: Tensor) -> Tensor:
    """Return (r - mean) / (std + 1e-6) within each group, std with Bessel's correction.

    GRPO, Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), section 4.1.2. A group whose totals are all equal, or of
    one response, gives exactly zero.

    Args:
        totals: [N] float64, what each response earned.
        groups: [N] int64, equal for the responses that are compared with each other; in any order, of any size.

    Returns:
        [N] float64.
    """
    centred, index, counts = _centred(totals, groups)
    squares = torch.zeros_like(counts).index_add(0, index, centred.square())
    std = (squares / (counts - 1.0).clamp(min=1.0)).sqrt()
    return centred / (std[index] + 1e-6)


def dr_grpo(totals: Tensor, groups: Tensor) -> Tensor:
    """Return r - mean within each group; arguments as for `grpo`.

    Dr. GRPO, Liu et al. 2025 (arXiv 2503.20783): without the division, which favours groups that are easy or hard.
    """
    return _centred(totals, groups)[0]


def rloo(totals: Tensor, groups: Tensor) -> Tensor:
    """Return r - mean of the others in its group; zero in a group of one. Arguments as for `grpo`.

    RLOO, Ahmadian et al. 2024 (arXiv 2402.14740). It is n / (n - 1) times r - mean of all n.
    """
    centred, index, counts = _centred(totals, groups)
    return centred * (counts / (counts - 1.0).clamp(min=1.0))[index]


def _centred(totals: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (totals minus their group's mean [N], number of each one's group [N], size of each group [G])."""
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    sizes = counts.to(totals)
    blank = torch.zeros_like(sizes)
    # From the least of the group, so that equal totals are exactly zero and large ones lose nothing to rounding.
    above = totals - blank.scatter_reduce(0, index, totals, "amin", include_self=False)[index]
    return above - (blank.index_add(0, index, above) / sizes)[index], index, sizes


# Whitening


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
