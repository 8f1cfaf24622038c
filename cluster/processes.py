"""Starting Ray processes in their places, and waiting for what they answer."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.placement import Bundle
from conf.schema import ConfigError


class ProcessError(RuntimeError):
    """A process of the run died, failed or did not answer in time; says which and why."""


@dataclass(frozen=True)
class Placement:
    """Where processes may stand: the reserved group, its bundles, and what every process finds in its environment."""

    group: Any
    bundles: tuple[Bundle, ...]
    environment: dict[str, str]

    def start(self, process: type, role: str) -> list[Any]:
        """Return a handle for each bundle of the role, each process starting in its own."""
        return [
            ray.remote(process)
            .options(
                num_cpus=bundle.cpus,
                num_gpus=bundle.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index),
                runtime_env={"env_vars": self.environment},
            )
            .remote()
            for index, bundle in enumerate(self.bundles)
            if bundle.role == role
        ]


def collect(refs: Sequence[Any], *, what: str, timeout_s: float) -> list[Any]:
    """Return what the calls returned, in their order, or raise as soon as one of them has failed.

    Raises:
        ProcessError: a call raised (with the traceback of its process), or a process died or did not answer in time;
            says which by its place among the refs.
        ConfigError: a call found fault with a setting.
    """
    deadline = time.monotonic() + timeout_s
    places = {ref: place for place, ref in enumerate(refs)}
    waiting, results = list(refs), dict.fromkeys(places)
    while waiting:
        left = max(deadline - time.monotonic(), 0.0)
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=left, fetch_local=False)
        if not ready:
            late = [places[ref] for ref in waiting]
            raise ProcessError(f"{what}: no answer from process {late} within {timeout_s:g} s")
        for ref in ready:
            try:
                results[ref] = ray.get(ref, timeout=timeout_s)
            except RayActorError as error:
                raise ProcessError(f"{what}: process {places[ref]} died: {error}") from error
            except GetTimeoutError as error:
                raise ProcessError(f"{what}: no result from process {places[ref]} in {timeout_s:g} s") from error
            except RayTaskError as error:
                if isinstance(error.cause, ConfigError):
                    raise error.cause from None
                raise ProcessError(f"{what}: process {places[ref]} failed: {error.cause!r}\n{error}") from error
    return [results[ref] for ref in refs]


def peak_resident_mib() -> float:
    """Return the largest resident memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
