"""Held-out figures with partners that only take notes and a reward that follows a script. About a second beside the
imports.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.driver import ScoredHandle
from cluster.evaluation import Evaluator, by_prompt, response_from_plain, response_to_plain, signs
from cluster.rollouts import NothingToLearnError
from conf.schema import Config, EvaluationConfig, GeneratorConfig
from tests.stand_ins import Script, StandIns, prompt, rollout, scored_handle


def make(
    script: Script, *, num_prompts: int = 4, with_learners: bool = True, **settings: Any
) -> tuple[Evaluator, StandIns]:
    """An evaluator, and the stand-in that is all its partners."""
    partners = StandIns(script, chunk_size=3)
    config = Config(
        generator=GeneratorConfig(temperature=0.7, max_new_tokens=5),
        evaluation=replace(EvaluationConfig(verifier="module:function", temperature=0.9), **settings),
        seed=3,
    )
    return Evaluator(
        config,
        [prompt(number) for number in range(num_prompts)],
        partners,
        partners,
        learners=partners if with_learners else None,
    ), partners


def own_number(number: int, sample: int, temperature: float) -> float:
    return float(number)


# Sampling -------------------------------------------------------------------------------------------------------------


def test_held_out_prompts_are_sampled_as_their_settings_say_and_always_alike() -> None:
    evaluator, partners = make(own_number, samples_per_prompt=2)
    first, second = evaluator.evaluate(), evaluator.evaluate()
    sampling = partners.samplings[0]
    assert (sampling.num_samples, sampling.temperature, sampling.max_new_tokens) == (2, 0.9, 5)
    assert sampling.seed != 3, "not the seed of training"
    assert partners.samplings == [sampling] * 2
    assert partners.sampled == [[0, 1, 2, 3]] * 2
    timing = "timing/evaluate_s"
    assert first.metrics | {timing: 0.0} == second.metrics | {timing: 0.0}
    assert [(h.info.prompt_id, h.info.sample) for h in first.handles] == [(p, s) for p in range(4) for s in range(2)]


# What is right --------------------------------------------------------------------------------------------------------


def test_accuracy_is_the_share_of_verdicts_at_the_threshold_or_above() -> None:
    """Prompts 0, 2 and 4 of six get 1.0 and the others 0.5."""
    evaluator, _ = make(own_number, num_prompts=6)
    result = evaluator.evaluate()
    assert result.metrics["eval/accuracy"] == 0.5
    assert result.metrics["eval/score_mean"] == result.metrics["eval/model_mean"] == 2.5
    assert result.verdicts == (1.0, 0.5, 1.0, 0.5, 1.0, 0.5)
    assert make(own_number, threshold=0.5)[0].evaluate().metrics["eval/accuracy"] == 1.0


def test_pass_at_k_counts_prompts_and_not_samples() -> None:
    """Even prompts are right in all 3 samples, odd ones in sample 1 alone: pass@1 is 1 or 1/3, pass@2 is 1 or 2/3."""
    evaluator, _ = make(own_number, samples_per_prompt=3, pass_at=(1, 2, 3))
    metrics = evaluator.evaluate().metrics
    assert metrics["eval/accuracy"] == pytest.approx((1 + 1 / 3) / 2)
    found = [metrics[f"eval/pass_at_{k}"] for k in (1, 2, 3)]
    assert found == pytest.approx([(1 + 1 / 3) / 2, (1 + 2 / 3) / 2, 1.0])


def test_a_response_without_a_verdict_is_neither_right_nor_wrong() -> None:
    """Of six prompts, 0, 2 and 4 are right; on 1 and 2 there is no verdict: 2 of 4 are right."""
    evaluator, partners = make(own_number, num_prompts=6)
    partners.unjudged = (1, 2)
    result = evaluator.evaluate()
    assert result.metrics["eval/accuracy"] == 2 / 4
    assert result.metrics["eval/num_unjudged"] == 2
    assert result.verdicts == (1.0, None, None, 0.5, 1.0, 0.5)
    partners.unjudged = tuple(range(6))
    assert math.isnan(evaluator.evaluate().metrics["eval/accuracy"])


def test_without_a_verifier_nothing_is_verified() -> None:
    evaluator, partners = make(own_number, verifier=None)
    result = evaluator.evaluate()
    assert result.verdicts is None
    assert "verify" not in partners.asked
    assert "eval/accuracy" not in result.metrics


# Dropped responses ----------------------------------------------------------------------------------------------------


def test_dropped_responses_are_counted_and_judged_by_nothing() -> None:
    """Of 4 prompts with 2 samples, prompt 0 loses one and prompt 1 both: no pass@2 for either (PPO details 13)."""
    gone = {(0, 0), (1, 0), (1, 1)}
    evaluator, partners = make(
        lambda number, sample, _: None if (number, sample) in gone else float(number),
        samples_per_prompt=2,
        pass_at=(1, 2),
    )
    result = evaluator.evaluate()
    assert result.metrics["eval/num_dropped"] == 3
    assert result.metrics["eval/num_rollouts"] == 5
    assert result.metrics["eval/score_mean"] == (0 + 2 + 2 + 3 + 3) / 5
    assert result.metrics["eval/accuracy"] == 4 / 5
    assert result.metrics["eval/pass_at_1"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert result.metrics["eval/pass_at_2"] == pytest.approx((1 + 1) / 2)
    assert sorted(h.info.prompt_id for hand in partners.judged[0] for h in hand) == [0, 2, 2, 3, 3]


def test_pass_at_k_of_no_prompt_with_enough_samples_is_no_number() -> None:
    evaluator, _ = make(lambda number, sample, _: None if sample == 0 else 1.0, samples_per_prompt=2, pass_at=(1, 2))
    metrics = evaluator.evaluate().metrics
    assert math.isnan(metrics["eval/pass_at_2"])
    assert metrics["eval/pass_at_1"] == 1.0


def test_an_evaluation_of_which_nothing_is_left_says_what_to_do() -> None:
    evaluator, _ = make(lambda *_: None)
    with pytest.raises(NothingToLearnError, match=r"no response to 4 held-out prompts.*reward\.on_failure=stop"):
        evaluator.evaluate()


# Against the reference ------------------------------------------------------------------------------------------------


def test_the_kl_is_asked_at_the_temperature_of_the_evaluation() -> None:
    """Each response goes to one rank, once; at another temperature it is no estimate of a KL (PPO details 5)."""
    evaluator, partners = make(own_number, num_prompts=5)
    assert evaluator.evaluate().metrics["eval/kl"] == 0.25
    assert [asked for asked in partners.asked if asked.startswith("kl")] == ["kl at 0.9"]
    hands = partners.judged[0]
    assert len(hands) == partners.num_hands
    assert sorted(h.info.prompt_id for hand in hands for h in hand) == [0, 1, 2, 3, 4]


def test_without_learners_there_is_no_kl() -> None:
    evaluator, partners = make(own_number, with_learners=False)
    assert "eval/kl" not in evaluator.evaluate().metrics
    assert partners.judged == []


class Changing:
    """A reward whose next scores can be set, by prompt and sample."""

    def __init__(self, scores: dict[tuple[int, int], float | None]) -> None:
        self.scores = scores

    def __call__(self, number: int, sample: int, temperature: float) -> float | None:
        return self.scores.get((number, sample), 0.0)


def test_the_win_rate_is_against_the_responses_that_are_remembered() -> None:
    """The reference scores 0 and 2 on both prompts; then the policy 1 and 3 on the first, and -1 and 2 on the second.

    Pairs won: 1 > 0, 3 > 0, 3 > 2 of four; and 2 > 0 with 2 = 2 for a half of four. Mean of 3/4 and 1.5/4.
    """
    reward = Changing({(0, 1): 2.0, (1, 1): 2.0})
    evaluator, _ = make(reward, num_prompts=2, samples_per_prompt=2)
    reference = evaluator.evaluate()
    assert "eval/win_rate" not in reference.metrics
    assert evaluator.compare_with(reference) == {"eval/win_rate": 0.5}, "so that it can be what is best at step 0"
    assert evaluator.evaluate().metrics["eval/win_rate"] == 0.5
    reward.scores = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): -1.0, (1, 1): 2.0}
    assert evaluator.evaluate().metrics["eval/win_rate"] == pytest.approx((3 / 4 + 1.5 / 4) / 2)


def test_the_win_rate_leaves_out_prompts_that_lost_their_responses() -> None:
    reward = Changing({(0, 0): None, (1, 0): 1.0})
    evaluator, _ = make(reward, num_prompts=3)
    evaluator.compare_with(evaluator.evaluate())  # of prompts 1 and 2
    reward.scores = {(1, 0): 2.0, (2, 0): None}  # of prompts 0 and 1
    assert evaluator.evaluate().metrics["eval/win_rate"] == 1.0
    reward.scores = {(1, 0): None, (2, 0): None}
    assert "eval/win_rate" not in evaluator.evaluate().metrics


def test_no_win_rate_unless_asked_for() -> None:
    evaluator, _ = make(own_number, win_rate=False)
    assert evaluator.compare_with(evaluator.evaluate()) == {}
    assert "eval/win_rate" not in evaluator.evaluate().metrics


# Drift ----------------------------------------------------------------------------------------------------------------


def test_the_drift_of_the_reward_is_seen_in_responses_that_it_has_scored_before() -> None:
    """The chunk with prompts 0, 1 and 2 is scored again each time; what is sampled anew is no part of it."""
    reward = Changing({(0, 0): 1.0, (3, 0): 1.0})
    evaluator, partners = make(reward)
    first = evaluator.evaluate()
    assert "monitor/score_drift" not in first.metrics
    evaluator.compare_with(first)
    (chunk,) = {handle.chunk for handle in evaluator.fixed}
    assert chunk.infos == first.handles[0].chunk.infos, "the other chunks are let go"
    before = len(partners.asked)
    assert evaluator.evaluate().metrics["monitor/score_drift"] == 0.0
    assert partners.asked[before:].count("score") == 2 + 1, "two new chunks and the one that is remembered"
    reward.scores = {(0, 0): 0.75, (1, 0): 0.125, (3, 0): -9.0}
    assert evaluator.evaluate().metrics["monitor/score_drift"] == 0.25


def test_what_is_compared_with_goes_through_a_checkpoint() -> None:
    evaluator, _ = make(own_number, samples_per_prompt=2)
    evaluator.compare_with(evaluator.evaluate())
    saved = json.loads(json.dumps(evaluator.state()))
    again, _ = make(lambda number, sample, temperature: float(number) + 0.25, samples_per_prompt=2)
    again.load_state(saved)
    assert again.reference_scores == evaluator.reference_scores
    assert [(h.info, h.row, h.score, h.parts) for h in again.fixed] == [
        (h.info, h.row, h.score, h.parts) for h in evaluator.fixed
    ]
    result = again.evaluate()
    assert result.metrics["monitor/score_drift"] == 0.25
    assert result.metrics["eval/win_rate"] > 0.5


def test_a_response_goes_through_json_bit_for_bit() -> None:
    before = replace(
        rollout(prompt(4), 1, length=3),
        rollout_logprobs=np.array([-0.1, -1e-30, -3.3333333], np.float32),
        response_mask=np.array([True, False, True]),
        policy_versions=np.array([2, 2, 3], np.int32),
    )
    plain = json.loads(json.dumps(response_to_plain(before)))
    after = response_from_plain(plain, {4: prompt(4)})
    for name in ("response_ids", "rollout_logprobs", "response_mask", "policy_versions"):
        old, new = getattr(before, name), getattr(after, name)
        assert (new.dtype, new.tobytes()) == (old.dtype, old.tobytes()), name
    assert (after.key, after.finish_reason, after.text) == (before.key, before.finish_reason, before.text)


def test_the_drift_compares_what_has_a_score_both_times() -> None:
    reward = Changing({(0, 0): None, (2, 0): 1.0})
    evaluator, _ = make(reward)
    evaluator.compare_with(evaluator.evaluate())  # of the first chunk, prompts 1 and 2
    reward.scores = {(0, 0): 5.0, (1, 0): None, (2, 0): 1.5}
    assert evaluator.evaluate().metrics["monitor/score_drift"] == 0.5
    reward.scores = {(1, 0): None, (2, 0): None}
    assert "monitor/score_drift" not in evaluator.evaluate().metrics


# Signs of a reward that is hacked -------------------------------------------------------------------------------------


def test_signs_are_recorded_under_the_prefix_that_is_asked_for() -> None:
    def handle(score: float, length: int, repetition: float, *, truncated: bool) -> ScoredHandle:
        plain = scored_handle(score=score, length=length, truncated=truncated)
        return replace(plain, info=replace(plain.info, repetition=repetition))

    handles = [
        handle(1.0, 2, 0.0, truncated=False),
        handle(2.0, 4, 0.5, truncated=False),
        handle(3.0, 6, 0.25, truncated=True),
        handle(4.0, 8, 0.25, truncated=False),
    ]
    for prefix in ("monitor", "eval"):
        expected = {f"{prefix}/length_correlation": 1.0, f"{prefix}/repetition": 0.25, f"{prefix}/eos_rate": 0.75}
        assert signs(handles, prefix=prefix) == pytest.approx(expected)
    evaluator, _ = make(own_number)
    assert {"eval/length_correlation", "eval/repetition", "eval/eos_rate"} <= evaluator.evaluate().metrics.keys()


def test_values_stand_with_their_prompts() -> None:
    handles = [scored_handle(number, sample, score=0.0) for number, sample in ((4, 0), (2, 0), (4, 1))]
    assert by_prompt(handles, ["a", "b", "c"]) == {4: ["a", "c"], 2: ["b"]}
