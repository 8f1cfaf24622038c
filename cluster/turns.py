"""Whose turn it is on the GPUs. Where everybody has their own, it is everybody's, always."""

from __future__ import annotations

from typing import Protocol

from cluster.driver import Metrics

SAMPLING, LEARNING, SYNCING = "sampling", "learning", "syncing"


class Turns(Protocol):
    """Who is on the GPUs; asked by whoever is about to use them."""

    def take(self, turn: str) -> None:
        """Return when the GPUs are those of whoever does this."""
        ...

    def metrics(self) -> Metrics:
        """Return how long changing turns has taken since this was last asked, if there are turns."""
        ...


class OwnGPUs:
    """Generators and learner ranks have GPUs of their own, or none."""

    def take(self, turn: str) -> None:
        pass

    def metrics(self) -> Metrics:
        return {}
