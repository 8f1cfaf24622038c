"""A learner rank off its GPU: everything that its engines keep there goes to the host, and comes back.

For GPUs that are shared with a generator (cluster/colocation.py). DeepSpeed has `offload_states`, which asks for its
own fused Adam and knows neither frozen engines nor adapters; so the tensors of the pinned 0.19.8 are moved here, by
their storages, since many of them are views of one another. Between two updates, when no pass is under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_GRADIENTS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


class Rest:
    """What a rank keeps on its device between updates, and where that is."""

    def __init__(self, engines: Sequence[Any], averages: Sequence[Tensor], device: torch.device) -> None:
        """`averages` are what is kept beside the engines."""
        self._engines, self._averages, self._device = engines, averages, device
        self._away: list[Tensor] = []

    def begin(self) -> int:
        """Move all of it to the host, unless it is there; return how many bytes that was. A collective."""
        if self._away:
            return 0
        for engine in self._engines:
            engine.optimizer.empty_partition_cache()  # parameters that passes have left whole
        tensors = [*self._averages, *(tensor for engine in self._engines for tensor in kept_tensors(engine))]
        # What DeepSpeed keeps on the host stays there when the rest comes back.
        self._away = [tensor for tensor in tensors if tensor.device.type == self._device.type]
        moved = move(self._away, torch.device("cpu"))
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # for the other process: to CUDA, memory that torch only keeps is in use
        return moved

    def end(self) -> int:
        """Move it back; return how many bytes that was."""
        away, self._away = self._away, []
        return move(away, self._device)


def kept_tensors(engine: Any) -> Iterator[Tensor]:
    """Yield every tensor that a trained or a frozen engine of ZeRO-3 keeps between updates."""
    optimizer = engine.optimizer
    for parameter in engine.module.parameters():
        yield parameter.ds_tensor
    yield from engine.module.buffers()
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):  # a frozen engine's
        return
    yield from optimizer.fp16_partitioned_groups_flat
    yield from optimizer.fp32_partitioned_groups_flat
    for state in optimizer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    yield from (one for one in (optimizer.lp_param_buffer, optimizer.grad_partitions_flat_buffer) if one is not None)
    yield from getattr(optimizer, _GRADIENTS).values()
    yield from (bucket.buffer for bucket in optimizer.ipg_buckets.values() if bucket.buffer is not None)


def move(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Give tensors the same content in new memory of `device`, views of one storage as such; return the bytes."""
    by_storage: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    moved = 0
    for views in by_storage.values():
        old = views[0].untyped_storage()
        new = torch.empty(old.nbytes(), dtype=torch.uint8, device=device)
        new.copy_(torch.empty(0, dtype=torch.uint8, device=views[0].device).set_(old))
        moved += old.nbytes()
        for view in views:
            data = torch.empty(0, dtype=view.dtype, device=device)
            data.set_(new.untyped_storage(), view.storage_offset(), view.size(), view.stride())
            view.data = data
    return moved
