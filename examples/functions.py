"""Reward functions to start from.

One is used with 'reward.sources=[{type: function, function: examples.functions:brevity}]' learner.critic_init=policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def brevity(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """A score from 0 to 1 for each response: 1 for an empty one, half as much at every hundred characters.

    The three arguments are equally long: the prompts as the policy read them, its responses, and the rows of the data.
    """
    return [0.5 ** (len(response) / 100) for response in responses]
