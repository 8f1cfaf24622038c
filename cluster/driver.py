"""The loop of PPO: draw prompts, sample, score, learn, sync, evaluate.

Knows nothing of Ray: it is given four partners by protocol and holds only handles, ids and floats of the rollouts, so
it does not grow with the model or the batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from actors.rollout import Prompt, Rollout
from conf.schema import AlgorithmConfig, EvaluationConfig, GeneratorConfig
from learner.experience import deal
from learner.ppo import KLController

Metrics = dict[str, float]


@dataclass(frozen=True)
class RolloutInfo:
    """What the driver knows of one rollout."""

    prompt_id: int
    sample: int
    num_tokens: int  # prompt and response
    num_response_tokens: int
    truncated: bool

    @staticmethod
    def of(rollout: Rollout) -> RolloutInfo:
        return RolloutInfo(
            rollout.prompt.id,
            rollout.sample,
            rollout.num_tokens,
            len(rollout.response_ids),
            rollout.finish_reason == "length",
        )


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rollouts that stay together on their way: `payload` is where they are, opaque to the driver."""

    infos: tuple[RolloutInfo, ...]
    payload: object


@dataclass(frozen=True, eq=False)
class ScoredHandle:
    """One rollout of a chunk with its score."""

    info: RolloutInfo
    chunk: Chunk
    row: int
    score: float


@dataclass(frozen=True)
class Sampling:
    """How the prompts of one call are sampled."""

    num_samples: int
    temperature: float
    max_new_tokens: int
    seed: int


class Generators(Protocol):
    """The generation actors."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Chunk]:
        """Yield the rollouts of all prompts in chunks, each as soon as its last rollout has finished."""
        ...

    def read(self, handles: Sequence[ScoredHandle]) -> list[Rollout]:
        """Return the rollouts themselves, for showing a few of them."""
        ...


class Rewards(Protocol):
    """The reward actors."""

    def score(self, chunks: Iterable[Chunk]) -> list[ScoredHandle]:
        """Score chunks as they come and return every rollout with its score, in the order of (prompt, sample)."""
        ...

    def verify(self, handles: Sequence[ScoredHandle]) -> list[float]:
        """Return what the verifier, which is never trained on, gives each rollout."""
        ...


class Learners(Protocol):
    """The learner group."""

    @property
    def num_ranks(self) -> int: ...

    def update(self, hands: Sequence[Sequence[Sequence[ScoredHandle]]], *, kl_coef: float, seed: int) -> Metrics:
        """Train on hands[rank][mini_batch] and return the metrics of the whole train batch."""
        ...

    def kl_to_reference(self, hands: Sequence[Sequence[ScoredHandle]], *, temperature: float) -> float:
        """Return the mean KL from the reference of the rollouts in hands[rank], sampled at that temperature."""
        ...

    def export(self, folder: Path) -> None:
        """Write policy and critic in Hugging Face format."""
        ...


class WeightSync(Protocol):
    """Carries the learner's weights to every generator."""

    def push(self, version: int) -> Metrics:
        """Return when every generator holds the weights under `version`, verified."""
        ...


class Prompts(Protocol):
    """Where prompts come from."""

    def next_batch(self, count: int) -> list[Prompt]: ...


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Held-out figures, and the rollouts that they are of."""

    metrics: Metrics
    handles: tuple[ScoredHandle, ...]
    verdicts: tuple[float, ...] | None  # of the verifier, in the order of the handles


@dataclass(frozen=True, eq=False)
class Iteration:
    """What one iteration of PPO gave."""

    step: int
    metrics: Metrics
    handles: tuple[ScoredHandle, ...]


@dataclass
class Stopwatch:
    """Wall-clock seconds by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def derived_seed(*parts: int) -> int:
    """Return a seed of 63 bits that is a pure function of the parts."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class PPODriver:
    """Carries the state of a run: the step, the version of the weights and the KL coefficient."""

    def __init__(
        self,
        *,
        algorithm: AlgorithmConfig,
        generator: GeneratorConfig,
        evaluation: EvaluationConfig,
        prompts: Prompts,
        generators: Generators,
        rewards: Rewards,
        learners: Learners,
        sync: WeightSync,
        seed: int,
    ) -> None:
        self.algorithm, self.generator, self.evaluation = algorithm, generator, evaluation
        self.prompts, self.generators, self.rewards = prompts, generators, rewards
        self.learners, self.sync, self.seed = learners, sync, seed
        self.kl = KLController(algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon)
        self.step = 0

    def start(self) -> Metrics:
        """Give the generators the learner's weights before anything is sampled, and say how that went."""
        return self.sync.push(self.step)

    def iterate(self) -> Iteration:
        """Run one iteration of PPO."""
        watch = Stopwatch()
        with watch.time("step_s"):
            with watch.time("generate_s"):
                prompts = self.prompts.next_batch(self.algorithm.prompts_per_step)
                chunks = self.generators.sample(prompts, self._training_sampling())
                handles = self.rewards.score(timed(chunks, watch, "wait_for_generators_s"))
            with watch.time("learn_s"):
                hands = self._deal(handles, mini_batch_size=self.algorithm.mini_batch_size)
                learned = self.learners.update(hands, kl_coef=self.kl.coef, seed=derived_seed(self.seed, self.step))
            with watch.time("sync_s"):
                synced = self.sync.push(self.step + 1)
        self.kl = self.kl.updated(learned["objective/kl"], num_rollouts=len(handles))
        self.step += 1
        metrics = describe(handles, prefix="rollout") | learned | synced | timings(watch, handles)
        return Iteration(self.step, metrics, tuple(handles))

    def evaluate(self, prompts: Sequence[Prompt]) -> EvaluationResult:
        """Sample each held-out prompt once and judge the responses by reward, verifier and KL from the reference."""
        watch = Stopwatch()
        with watch.time("evaluate_s"):
            sampling = Sampling(
                num_samples=1,
                temperature=self.evaluation.temperature,
                max_new_tokens=self.generator.max_new_tokens,
                seed=derived_seed(self.seed, 2**31),
            )
            handles = self.rewards.score(self.generators.sample(prompts, sampling))
            metrics = describe(handles, prefix="eval")
            verdicts: tuple[float, ...] | None = None
            if self.evaluation.verifier is not None:
                verdicts = tuple(self.rewards.verify(handles))
                right = [verdict >= self.evaluation.threshold for verdict in verdicts]
                metrics["eval/accuracy"] = sum(right) / len(right)
            hands = self._deal(handles, mini_batch_size=len(handles))
            metrics["eval/kl"] = self.learners.kl_to_reference(
                [hand[0] for hand in hands], temperature=self.evaluation.temperature
            )
        metrics["timing/evaluate_s"] = watch.seconds["evaluate_s"]
        return EvaluationResult(metrics, tuple(handles), verdicts)

    def _training_sampling(self) -> Sampling:
        return Sampling(
            num_samples=self.algorithm.samples_per_prompt,
            temperature=self.generator.temperature,
            max_new_tokens=self.generator.max_new_tokens,
            seed=self.seed,
        )

    def _deal(self, handles: Sequence[ScoredHandle], *, mini_batch_size: int) -> list[list[list[ScoredHandle]]]:
        """Return the rollouts as [rank][mini_batch][...], balanced by tokens."""
        dealt = deal(
            [handle.info.num_tokens for handle in handles],
            mini_batch_size=mini_batch_size,
            num_ranks=self.learners.num_ranks,
            seed=derived_seed(self.seed, self.step),
        )
        return [[[handles[i] for i in members] for members in hand] for hand in dealt]


def timed(chunks: Iterator[Chunk], watch: Stopwatch, name: str) -> Iterator[Chunk]:
    """Yield the chunks, adding to the watch how long each was waited for."""
    while True:
        with watch.time(name):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


def describe(handles: Sequence[ScoredHandle], *, prefix: str) -> Metrics:
    """Return the figures of scored rollouts; scores are `reward/score_*` in training, `eval/score_*` held out."""
    scores = np.array([handle.score for handle in handles])
    lengths = np.array([handle.info.num_response_tokens for handle in handles])
    score = "reward/score" if prefix == "rollout" else f"{prefix}/score"
    return {
        f"{score}_mean": float(scores.mean()),
        f"{score}_std": float(scores.std()),
        f"{prefix}/response_length_mean": float(lengths.mean()),
        f"{prefix}/response_length_max": float(lengths.max()),
        f"{prefix}/truncated_fraction": float(np.mean([handle.info.truncated for handle in handles])),
        f"{prefix}/num_rollouts": float(len(handles)),
        f"{prefix}/num_tokens": float(sum(handle.info.num_tokens for handle in handles)),
    }


def timings(watch: Stopwatch, handles: Sequence[ScoredHandle]) -> Metrics:
    """Return the seconds of each phase and the rates of the whole iteration."""
    seconds = watch.seconds
    tokens = sum(handle.info.num_response_tokens for handle in handles)
    return {f"timing/{name}": value for name, value in seconds.items()} | {
        "throughput/rollouts_per_s": len(handles) / seconds["step_s"],
        "throughput/response_tokens_per_s": tokens / seconds["step_s"],
        "throughput/generated_tokens_per_s": tokens / seconds["generate_s"],
    }
