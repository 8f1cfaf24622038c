"""The loop of PPO: sample and score, learn, sync.

Knows nothing of Ray: it is given its partners by protocol and holds only handles, ids and floats of the rollouts, so it
does not grow with the model or the batch. A variant of the algorithm is another partner.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from actors.repetition import repeated_fraction
from actors.rollout import Prompt, Rollout
from actors.spans import Span, now
from conf.schema import AlgorithmConfig
from learner.batching import deal
from learner.kl_control import KLController

if TYPE_CHECKING:
    from actors.reward import Judged

Metrics = dict[str, float]
Item = TypeVar("Item")


@dataclass(frozen=True)
class RolloutInfo:
    """What the driver knows of one rollout."""

    prompt_id: int
    sample: int
    num_tokens: int  # prompt and response
    num_response_tokens: int
    truncated: bool
    repetition: float  # share of the response's 4-grams that occurred before in it
    versions: tuple[tuple[int, int], ...]  # of the policy that sampled it, oldest first, each with its number of tokens

    @staticmethod
    def of(rollout: Rollout) -> RolloutInfo:
        versions, counts = np.unique(rollout.policy_versions, return_counts=True)
        return RolloutInfo(
            rollout.prompt.id,
            rollout.sample,
            rollout.num_tokens,
            len(rollout.response_ids),
            rollout.finish_reason == "length",
            repeated_fraction(rollout.response_ids),
            tuple(zip(versions.tolist(), counts.tolist(), strict=True)),
        )


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rollouts that stay together on their way: `payload` is where they are, opaque to the driver."""

    infos: tuple[RolloutInfo, ...]
    payload: object


@dataclass(frozen=True, eq=False)
class ScoredHandle:
    """One rollout of a chunk with its score: the weighted sum of `parts`, which are by the name of their source."""

    info: RolloutInfo
    chunk: Chunk
    row: int
    score: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Scoring:
    """Every rollout that could be scored, in the order of (prompt, sample), and what could not."""

    handles: tuple[ScoredHandle, ...]
    num_dropped: int = 0
    num_retries: int = 0

    @staticmethod
    def of(chunks: Sequence[Chunk], judged: Sequence[Sequence[Judged]], *, num_retries: int) -> Scoring:
        """Return the scores of chunks, which come in any order, from what is said of each row of each of them."""
        rows = [
            (info, chunk, row, of_row)
            for chunk, of_chunk in zip(chunks, judged, strict=True)
            for row, (info, of_row) in enumerate(zip(chunk.infos, of_chunk, strict=True))
        ]
        handles = [
            ScoredHandle(info, chunk, row, of_row.score, of_row.parts)
            for info, chunk, row, of_row in rows
            if of_row.score is not None
        ]
        handles.sort(key=lambda handle: (handle.info.prompt_id, handle.info.sample))
        return Scoring(tuple(handles), num_dropped=len(rows) - len(handles), num_retries=num_retries)


@dataclass(frozen=True, eq=False)
class ShapedHandle:
    """A rollout with the score that is trained on, and what its prompt's greedy response scored, or 0.0."""

    handle: ScoredHandle
    score: float
    baseline: float


@dataclass(frozen=True)
class Sampling:
    """How the prompts of one call are sampled."""

    num_samples: int
    temperature: float
    max_new_tokens: int
    seed: int


class Order(Protocol):
    """What the generators were asked for."""

    @property
    def done(self) -> bool:
        """Whether every chunk has been delivered."""
        ...

    def cancel(self) -> None:
        """Want nothing more of it."""
        ...


class Generators(Protocol):
    """The generation actors."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Chunk]:
        """Yield the rollouts of all prompts in chunks, each as soon as its last rollout has finished."""
        ...

    def order(
        self, prompts: Sequence[Prompt], sampling: Sampling, deliver: Callable[[Chunk], None], *, urgent: bool
    ) -> Order:
        """Have the prompts sampled while something else is done; each chunk is delivered as `sample` yields it."""
        ...

    def attend(self) -> None:
        """Wait for chunks of orders, a second at most."""
        ...

    def read(self, handles: Sequence[ScoredHandle]) -> list[Rollout]:
        """Return the rollouts themselves, for showing a few of them."""
        ...

    def hold(self, rollouts: Sequence[Rollout]) -> Chunk:
        """Return rollouts that come from elsewhere, such as a checkpoint, as a chunk."""
        ...


class Scores(Protocol):
    """Chunks on their way to their scores."""

    def add(self, chunk: Chunk) -> None:
        """Have a chunk scored; returns at once."""
        ...

    def result(self) -> Scoring:
        """Return the scores of all chunks, when all are there."""
        ...


class Rewards(Protocol):
    """The reward actors."""

    def open(self) -> Scores:
        """Return a round of scoring, to which chunks are added as they come."""
        ...

    def score(self, chunks: Iterable[Chunk]) -> Scoring:
        """Score chunks as they come."""
        ...

    def verify(self, handles: Sequence[ScoredHandle]) -> list[float | None]:
        """Return what the verifier, which is never trained on, gives each rollout; None where it has no verdict."""
        ...


class Learners(Protocol):
    """The learner group."""

    @property
    def num_hands(self) -> int:
        """How many parts a batch is dealt in: one to a rank, or to the ranks that share the tokens of each rollout."""
        ...

    def costs(self, infos: Sequence[RolloutInfo]) -> list[float]:
        """Return what evaluating each rollout and training on it takes of a rank, in any unit."""
        ...

    def evaluate(self, chunk: Chunk) -> None:
        """Have a chunk evaluated before the update that trains on it; returns at once."""
        ...

    def update(
        self, hands: Sequence[Sequence[Sequence[ShapedHandle]]], *, kl_coef: float, seed: int, step: int
    ) -> Metrics:
        """Train on hands[hand][mini_batch] and return the metrics of the whole train batch."""
        ...

    def kl_to_reference(self, hands: Sequence[Sequence[ScoredHandle]], *, temperature: float) -> float:
        """Return the mean KL from the reference of the rollouts in all hands, sampled at that temperature."""
        ...

    def export(self, folder: Path) -> None:
        """Write policy and critic in Hugging Face format."""
        ...


class WeightSync(Protocol):
    """Carries the learner's weights to every generator."""

    def push(self, version: int) -> Metrics:
        """Return when every generator holds the weights under `version`, verified."""
        ...


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """The rollouts of one iteration, scored, and the greedy responses to their prompts where they were asked for."""

    handles: tuple[ScoredHandle, ...]
    prompts: tuple[Prompt, ...]
    metrics: Metrics
    greedy: Mapping[int, ScoredHandle] = field(default_factory=dict)  # by prompt id


class Rollouts(Protocol):
    """Where the rollouts of an iteration come from."""

    def next_batch(self, step: int, watch: Stopwatch) -> TrainBatch:
        """Return the rollouts of the iteration after `step` others; asked for once for each, in order."""
        ...

    def state(self) -> dict[str, int]:
        """Return where in the prompts the next batch begins, as JSON can hold it."""
        ...

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on from there, whatever has been asked for since."""
        ...


class Shaping(Protocol):
    """From scores to what is trained on."""

    def __call__(self, batch: TrainBatch) -> tuple[list[ShapedHandle], Metrics]: ...


@dataclass(frozen=True, eq=False)
class Iteration:
    """What one iteration of PPO gave."""

    step: int
    metrics: Metrics
    handles: tuple[ScoredHandle, ...]
    spans: tuple[Span, ...]  # its phases, the whole of it last


@dataclass
class Stopwatch:
    """Wall-clock seconds by name, and the spans of time that they come of, in the order of their ends."""

    seconds: dict[str, float] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start, begun = time.perf_counter(), now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.spans.append(Span(name.removesuffix("_s"), begun, now()))


def derived_seed(*parts: int) -> int:
    """Return a seed of 63 bits that is a pure function of the parts."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class PPODriver:
    """Carries the state of a run: the step, the version of the weights and the KL coefficient."""

    def __init__(
        self,
        *,
        algorithm: AlgorithmConfig,
        rollouts: Rollouts,
        shaping: Shaping,
        learners: Learners,
        sync: WeightSync,
        seed: int,
    ) -> None:
        self.algorithm, self.rollouts, self.shaping = algorithm, rollouts, shaping
        self.learners, self.sync, self.seed = learners, sync, seed
        self.kl = KLController(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon)
        self.step = 0

    def start(self) -> Metrics:
        """Give the generators the learner's weights before anything is sampled, and say how that went."""
        return self.sync.push(self.step)

    def state(self) -> dict[str, float]:
        """Return what a resumed run needs beside what its partners hold."""
        return {"step": self.step, "kl_coef": self.kl.coef}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from where `state` was taken; `start` brings the generators there."""
        self.step, self.kl = int(state["step"]), replace(self.kl, coef=state["kl_coef"])

    def iterate(self) -> Iteration:
        """Run one iteration of PPO."""
        watch = Stopwatch()
        with watch.time("step_s"):
            with watch.time("generate_s"):
                batch = self.rollouts.next_batch(self.step, watch)
                stale = staleness(batch.handles, self.step, limit=self.algorithm.max_staleness)
                shaped, shaping = self.shaping(batch)
            with watch.time("learn_s"):
                seed = derived_seed(self.seed, self.step)
                hands = dealt(
                    shaped,
                    self.learners.costs([item.handle.info for item in shaped]),
                    mini_batch_size=self.algorithm.mini_batch_size,
                    num_hands=self.learners.num_hands,
                    seed=seed,
                )
                learned = self.learners.update(hands, kl_coef=self.kl.coef, seed=seed, step=self.step)
            with watch.time("sync_s"):
                synced = self.sync.push(self.step + 1)
        # While the critic warms up, the policy does not move, whatever the coefficient.
        if self.step >= self.algorithm.critic_warmup_steps:
            self.kl = self.kl.updated(learned["objective/kl"], num_rollouts=len(shaped))
        self.step += 1
        metrics = describe(batch.handles, prefix="rollout") | stale | batch.metrics | shaping | learned | synced
        metrics |= utilisation(learned, watch.seconds["learn_s"])
        return Iteration(self.step, metrics | timings(watch, batch.handles), batch.handles, tuple(watch.spans))


def staleness(handles: Sequence[ScoredHandle], step: int, *, limit: int) -> Metrics:
    """Return how many versions old the tokens of a train batch are: mean, largest, and with a limit the share of each.

    Raises:
        RuntimeError: a token is older than the limit, or from a version that is yet to come.
    """
    ages: Counter[int] = Counter()
    for handle in handles:
        for version, count in handle.info.versions:
            ages[step - version] += count
    if min(ages) < 0 or max(ages) > limit:
        raise RuntimeError(
            f"the rollouts of step {step} have tokens that are {min(ages)} to {max(ages)} versions old; 0 to {limit} "
            "is allowed (algorithm.max_staleness): the weight sync or the order of rollouts is broken"
        )
    total = ages.total()
    shares = {f"rollout/staleness_{age}": ages[age] / total for age in range(limit + 1)} if limit else {}
    mean = sum(age * count for age, count in ages.items()) / total
    return {"rollout/staleness_mean": mean, "rollout/staleness_max": float(max(ages)), **shares}


def dealt(
    items: Sequence[Item], costs: Sequence[float], *, mini_batch_size: int, num_hands: int, seed: int
) -> list[list[list[Item]]]:
    """Return the items as [hand][mini_batch][...], balanced by their costs."""
    hands = deal(costs, mini_batch_size=mini_batch_size, num_hands=num_hands, seed=seed)
    return [[[items[i] for i in members] for members in hand] for hand in hands]


def describe(handles: Sequence[ScoredHandle], *, prefix: str) -> Metrics:
    """Return the figures of scored rollouts; scores are `reward/...` in training, `eval/...` held out."""
    scores = np.array([handle.score for handle in handles])
    lengths = np.array([handle.info.num_response_tokens for handle in handles])
    of_scores = "reward" if prefix == "rollout" else prefix
    metrics = {
        f"{of_scores}/score_mean": float(scores.mean()),
        f"{of_scores}/score_std": float(scores.std()),
        f"{prefix}/response_length_mean": float(lengths.mean()),
        f"{prefix}/response_length_max": float(lengths.max()),
        f"{prefix}/truncated_fraction": float(np.mean([handle.info.truncated for handle in handles])),
        f"{prefix}/num_rollouts": float(len(handles)),
        f"{prefix}/num_tokens": float(sum(handle.info.num_tokens for handle in handles)),
    }
    for source in handles[0].parts:
        of_source = np.array([handle.parts[source] for handle in handles])
        metrics[f"{of_scores}/{source}_mean"] = float(of_source.mean())
        metrics[f"{of_scores}/{source}_std"] = float(of_source.std())
    return metrics


def utilisation(learned: Metrics, seconds: float) -> Metrics:
    """Return the share of what the ranks' devices could compute in the time of an update that the update needs.

    `seconds` is without what the ranks have spent on evaluating rollouts before it.
    """
    needed, limit = learned["throughput/learner_flops"], learned["throughput/learner_flops_limit"]
    seconds += learned["timing/early_evaluation_s"]
    return {"throughput/learner_mfu": needed / (seconds * limit)}


def timings(watch: Stopwatch, handles: Sequence[ScoredHandle]) -> Metrics:
    """Return the seconds of each phase and the rates of the whole iteration."""
    seconds = watch.seconds
    tokens = sum(handle.info.num_response_tokens for handle in handles)
    return {f"timing/{name}": value for name, value in seconds.items()} | {
        "throughput/rollouts_per_s": len(handles) / seconds["step_s"],
        "throughput/response_tokens_per_s": tokens / seconds["step_s"],
        "throughput/generated_tokens_per_s": tokens / seconds["generate_s"],
    }
