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
