"""The few reductions over learner ranks that the mathematics needs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor


def summed(value: Tensor) -> Tensor:
    """Return the sum over ranks, float64 and on the device of `value`, whose own content stays."""
    total = value.detach().to(torch.float64, copy=True)
    dist.all_reduce(total)
    return total


def summed_stats(stats: Mapping[str, float]) -> dict[str, float]:
    """Return each figure summed over ranks; every rank must bring the same names in the same order."""
    total = summed(torch.tensor(list(stats.values()), dtype=torch.float64, device=collective_device()))
    return dict(zip(stats, total.tolist(), strict=True))


def highest(value: int) -> int:
    """Return the largest of the ranks' integers."""
    total = torch.tensor(value, dtype=torch.int64, device=collective_device())
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return int(total)


def concatenated(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the ranks' arrays one after another, in rank order, on every rank."""
    parts: list[NDArray[np.float32]] = [values] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return np.concatenate(parts)


def collective_device() -> torch.device:
    """Return the device on which the group's backend takes tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
