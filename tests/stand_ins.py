"""Stand-ins for the driver's partners, in one process: they take notes, and a rollout scores what a script says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from actors.reward import Judged
from actors.rollout import Prompt, Rollout
from cluster.driver import Chunk, Metrics, RolloutInfo, Sampling, ScoredHandle, Scoring, ShapedHandle

Script = Callable[[int, int, float], float | None]  # prompt id, sample, temperature -> score; None: dropped


def prompt(number: int) -> Prompt:
    return Prompt(
        number, np.arange(3, dtype=np.int32), f"prompt {number}", ({"role": "user", "content": f"prompt {number}"},)
    )


def rollout(of: Prompt, sample: int, *, length: int, truncated: bool = False, version: int = 0) -> Rollout:
    return Rollout(
        of,
        sample,
        response_ids=np.arange(length, dtype=np.int32),
        rollout_logprobs=np.zeros(length, np.float32),
        response_mask=np.ones(length, np.bool_),
        policy_versions=np.full(length, version, np.int32),
        finish_reason="length" if truncated else "stop",
        text=f"response {of.id}.{sample}",
    )


def scored_handle(
    prompt_id: int = 0, sample: int = 0, *, score: float, length: int = 1, truncated: bool = False
) -> ScoredHandle:
    info = RolloutInfo.of(rollout(prompt(prompt_id), sample, length=length, truncated=truncated))
    return ScoredHandle(info, Chunk((info,), payload=None), 0, score, {"model": score})


class NumberedPrompts:
    """Prompt 0, 1, 2 and so on, without end."""

    def __init__(self) -> None:
        self.drawn = 0

    def next_batch(self, count: int) -> list[Prompt]:
        self.drawn += count
        return [prompt(number) for number in range(self.drawn - count, self.drawn)]

    def state(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state(self, state: Mapping[str, int]) -> None:
        self.drawn = state["drawn"]


@dataclass(eq=False)
class StandInOrder:
    """Chunks that are still to be finished, by their numbers."""

    finish: Callable[[int], None]
    numbers: list[int]

    @property
    def done(self) -> bool:
        return not self.numbers

    def cancel(self) -> None:
        self.numbers.clear()


@dataclass(eq=False)
class StandInScores:
    """A round of scoring."""

    of: StandIns
    chunks: list[Chunk] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.of.asked.append("score")
        self.chunks.append(chunk)

    def result(self) -> Scoring:
        judged = [[self.of.judge(info, chunk) for info in chunk.infos] for chunk in self.chunks]
        return Scoring.of(self.chunks, judged, num_retries=self.of.num_retries)


@dataclass
class StandIns:
    """All partners in one, with one list of what was asked of them.

    Responses have 1, 2 or 3 tokens, by their prompt. The payload of a chunk is its rollouts and their temperature.
    """

    script: Script = lambda number, sample, temperature: float(number)
    chunk_size: int = 2
    order_of_chunks: Callable[[list[Chunk]], Iterable[Chunk]] = reversed  # in which they are finished
    choose: Callable[[list[StandInOrder]], StandInOrder] = lambda orders: orders[0]  # who is next to get a chunk
    num_hands: int = 2
    kl: float = 0.0
    fail_sync_at: int | None = None
    num_retries: int = 0
    unjudged: tuple[int, ...] = ()  # prompts on which the verifier has no verdict
    asked: list[str] = field(default_factory=list)
    sampled: list[list[int]] = field(default_factory=list)  # the prompt ids of each call
    samplings: list[Sampling] = field(default_factory=list)
    updates: list[list[list[list[ShapedHandle]]]] = field(default_factory=list)
    evaluated: list[list[tuple[int, int]]] = field(default_factory=list)  # prompts and samples of each chunk
    evaluated_by: list[int] = field(default_factory=list)  # the version that the learner had then
    kl_coefs: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    judged: list[Sequence[Sequence[ScoredHandle]]] = field(default_factory=list)
    version: int = 0  # of the weights that the generators hold
    orders: list[StandInOrder] = field(default_factory=list)

    # --- generators

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Chunk]:
        self.asked.append(f"sample {len(prompts)} x {sampling.num_samples}")
        self.samplings.append(sampling)
        self.sampled.append([of.id for of in prompts])
        for chunk in self.order_of_chunks(self._chunks(prompts, sampling)):
            self.asked.append("chunk")
            yield chunk

    def order(
        self, prompts: Sequence[Prompt], sampling: Sampling, deliver: Callable[[Chunk], None], *, urgent: bool
    ) -> StandInOrder:
        """Each chunk is sampled as it is attended to, by the weights of that moment."""
        self.asked.append(f"order {len(prompts)} x {sampling.num_samples}")
        self.sampled.append([of.id for of in prompts])
        count = -(-len(prompts) * sampling.num_samples // self.chunk_size)
        order = StandInOrder(lambda number: deliver(self._chunks(prompts, sampling)[number]), list(range(count)))
        self.orders.append(order)
        return order

    def attend(self) -> None:
        """Finish a chunk of some order that has one left, chosen by `choose`."""
        waiting = [order for order in self.orders if not order.done]
        order = self.choose(waiting)
        self.asked.append("chunk")
        order.finish(order.numbers.pop())

    def _chunks(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Chunk]:
        rollouts = [
            rollout(of, sample, length=1 + of.id % 3, version=self.version)
            for of in prompts
            for sample in range(sampling.num_samples)
        ]
        parts = [rollouts[start : start + self.chunk_size] for start in range(0, len(rollouts), self.chunk_size)]
        return [Chunk(tuple(map(RolloutInfo.of, part)), (part, sampling.temperature)) for part in parts]

    def read(self, handles: Sequence[ScoredHandle]) -> list[Rollout]:
        self.asked.append("read")
        return [rollouts_of(handle.chunk)[handle.row] for handle in handles]

    def hold(self, rollouts: Sequence[Rollout]) -> Chunk:
        self.asked.append("hold")
        return Chunk(tuple(map(RolloutInfo.of, rollouts)), (list(rollouts), 1.0))

    # --- rewards

    def open(self) -> StandInScores:
        return StandInScores(self)

    def score(self, chunks: Iterable[Chunk]) -> Scoring:
        scores = self.open()
        for chunk in chunks:
            scores.add(chunk)
        return scores.result()

    def judge(self, info: RolloutInfo, chunk: Chunk) -> Judged:
        score = self.script(info.prompt_id, info.sample, chunk.payload[1])  # type: ignore[index]
        return Judged(None, fault="gone") if score is None else Judged(score, {"model": score})

    def verify(self, handles: Sequence[ScoredHandle]) -> list[float | None]:
        """Even prompts are right, and of the others sample 1; on those of `unjudged` there is no verdict."""
        self.asked.append("verify")
        verdicts = [1.0 if h.info.prompt_id % 2 == 0 or h.info.sample == 1 else 0.5 for h in handles]
        return [None if h.info.prompt_id in self.unjudged else v for h, v in zip(handles, verdicts, strict=True)]

    # --- learners and sync

    def costs(self, infos: Sequence[RolloutInfo]) -> list[float]:
        return [float(info.num_tokens) for info in infos]

    def evaluate(self, chunk: Chunk) -> None:
        self.evaluated.append(sorted((info.prompt_id, info.sample) for info in chunk.infos))
        self.evaluated_by.append(self.version)

    def update(
        self, hands: Sequence[Sequence[Sequence[ShapedHandle]]], *, kl_coef: float, seed: int, step: int
    ) -> Metrics:
        self.asked.append("update")
        self.updates.append([[list(mini_batch) for mini_batch in hand] for hand in hands])
        self.kl_coefs.append(kl_coef)
        self.seeds.append(seed)
        self.steps.append(step)
        return {
            "objective/kl": self.kl,
            "timing/early_evaluation_s": 0.0,
            "throughput/learner_flops": 6.0,
            "throughput/learner_flops_limit": 3.0,
        }

    def kl_to_reference(self, hands: Sequence[Sequence[ScoredHandle]], *, temperature: float) -> float:
        self.asked.append(f"kl at {temperature}")
        self.judged.append(hands)
        return 0.25

    def export(self, folder: Path) -> None:
        self.asked.append("export")

    def push(self, version: int) -> Metrics:
        self.asked.append(f"push {version}")
        if version == self.fail_sync_at:
            raise RuntimeError("the sync failed")
        self.version = version
        return {"sync/version": float(version)}


def rollouts_of(chunk: Chunk) -> list[Rollout]:
    rollouts: list[Rollout] = chunk.payload[0]  # type: ignore[index]
    return rollouts
