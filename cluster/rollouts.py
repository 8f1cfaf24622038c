"""Where the rollouts of an iteration come from: sampled, sampled ahead, until groups differ, with a greedy baseline.

Each is an object with the driver's `Rollouts` interface; the others ask the first. No Ray in here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from actors.rollout import Prompt
from cluster.driver import (
    Chunk,
    Generators,
    Metrics,
    Order,
    Rewards,
    Rollouts,
    Sampling,
    ScoredHandle,
    Scores,
    Scoring,
    Stopwatch,
    TrainBatch,
)
from cluster.faults import RolloutsLostError
from cluster.recoveries import Recoveries


class NothingToLearnError(RuntimeError):
    """An iteration or an evaluation has no rollout that can be used; says why and what to change."""


class Prompts(Protocol):
    """Where prompts come from, and can be drawn from again."""

    def next_batch(self, count: int) -> list[Prompt]: ...

    def state(self) -> dict[str, int]: ...

    def load_state(self, state: Mapping[str, int]) -> None: ...


class SampledRollouts:
    """As many prompts as an iteration takes, sampled and scored once."""

    def __init__(
        self,
        prompts: Prompts,
        generators: Generators,
        rewards: Rewards,
        *,
        evaluate: Callable[[Chunk], None],
        sampling: Sampling,
        prompts_per_step: int,
    ) -> None:
        """`evaluate` is told of each chunk that may be trained on, as it comes."""
        self.prompts, self.generators, self.rewards, self.evaluate = prompts, generators, rewards, evaluate
        self.sampling, self.prompts_per_step = sampling, prompts_per_step

    def next_batch(self, step: int, watch: Stopwatch) -> TrainBatch:
        """Return the rollouts that have a score, in the order of (prompt, sample)."""
        batch = self.draw(self.prompts_per_step, watch)
        return replace(batch, handles=some(batch.handles, of=f"{self.prompts_per_step} prompts"))

    def state(self) -> dict[str, int]:
        return self.prompts.state()

    def load_state(self, state: Mapping[str, int]) -> None:
        self.prompts.load_state(state)

    def draw(self, num_prompts: int, watch: Stopwatch) -> TrainBatch:
        """Return the rollouts of the next `num_prompts` prompts; there may be none if all were dropped."""
        return self._scored(self.prompts.next_batch(num_prompts), self.sampling, watch, self.evaluate)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, watch: Stopwatch) -> TrainBatch:
        """Return rollouts of these prompts that are not trained on; there may be none if all were dropped."""
        return self._scored(prompts, sampling, watch, unheard)

    def _scored(
        self, prompts: Sequence[Prompt], sampling: Sampling, watch: Stopwatch, evaluate: Callable[[Chunk], None]
    ) -> TrainBatch:
        scores = self.rewards.open()
        for chunk in timed(self.generators.sample(prompts, sampling), watch, "wait_for_generators_s"):
            scores.add(chunk)
            evaluate(chunk)
        scoring = scores.result()
        return TrainBatch(scoring.handles, tuple(prompts), counted(scoring))


@dataclass(frozen=True, eq=False)
class Flight:
    """A batch that is being sampled and scored."""

    prompts: tuple[Prompt, ...]
    before: dict[str, int]  # where in the prompts it begins
    order: Order
    scores: Scores
    chunks: deque[Chunk]  # that have come and are not yet evaluated


class AheadRollouts:
    """Batches that are sampled ahead of their training, so that generators never wait for the learner.

    While the learner trains on batch s, batches s + 1 to s + `max_staleness` are being sampled. Batch b begins when the
    weights are those of version b - max_staleness or newer, and is trained on as version b is, so no token of it is
    older than `max_staleness` versions; the driver checks each. The learner takes batches in their order, and evaluates
    what there is of the next one as soon as it has trained on the one before.
    """

    def __init__(self, sampled: SampledRollouts, *, max_staleness: int, num_steps: int) -> None:
        """`num_steps` is how many batches there are in all."""
        self.sampled, self.max_staleness, self.num_steps = sampled, max_staleness, num_steps
        self._flights: deque[Flight] = deque()  # the next batch first

    def next_batch(self, step: int, watch: Stopwatch) -> TrainBatch:
        """Return the rollouts of batch `step`, when all of them have a score; others are on their way meanwhile."""
        while len(self._flights) < min(1 + self.max_staleness, self.num_steps - step):
            self._flights.append(self._begun())
        flight = self._flights[0]
        with watch.time("wait_for_generators_s"):
            while flight.chunks or not flight.order.done:
                if flight.chunks:
                    self.sampled.evaluate(flight.chunks.popleft())
                else:
                    self.sampled.generators.attend()
        scoring = flight.scores.result()
        self._flights.popleft()
        handles = some(scoring.handles, of=f"{self.sampled.prompts_per_step} prompts")
        return TrainBatch(handles, flight.prompts, counted(scoring))

    def state(self) -> dict[str, int]:
        return self._flights[0].before if self._flights else self.sampled.state()

    def load_state(self, state: Mapping[str, int]) -> None:
        while self._flights:
            self._flights.popleft().order.cancel()
        self.sampled.load_state(state)

    def _begun(self) -> Flight:
        sampled, before = self.sampled, self.sampled.state()
        prompts = tuple(sampled.prompts.next_batch(sampled.prompts_per_step))
        scores, chunks = sampled.rewards.open(), deque[Chunk]()

        def deliver(chunk: Chunk) -> None:
            scores.add(chunk)
            chunks.append(chunk)

        order = sampled.generators.order(prompts, sampled.sampling, deliver, urgent=False)
        return Flight(prompts, before, order, scores, chunks)


class SampledAgain:
    """Rollouts that are drawn anew, from the same prompts, if the node that held them is lost on the way."""

    def __init__(self, rollouts: Rollouts, recoveries: Recoveries) -> None:
        self.rollouts, self.recoveries = rollouts, recoveries

    def next_batch(self, step: int, watch: Stopwatch) -> TrainBatch:
        """Return what the rollouts give. Raises ProcessError if they are lost too often."""
        start = self.state()
        while True:
            try:
                return self.rollouts.next_batch(step, watch)
            except RolloutsLostError as error:
                self.recoveries.count("rollouts", str(error))
                self.load_state(start)

    def state(self) -> dict[str, int]:
        return self.rollouts.state()

    def load_state(self, state: Mapping[str, int]) -> None:
        self.rollouts.load_state(state)


class VariedGroups:
    """Prompts whose samples do not all have the same score; others are replaced until the batch is full.

    The dynamic sampling of DAPO (Yu et al. 2025, arXiv 2503.14476, section 3.2): such a group has no advantage, and the
    batch would shrink as the policy learns. Each round asks for as many prompts as the share that was kept so far lets
    expect to be enough; what is too many is left out, the last drawn first. Scores are compared before they are shaped.
    """

    def __init__(self, sampled: SampledRollouts, *, max_rounds: int) -> None:
        self.sampled, self.max_rounds = sampled, max_rounds

    def next_batch(self, step: int, watch: Stopwatch) -> TrainBatch:
        """Return a full batch, or what there is after `max_rounds`, if there is something."""
        wanted = self.sampled.prompts_per_step
        kept: list[Group] = []
        drawn, rounds, counts = 0, 0, Metrics()
        while len(kept) < wanted and rounds < self.max_rounds:
            expected = math.ceil((wanted - len(kept)) * drawn / len(kept)) if kept else wanted
            batch = self.sampled.draw(min(expected, wanted), watch)
            kept += [group for group in groups_of(batch) if group.is_varied]
            drawn, rounds = drawn + len(batch.prompts), rounds + 1
            counts = {name: counts.get(name, 0.0) + value for name, value in batch.metrics.items()}
        if not kept:
            raise NothingToLearnError(
                f"none of {drawn} prompts, drawn in {rounds} rounds, has samples with different scores "
                f"({counts['rollout/num_dropped']:.0f} rollouts have none and were dropped): there is nothing to "
                "compare; raise algorithm.samples_per_prompt or algorithm.filter_max_rounds, change the prompts or the "
                "reward, or set algorithm.filter_groups=false"
            )
        counts |= {"rollout/filter_rounds": float(rounds), "rollout/num_filtered_prompts": float(drawn - len(kept))}
        chosen = kept[:wanted]
        return TrainBatch(
            tuple(handle for group in chosen for handle in group.handles),
            tuple(group.prompt for group in chosen),
            counts,
        )

    def state(self) -> dict[str, int]:
        return self.sampled.state()

    def load_state(self, state: Mapping[str, int]) -> None:
        self.sampled.load_state(state)


class WithGreedyBaselines:
    """Rollouts with the greedy response to each prompt, for ReMax (Li et al. 2024, arXiv 2310.10505)."""

    def __init__(self, sampled: SampledRollouts) -> None:
        self.sampled = sampled

    def next_batch(self, step: int, watch: Stopwatch) -> TrainBatch:
        """Return the rollouts of prompts whose greedy response has a score; the others count as dropped."""
        batch = self.sampled.draw(self.sampled.prompts_per_step, watch)
        greedy = self.sampled.sample(
            batch.prompts, replace(self.sampled.sampling, num_samples=1, temperature=0.0), watch
        )
        by_prompt = {handle.info.prompt_id: handle for handle in greedy.handles}
        handles = tuple(handle for handle in batch.handles if handle.info.prompt_id in by_prompt)
        counts = {name: batch.metrics[name] + greedy.metrics[name] for name in batch.metrics}
        counts["rollout/num_dropped"] += len(batch.handles) - len(handles)
        some(handles, of=f"{len(batch.prompts)} prompts with a greedy one each")
        return TrainBatch(handles, batch.prompts, counts, by_prompt)

    def state(self) -> dict[str, int]:
        return self.sampled.state()

    def load_state(self, state: Mapping[str, int]) -> None:
        self.sampled.load_state(state)


@dataclass(frozen=True, eq=False)
class Group:
    """The scored samples of one prompt."""

    prompt: Prompt
    handles: tuple[ScoredHandle, ...]

    @property
    def is_varied(self) -> bool:
        return len({handle.score for handle in self.handles}) > 1


def counted(scoring: Scoring) -> Metrics:
    return {
        "rollout/num_dropped": float(scoring.num_dropped),
        "reward/num_retries": float(scoring.num_retries),
    }


def groups_of(batch: TrainBatch) -> list[Group]:
    """Return the samples of each prompt of a batch, in the order of the prompts."""
    members: dict[int, list[ScoredHandle]] = {prompt.id: [] for prompt in batch.prompts}
    for handle in batch.handles:
        members[handle.info.prompt_id].append(handle)
    return [Group(prompt, tuple(members[prompt.id])) for prompt in batch.prompts]


def some(handles: tuple[ScoredHandle, ...], *, of: str) -> tuple[ScoredHandle, ...]:
    """Return the handles. Raises NothingToLearnError if there are none; `of` says what responses they are of."""
    if not handles:
        raise NothingToLearnError(
            f"no response to {of} is left, since the reward sources gave none a score (reward.on_failure=drop); see to "
            "the sources, or set reward.on_failure=stop to learn why they fail"
        )
    return handles


def unheard(chunk: Chunk) -> None:
    """Take no note of a chunk."""


def timed(chunks: Iterator[Chunk], watch: Stopwatch, name: str) -> Iterator[Chunk]:
    """Yield the chunks, adding to the watch how long each was waited for."""
    while True:
        with watch.time(name):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk
