"""How many floating-point operations a second this device can do."""

from __future__ import annotations

import time

import torch


def matrix_rate(device: torch.device, dtype: torch.dtype, *, repeats: int = 5) -> float:
    """Return the floating-point operations per second of a large product of matrices here and now: the best of a few.

    On a CPU with as many threads as torch has here.
    """
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))  # no random state is touched
    return 2 * size**3 / min(_seconds(left, right) for _ in range(repeats))


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    start = time.perf_counter()
    product = left @ right
    if product.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
