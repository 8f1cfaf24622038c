"""What a source of scores is, and the two ways in which it may fail: for one rollout, and as a whole.

A score is never invented: what cannot be scored is a Fault or raises. Knows nothing of any particular source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import numpy as np

from actors.rollout import Rollout


@dataclass(frozen=True)
class Fault:
    """Why one rollout has no score from one source; `message` names the source, the prompt and the sample."""

    message: str
    lasting: bool = False  # another try would end the same way


class SourceError(RuntimeError):
    """A whole call of a source failed. Another one may succeed."""


class RewardSource(Protocol):
    def score(self, rollouts: Sequence[Rollout]) -> list[float | Fault]:
        """A finite score or a fault for each rollout, in their order. Raises SourceError if none could be asked for."""


def sample_name(rollout: Rollout) -> str:
    """What messages call `rollout`."""
    return f"prompt {rollout.prompt.id}, sample {rollout.sample}"


def finite_number(value: object) -> float | None:
    """`value` as a float if it is a finite number or a bool; None if it is anything else."""
    if not isinstance(value, Real | np.bool_):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer that no float can hold
        return None
    return number if math.isfinite(number) else None
