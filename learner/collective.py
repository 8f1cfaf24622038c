"""The few reductions over learner ranks that the mathematics needs.

Of ranks that share the tokens of their rollouts, and so have the same, one counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from learner import advantages
from learner.sequence_groups import collective_device, hands

Item = TypeVar("Item")
Number = TypeVar("Number", bound=np.generic)


def summed(value: Tensor) -> Tensor:
    """Return the sum over ranks, float64 and on the device of `value`, whose own content stays."""
    total = value.detach().to(torch.float64, copy=True)
    dist.all_reduce(total, group=hands())
    return total


def summed_stats(stats: Mapping[str, float]) -> dict[str, float]:
    """Return each figure summed over ranks; every rank must bring the same names in the same order."""
    total = summed(torch.tensor(list(stats.values()), dtype=torch.float64, device=collective_device()))
    return dict(zip(stats, total.tolist(), strict=True))


@dataclass(frozen=True)
class Moments:
    """Of tokens of all ranks; mean and standard deviation are NaN if there are none."""

    count: int
    mean: float
    std: float  # population


def token_moments(values: Sequence[Tensor], masks: Sequence[Tensor]) -> Moments:
    """Return the moments of all masked tokens of this rank's micro-batches, [B, T] each, and of the other ranks'.

    A collective; a rank may have no micro-batch.
    """
    total = torch.zeros(3, dtype=torch.float64, device=collective_device())
    for of_batch, mask in zip(values, masks, strict=True):
        total += advantages.moments(of_batch, mask)
    total = summed(total)
    count = int(total[0])
    return Moments(count, *(advantages.mean_and_std(total) if count else (math.nan, math.nan)))


def highest(value: int) -> int:
    """Return the largest of the ranks' integers."""
    total = torch.tensor(value, dtype=torch.int64, device=collective_device())
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return int(total)


def evened(items: Sequence[Item]) -> list[Item | None]:
    """Return the items, then None as often as another rank has more of them. A collective.

    Not a generator: the ranks must compare their counts before the first of them starts a forward pass.
    """
    return [*items, *[None] * (highest(len(items)) - len(items))]


def concatenated(values: NDArray[Number]) -> tuple[NDArray[Number], slice]:
    """Return the ranks' arrays one after another, in rank order, on every rank, and where this rank's own stand."""
    group = hands()
    parts: list[NDArray[Number]] = [values] * dist.get_world_size(group)
    dist.all_gather_object(parts, values, group=group)
    start = sum(len(part) for part in parts[: dist.get_rank(group)])
    return np.concatenate(parts), slice(start, start + len(values))
