"""The generation actors: vLLM engines as Ray processes behind one typed facade."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.rollout import Prompt, Rollout
from cluster.driver import Chunk, Metrics, RolloutInfo, Sampling, ScoredHandle
from cluster.faults import ProcessLostError
from cluster.members import Members
from cluster.processes import Placement, Process, answer, collect, reason
from cluster.recoveries import Recoveries
from conf.schema import ClusterConfig, ConfigError, GeneratorConfig

Part = tuple[tuple[Prompt, int], ...]  # the (prompt, sample) pairs of one chunk
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


class GeneratorProcess(Process):
    """One vLLM engine in a process of its own."""

    def __init__(self) -> None:
        self.generator: Any = None

    def start(self, setup: GeneratorSetup) -> None:
        from actors.generator import VLLMGenerator

        self.generator = VLLMGenerator(
            setup.model_path,
            setup.config,
            device=setup.device,
            seed=setup.seed,
            tokenizer=setup.tokenizer,
            stop_tokens_of=setup.policy_path,
            trust_remote_code=setup.trust_remote_code,
        )

    def sample(self, parts: Sequence[Part], sampling: Sampling) -> Iterator[Any]:
        """Yield a chunk (a list of rollouts), then its part and what the driver needs to know of it, as each is whole.

        A chunk is what its part says, whichever of its rollouts finishes first, so that what is scored together does
        not depend on timing.
        """
        from actors.generator import SampleRequest, sampling_seed

        place = {(prompt.id, sample): number for number, part in enumerate(parts) for prompt, sample in part}
        chunks: list[list[Rollout]] = [[] for _ in parts]
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
        for rollout in self.generator.generate(requests):
            number = place[rollout.key]
            chunks[number].append(rollout)
            if len(chunks[number]) == len(parts[number]):
                chunk = sorted(chunks[number], key=lambda member: member.key)
                chunks[number] = []
                yield chunk
                yield number, tuple(RolloutInfo.of(member) for member in chunk)

    def join_sync(self, info: dict[str, Any]) -> None:
        self.generator.init_weight_transfer(info)

    def receive_weights(self, version: int) -> None:
        self.generator.start_weight_update()
        self.generator.update_weights({"version": version})
        self.generator.finish_weight_update(version)


class GeneratorGroup:
    """The generation actors; prompts are dealt to them in turn.

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
    ) -> None:
        self.chunk_size, self.limits = chunk_size, limits
        self.members = Members(
            placement,
            GeneratorProcess,
            "generator",
            begin=lambda handle: handle.start.remote(setup),
            limits=limits,
            recoveries=recoveries,
        )
        self.restore: Callable[[], None] = lambda: None  # brings the current weights to all; set by the weight sync

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Chunk]:
        count = len(self.members)
        shares = [
            planned(prompts[index::count], num_samples=sampling.num_samples, chunk_size=self.chunk_size)
            for index in range(count)
        ]
        while any(shares):
            unfinished, lost = yield from self._round(shares, sampling)
            if lost:
                self.members.replace(lost, what="generating")
                self.restore()
            shares = [unfinished[index::count] for index in range(count)]

    def _round(
        self, shares: Sequence[Sequence[Part]], sampling: Sampling
    ) -> Generator[Chunk, None, tuple[list[Part], dict[int, str]]]:
        """Let every member sample its share; return the parts that are not finished, and who is lost and why."""
        streams = {
            handle.sample.options(num_returns="streaming").remote(share, sampling): index
            for index, (handle, share) in enumerate(zip(self.members.handles, shares, strict=True))
            if share
        }
        open_parts = [dict(enumerate(share)) for share in shares]
        payloads: dict[int, Any] = {}  # of members whose next item describes it
        lost: dict[int, str] = {}
        while streams:
            ready, gone = self.members.wait_or_lose(streams, timeout_s=self.limits.call_timeout_s)
            lost |= gone
            for stream in ready:
                index = streams[stream]
                try:
                    item = next(stream)  # which does not block: the stream is ready
                except StopIteration:
                    del streams[stream]
                    if index not in payloads:
                        continue
                    item = payloads[index]  # a stream that failed ends with its error in the place of a chunk
                if index not in payloads:
                    payloads[index] = item
                    continue
                try:
                    number, infos = self._description(item)
                except ProcessLostError as error:
                    lost[index] = error.why
                    continue
                del open_parts[index][number]
                yield Chunk(infos, payloads.pop(index))
            streams = {stream: index for stream, index in streams.items() if index not in lost}
        return [part for parts in open_parts for part in parts.values()], lost

    def _description(self, item: Any) -> tuple[int, tuple[RolloutInfo, ...]]:
        """Return the number of a part, and what the driver needs to know of its rollouts.

        Raises:
            ProcessLostError: the process or its engine is gone.
            ProcessError, ConfigError: the engine found fault with what it was given.
        """
        try:
            number, infos = ray.get(item, timeout=self.limits.call_timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, WRONG_AGAIN):
                answer(item, who="a generator", what="generating", timeout_s=self.limits.call_timeout_s)
            why = f"its engine failed: {error.cause!r}"
            raise ProcessLostError(f"generating: {why}", why=why) from error
        except RayError as error:
            why = f"it died: {reason(error)}"
            raise ProcessLostError(f"generating: {why}", why=why) from error
        return number, infos

    def read(self, handles: Sequence[ScoredHandle]) -> list[Rollout]:
        payloads = {id(handle.chunk): handle.chunk.payload for handle in handles}
        read = collect(list(payloads.values()), what="reading rollouts", timeout_s=self.limits.call_timeout_s)
        chunks = dict(zip(payloads, read, strict=True))
        return [chunks[id(handle.chunk)][handle.row] for handle in handles]

    def hold(self, rollouts: Sequence[Rollout]) -> Chunk:
        """Return rollouts that come from elsewhere, such as a checkpoint, as a chunk."""
        return Chunk(tuple(map(RolloutInfo.of, rollouts)), ray.put(list(rollouts)))

    def join_sync(self, infos: Sequence[dict[str, Any]]) -> list[Any]:
        return [handle.join_sync.remote(info) for handle, info in zip(self.members.handles, infos, strict=True)]

    def receive_weights(self, version: int) -> list[Any]:
        return [handle.receive_weights.remote(version) for handle in self.members.handles]

    def memory(self) -> Metrics:
        return self.members.memory()


def planned(prompts: Sequence[Prompt], *, num_samples: int, chunk_size: int) -> list[Part]:
    """Return what one generator samples, cut into chunks of consecutive requests."""
    pairs = [(prompt, sample) for prompt in prompts for sample in range(num_samples)]
    return [tuple(pairs[start : start + chunk_size]) for start in range(0, len(pairs), chunk_size)]
