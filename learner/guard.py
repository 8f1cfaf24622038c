"""What becomes of the gradient of a mini-batch: an optimizer step, or a reason to take none."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from conf.schema import AlgorithmConfig


class Verdict(Enum):
    """What becomes of the gradient of a mini-batch; the values are the names under which they are counted."""

    STEP = "steps"
    EMPTY = "skipped_empty"  # no token is in the losses
    RATIO = "skipped_ratio"
    NONFINITE = "skipped_nonfinite"
    EARLY_STOP = "early_stops"  # and none of the mini-batches that would follow


@dataclass(frozen=True)
class UpdateGuard:
    """Judges a mini-batch before its step, by its mean ratio and its approximate KL, as TRL's PPO did before 1.0."""

    max_mean_ratio: float | None
    max_kl: float | None

    @staticmethod
    def of(algorithm: AlgorithmConfig) -> UpdateGuard:
        target = algorithm.early_stop_kl
        return UpdateGuard(algorithm.max_mean_ratio, None if target is None else algorithm.early_stop_factor * target)

    def verdict(self, losses: Iterable[float], *, mean_ratio: float, approx_kl: float) -> Verdict:
        """Return what to do with a mini-batch of these losses, ratio of new to old policy and KL(old || new)."""
        if not all(map(math.isfinite, (*losses, mean_ratio, approx_kl))):
            return Verdict.NONFINITE
        if self.max_mean_ratio is not None and mean_ratio > self.max_mean_ratio:
            return Verdict.RATIO
        if self.max_kl is not None and approx_kl > self.max_kl:
            return Verdict.EARLY_STOP
        return Verdict.STEP
