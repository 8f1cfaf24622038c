"""The learner ranks: PPO and the supervised stages as Ray processes behind typed facades."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray
from ray.exceptions import ObjectLostError

from actors.rollout import Rollout, ScoredRollout
from cluster.driver import Chunk, Metrics, RolloutInfo, ScoredHandle, ShapedHandle
from cluster.faults import LearnersLostError, ProcessError, ProcessLostError, RolloutsLostError
from cluster.members import LOOK_EVERY_S, Members, Patience
from cluster.processes import WRITER, Placement, Process, answer, in_group, spanned
from cluster.reactor import Reactor
from cluster.recoveries import Recoveries
from cluster.turns import LEARNING, OwnGPUs, Turns
from conf.schema import ClusterConfig, ConfigError
from learner.costs import Costs, passes_flops
from learner.ranks import Ranks

Item = TypeVar("Item")
Files = dict[str, tuple[int, str]]  # name -> bytes and SHA-256
TAKEN_PORT = "EADDRINUSE"
SETTLE_S = 15.0  # how long the other ranks have to say what they know, once one has failed


class Place(NamedTuple):
    """Where a rollout is among the chunks of a call, and what it is trained with."""

    chunk: int
    row: int
    score: float
    baseline: float


class RankProcess(Process):
    """One rank of a learner group: PPO or a supervised stage, in a process of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.worker: Any = None
        self.snapshot: Any = None

    def prepare(self, device: str, *, reward_models: bool) -> None:
        from learner.zero import import_engine

        import_engine(device)

    def endpoint(self) -> tuple[str, int]:
        """Return an address of this node and a port that is free on it."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return ray.util.get_node_ip_address(), int(listener.getsockname()[1])

    def start(
        self,
        make: Callable[[Any, Ranks], Any],
        setup: Any,
        rank: int,
        world_size: int,
        endpoint: tuple[str, int],
        sequence_parallel_size: int,
    ) -> None:
        self.worker = make(setup, Ranks(rank, world_size, *endpoint, sequence_parallel_size))

    @spanned
    def rest(self) -> None:
        self.worker.rest()

    @spanned
    def rise(self) -> None:
        self.worker.rise()

    def costs(self) -> Any:
        """Return what a pass of each network costs (learner.costs.Costs)."""
        return self.worker.networks.costs

    @spanned
    def evaluate_rollouts(self, chunk: Sequence[Any]) -> list[Any]:
        """Return what the networks say of each rollout of a chunk; none if it is lost, or there is none for this rank.

        The chunk comes as the reference to it, if any: a call whose argument is lost is not made, and the other ranks
        wait for this one in their collectives.
        """
        rollouts: list[Rollout] | None = None
        with suppress(ObjectLostError):  # whoever needs the chunk itself hears of it
            rollouts = [rollout for payload in chunk for rollout in ray.get(payload)]
        evaluated: list[Any] = self.worker.evaluate(rollouts)
        return evaluated

    @spanned
    def update(
        self, places: Sequence[Sequence[Place]], kl_coef: float, seed: int, step: int, num_chunks: int, *given: Any
    ) -> Metrics:
        """Train on rollouts in their places among the chunks that are given, and then an evaluation of each or None."""
        chunks, evaluations = given[:num_chunks], given[num_chunks:]
        metrics: Metrics = self.worker.update(
            [scored_rollouts(members, chunks) for members in places],
            [
                [evaluations[at.chunk][at.row] if evaluations[at.chunk] else None for at in members]
                for members in places
            ],
            kl_coef=kl_coef,
            seed=seed,
            step=step,
        )
        self.spans.add(self.worker.phases.spans)
        return metrics

    @spanned
    def kl_to_reference(self, places: Sequence[Place], temperature: float, *chunks: Sequence[Rollout]) -> float:
        kl: float = self.worker.kl_to_reference(scored_rollouts(places, chunks), temperature=temperature)
        return kl

    def open_sync(
        self, dtype: str, wire: str, bucket_bytes: int, timeout_s: float, num_receivers: int
    ) -> list[dict[str, Any]]:
        infos: list[dict[str, Any]] = self.worker.open_sync(
            dtype=dtype,
            num_receivers=num_receivers,
            bucket_bytes=bucket_bytes,
            host=ray.util.get_node_ip_address(),
            timeout_s=timeout_s,
            wire=wire,
        )
        return infos

    def connect_sync(self) -> None:
        self.worker.connect_sync()

    @spanned
    def send_weights(self, version: int) -> Metrics:
        metrics: Metrics = self.worker.send_weights(version)
        return metrics

    @spanned
    def train_step(self, rows: Sequence[Any]) -> Metrics:
        metrics: Metrics = self.worker.train_step(rows)
        return metrics

    @spanned
    def evaluate(self, rows: Sequence[Any]) -> Metrics:
        metrics: Metrics = self.worker.evaluate(rows)
        return metrics

    @spanned
    def export(self, folder: Path) -> None:
        self.worker.export(folder)

    @spanned
    def take_snapshot(self) -> None:
        """Copy what a checkpoint holds of this rank; training may go on while `write_snapshot` writes it."""
        self.snapshot = self.worker.snapshot()

    @in_group(WRITER)
    def write_snapshot(self, folder: Path) -> Files:
        """Write the copy to this rank's files in `folder`, and let it go."""
        snapshot, self.snapshot = self.snapshot, None
        files: Files = snapshot.write(folder)
        return files

    def restore(self, folder: Path) -> None:
        self.worker.restore(folder)


def scored_rollouts(places: Sequence[Place], chunks: Sequence[Sequence[Rollout]]) -> list[ScoredRollout]:
    return [ScoredRollout(chunks[place.chunk][place.row], place.score, place.baseline) for place in places]


class RankGroup:
    """Learner ranks that were started together and enter every collective together.

    A rank that is lost takes the group with it: every method raises LearnersLostError then, until `restart`.
    """

    def __init__(
        self,
        placement: Placement,
        make: Callable[[Any, Ranks], Any],
        setup: Any,
        *,
        limits: ClusterConfig,
        recoveries: Recoveries,
        reactor: Reactor | None = None,
        sequence_parallel_size: int = 1,
    ) -> None:
        """Let the ranks start; so many neighbours share the tokens of each rollout, and are given the same."""
        self.make, self.setup, self.limits, self.recoveries = make, setup, limits, recoveries
        self.sequence_parallel_size = sequence_parallel_size
        self.members = Members(
            placement,
            RankProcess,
            "learner",
            begin=None,
            limits=limits,
            recoveries=recoveries,
            reactor=reactor,
        )
        self._starting = self._start()

    @property
    def num_ranks(self) -> int:
        return len(self.members)

    @property
    def num_hands(self) -> int:
        """How many ranks, or groups of ranks that share tokens, are given rollouts of their own."""
        return self.num_ranks // self.sequence_parallel_size

    def _hand(self, rank: int) -> int:
        return rank // self.sequence_parallel_size

    def _start(self) -> list[Any]:
        """Let the ranks load what they train, rank 0 being where they meet."""
        endpoint = self.members.handles[0].endpoint.remote()
        return [
            handle.start.remote(self.make, self.setup, rank, self.num_ranks, endpoint, self.sequence_parallel_size)
            for rank, handle in enumerate(self.members.handles)
        ]

    def wait_started(self) -> None:
        """Return when every rank has loaded what it trains; at once if that has been said already."""
        starting, self._starting = self._starting, []
        if not starting:
            return
        try:
            self._settled(starting, what="start of the learner", timeout_s=self.limits.start_timeout_s, starting=True)
        except ProcessError as error:
            if TAKEN_PORT in str(error):  # between the choice of it and its use
                raise LearnersLostError(str(error)) from error
            raise

    def end(self) -> None:
        """Kill every rank; `restart` puts new ones in their places."""
        for rank in range(self.num_ranks):
            self.members.end(rank)

    def restart(self, why: str) -> None:
        """Begin anew with new processes in the places of all, which know nothing of what was learnt.

        Raises ProcessError if that has been done too often.
        """
        self.recoveries.count("learner", why)
        self.members.renew(range(self.num_ranks))
        self._starting = self._start()
        self.wait_started()

    def restore(self, folder: Path) -> None:
        """Take up what a checkpoint holds in `folder`, of this or another number of ranks."""
        self._all("restore", folder, what="taking up a checkpoint")

    def take_snapshot(self) -> None:
        """Copy what a checkpoint holds, on every rank."""
        self._all("take_snapshot", what="copying for a checkpoint")

    def write_snapshot(self, folder: Path) -> list[Any]:
        """Let every rank write its copy; the calls return the files, and training may go on meanwhile."""
        return [handle.write_snapshot.remote(folder) for handle in self.members.handles]

    def written(self, calls: Sequence[Any]) -> list[Files]:
        """Return the files that each rank has written, when all have.

        Raises LearnersLostError if a rank is lost, ProcessError if it could not write.
        """
        return self._settled(calls, what="writing a checkpoint")

    def export(self, folder: Path) -> None:
        self._all("export", folder, what="export")

    def memory(self) -> Metrics:
        return self.members.memory()

    def _all(self, method: str, *arguments: Any, what: str) -> list[Any]:
        """Return what a method that takes the same on every rank returned on each."""
        return self._settled([getattr(handle, method).remote(*arguments) for handle in self.members.handles], what=what)

    def _settled(
        self, refs: Sequence[Any], *, what: str, timeout_s: float | None = None, starting: bool = False
    ) -> list[Any]:
        """Return what the calls to the ranks, one each, returned.

        The first error to arrive is seldom the cause: when a rank is lost, the collectives of the others break. So all
        are heard before it is said who is lost, or what failed.

        Args:
            starting: the calls are the first, and may keep a rank from answering for longer.

        Raises:
            LearnersLostError: a rank died, does not answer or has not done it in time.
            ProcessError, ConfigError: a rank raised, and all of them live.
        """
        limit = self.limits.call_timeout_s if timeout_s is None else timeout_s
        patience = Patience(limit)
        calls = {ref: rank for rank, ref in enumerate(refs)}
        results: dict[int, Any] = {}
        lost: dict[int, str] = {}
        failed: list[Exception] = []
        while calls and not lost:
            left = patience.look()
            done, lost = self.members.wait(calls, timeout_s=min(left, LOOK_EVERY_S), starting=starting)
            for ref in done:
                rank = calls.pop(ref)
                try:
                    results[rank] = answer(ref, who=f"learner rank {rank}", what=what, timeout_s=limit)
                except ProcessLostError as error:
                    lost[rank] = error.why
                except (ProcessError, ConfigError) as error:
                    failed.append(error)
                    patience.limit_s = min(patience.limit_s, patience.waited_s + SETTLE_S)
            if left <= 0 and not done and not lost:  # after a failure the others wait for the one that left
                lost = {} if failed else dict.fromkeys(calls.values(), f"it has not done it in {limit:g} s")
                break
        if lost:
            raise LearnersLostError(
                "; ".join(f"{what}: learner rank {rank} is lost: {why}" for rank, why in lost.items())
            )
        if failed:
            raise LearnersLostError(str(failed[0])) if isinstance(failed[0], RolloutsLostError) else failed[0]
        return [results[rank] for rank in range(len(refs))]


class LearnerGroup(RankGroup):
    """The ranks of the PPO learner."""

    _coming: list[Chunk]  # to be evaluated as soon as there is one for every hand
    _evaluations: dict[int, tuple[Chunk, Any]]  # by the chunk's identity; of the policy before the next update

    _costs: Costs | None  # of the networks' passes; None until it has been asked for
    turns: Turns = OwnGPUs()

    def _start(self) -> list[Any]:
        self._coming, self._evaluations, self._costs = [], {}, None
        return super()._start()

    def costs(self, infos: Sequence[RolloutInfo]) -> list[float]:
        """Return the operations of evaluating each rollout and training on it."""
        if self._costs is None:
            self._costs = self._settled([self.members.handles[0].costs.remote()], what="asking for costs")[0]
        epochs = self.setup.algorithm.ppo_epochs
        return [
            passes_flops(self._costs, [info.num_tokens], info.num_response_tokens, epochs=epochs, train_policy=True)
            for info in infos
        ]

    def evaluate(self, chunk: Chunk) -> None:
        """Have a chunk evaluated by the networks before the update that trains on it; returns at once.

        A chunk is evaluated whole, by one rank or by ranks that share its tokens, so that no result depends on which
        chunk is finished first.
        """
        self._coming.append(chunk)
        if len(self._coming) == self.num_hands:
            self._evaluate()

    def _evaluate(self) -> None:
        """Let the ranks evaluate the chunks that have come, at most one each."""
        coming, self._coming = self._coming, []
        for rank, handle in enumerate(self.members.handles if coming else []):
            hand = self._hand(rank)
            evaluation = handle.evaluate_rollouts.remote([chunk.payload for chunk in coming[hand : hand + 1]])
            if hand < len(coming):  # ranks that share tokens say the same
                self._evaluations[id(coming[hand])] = coming[hand], evaluation

    def update(
        self, hands: Sequence[Sequence[Sequence[ShapedHandle]]], *, kl_coef: float, seed: int, step: int
    ) -> Metrics:
        self.turns.take(LEARNING)
        self._evaluate()
        evaluations, self._evaluations = self._evaluations, {}
        refs = []
        for rank, handle in enumerate(self.members.handles):
            chunks, places = addressed(hands[self._hand(rank)])
            known = [evaluations[id(chunk)][1] if id(chunk) in evaluations else None for chunk in chunks]
            payloads = [chunk.payload for chunk in chunks]
            refs.append(handle.update.remote(places, kl_coef, seed, step, len(chunks), *payloads, *known))
        metrics: Metrics = self._settled(refs, what="learner update")[0]
        return metrics

    def kl_to_reference(self, hands: Sequence[Sequence[ScoredHandle]], *, temperature: float) -> float:
        self.turns.take(LEARNING)
        refs = []
        for rank, handle in enumerate(self.members.handles):
            hand = [ShapedHandle(one, one.score, 0.0) for one in hands[self._hand(rank)]]
            chunks, places = addressed([hand])
            payloads = [chunk.payload for chunk in chunks]
            refs.append(handle.kl_to_reference.remote(places[0], temperature, *payloads))
        kl: float = self._settled(refs, what="learner evaluation")[0]
        return kl

    def open_sync(
        self, *, dtype: str, wire: str, num_receivers: Sequence[int], bucket_bytes: int, timeout_s: float
    ) -> list[list[dict[str, Any]]]:
        """Return, for each rank, what each of its receivers needs to join; `num_receivers` has their number."""
        refs = [
            handle.open_sync.remote(dtype, wire, bucket_bytes, timeout_s, count)
            for handle, count in zip(self.members.handles, num_receivers, strict=True)
        ]
        return self._settled(refs, what="opening the sync")

    def export(self, folder: Path) -> None:
        self.turns.take(LEARNING)
        super().export(folder)

    def rest(self) -> None:
        """Let the ranks leave their GPUs to others."""
        self._all("rest", what="leaving the GPUs")

    def rise(self) -> None:
        """Let the ranks come back to them; at once where they are."""
        self._all("rise", what="coming back to the GPUs")

    def connect_sync(self) -> list[Any]:
        return [handle.connect_sync.remote() for handle in self.members.handles]

    def send_weights(self, version: int) -> list[Any]:
        return [handle.send_weights.remote(version) for handle in self.members.handles]


class SupervisedGroup(RankGroup):
    """The ranks of a supervised stage."""

    def train_step(self, rows: Sequence[Any]) -> Metrics:
        return self._shared("train_step", rows, what="learner step")

    def evaluate(self, rows: Sequence[Any]) -> Metrics:
        return self._shared("evaluate", rows, what="learner evaluation")

    def _shared(self, method: str, rows: Sequence[Any], *, what: str) -> Metrics:
        """Return what a method says, every rank being given its share of the rows."""
        refs = [
            getattr(handle, method).remote(rows[self._hand(rank) :: self.num_hands])
            for rank, handle in enumerate(self.members.handles)
        ]
        metrics: Metrics = self._settled(refs, what=what)[0]
        return metrics


def addressed(hand: Sequence[Sequence[ShapedHandle]]) -> tuple[list[Chunk], list[list[Place]]]:
    """Return the chunks that the hand refers to, each once, and every rollout as its place among them."""
    chunks: list[Chunk] = []
    numbers: dict[int, int] = {}
    places: list[list[Place]] = []
    for members in hand:
        places.append([])
        for shaped in members:
            chunk = shaped.handle.chunk
            if id(chunk) not in numbers:
                numbers[id(chunk)] = len(chunks)
                chunks.append(chunk)
            places[-1].append(Place(numbers[id(chunk)], shaped.handle.row, shaped.score, shaped.baseline))
    return chunks, places
