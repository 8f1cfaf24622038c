"""Learner weights into every generator: one verified, versioned operation.

The learner gathers a layer group at a time and rank 0 broadcasts it; every generator receives, loads and verifies it
(actors/weight_receiver.py). Both sides run at once, so neither is waited for alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from cluster.driver import Metrics
from cluster.generators import GeneratorGroup
from cluster.learners import LearnerGroup
from cluster.processes import ProcessError


class VerifiedWeightSync:
    """Pushes the learner group's weights to the generator group."""

    def __init__(
        self,
        learners: LearnerGroup,
        generators: GeneratorGroup,
        *,
        dtype: str,
        processes_per_generator: int,
        timeout_s: float,
    ) -> None:
        """Return when every generator has joined the learner's transport."""
        self.learners, self.generators, self.timeout_s = learners, generators, timeout_s
        count = len(generators.processes)
        infos = learners.open_sync(dtype=dtype, num_receivers=count * processes_per_generator, timeout_s=timeout_s)
        self._together(
            generators.join_sync(infos[::processes_per_generator]),
            learners.connect_sync(),
            what="joining the weight sync",
        )

    def push(self, version: int) -> Metrics:
        start = time.perf_counter()
        self._together(
            self.generators.receive_weights(version),
            self.learners.send_weights(version),
            what=f"weight sync of version {version}",
        )
        return {"sync/version": float(version), "timing/weight_sync_s": time.perf_counter() - start}

    def _together(self, receiving: Sequence[Any], sending: Sequence[Any], *, what: str) -> None:
        """Wait for both sides and raise one error that names everyone who failed.

        A failure on one side breaks the other's connection, so the first error to arrive is seldom the cause.
        """
        names = {ref: f"generator {index}" for index, ref in enumerate(receiving)}
        names |= {ref: f"learner rank {index}" for index, ref in enumerate(sending)}
        _, late = ray.wait(list(names), num_returns=len(names), timeout=self.timeout_s)
        failures = [f"{names[ref]} did not answer within {self.timeout_s:g} s" for ref in late]
        cause: BaseException | None = None
        for ref, name in names.items():
            if ref in late:
                continue
            try:
                ray.get(ref)
            except Exception as error:  # of any kind: it ends the run below, with everyone else's
                cause = cause or error
                failures.append(f"{name}: {getattr(error, 'cause', error)}")
        if failures:
            raise ProcessError(f"{what} failed: " + "; ".join(failures)) from cause
