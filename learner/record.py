"""What an update did, mini-batch by mini-batch, and the metrics that come of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from learner.guard import Verdict

OF_TOKENS = {
    "policy/approx_kl": "approx_kl",
    "policy/clipfrac": "clipfrac",
    "policy/ratio_mean": "ratio",
    "policy/outside_fraction": "outside",
    "critic/loss": "critic_loss",
    "critic/clipfrac": "critic_clipfrac",
}
OF_MINI_BATCHES = {"policy/loss": "policy_loss", "policy/kl_loss": "kl_loss", "policy/ptx_loss": "ptx_loss"}


@dataclass
class Record:
    """Sums over the mini-batches of an update, of all ranks."""

    total: dict[str, float] = field(default_factory=dict)
    tokens: float = 0.0
    mini_batches: int = 0
    grad_norms: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by network
    verdicts: Counter[Verdict] = field(default_factory=Counter)

    def add(self, sums: Mapping[str, float], tokens: float) -> None:
        """Take in a mini-batch: sums over its tokens, of which there are `tokens`, and losses."""
        self.total = {name: self.total.get(name, 0.0) + value for name, value in sums.items()}
        self.tokens += tokens
        self.mini_batches += 1

    def metrics(self) -> dict[str, float]:
        """Return means over tokens, mini-batches and steps, and how many mini-batches took no step, for which reason.

        What was not recorded, of a network that took no part, is left out.
        """
        counts = {f"policy/{v.value}": float(self.verdicts[v]) for v in Verdict if v is not Verdict.STEP}
        means = {key: self.total[name] / self.tokens for key, name in OF_TOKENS.items() if name in self.total}
        means |= {
            key: self.total[name] / self.mini_batches for key, name in OF_MINI_BATCHES.items() if name in self.total
        }
        norms = {f"{name}/grad_norm": float(np.mean(taken)) for name, taken in self.grad_norms.items()}
        return counts | means | norms
