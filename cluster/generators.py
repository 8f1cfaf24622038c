"""The generation actors: vLLM engines as Ray processes behind one typed facade."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.rollout import Prompt, Rollout
from cluster.driver import Chunk, Metrics, RolloutInfo, Sampling, ScoredHandle
from cluster.faults import ProcessError, ProcessLostError
from cluster.members import LOOK_EVERY_S, Members, Patience
from cluster.processes import SAMPLER, Placement, Process, answer, collect, in_group, reason, spanned
from cluster.reactor import Reactor
from cluster.recoveries import Recoveries
from cluster.sampling import Dealer, Order, Part, planned
from cluster.turns import SAMPLING, OwnGPUs, Turns
from conf.schema import ClusterConfig, ConfigError, GeneratorConfig

SPARE = 2  # so many times `generator.max_num_seqs` requests a generator has at most: one half runs, one half waits
WRONG_AGAIN = (ConfigError, ValueError, TypeError, AssertionError, LookupError)  # what a new engine would say as well


@dataclass(frozen=True)
class GeneratorSetup:
    """What every generator is built from."""

    model_path: str  # what the engine starts from
    policy_path: str  # whose end-of-text tokens end a response
    tokenizer: str
    config: GeneratorConfig
    device: str
    seed: int
    trust_remote_code: bool
    shares_gpus: bool = False  # with learner ranks, so that the engine has to be able to sleep


class GeneratorProcess(Process):
    """One vLLM engine in a process of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loop: Any = None

    def prepare(self, device: str, *, reward_models: bool) -> None:
        from actors.generator import import_engine

        import_engine(device)

    def start(self, setup: GeneratorSetup) -> None:
        from actors.engine_loop import EngineLoop
        from actors.generator import VLLMGenerator

        self.loop = EngineLoop(
            lambda: VLLMGenerator(
                setup.model_path,
                setup.config,
                device=setup.device,
                seed=setup.seed,
                tokenizer=setup.tokenizer,
                stop_tokens_of=setup.policy_path,
                trust_remote_code=setup.trust_remote_code,
                shares_gpus=setup.shares_gpus,
            ),
            self.spans,
        )

    @in_group(SAMPLER)
    def sample(self, parts: Sequence[Part], sampling: Sampling) -> Iterator[Any]:
        """Yield a chunk (a list of rollouts), then its place among the parts and what the driver needs to know of it.

        Each comes as soon as it is whole. A chunk is what its part says, whichever of its rollouts finishes first, so
        that what is scored together does not depend on timing. May be called while other calls of it run.
        """
        from actors.generator import SampleRequest, sampling_seed

        requests = [
            SampleRequest(
                prompt=prompt,
                sample=sample,
                seed=sampling_seed(sampling.seed, prompt.id, sample),
                temperature=sampling.temperature,
                max_new_tokens=sampling.max_new_tokens,
            )
            for part in parts
            for prompt, sample in part
        ]
        part_of = [number for number, part in enumerate(parts) for _ in part]
        chunks: list[list[Rollout]] = [[] for _ in parts]
        for place, rollout in self.loop.sample(requests):
            number = part_of[place]
            chunks[number].append(rollout)
            if len(chunks[number]) == len(parts[number]):
                chunk = sorted(chunks[number], key=lambda member: member.key)
                chunks[number] = []
                yield chunk
                yield number, tuple(RolloutInfo.of(member) for member in chunk)

    def join_sync(self, workers: Sequence[dict[str, Any]]) -> None:
        self.loop.call(lambda: self.loop.generator.init_weight_transfer(workers))

    @spanned
    def sleep(self) -> None:
        self.loop.call(self.loop.generator.sleep)

    @spanned
    def wake_weights(self) -> None:
        self.loop.call(self.loop.generator.wake_weights)

    @spanned
    def wake(self) -> None:
        self.loop.call(self.loop.generator.wake)

    @spanned
    def receive_weights(self, version: int) -> Metrics:
        """Take new weights on between two steps of the engine; what is being sampled goes on with them."""

        def receive() -> Metrics:
            generator, start = self.loop.generator, time.perf_counter()
            generator.start_weight_update()
            generator.update_weights({"version": version})
            loaded = time.perf_counter()
            generator.finish_weight_update(version)
            return {"timing/sync_load_s": loaded - start, "timing/sync_verify_s": time.perf_counter() - loaded}

        metrics: Metrics = self.loop.call(receive)
        return metrics


@dataclass(eq=False)
class Stream:
    """A call for samples that is under way."""

    handle: Any  # of the process
    who: int
    parts: dict[int, tuple[Order, int, Part]]  # those that have not come, by their places in the call
    payload: Any = None  # the chunk that the next item describes


class GeneratorGroup:
    """The generation actors; each part of what is to be sampled goes to the one with the fewest tokens to sample.

    One that is lost while it samples is replaced, and what it had not finished is sampled again with the same seeds.
    """

    def __init__(
        self,
        placement: Placement,
        setup: GeneratorSetup,
        *,
        chunk_size: int,
        limits: ClusterConfig,
        recoveries: Recoveries,
        reactor: Reactor,
    ) -> None:
        self.chunk_size, self.limits, self.reactor = chunk_size, limits, reactor
        self.members = Members(
            placement,
            GeneratorProcess,
            "generator",
            begin=lambda handle: handle.start.remote(setup),
            limits=limits,
            recoveries=recoveries,
            reactor=reactor,
        )
        self.turns: Turns = OwnGPUs()
        self.restore: Callable[[], None] = lambda: None  # brings the current weights to all; set by the weight sync
        self._dealer = Dealer(enough_requests=SPARE * setup.config.max_num_seqs)
        self._streams: dict[Any, Stream] = {}
        self._lost: dict[int, tuple[Any, str]] = {}  # who, with the process that it was, and why
        self._wrong: ProcessError | ConfigError | None = None  # what another engine would say as well
        self._patience = Patience(limits.call_timeout_s)
        reactor.sources.append(self)

    def order(
        self, prompts: Sequence[Prompt], sampling: Sampling, deliver: Callable[[Chunk], None], *, urgent: bool
    ) -> Order:
        """Have the prompts sampled; each chunk is delivered as soon as its last rollout has finished.

        Nothing comes unless somebody waits: for this, by `attend`, or for anything else by way of the reactor. Urgent
        orders come before those that are not.
        """
        parts = planned(
            prompts,
            num_samples=sampling.num_samples,
            chunk_size=self.chunk_size,
            num_generators=len(self.members),
        )
        self.turns.take(SAMPLING)
        order = Order(sampling, deliver, dict(enumerate(parts)), urgent=urgent)
        self._dealer.take(order)
        self._deal()
        return order

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Chunk]:
        """Yield the rollouts of all prompts in chunks, each as soon as its last rollout has finished."""
        come: deque[Chunk] = deque()
        order = self.order(prompts, sampling, come.append, urgent=True)
        try:
            while come or not order.done:
                while come:
                    yield come.popleft()
                if not order.done:
                    self.attend()
        finally:
            order.cancel()

    def attend(self) -> None:
        """Wait for a second at most for something to come, and make good what is lost.

        Raises:
            ProcessError, ConfigError: an engine found fault with what it was given, or too many were lost.
        """
        self.reactor.wait((), timeout_s=LOOK_EVERY_S)
        if self._wrong is not None:
            raise self._wrong
        sampling = sorted({stream.who for stream in self._streams.values()})
        lost = self.members.lost(sampling)
        if self._streams and self._patience.look() <= 0:
            lost = dict.fromkeys(sampling, f"it has finished nothing for {self.limits.call_timeout_s:g} s")
        lost |= {who: why for who, (handle, why) in self._lost.items() if handle is self.members.handles[who]}
        if lost:
            for stream in [one for one, call in self._streams.items() if call.who in lost]:
                self._give_up(stream)
            self._lost.clear()
            self.members.replace(lost, what="generating")
            self.restore()
            self._patience = Patience(self.limits.call_timeout_s)
        self._deal()

    def _deal(self) -> None:
        """Give the generators that live what waits to be sampled."""
        gone = {who for who, (handle, _) in self._lost.items() if handle is self.members.handles[who]}
        for who, given in self._dealer.deal([who for who in range(len(self.members)) if who not in gone]).items():
            by_sampling: dict[Sampling, list[tuple[Order, int, Part]]] = {}
            for order, number in given:
                by_sampling.setdefault(order.sampling, []).append((order, number, order.running[number]))
            handle = self.members.handles[who]
            for sampling, parts in by_sampling.items():
                stream = handle.sample.options(num_returns="streaming").remote([part for *_, part in parts], sampling)
                self._streams[stream] = Stream(handle, who, dict(enumerate(parts)))

    def refs(self) -> Iterable[Any]:
        return self._streams

    def ready(self, ref: Any) -> None:
        """Take what a stream has for us: a chunk, what is to be known of it, or its end."""
        stream = self._streams[ref]
        self._patience = Patience(self.limits.call_timeout_s)
        try:
            item = next(ref)  # which does not block: the stream is ready
        except StopIteration:
            if stream.payload is None:
                del self._streams[ref]
                return
            item = stream.payload  # a stream that failed ends with its error in the place of a chunk
        if stream.payload is None:
            stream.payload = item
            return
        try:
            place, infos = self._description(item)
        except ProcessLostError as error:
            self._give_up(ref)
            self._lost[stream.who] = (stream.handle, error.why)
        except (ProcessError, ConfigError) as error:
            self._give_up(ref)
            self._wrong = error
        else:
            order, number, part = stream.parts.pop(place)
            self._dealer.add(stream.who, part, order.sampling, sign=-1)
            payload, stream.payload = stream.payload, None
            order.came(number, Chunk(infos, payload))
        self._deal()

    def _give_up(self, ref: Any) -> None:
        """Let what a stream has not brought be sampled by another."""
        stream = self._streams.pop(ref)
        for order, number, part in stream.parts.values():
            self._dealer.add(stream.who, part, order.sampling, sign=-1)
            order.take_back(number)

    def _description(self, item: Any) -> tuple[int, tuple[RolloutInfo, ...]]:
        """Return the place of a part in its call, and what the driver needs to know of its rollouts.

        Raises:
            ProcessLostError: the process or its engine is gone.
            ProcessError, ConfigError: the engine found fault with what it was given.
        """
        try:
            place, infos = ray.get(item, timeout=self.limits.call_timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, WRONG_AGAIN):
                answer(item, who="a generator", what="generating", timeout_s=self.limits.call_timeout_s)
            why = f"its engine failed: {error.cause!r}"
            raise ProcessLostError(f"generating: {why}", why=why) from error
        except RayError as error:
            why = f"it died: {reason(error)}"
            raise ProcessLostError(f"generating: {why}", why=why) from error
        return place, infos

    def read(self, handles: Sequence[ScoredHandle]) -> list[Rollout]:
        payloads = {id(handle.chunk): handle.chunk.payload for handle in handles}
        read = collect(list(payloads.values()), what="reading rollouts", timeout_s=self.limits.call_timeout_s)
        chunks = dict(zip(payloads, read, strict=True))
        return [chunks[id(handle.chunk)][handle.row] for handle in handles]

    def hold(self, rollouts: Sequence[Rollout]) -> Chunk:
        """Return rollouts that come from elsewhere, such as a checkpoint, as a chunk."""
        return Chunk(tuple(map(RolloutInfo.of, rollouts)), ray.put(list(rollouts)))

    def join_sync(self, infos: Sequence[Sequence[dict[str, Any]]]) -> list[Any]:
        """Let every generator join; `infos` has for each of them what each of its processes needs."""
        return [handle.join_sync.remote(info) for handle, info in zip(self.members.handles, infos, strict=True)]

    def receive_weights(self, version: int) -> list[Any]:
        return [handle.receive_weights.remote(version) for handle in self.members.handles]

    def all_turn(self, method: str) -> None:
        """Let every generator sleep or wake; one that is lost in it is found when something is asked of it next."""
        calls = {getattr(handle, method).remote(): who for who, handle in enumerate(self.members.handles)}
        while calls:
            done, lost = self.members.wait_or_lose(calls, timeout_s=self.limits.call_timeout_s)
            for ref in done:
                who = calls[ref]
                try:
                    answer(ref, who=f"generator {who}", what=method, timeout_s=self.limits.call_timeout_s)
                except ProcessLostError as error:
                    lost[who] = error.why
            for who in lost:
                self.members.end(who)
            calls = {ref: who for ref, who in calls.items() if ref not in done and who not in lost}

    def memory(self) -> Metrics:
        return self.members.memory()
