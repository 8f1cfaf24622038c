"""learner.preparation and learner.describe against numbers by hand and slow loops, in a group of one. Two seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from actors.rollout import Prompt, Rollout, ScoredRollout
from conf.schema import AlgorithmConfig
from learner.describe import describe
from learner.experience import Batch, Evaluation, Experience, Values, collate
from learner.preparation import Preparation, make_correction, scaled_rewards, whitened
from tests.test_ppo_maths import random

INF = math.inf
# With gamma = 0 and no critic, the advantages are the token rewards.
REWARDS_ALONE = AlgorithmConfig(estimator="reinforce_pp", gamma=0.0)


@pytest.fixture(scope="module", autouse=True)
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def scored(
    logprobs: list[float], *, mask: list[bool] | None = None, score: float = 0.0, truncated: bool = False
) -> ScoredRollout:
    """A response of which the engine says `logprobs`."""
    length = len(logprobs)
    rollout = Rollout(
        prompt=Prompt(0, np.array([1, 2], np.int32), "", ()),
        sample=0,
        response_ids=np.arange(length, dtype=np.int32),
        rollout_logprobs=np.array(logprobs, np.float32),
        response_mask=np.array(mask or [True] * length, np.bool_),
        policy_versions=np.zeros(length, np.int32),
        finish_reason="length" if truncated else "stop",
        text="",
    )
    return ScoredRollout(rollout, score)


def seen(old: Tensor, *, ref: Tensor | None = None, values: Values | None = None) -> Evaluation:
    ref = old if ref is None else ref
    return Evaluation(old.float(), ref.float(), torch.full_like(old, 0.5).float(), values)


def case() -> tuple[Batch, Evaluation]:
    """Four responses of 5, 4, 6 and 1 tokens with holes; row 1 was cut; engine, learner and reference differ."""
    masks = [[True] * 5, [True, False, True, True], [True, True, True, False, False, True], [True]]
    rollouts = [
        scored((-random(len(m), seed=n).abs()).tolist(), mask=m, score=n - 1.5, truncated=n == 1)
        for n, m in enumerate(masks)
    ]
    batch = collate(rollouts)
    old = batch.rollout_logprobs + random(4, 6, seed=7, scale=0.3)
    values = Values(random(4, 6, seed=8).float(), random(4, seed=9).float())
    return batch, seen(old, ref=old + random(4, 6, seed=10, scale=0.5), values=values)


def prepared(
    algorithm: AlgorithmConfig, *pairs: tuple[Batch, Evaluation], kl_coef: float = 0.0, whiten_rewards: bool = False
) -> list[Experience]:
    prepare = Preparation(algorithm, whiten_rewards=whiten_rewards)
    return prepare([batch for batch, _ in pairs], [of for _, of in pairs], kl_coef=kl_coef)


def rows_of(batch: Batch, rows: slice, length: int) -> Batch:
    """Some rows of a micro-batch, with less padding in the response."""
    parts = {name: getattr(batch, name)[rows] for name in batch.__dataclass_fields__}
    for name in ("state_index", "response_ids", "mask", "rollout_logprobs"):
        parts[name] = parts[name][:, :length]
    return Batch(**parts)


def slow_gae(rewards: list[float], values: list[float], *, gamma: float, gae_lambda: float) -> list[float]:
    following = [*values[1:], 0.0]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, following, strict=True)]
    return [sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


# Token rewards, and what has no probability in engine or learner


def test_token_rewards_are_the_kl_penalty_and_the_score_on_the_last_token_by_hand() -> None:
    """(PPO details 1)"""
    batch = collate([scored([-1.0, -1.0, -1.0], mask=[True, True, False], score=2.0), scored([-1.0], score=-3.0)])
    old = torch.tensor([[-1.0, -2.0, -4.0], [-0.5, 7.0, 7.0]])
    ref = torch.tensor([[-1.5, -1.0, -9.0], [-2.5, 8.0, 8.0]])  # d = 0.5, -1, not written; 2
    (item,) = prepared(REWARDS_ALONE, (batch, seen(old, ref=ref)), kl_coef=0.1)
    assert item.advantages.tolist() == [pytest.approx([-0.05, 0.1 + 2.0, 0.0]), pytest.approx([-0.2 - 3.0, 0.0, 0.0])]
    (item,) = prepared(replace(REWARDS_ALONE, kl_estimator="k2"), (batch, seen(old, ref=ref)), kl_coef=0.1)
    assert item.advantages[:, 0].tolist() == pytest.approx([-0.0125, -0.2 - 3.0])
    assert item.returns is None


@pytest.mark.parametrize("side", ["engine", "learner"])
def test_a_token_that_one_of_engine_and_learner_cut_off_has_no_kl_and_no_loss_but_keeps_the_score(side: str) -> None:
    """The first and the last token have no probability in one of the two. (PPO details 5)"""
    cut = torch.tensor([[True, False, False, True]])
    batch = collate([scored([-1.0] * 4, score=2.0)])
    old = torch.full((1, 4), -1.5)
    if side == "engine":
        batch = replace(batch, rollout_logprobs=batch.rollout_logprobs.masked_fill(cut, -INF))
    else:
        old = old.masked_fill(cut, -INF)
    values = Values(torch.tensor([[0.3, -0.2, 0.7, 0.4]]), torch.zeros(1))
    item, plain = (
        prepared(algorithm, (batch, seen(old, ref=torch.full((1, 4), -2.0), values=values)), kl_coef=0.1)[0]
        for algorithm in (AlgorithmConfig(correction="token", gamma=0.9, gae_lambda=0.8), REWARDS_ALONE)
    )
    rewards = [0.0, -0.05, -0.05, 2.0]
    assert plain.advantages[0].tolist() == pytest.approx(rewards)
    assert item.mask.tolist() == (~cut).tolist()
    assert item.anchor_logprobs[0].tolist() == [0.0, -1.5, -1.5, 0.0]
    assert item.importance[0].tolist() == pytest.approx([0.0, math.exp(-0.5), math.exp(-0.5), 0.0])
    expected = slow_gae(rewards, values.tokens[0].tolist(), gamma=0.9, gae_lambda=0.8)
    assert item.advantages[0].tolist() == pytest.approx(expected, abs=1e-6)  # they are time steps all the same
    assert item.returns is not None
    assert (item.returns - values.tokens)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_what_is_not_a_number_is_not_removed() -> None:
    batch = collate([scored([-1.0, -1.0])])
    (item,) = prepared(REWARDS_ALONE, (batch, seen(torch.tensor([[math.nan, -1.0]]))), kl_coef=0.1)
    assert item.mask.all()
    assert item.anchor_logprobs[0].isnan().tolist() == item.advantages[0].isnan().tolist() == [True, False]


def test_a_cut_response_is_left_out_of_the_losses_and_has_its_advantages_all_the_same() -> None:
    batch, evaluation = case()
    whole, without = (
        prepared(AlgorithmConfig(mask_truncated=mask), (batch, evaluation), kl_coef=0.1)[0] for mask in (False, True)
    )
    assert torch.equal(whole.mask, batch.mask)
    assert not without.mask[1].any()
    assert not without.anchor_logprobs[1].any()
    assert torch.equal(without.mask[[0, 2, 3]], batch.mask[[0, 2, 3]])
    assert torch.equal(without.advantages, whole.advantages)
    assert without.returns is not None
    assert whole.returns is not None
    assert torch.equal(without.returns, whole.returns)
    assert without.advantages[1].any()


# Old log-probabilities and importance weights


@pytest.mark.parametrize("whose", ["learner", "engine"])
def test_the_ratio_compares_with_the_log_probabilities_that_the_settings_name(whose: str) -> None:
    """(PPO details 6)"""
    batch, evaluation = case()
    (item,) = prepared(AlgorithmConfig(old_logprobs=whose), (batch, evaluation))
    expected = evaluation.old_logprobs if whose == "learner" else batch.rollout_logprobs
    assert torch.equal(item.anchor_logprobs, torch.where(batch.mask, expected, 0.0))
    assert torch.equal(item.importance, batch.mask.float())
    assert item.evaluation is evaluation


def test_importance_weights_are_of_the_learners_old_log_probabilities_to_the_engines() -> None:
    """(PPO details 6)"""
    batch, evaluation = case()
    (item,) = prepared(AlgorithmConfig(correction="token", correction_cap=1.1), (batch, evaluation))
    capped = 0
    for b, t in batch.mask.nonzero().tolist():
        ratio = math.exp(float(evaluation.old_logprobs[b, t]) - float(batch.rollout_logprobs[b, t]))
        assert float(item.importance[b, t]) == pytest.approx(min(ratio, 1.1), rel=1e-6)
        capped += ratio > 1.1
    assert 0 < capped < batch.num_response_tokens
    assert not item.importance[~batch.mask].any()


@pytest.mark.parametrize(
    ("more", "weights"),
    [
        ({}, [1, 1, 1, 1]),
        ({"correction": "token"}, [0.4, 2, 0.6, 2]),  # the cap is 2
        ({"correction": "token", "correction_cap": 3.0}, [0.4, 3, 0.6, 3]),
        ({"correction": "sequence"}, [2, 2, 2, 2]),  # .4 x 6 x .6 x 4 = 5.76
        ({"correction": "sequence", "correction_cap": 7.0}, [5.76] * 4),
        ({"correction": "icepop"}, [0, 0, 0.6, 4]),  # in [0.5, 5]
        ({"correction": "icepop", "icepop_low": 0.3, "icepop_high": 6.5}, [0.4, 6, 0.6, 4]),
    ],
)
def test_the_settings_choose_the_correction(more: dict[str, Any], weights: list[float]) -> None:
    ratios = torch.tensor([[0.4, 6.0, 0.6, 4.0]])
    correction = make_correction(AlgorithmConfig(**more))
    assert correction(ratios.log(), torch.zeros(1, 4), ratios > 0)[0].tolist() == pytest.approx(weights)


# Moments of a train batch


def chosen(values: Sequence[Tensor], masks: Sequence[Tensor]) -> np.ndarray[Any, Any]:
    return np.concatenate([of[mask].double().numpy() for of, mask in zip(values, masks, strict=True)])


def test_scaled_rewards_have_a_standard_deviation_of_one_and_the_mean_that_they_had() -> None:
    masks = [random(3, 7, seed=1) > -0.5, random(2, 4, seed=2) > 0]
    rewards = [(5 * random(3, 7, seed=3) + 2).float(), random(2, 4, seed=4).float() - 6]
    before = chosen(rewards, masks)
    soiled = [of.masked_fill(~mask, math.nan) for of, mask in zip(rewards, masks, strict=True)]
    scaled = scaled_rewards(soiled, masks)
    after = chosen(scaled, masks)
    assert after.std() == pytest.approx(1.0, rel=1e-6)
    assert after.mean() == pytest.approx(before.mean(), abs=1e-6)
    np.testing.assert_allclose(after, (before - before.mean()) / before.std() + before.mean(), atol=1e-5)
    assert all((of[~mask] == 0).all() for of, mask in zip(scaled, masks, strict=True))


def test_rewards_are_whitened_before_the_advantages_and_only_if_asked() -> None:
    batch, evaluation = case()
    plain, whitened_rewards = (
        prepared(REWARDS_ALONE, (batch, evaluation), kl_coef=0.3, whiten_rewards=whiten)[0] for whiten in (False, True)
    )
    before = chosen([plain.advantages], [batch.mask])
    np.testing.assert_allclose(
        chosen([whitened_rewards.advantages], [batch.mask]),
        (before - before.mean()) / before.std() + before.mean(),
        atol=1e-5,
    )
    (item,) = prepared(AlgorithmConfig(gae_lambda=0.9), (batch, evaluation), kl_coef=0.3, whiten_rewards=True)
    assert evaluation.values is not None
    for b in range(4):
        steps = batch.mask[b].nonzero().flatten().tolist()
        rewards, values = (of[b, steps].tolist() for of in (whitened_rewards.advantages, evaluation.values.tokens))
        expected = slow_gae(rewards, values, gamma=1.0, gae_lambda=0.9)
        assert item.advantages[b, steps].tolist() == pytest.approx(expected, abs=1e-5)


def test_advantages_are_whitened_with_the_moments_of_the_tokens_in_the_losses() -> None:
    """Not of all that the policy wrote, and not of each micro-batch. (PPO details 4)"""
    batch, evaluation = case()
    evaluation.old_logprobs[0, 0] = -INF
    algorithm = AlgorithmConfig(mask_truncated=True)
    (item,) = prepared(algorithm, (batch, evaluation), kl_coef=0.1)
    other = replace(item, advantages=3 * item.advantages.flip(0) + 1, mask=item.mask.flip(0))
    both = [item, other]
    before = chosen([one.advantages for one in both], [one.mask for one in both])
    assert len(before) == 2 * (batch.num_response_tokens - 3 - 1)
    white = whitened(both)
    after = chosen([one.advantages for one in white], [one.mask for one in white])
    np.testing.assert_allclose(after, (before - before.mean()) / before.std(), atol=1e-5)
    for one, plain in zip(white, both, strict=True):
        assert not one.advantages[~one.mask].any()
        assert one.returns is plain.returns


def test_nothing_depends_on_the_cut_into_micro_batches() -> None:
    batch, evaluation = case()
    assert evaluation.values is not None
    algorithm = AlgorithmConfig(correction="sequence", bootstrap_truncated=True)
    (whole,) = whitened(prepared(algorithm, (batch, evaluation), kl_coef=0.1, whiten_rewards=True))
    cuts = [(slice(0, 2), 5), (slice(2, 4), 6)]
    pairs = []
    for rows, length in cuts:
        old, ref, entropy, tokens = (
            of[rows, :length]
            for of in (
                evaluation.old_logprobs,
                evaluation.ref_logprobs,
                evaluation.entropy,
                evaluation.values.tokens,
            )
        )
        values = Values(tokens, evaluation.values.final[rows])
        pairs.append((rows_of(batch, rows, length), Evaluation(old, ref, entropy, values)))
    parts = whitened(prepared(algorithm, *pairs, kl_coef=0.1, whiten_rewards=True))
    for part, (rows, length) in zip(parts, cuts, strict=True):
        for name in ("mask", "anchor_logprobs", "importance", "advantages", "returns"):
            torch.testing.assert_close(
                getattr(part, name), getattr(whole, name)[rows, :length], atol=1e-5, rtol=0, msg=name
            )


def test_a_rank_may_have_no_micro_batch_and_a_train_batch_no_token_in_the_losses() -> None:
    assert whitened(prepared(AlgorithmConfig(), whiten_rewards=True)) == []
    batch = collate([scored([-1.0, -1.0], truncated=True)])
    values = Values(torch.ones(1, 2), torch.zeros(1))
    (item,) = whitened(
        prepared(AlgorithmConfig(mask_truncated=True), (batch, seen(torch.full((1, 2), -1.0), values=values)))
    )
    assert not item.mask.any()
    assert not item.advantages.any()


# What a train batch looks like


def test_the_gap_between_engine_and_learner_is_recorded_by_hand() -> None:
    """101 tokens with gaps of 0, 0.01 .. 1, so that the 99th percentile is the last but one. (PPO details 6)"""
    size = torch.arange(101) / 100
    gap = torch.where(torch.arange(101) % 3 == 0, -size, size)[torch.randperm(101, generator=torch.Generator())]
    pairs = []
    for part in (gap[:40], gap[40:]):
        # Two more tokens, with gaps that must not count: one the policy did not write, one that the engine cut off.
        engine = [*[-2.0] * len(part), -2.0, -INF]
        batch = collate([scored(engine, mask=[True] * len(part) + [False, True])])
        pairs.append((batch, seen(torch.cat([part - 2.0, torch.tensor([9.0, 9.0])])[None])))
    figures = describe(prepared(REWARDS_ALONE, *pairs), kl_coef=0.0, cap=2.0)
    assert figures["sync/logprob_gap_mean"] == pytest.approx(0.5, rel=1e-5)
    assert figures["sync/logprob_gap_p99"] == pytest.approx(0.99, rel=1e-5)
    assert figures["sync/logprob_gap_max"] == pytest.approx(1.0, rel=1e-5)
    assert figures["offpolicy/ratio_max"] == pytest.approx(math.exp(1.0), rel=1e-5)  # 100 % 3 != 0: learner above
    above = sum(n % 3 != 0 and math.exp(n / 100) > 2.0 for n in range(101))
    assert figures["offpolicy/above_cap_fraction"] == pytest.approx(above / 101)
    k3 = [math.exp(g) - 1 - g for g in gap.tolist()]
    assert figures["offpolicy/kl"] == pytest.approx(sum(k3) / 101, rel=1e-5)
    assert figures["offpolicy/outside_fraction"] == pytest.approx(2 / 103)


def test_figures_of_a_train_batch_by_hand() -> None:
    batch = collate([scored([-1.0, -1.0], score=2.0), scored([-1.0, -1.0], score=-1.0, truncated=True)])
    old = torch.tensor([[-1.0, -2.0], [-1.5, -1.0]])
    ref = torch.tensor([[-1.5, -3.0], [-1.0, -1.0]])  # KL 1.5 and -0.5
    values = Values(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), torch.zeros(2))
    algorithm = AlgorithmConfig(gae_lambda=1.0, mask_truncated=True, correction="token", correction_cap=1.5)
    items = prepared(algorithm, (batch, seen(old, ref=ref, values=values)), kl_coef=0.2)
    figures = describe(items, kl_coef=0.2, cap=1.5)
    returns = [1.7, 1.8, -0.9, -1.0]  # -0.1 - 0.2 + 2, -0.2 + 2; 0.1 - 1, -1
    errors = np.array(returns) - [1, 2, -1, -2]
    assert figures["objective/kl"] == pytest.approx(0.5)
    assert figures["objective/kl_coef"] == 0.2
    assert figures["objective/rlhf_reward"] == pytest.approx(0.5 - 0.2 * 0.5)
    assert figures["policy/entropy"] == pytest.approx(0.5)
    assert figures["policy/masked_rollouts"] == 1
    assert figures["advantages/mean"] == pytest.approx((0.7 - 0.2) / 2)
    assert figures["advantages/std"] == pytest.approx(0.45)
    assert figures["critic/value_mean"] == 0
    assert figures["critic/return_mean"] == pytest.approx(0.4)
    assert figures["critic/explained_variance"] == pytest.approx(1 - errors.var() / np.var(returns))
    assert figures["offpolicy/weight_mean"] == pytest.approx((1 + math.exp(-1)) / 2)


def test_a_gap_over_no_tokens_is_not_a_number() -> None:
    batch = collate([scored([-INF, -INF])])
    figures = describe(prepared(REWARDS_ALONE, (batch, seen(torch.full((1, 2), -1.0)))), kl_coef=0.0, cap=2.0)
    for name in ("logprob_gap_mean", "logprob_gap_p99", "logprob_gap_max"):
        assert math.isnan(figures[f"sync/{name}"])
    assert math.isnan(figures["offpolicy/kl"])
    assert figures["offpolicy/outside_fraction"] == 1.0
