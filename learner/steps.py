"""An optimizer step of a DeepSpeed ZeRO-3 engine: adding up gradients, taking the step, throwing the gradients away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from learner.experience import blank_batch


@dataclass(frozen=True)
class Step:
    """What came of a step."""

    applied: bool  # False: the gradient was not finite, and the weights are as they were
    grad_norm: float  # of the whole gradient over all ranks, before clipping; infinite where it was not finite


def backward(engine: Any, loss: Tensor) -> None:
    """Add the gradient of `loss`, this rank's share of a sum over all ranks. A collective.

    DeepSpeed averages gradients over ranks, and the sum is wanted.
    """
    engine.backward(loss * dist.get_world_size())


def blank_pass(engine: Any, **how: Any) -> None:
    """Take part in the collectives of another rank's forward and backward pass, and add nothing.

    `how` is what the network's forward takes beside a batch.
    """
    backward(engine, engine(blank_batch().to(engine.device), **how).sum() * 0.0)


def step(engine: Any) -> Step:
    """Step the optimizer and its scheduler with what was added up. A collective.

    ZeRO-3 itself leaves weights, optimizer and scheduler alone if the norm of the gradient is not finite.
    """
    engine.step()
    return Step(bool(engine.was_step_applied()), float(engine.get_global_grad_norm()))


def discard(engine: Any) -> None:
    """Throw away what was added up: weights, optimizer and scheduler stay as they are.

    To be called on the optimizer: the engine's own zero_grad leaves alone what ZeRO-3 has added up.
    """
    engine.optimizer.zero_grad()
