"""When a run keeps what it can go on from, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema.rules import at_least


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 10  # steps of a stage between checkpoints; 0: at its ends, at a new best, and when asked to stop
    keep: int = 2  # the newest so many stay, and beside them that of the best step

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 1)
