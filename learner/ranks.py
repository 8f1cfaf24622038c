"""Which place a process has among the learner ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """Where one process stands in a learner group."""

    rank: int
    world_size: int
    address: str  # of rank 0
    port: int
    sequence_parallel_size: int = 1  # ranks, one after another, that share the tokens of each micro-batch

    @property
    def num_hands(self) -> int:
        """How many ranks, or groups of ranks that share tokens, have rollouts of their own."""
        return self.world_size // self.sequence_parallel_size

    @property
    def hand(self) -> int:
        """Which of them this rank is, or belongs to."""
        return self.rank // self.sequence_parallel_size
