"""Generators and learner ranks that share GPUs, and take turns on them.

Whose turn it is not keeps nothing on the GPU but its context: an engine sleeps (its weights go to the host, its cache
is dropped), a rank rests (its states go to the host). While weights are brought over, ranks are there and engines have
their weights, but no cache. The groups ask for their turn before they do anything; nothing else knows of it.
"""

from __future__ import annotations

import time

from cluster.driver import Metrics
from cluster.generators import GeneratorGroup
from cluster.learners import LearnerGroup
from cluster.turns import LEARNING, SAMPLING, SYNCING
from cluster.weight_sync import VerifiedWeightSync


class SharedGPUs:
    """Generators and learner ranks on the same GPUs."""

    def __init__(self, generators: GeneratorGroup, learners: LearnerGroup, sync: VerifiedWeightSync) -> None:
        """The generators are asleep, and the ranks load, or have loaded, what they train."""
        self.generators, self.learners = generators, learners
        self.turn, self._seconds = LEARNING, 0.0
        generators.turns = learners.turns = sync.turns = self
        generators.members.make_room = self._make_room

    def take(self, turn: str) -> None:
        if turn == self.turn:
            return
        begun = time.perf_counter()
        if turn == SAMPLING:
            self.learners.rest()
            self.generators.all_turn("wake")
        else:
            self.generators.all_turn("sleep")
            self.learners.rise()
        if turn == SYNCING:
            self.generators.all_turn("wake_weights")
        self.turn = turn
        self._seconds += time.perf_counter() - begun

    def metrics(self) -> Metrics:
        seconds, self._seconds = self._seconds, 0.0
        return {"timing/turns_s": seconds}

    def _make_room(self) -> None:
        """Clear the GPUs for engines that start anew, which begin awake."""
        self.learners.rest()
        self.turn = ""
