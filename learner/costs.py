"""How many floating-point operations an update needs. Known without torch, so that the driver can deal by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

BACKWARD = 2  # times the operations of a forward pass: gradients of the inputs and of the weights


@dataclass(frozen=True)
class PassCost:
    """What a forward pass of a transformer costs. A multiplication and an addition are two operations.

    As in Kaplan et al. 2020 (arXiv 2001.08361), table 1, with attention as causality leaves it.
    """

    body: int  # weights of the matrices that each token goes through
    head: int  # of those that a state goes through of which something is asked
    attention: int  # layers x width of the queries

    @staticmethod
    def of(model: Any, head: Any) -> PassCost:
        """Return the cost of a Hugging Face model of which `head` is the head; it may be partitioned."""
        from torch import nn

        inside = {id(module) for module in head.modules()}
        matrices = [
            (prod(getattr(module.weight, "ds_shape", module.weight.shape)), id(module) in inside)
            for module in model.modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        ]
        config = model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return PassCost(
            body=sum(size for size, is_head in matrices if not is_head),
            head=sum(size for size, is_head in matrices if is_head),
            attention=config.num_hidden_layers * config.num_attention_heads * width,
        )

    def forward(self, lengths: Sequence[int], num_states: int) -> float:
        """Return the operations of one forward pass over sequences of so many tokens, the head at `num_states` states.

        A token attends to itself and to all before it: to (L + 1) / 2 in the mean, for two products.
        """
        attended = sum(length * (length + 1) / 2 for length in lengths)
        return 2.0 * self.body * sum(lengths) + 2.0 * self.head * num_states + 4.0 * self.attention * attended

    def training(self, lengths: Sequence[int], num_states: int) -> float:
        """Return the operations of a forward and a backward pass."""
        return (1 + BACKWARD) * self.forward(lengths, num_states)


@dataclass(frozen=True)
class Costs:
    """What a pass of each network costs; the reference's is the policy's."""

    policy: PassCost
    critic: PassCost | None  # None: there is none, or it is a head on the policy


def passes_flops(costs: Costs, lengths: Sequence[int], num_states: int, *, epochs: int, train_policy: bool) -> float:
    """Return the floating-point operations of an update on sequences of these lengths.

    Policy, reference and critic are run once without gradient, then policy and critic are trained `epochs` times.
    """
    total = 2 * costs.policy.forward(lengths, num_states)
    if train_policy:
        total += epochs * costs.policy.training(lengths, num_states)
    if costs.critic is not None:
        total += costs.critic.forward(lengths, num_states) + epochs * costs.critic.training(lengths, num_states)
    return total
