"""How good the policy is on held-out prompts, and whether the reward still means what it meant. No Ray in here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from actors.rollout import Prompt, Rollout
from cluster.driver import (
    Chunk,
    Generators,
    Learners,
    Metrics,
    Rewards,
    Sampling,
    ScoredHandle,
    Stopwatch,
    dealt,
    derived_seed,
    describe,
)
from cluster.judging import mean_pass_at_k, win_rate
from cluster.monitors import monitored, score_drift
from cluster.rollouts import some
from conf.schema import Config

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Held-out figures, and the rollouts that they are of."""

    metrics: Metrics
    handles: tuple[ScoredHandle, ...]
    verdicts: tuple[float | None, ...] | None  # of the verifier, in the order of the handles


class Evaluator:
    """Samples the held-out prompts and judges the responses, the same way every time."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        generators: Generators,
        rewards: Rewards,
        *,
        learners: Learners | None,
    ) -> None:
        """Without `learners` there is no reference, hence no KL from it."""
        self.config, self.prompts = config.evaluation, prompts
        self.generators, self.rewards, self.learners = generators, rewards, learners
        self.seed = config.seed
        self.sampling = Sampling(
            num_samples=self.config.samples_per_prompt,
            temperature=self.config.temperature,
            max_new_tokens=config.generator.max_new_tokens,
            seed=derived_seed(config.seed, 2**31),
        )
        self.reference_scores: dict[int, list[float]] = {}
        self.fixed: tuple[ScoredHandle, ...] = ()

    def evaluate(self) -> EvaluationResult:
        """Sample every prompt and judge the responses by reward, verifier and KL from the reference."""
        watch = Stopwatch()
        with watch.time("evaluate_s"):
            scoring = self.rewards.score(self.generators.sample(self.prompts, self.sampling))
            handles = some(scoring.handles, of=f"{len(self.prompts)} held-out prompts")
            verdicts = None if self.config.verifier is None else tuple(self.rewards.verify(handles))
            metrics = describe(handles, prefix="eval") | signs(handles, prefix="eval")
            metrics["eval/num_dropped"] = float(scoring.num_dropped)
            if verdicts is not None:
                metrics |= self._correctness(handles, verdicts)
            metrics |= self._kl(handles) | self._win_rate(scores_of(handles)) | self._drift()
        metrics["timing/evaluate_s"] = watch.seconds["evaluate_s"]
        return EvaluationResult(metrics, handles, verdicts)

    def compare_with(self, reference: EvaluationResult) -> Metrics:
        """Take the responses of `reference`: what win rates are against, and whose scores should never change.

        Returns the win rate of the reference against itself, one half, if win rates are asked for.
        """
        self.reference_scores = scores_of(reference.handles)
        first = reference.handles[0].chunk  # alone: whoever holds a handle keeps its chunk from being let go
        scored = [handle for handle in reference.handles if handle.chunk is first]
        # Copied, since the node that made it may be lost; whole, since padding goes by all that are scored together.
        chunk = self.generators.hold(self.generators.read(whole(first)))
        self.fixed = tuple(replace(handle, chunk=chunk) for handle in scored)
        return self._win_rate(self.reference_scores)

    def state(self) -> dict[str, Any]:
        """Return, as JSON can hold it, what `compare_with` has taken."""
        rollouts = self.generators.read(whole(self.fixed[0].chunk)) if self.fixed else []
        return {
            "reference_scores": [[prompt, scores] for prompt, scores in self.reference_scores.items()],
            "responses": [response_to_plain(rollout) for rollout in rollouts],
            "scores": [[handle.row, handle.score, dict(handle.parts)] for handle in self.fixed],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned, with the same held-out prompts."""
        self.reference_scores = dict(state["reference_scores"])
        self.fixed = ()
        if state["responses"]:
            prompts = {prompt.id: prompt for prompt in self.prompts}
            chunk = self.generators.hold([response_from_plain(plain, prompts) for plain in state["responses"]])
            self.fixed = tuple(
                ScoredHandle(chunk.infos[row], chunk, row, score, parts) for row, score, parts in state["scores"]
            )

    def _correctness(self, handles: Sequence[ScoredHandle], verdicts: Sequence[float | None]) -> Metrics:
        """Return the share of the judged responses that is right, pass@k, and how many have no verdict.

        A prompt that lost a sample may have too few for pass@k and is left out there.
        """
        judged = [(handle, verdict) for handle, verdict in zip(handles, verdicts, strict=True) if verdict is not None]
        right = [verdict >= self.config.threshold for _, verdict in judged]
        of_prompts = by_prompt([handle for handle, _ in judged], right)
        metrics = {
            "eval/accuracy": sum(right) / len(right) if right else math.nan,
            "eval/num_unjudged": float(len(handles) - len(judged)),
        }
        for k in self.config.pass_at:
            enough = {prompt: samples for prompt, samples in of_prompts.items() if len(samples) >= k}
            metrics[f"eval/pass_at_{k}"] = mean_pass_at_k(enough, k) if enough else math.nan
        return metrics

    def _win_rate(self, scores: Mapping[int, Sequence[float]]) -> Metrics:
        if not self.config.win_rate or not scores.keys() & self.reference_scores.keys():
            return {}
        return {"eval/win_rate": win_rate(scores, self.reference_scores)}

    def _kl(self, handles: Sequence[ScoredHandle]) -> Metrics:
        if self.learners is None:
            return {}
        hands = dealt(
            handles,
            [handle.info.num_tokens for handle in handles],
            mini_batch_size=len(handles),
            num_hands=self.learners.num_hands,
            seed=self.seed,
        )
        kl = self.learners.kl_to_reference([hand[0] for hand in hands], temperature=self.sampling.temperature)
        return {"eval/kl": kl}

    def _drift(self) -> Metrics:
        if not self.fixed:
            return {}
        again = {
            (handle.info.prompt_id, handle.info.sample): handle.score
            for handle in self.rewards.score([self.fixed[0].chunk]).handles
        }
        before = [handle for handle in self.fixed if (handle.info.prompt_id, handle.info.sample) in again]
        if not before:
            return {}
        now = [again[handle.info.prompt_id, handle.info.sample] for handle in before]
        return {"monitor/score_drift": score_drift([handle.score for handle in before], now)}


def whole(chunk: Chunk) -> list[ScoredHandle]:
    """Return a handle for every row of a chunk, to read it by; the scores are none."""
    return [ScoredHandle(info, chunk, row, math.nan) for row, info in enumerate(chunk.infos)]


def response_to_plain(rollout: Rollout) -> dict[str, Any]:
    """Return a response as JSON can hold it, its prompt by number; float32 comes back bit for bit."""
    return {
        "prompt": rollout.prompt.id,
        "sample": rollout.sample,
        "response_ids": rollout.response_ids.tolist(),
        "rollout_logprobs": rollout.rollout_logprobs.tolist(),
        "response_mask": rollout.response_mask.tolist(),
        "policy_versions": rollout.policy_versions.tolist(),
        "finish_reason": rollout.finish_reason,
        "text": rollout.text,
    }


def response_from_plain(plain: Mapping[str, Any], prompts: Mapping[int, Prompt]) -> Rollout:
    """Return what `response_to_plain` was called on."""
    return Rollout(
        prompt=prompts[plain["prompt"]],
        sample=plain["sample"],
        response_ids=np.asarray(plain["response_ids"], dtype=np.int32),
        rollout_logprobs=np.asarray(plain["rollout_logprobs"], dtype=np.float32),
        response_mask=np.asarray(plain["response_mask"], dtype=np.bool_),
        policy_versions=np.asarray(plain["policy_versions"], dtype=np.int32),
        finish_reason=plain["finish_reason"],
        text=plain["text"],
    )


def scores_of(handles: Sequence[ScoredHandle]) -> dict[int, list[float]]:
    """Return the scores of each prompt's samples, by prompt id."""
    return by_prompt(handles, [handle.score for handle in handles])


def signs(handles: Sequence[ScoredHandle], *, prefix: str) -> Metrics:
    """Return the figures that a hacked reward shows in: `monitor/...` of training, `eval/...` of held-out responses."""
    figures = monitored(
        [handle.score for handle in handles],
        [handle.info.num_response_tokens for handle in handles],
        repetition=[handle.info.repetition for handle in handles],
        ended=[not handle.info.truncated for handle in handles],
    )
    return {name.replace("monitor/", f"{prefix}/"): value for name, value in figures.items()}


def by_prompt(handles: Sequence[ScoredHandle], values: Sequence[Value]) -> dict[int, list[Value]]:
    """Return the values of each prompt's samples, by prompt id."""
    grouped: dict[int, list[Value]] = {}
    for handle, value in zip(handles, values, strict=True):
        grouped.setdefault(handle.info.prompt_id, []).append(value)
    return grouped
