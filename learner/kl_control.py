"""The coefficient of the KL penalty from iteration to iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class KLController:
    """The coefficient of the KL penalty: fixed, or driven towards a target.

    Adaptive as in Ziegler et al. 2019, section 2.2: error = clip(kl / target - 1, -0.2, 0.2) and
    coef *= 1 + error * num_rollouts / horizon. `kl` is the mean over rollouts of the KL summed over a response.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def updated(self, kl: float, *, num_rollouts: int) -> KLController:
        """Return the controller for the next iteration; the same after a KL that is not finite."""
        if self.target is None or not math.isfinite(kl):
            return self
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return KLController(self.coef * (1.0 + error * num_rollouts / self.horizon), self.target, self.horizon)
