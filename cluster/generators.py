"""The generation actors: vLLM engines as Ray processes behind one typed facade."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.rollout import Prompt, Rollout
from cluster.driver import Chunk, Metrics, RolloutInfo, Sampling, ScoredHandle
from cluster.processes import Placement, ProcessError, collect, peak_resident_mib
from conf.schema import ClusterConfig, GeneratorConfig


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


class GeneratorProcess:
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

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, chunk_size: int) -> Iterator[Any]:
        """Yield a chunk (a list of rollouts) and then what the driver needs to know of it, chunk by chunk.

        A chunk is `chunk_size` consecutive requests, whichever finishes first, so that what is scored together does not
        depend on timing.
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
            for prompt in prompts
            for sample in range(sampling.num_samples)
        ]
        place = {(request.prompt.id, request.sample): i // chunk_size for i, request in enumerate(requests)}
        unfinished = [min(chunk_size, len(requests) - start) for start in range(0, len(requests), chunk_size)]
        chunks: list[list[Rollout]] = [[] for _ in unfinished]
        for rollout in self.generator.generate(requests):
            index = place[rollout.key]
            chunks[index].append(rollout)
            if len(chunks[index]) == unfinished[index]:
                chunk = sorted(chunks[index], key=lambda member: member.key)
                chunks[index] = []
                yield chunk
                yield tuple(RolloutInfo.of(member) for member in chunk)

    def join_sync(self, info: dict[str, Any]) -> None:
        self.generator.init_weight_transfer(info)

    def receive_weights(self, version: int) -> None:
        self.generator.start_weight_update()
        self.generator.update_weights({"version": version})
        self.generator.finish_weight_update(version)

    def peak_resident_mib(self) -> float:
        return peak_resident_mib()


class GeneratorGroup:
    """The generation actors; prompts are dealt to them in turn."""

    def __init__(self, placement: Placement, setup: GeneratorSetup, *, chunk_size: int, limits: ClusterConfig) -> None:
        self.processes = placement.start(GeneratorProcess, "generator")
        self.chunk_size, self.limits = chunk_size, limits
        self.starting = [process.start.remote(setup) for process in self.processes]

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Chunk]:
        shares = [list(prompts[index :: len(self.processes)]) for index in range(len(self.processes))]
        streams = [
            process.sample.options(num_returns="streaming").remote(share, sampling, self.chunk_size)
            for process, share in zip(self.processes, shares, strict=True)
            if share
        ]
        while streams:
            ready, _ = ray.wait(streams, num_returns=1, timeout=self.limits.call_timeout_s, fetch_local=False)
            if not ready:
                raise ProcessError(f"generating: nothing finished within {self.limits.call_timeout_s:g} s")
            stream = ready[0]
            try:
                payload = next(stream)
            except StopIteration:
                streams.remove(stream)
                continue
            described = next(stream, None)
            if described is None:  # a stream that failed ends with its error in the place of a chunk
                collect([payload], what="generating", timeout_s=self.limits.call_timeout_s)
                raise ProcessError("generating: a stream of rollouts ended in the middle of a chunk")
            yield Chunk(collect([described], what="generating", timeout_s=self.limits.call_timeout_s)[0], payload)

    def read(self, handles: Sequence[ScoredHandle]) -> list[Rollout]:
        payloads = {id(handle.chunk): handle.chunk.payload for handle in handles}
        chunks = dict(
            zip(
                payloads,
                collect(list(payloads.values()), what="reading rollouts", timeout_s=self.limits.call_timeout_s),
                strict=True,
            )
        )
        return [chunks[id(handle.chunk)][handle.row] for handle in handles]

    def join_sync(self, infos: Sequence[dict[str, Any]]) -> list[Any]:
        return [process.join_sync.remote(info) for process, info in zip(self.processes, infos, strict=True)]

    def receive_weights(self, version: int) -> list[Any]:
        return [process.receive_weights.remote(version) for process in self.processes]

    def memory(self) -> Metrics:
        sizes = collect(
            [p.peak_resident_mib.remote() for p in self.processes], what="memory", timeout_s=self.limits.call_timeout_s
        )
        return {"memory/generator_peak_mib": max(sizes)}
