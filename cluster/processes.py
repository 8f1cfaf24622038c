"""Starting Ray processes in their places, and waiting for what they answer."""

from __future__ import annotations

import functools
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.spans import Span, SpanLog
from cluster.faults import ProcessError, ProcessLostError, RolloutsLostError
from cluster.placement import Place, Plan
from conf.schema import ConfigError

Method = TypeVar("Method", bound=Callable[..., Any])
# Groups of calls that are answered beside the others, each in so many threads of its own.
CONTROL, WRITER, SAMPLER = "control", "writer", "sampler"
VISIBLE = "CUDA_VISIBLE_DEVICES"
THREADS = {CONTROL: 1, WRITER: 1, SAMPLER: 16}


def in_group(name: str) -> Callable[[Method], Method]:
    """Let calls of a method be answered in a thread of their own, beside the others."""
    decorate: Callable[[Method], Method] = ray.method(concurrency_group=name)
    return decorate


def spanned(method: Method) -> Method:
    """Record every call of a method of a process as a span with its name."""

    @functools.wraps(method)
    def recorded(self: Process, *arguments: Any, **named: Any) -> Any:
        with self.spans.record(method.__name__):
            return method(self, *arguments, **named)

    return recorded  # type: ignore[return-value]


class Process:
    """What every process of a run answers, whatever else it is doing."""

    def __init__(self) -> None:
        self.spans = SpanLog()

    def prepare(self, device: str, *, reward_models: bool) -> None:
        """Import what takes time, before it is known what this process is to do on `device`.

        `reward_models` is whether reward actors will hold any.
        """

    @in_group(CONTROL)
    def take_spans(self) -> list[Span]:
        """Return what this process has been busy with since it was last asked."""
        return self.spans.take()

    @in_group(CONTROL)
    def ping(self) -> int:
        """Return the number of the process on its node."""
        return os.getpid()

    @in_group(CONTROL)
    def peak_resident_mib(self) -> float:
        """Return the largest resident memory that this process has had, in MiB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


@dataclass(frozen=True)
class Placement:
    """Where processes may stand: the reserved group, the plan, and what every process finds in its environment."""

    group: Any
    plan: Plan
    environment: dict[str, str]
    timeout_s: float = 600.0  # until a bundle has to say which GPUs it has
    started: dict[tuple[type[Process], Place], Any] = field(default_factory=dict)  # ahead, and not yet taken

    def places(self, role: str) -> list[Place]:
        return self.plan.of(role)

    def start_ahead(self, processes: Mapping[str, type[Process]], device: str, *, reward_models: bool) -> None:
        """Let the processes that `start` will be asked for, by their roles, import what takes time; returns at once."""
        for place in self.plan.places:
            process = processes[place.role]
            handle = self.start(process, place)
            handle.prepare.remote(device, reward_models=reward_models)
            self.started[process, place] = handle

    def start(self, process: type[Process], place: Place) -> Any:
        """Return the handle of a new process in its place, or of one that was started there ahead."""
        if (process, place) in self.started:
            return self.started.pop((process, place))
        environment, num_gpus = self.environment | {"OMP_NUM_THREADS": str(place.threads)}, len(place.gpus)
        # Ray has no words for several processes on the same several GPUs.
        if place.gpus and not self.plan.has_own_gpus(place):
            ids = self.gpu_ids(place.bundle)
            environment = environment | {VISIBLE: ",".join(ids[gpu] for gpu in place.gpus)}
            num_gpus = 0  # which leaves what the environment says alone
        return (
            ray.remote(num_cpus=1, num_gpus=num_gpus, concurrency_groups=THREADS)(process)
            .options(scheduling_strategy=self._within(place.bundle), runtime_env={"env_vars": environment})
            .remote()
        )

    def gpu_ids(self, bundle: int) -> list[str]:
        """Return the ids of the GPUs that a bundle has on its node, where nobody has been given them by Ray.

        Asked of the bundle itself, each time, since Ray may have moved it to another node.

        Raises:
            ProcessLostError: it does not say.
        """
        whole = ray.remote(num_cpus=0, num_gpus=self.plan.bundles[bundle].gpus, max_retries=0)(own_gpu_ids)
        asked = whole.options(scheduling_strategy=self._within(bundle)).remote()
        ids: list[str] = answer(asked, who=f"bundle {bundle}", what="asking for GPUs", timeout_s=self.timeout_s)
        return ids

    def _within(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)


def own_gpu_ids() -> list[str]:
    """Return the ids of the GPUs that Ray has given to this task."""
    ids: list[str] = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    return ids


def collect(refs: Sequence[Any], *, what: str, timeout_s: float) -> list[Any]:
    """Return what the calls returned, in their order, or raise as soon as one of them has failed.

    Raises:
        ProcessError: a call raised (with the traceback of its process), or a process died or did not answer in time
            (ProcessLostError), or what it needs is gone (RolloutsLostError); says which by its place among the refs.
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
            raise ProcessLostError(f"{what}: no answer from process {late} within {timeout_s:g} s")
        for ref in ready:
            results[ref] = answer(ref, who=f"process {places[ref]}", what=what, timeout_s=timeout_s)
    return [results[ref] for ref in refs]


def answer(ref: Any, *, who: str, what: str, timeout_s: float) -> Any:
    """Return what a call that is done has returned.

    Raises:
        ProcessLostError: the process died, or its result does not come.
        RolloutsLostError: what the call was given, or has given, is gone.
        ProcessError: the call raised; with the traceback of the process.
        ConfigError: the call found fault with a setting.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except ObjectLostError as error:
        raise RolloutsLostError(f"{what}: {who} needs what is lost: {error}") from error
    except GetTimeoutError as error:
        why = f"it gave no answer in {timeout_s:g} s"
        raise ProcessLostError(f"{what}: {who} is lost: {why}", why=why) from error
    except RayTaskError as error:
        if isinstance(error.cause, ConfigError):
            raise error.cause from None
        if isinstance(error.cause, ObjectLostError):
            raise RolloutsLostError(f"{what}: {who} needs what is lost: {error.cause}") from error
        if isinstance(error.cause, RayError):  # what the call was given comes from a process that is lost
            raise ProcessLostError(f"{what}: {who} is lost: {error.cause}", why=str(error.cause)) from error
        raise ProcessError(f"{what}: {who} failed: {error.cause!r}\n{error}") from error
    except RayError as error:  # of the many names of a death: by a signal, by Ray for want of memory, with its node
        why = f"it died: {reason(error)}"
        raise ProcessLostError(f"{what}: {who} is lost: {why}", why=why) from error


def reason(error: BaseException) -> str:
    """Return what an error of Ray's says, without its lines about itself and its list of common causes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("File ") for line in lines):  # it could not be made: a traceback, and last what was raised
        return lines[-1]
    telling = [line for line in lines if not line.startswith(("class_name", "actor_id", "pid", "namespace", "ip:"))]
    return " ".join(telling[:3]).split(" Some common causes")[0] or type(error).__name__
