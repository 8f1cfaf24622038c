"""The exponential moving average of a ZeRO-3 model's trained parameters, each rank keeping that of its own shard.

With LoRA these are the adapters alone. The average is float32 and follows the optimizer's float32 weights, so that it
also sees steps too small for bfloat16. It knows nothing of what it is used for:

    average = PolicyEMA(engine.module.model, decay=0.999)   after the engine is made
    engine.step(); average.update()                         no communication
    with average.swapped_in(): zero.full_state(...)         the model is the averaged one; exports, evaluation, a sync
    average.shards()                                        this rank's part of it, for a checkpoint
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from learner import zero
from learner.shards import Shard, shard_of


class PolicyEMA:
    """ema = decay * ema + (1 - decay) * weight for every trained parameter; starts from the weights as they are.

    Polyak and Juditsky 1992 average all steps alike; the exponential form is that of Tarvainen and Valpola 2017,
    arXiv 1703.01780, equation 1. There is no correction of the start: it needs none where the start is a model.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        """`model` is in a ZeRO-3 engine with an optimizer; `decay` is at least 0 and less than 1."""
        assert 0 <= decay < 1, decay
        self.decay = decay
        self._model = model
        self._parameters: dict[str, Any] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        assert self._parameters, "nothing is trained"
        self._averages: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            master = _master(parameter)
            assert parameter.ds_tensor.numel() == master.numel(), f"{name}: its shard is not in memory"
            place = parameter._z3_optimizer.get_hp_param_device(parameter)  # with offloading, not where it computes
            self._averages[name] = master.to(place, copy=True)

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after an optimizer step into the average. Local to each rank."""
        for name, parameter in self._parameters.items():
            average = self._averages[name]
            average.lerp_(_master(parameter).to(average.device), 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the model holds the average, in its own dtype; after it its weights again, bit for bit.

        For forward passes and gathers; no optimizer step may be taken in the block. It does not communicate, but every
        rank must enter it at the same place, or they would gather shards of two models.
        """
        own = {name: parameter.ds_tensor.clone() for name, parameter in self._parameters.items()}
        try:
            self._hold(self._averages)
            yield
        finally:
            self._hold(own)

    @torch.no_grad()
    def _hold(self, shards: Mapping[str, Tensor]) -> None:
        zero.release(self._model)  # what is whole now would not see a new shard
        for name, parameter in self._parameters.items():
            parameter.ds_tensor.copy_(shards[name])

    def tensors(self) -> list[Tensor]:
        """Return the memory of this rank's part."""
        return list(self._averages.values())

    def shards(self) -> dict[str, Shard]:
        """Return this rank's part of the average by parameter name, to read and to write; updates change it."""
        return {name: shard_of(self._parameters[name], average) for name, average in self._averages.items()}


def _master(parameter: Any) -> Tensor:
    """This rank's shard of a parameter in float32, flat, as the optimizer steps it; padding may follow at its end."""
    from deepspeed.utils import safe_get_local_fp32_param

    master: Tensor = safe_get_local_fp32_param(parameter)
    return master.detach()
