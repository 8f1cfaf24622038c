"""learner.correction against hand-computed numbers, slow float64 loops and properties. A second."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from learner.correction import Correction, icepop, truncated_by_sequence, truncated_by_token, uncorrected
from tests.test_ppo_maths import ragged_mask, random

BY_TOKEN: Correction = partial(truncated_by_token, cap=1.5)
BY_SEQUENCE: Correction = partial(truncated_by_sequence, cap=1.5)
ICEPOP: Correction = partial(icepop, low=0.7, high=1.5)
ALL = pytest.mark.parametrize(
    "correction", [uncorrected, BY_TOKEN, BY_SEQUENCE, ICEPOP], ids=["none", "token", "sequence", "icepop"]
)


def case() -> tuple[Tensor, Tensor, Tensor]:
    rollout = -random(4, 9, seed=0).abs()
    return rollout + random(4, 9, seed=1, scale=0.4), rollout, ragged_mask(4, 9)


def by_hand(correction: Correction) -> list[list[float]]:
    ratios = torch.tensor([[2.0, 0.5, 1.25, 9.0], [0.5, 9.0, 0.5, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False], [True, False, True, True]])
    weights: list[list[float]] = correction(ratios.log() - 1.0, torch.full_like(ratios, -1.0), mask).tolist()
    return weights


def test_weights_by_hand() -> None:
    expected: list[tuple[Correction, list[list[float]]]] = [
        (uncorrected, [[1, 1, 1, 0], [1, 0, 1, 1]]),
        (BY_TOKEN, [[1.5, 0.5, 1.25, 0], [0.5, 0, 0.5, 1]]),
        (BY_SEQUENCE, [[1.25, 1.25, 1.25, 0], [0.25, 0, 0.25, 0.25]]),  # 2 * .5 * 1.25 and .5 * .5 * 1
        (partial(truncated_by_sequence, cap=1.2), [[1.2, 1.2, 1.2, 0], [0.25, 0, 0.25, 0.25]]),
        (ICEPOP, [[0, 0, 1.25, 0], [0, 0, 0, 1]]),
        (partial(icepop, low=0.4, high=5.0), [[2, 0.5, 1.25, 0], [0.5, 0, 0.5, 1]]),
    ]
    for correction, weights in expected:
        for row, numbers in zip(by_hand(correction), weights, strict=True):
            assert row == pytest.approx(numbers, abs=1e-12)


def test_weights_equal_a_slow_loop() -> None:
    old, rollout, mask = case()
    seen = dict.fromkeys(("capped", "capped_sequences", "dropped"), 0)
    for b in range(4):
        steps = [t for t in range(9) if mask[b, t]]
        ratios = {t: math.exp(old[b, t].item() - rollout[b, t].item()) for t in steps}
        product = math.prod(ratios.values())
        seen["capped_sequences"] += product > 1.5
        for t in steps:
            r = ratios[t]
            assert BY_TOKEN(old, rollout, mask)[b, t].item() == pytest.approx(min(r, 1.5), abs=1e-12)
            assert BY_SEQUENCE(old, rollout, mask)[b, t].item() == pytest.approx(min(product, 1.5), abs=1e-12)
            expected = r if 0.7 <= r <= 1.5 else 0.0
            assert ICEPOP(old, rollout, mask)[b, t].item() == pytest.approx(expected, abs=1e-12)
            seen["capped"] += r > 1.5
            seen["dropped"] += expected == 0.0
    assert all(seen.values()), seen


def test_a_response_of_one_token_is_corrected_alike_by_token_and_by_sequence() -> None:
    old, rollout, _ = (x.reshape(36, 1) for x in case())
    mask = torch.ones(36, 1, dtype=torch.bool)
    assert torch.equal(BY_TOKEN(old, rollout, mask), BY_SEQUENCE(old, rollout, mask))


def test_the_bounds_of_icepop_are_inside() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    weights = icepop(torch.zeros(1, 3), torch.zeros(1, 3), mask, low=1.0, high=1.0)
    assert weights.tolist() == [[1, 1, 1]]


def test_uncapped_weights_make_the_mean_over_the_engine_that_of_the_learner() -> None:
    engine, learner = (torch.softmax(random(7, seed=s), -1) for s in (2, 3))
    rewards, mask = random(7, seed=4), torch.ones(7, 1, dtype=torch.bool)
    for correction in (partial(truncated_by_token, cap=1e9), partial(icepop, low=0.0, high=1e9)):
        weights = correction(learner.log()[:, None], engine.log()[:, None], mask)[:, 0]
        assert (engine * weights * rewards).sum().item() == pytest.approx((learner * rewards).sum().item(), abs=1e-12)
    capped = BY_TOKEN(learner.log()[:, None], engine.log()[:, None], mask)[:, 0]
    assert abs((engine * (capped - 1) * rewards).sum().item()) > 1e-3


@ALL
def test_an_engine_that_agrees_gives_ones_without_gradient(correction: Correction) -> None:
    old, _, mask = case()
    weights = correction(old.clone().requires_grad_(), old, mask)
    assert torch.equal(weights, mask.double())
    assert not weights.requires_grad
    assert correction(old.float(), old.float(), mask).dtype == torch.float32


@ALL
@pytest.mark.parametrize("fill", [math.nan, -math.inf])
def test_what_stands_outside_the_mask_changes_nothing(correction: Correction, fill: float) -> None:
    old, rollout, mask = case()
    plain = correction(old, rollout, mask)
    assert torch.equal(correction(old.masked_fill(~mask, fill), rollout.masked_fill(~mask, fill), mask), plain)
    assert (plain[~mask] == 0).all()
    none = correction(old, rollout, torch.zeros_like(mask))
    assert (none == 0).all()


@ALL
def test_log_ratios_are_clamped_before_exp_so_that_one_mismatch_cannot_overflow(correction: Correction) -> None:
    """Nor turn a sum of many into an infinity. (PPO details 7)"""
    old = torch.tensor([[500.0, 500.0], [-500.0, -500.0]])
    weights = correction(old, torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert torch.isfinite(weights).all()
    assert weights.max() <= 1.5


def test_the_clamp_is_at_ten() -> None:
    """(PPO details 7)"""
    old = torch.tensor([[500.0], [-500.0]])
    for correction in (truncated_by_token, truncated_by_sequence):
        weights = correction(old, torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool), cap=1e9)
        assert weights.flatten().tolist() == pytest.approx([math.exp(10), math.exp(-10)])
