"""Reward functions to start from.

One is used with 'reward.sources=[{type: function, function: examples.functions:brevity}]' learner.critic_init=policy,
and any of them can be evaluation.verifier.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from actors.verifiers import reasoning_gym


def brevity(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """A score from 0 to 1 for each response: 1 for an empty one, half as much at every hundred characters.

    The three arguments are equally long: the prompts as the policy read them, its responses, and the rows of the data.
    """
    return [0.5 ** (len(response) / 100) for response in responses]


def final_number(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """1.0 for each response of which reasoning-gym's own verifier takes the last whole number for the answer, else 0.0.

    Language models answer in words, "4 - 1 = 3." for example, and that verifier wants the answer alone.
    """
    numbers = [re.findall(r"-?\d+", response) or [""] for response in responses]
    scores = reasoning_gym(prompts, [found[-1] for found in numbers], rows)
    return [float(score == 1.0) for score in scores]
