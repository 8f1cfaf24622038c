"""The learner ranks: PPO and the supervised stages as Ray processes behind typed facades."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray

from actors.rollout import Rollout, ScoredRollout
from cluster.driver import Metrics, ScoredHandle, ShapedHandle
from cluster.processes import Placement, collect, peak_resident_mib
from conf.schema import ClusterConfig
from learner.zero import Ranks

Item = TypeVar("Item")


class Place(NamedTuple):
    """Where a rollout is among the chunks of a call, and what it is trained with."""

    chunk: int
    row: int
    score: float
    baseline: float


class RankProcess:
    """One rank of a learner group: PPO or a supervised stage, in a process of its own."""

    def __init__(self) -> None:
        self.worker: Any = None

    def endpoint(self) -> tuple[str, int]:
        """Return an address of this node and a port that is free on it."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return ray.util.get_node_ip_address(), int(listener.getsockname()[1])

    def start(self, make: Callable[[Any, Ranks], Any], setup: Any, ranks: Ranks) -> None:
        self.worker = make(setup, ranks)

    def update(
        self, places: Sequence[Sequence[Place]], kl_coef: float, seed: int, step: int, *chunks: Sequence[Rollout]
    ) -> Metrics:
        metrics: Metrics = self.worker.update(
            [scored_rollouts(members, chunks) for members in places], kl_coef=kl_coef, seed=seed, step=step
        )
        return metrics

    def kl_to_reference(self, places: Sequence[Place], temperature: float, *chunks: Sequence[Rollout]) -> float:
        kl: float = self.worker.kl_to_reference(scored_rollouts(places, chunks), temperature=temperature)
        return kl

    def open_sync(self, dtype: str, num_receivers: int, timeout_s: float) -> list[dict[str, Any]]:
        infos: list[dict[str, Any]] = self.worker.open_sync(
            dtype=dtype, num_receivers=num_receivers, host=ray.util.get_node_ip_address(), timeout_s=timeout_s
        )
        return infos

    def connect_sync(self) -> None:
        self.worker.connect_sync()

    def send_weights(self, version: int) -> None:
        self.worker.send_weights(version)

    def train_step(self, rows: Sequence[Any]) -> Metrics:
        metrics: Metrics = self.worker.train_step(rows)
        return metrics

    def evaluate(self, rows: Sequence[Any]) -> Metrics:
        metrics: Metrics = self.worker.evaluate(rows)
        return metrics

    def export(self, folder: Path) -> None:
        self.worker.export(folder)

    def peak_resident_mib(self) -> float:
        return peak_resident_mib()


def scored_rollouts(places: Sequence[Place], chunks: Sequence[Sequence[Rollout]]) -> list[ScoredRollout]:
    return [ScoredRollout(chunks[place.chunk][place.row], place.score, place.baseline) for place in places]


class RankGroup:
    """Learner ranks that were started together and enter every collective together."""

    def __init__(self, placement: Placement, make: Callable[[Any, Ranks], Any], setup: Any, *, limits: ClusterConfig):
        self.processes = placement.start(RankProcess, "learner")
        self.limits = limits
        endpoint = [self.processes[0].endpoint.remote()]
        address, port = collect(endpoint, what="placing rank 0", timeout_s=limits.start_timeout_s)[0]
        self.starting = [
            process.start.remote(make, setup, Ranks(rank, len(self.processes), address, port))
            for rank, process in enumerate(self.processes)
        ]

    @property
    def num_ranks(self) -> int:
        return len(self.processes)

    def export(self, folder: Path) -> None:
        self._collect([process.export.remote(folder) for process in self.processes], "export")

    def memory(self) -> Metrics:
        sizes = self._collect([process.peak_resident_mib.remote() for process in self.processes], "memory")
        return {"memory/learner_peak_mib": max(sizes)}

    def _collect(self, refs: Sequence[Any], what: str) -> list[Any]:
        return collect(refs, what=f"learner {what}", timeout_s=self.limits.call_timeout_s)


class LearnerGroup(RankGroup):
    """The ranks of the PPO learner."""

    def update(
        self, hands: Sequence[Sequence[Sequence[ShapedHandle]]], *, kl_coef: float, seed: int, step: int
    ) -> Metrics:
        refs = []
        for process, hand in zip(self.processes, hands, strict=True):
            payloads, places = addressed(hand)
            refs.append(process.update.remote(places, kl_coef, seed, step, *payloads))
        metrics: Metrics = self._collect(refs, "update")[0]
        return metrics

    def kl_to_reference(self, hands: Sequence[Sequence[ScoredHandle]], *, temperature: float) -> float:
        refs = []
        for process, hand in zip(self.processes, hands, strict=True):
            payloads, places = addressed([[ShapedHandle(handle, handle.score, 0.0) for handle in hand]])
            refs.append(process.kl_to_reference.remote(places[0], temperature, *payloads))
        kl: float = self._collect(refs, "evaluation")[0]
        return kl

    def open_sync(self, *, dtype: str, num_receivers: int, timeout_s: float) -> list[dict[str, Any]]:
        refs = [process.open_sync.remote(dtype, num_receivers, timeout_s) for process in self.processes]
        infos: list[dict[str, Any]] = self._collect(refs, "sync")[0]
        return infos

    def connect_sync(self) -> list[Any]:
        return [process.connect_sync.remote() for process in self.processes]

    def send_weights(self, version: int) -> list[Any]:
        return [process.send_weights.remote(version) for process in self.processes]


class SupervisedGroup(RankGroup):
    """The ranks of a supervised stage."""

    def train_step(self, rows: Sequence[Any]) -> Metrics:
        metrics: Metrics = self._collect(
            [p.train_step.remote(share) for p, share in zip(self.processes, self._shares(rows), strict=True)], "step"
        )[0]
        return metrics

    def evaluate(self, rows: Sequence[Any]) -> Metrics:
        metrics: Metrics = self._collect(
            [p.evaluate.remote(share) for p, share in zip(self.processes, self._shares(rows), strict=True)],
            "evaluation",
        )[0]
        return metrics

    def _shares(self, rows: Sequence[Item]) -> list[Sequence[Item]]:
        return [rows[rank :: self.num_ranks] for rank in range(self.num_ranks)]


def addressed(hand: Sequence[Sequence[ShapedHandle]]) -> tuple[list[Any], list[list[Place]]]:
    """Return the chunks that the hand refers to, each once, and every rollout as its place among them."""
    payloads: list[Any] = []
    numbers: dict[int, int] = {}
    places: list[list[Place]] = []
    for members in hand:
        places.append([])
        for shaped in members:
            chunk = shaped.handle.chunk
            if id(chunk) not in numbers:
                numbers[id(chunk)] = len(payloads)
                payloads.append(chunk.payload)
            places[-1].append(Place(numbers[id(chunk)], shaped.handle.row, shaped.score, shaped.baseline))
    return payloads, places
