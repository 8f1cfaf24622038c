"""The two clipped losses of learner.ppo against hand-computed numbers, slow loops and finite differences in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.ppo import LossTerms, clipped_policy_loss, clipped_value_loss, last_position
from tests.test_ppo_maths import ragged_mask, random

# The policy loss


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> LossTerms:
    return clipped_policy_loss(logprobs, old, advantages, mask, clip_eps=0.2)


def test_policy_loss_by_hand() -> None:
    ratios = torch.tensor([[1.0, 1.5, 1.5, 0.5, 0.6, 3.0]])
    advantages = torch.tensor([[2.0, 1.0, -1.0, 1.0, -1.0, 100.0]])
    mask = torch.tensor([[True, True, True, True, True, False]])
    terms = policy_loss(ratios.log(), torch.zeros(1, 6), advantages, mask)
    # min(r A, clip(r) A) = 2, 1.2 (clipped), -1.5, 0.5, -0.8 (clipped)
    assert terms.loss_sum.item() == pytest.approx(-(2 + 1.2 - 1.5 + 0.5 - 0.8), abs=1e-6)
    assert terms.stats["clipfrac"].item() == 2
    assert terms.stats["ratio"].item() == pytest.approx(1 + 1.5 + 1.5 + 0.5 + 0.6, abs=1e-6)
    kl = sum(r - 1 - math.log(r) for r in (1.0, 1.5, 1.5, 0.5, 0.6))
    assert terms.stats["approx_kl"].item() == pytest.approx(kl, abs=1e-6)
    assert not any(value.requires_grad for value in terms.stats.values())


def policy_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = ragged_mask(4, 9)
    old = -random(4, 9, seed=8).abs()
    return old + random(4, 9, seed=9, scale=0.4), old, random(4, 9, seed=10), mask


def numeric_gradient(loss: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences, one entry at a time."""
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        shift = torch.zeros_like(at)
        shift.view(-1)[index] = step
        gradient.view(-1)[index] = (loss(at + shift) - loss(at - shift)) / (2 * step)
    return gradient


def test_policy_loss_and_gradient_equal_a_slow_loop_and_finite_differences() -> None:
    logprobs, old, advantages, mask = policy_case()
    leaf = logprobs.clone().requires_grad_()
    terms = policy_loss(leaf, old, advantages, mask)
    terms.loss_sum.backward()
    assert leaf.grad is not None
    total, num_clipped = 0.0, 0
    for b in range(4):
        for t in range(9):
            ratio, advantage = math.exp(logprobs[b, t] - old[b, t]), advantages[b, t].item()
            clipped = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
            if not mask[b, t]:
                assert leaf.grad[b, t] == 0
                continue
            total -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            num_clipped += clipped
            expected = 0.0 if clipped else -advantage * ratio
            assert leaf.grad[b, t].item() == pytest.approx(expected, abs=1e-12)
    assert terms.loss_sum.item() == pytest.approx(total, abs=1e-12)
    assert terms.stats["clipfrac"].item() == num_clipped > 3
    numeric = numeric_gradient(lambda x: policy_loss(x, old, advantages, mask).loss_sum, logprobs)
    torch.testing.assert_close(leaf.grad, numeric, atol=1e-8, rtol=0)


def test_at_the_old_policy_the_gradient_is_the_policy_gradient() -> None:
    _, old, advantages, mask = policy_case()
    leaf = old.clone().requires_grad_()
    terms = policy_loss(leaf, old, advantages, mask)
    terms.loss_sum.backward()
    torch.testing.assert_close(leaf.grad, torch.where(mask, -advantages, torch.zeros_like(advantages)))
    assert terms.stats["approx_kl"].item() == terms.stats["clipfrac"].item() == 0
    assert terms.stats["ratio"].item() == mask.sum().item()


def test_approx_kl_has_the_kl_of_old_from_new_as_its_mean() -> None:
    old, new = torch.log_softmax(random(6, seed=11), -1), torch.log_softmax(random(6, seed=12), -1)
    ones = torch.ones(1, dtype=torch.bool)
    estimates = [
        policy_loss(new[i : i + 1], old[i : i + 1], torch.ones(1), ones).stats["approx_kl"] for i in range(len(old))
    ]
    expectation = (old.exp() * torch.stack(estimates)).sum().item()
    assert expectation == pytest.approx((old.exp() * (old - new)).sum().item(), abs=1e-12)


def test_one_mismatch_cannot_overflow_the_policy_loss() -> None:
    leaf = torch.tensor([[200.0, -200.0]]).requires_grad_()
    terms = policy_loss(leaf, torch.zeros(1, 2), torch.tensor([[-1.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool))
    terms.loss_sum.backward()
    assert leaf.grad is not None
    assert torch.isfinite(terms.loss_sum)
    assert torch.isfinite(leaf.grad).all()
    assert all(torch.isfinite(value) for value in terms.stats.values())


# The value loss


def test_value_loss_by_hand() -> None:
    old = torch.zeros(1, 5)
    values = torch.tensor([[0.1, 1.0, 1.0, -1.0, 7.0]])
    returns = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    terms = clipped_value_loss(values, old, returns, mask, value_clip_eps=0.2)
    # Squared errors, free and clipped: (.81, .81), (1, 3.24), (1, .04), (1, .04)
    assert terms.loss_sum.item() == pytest.approx(0.5 * (0.81 + 3.24 + 1 + 1), abs=1e-6)
    assert terms.stats["clipfrac"].item() == 1
    assert not terms.stats["clipfrac"].requires_grad


def test_value_loss_and_gradient_equal_a_slow_loop_and_finite_differences() -> None:
    mask = ragged_mask(4, 9)
    old, returns = random(4, 9, seed=13), random(4, 9, seed=14)
    values = old + random(4, 9, seed=15, scale=0.4)
    leaf = values.clone().requires_grad_()
    terms = clipped_value_loss(leaf, old, returns, mask, value_clip_eps=0.2)
    terms.loss_sum.backward()
    assert leaf.grad is not None
    total, num_clipped = 0.0, 0
    for b in range(4):
        for t in range(9):
            v, o, target = values[b, t].item(), old[b, t].item(), returns[b, t].item()
            clipped_value = min(max(v, o - 0.2), o + 0.2)
            clipped = (clipped_value - target) ** 2 > (v - target) ** 2
            if not mask[b, t]:
                assert leaf.grad[b, t] == 0
                continue
            total += 0.5 * max((v - target) ** 2, (clipped_value - target) ** 2)
            num_clipped += clipped
            assert leaf.grad[b, t].item() == pytest.approx(0.0 if clipped else v - target, abs=1e-12)
    assert terms.loss_sum.item() == pytest.approx(total, abs=1e-12)
    assert terms.stats["clipfrac"].item() == num_clipped > 3
    numeric = numeric_gradient(lambda x: clipped_value_loss(x, old, returns, mask, value_clip_eps=0.2).loss_sum, values)
    torch.testing.assert_close(leaf.grad, numeric, atol=1e-8, rtol=0)


def test_a_wide_value_clip_is_plain_regression() -> None:
    """And rounding never counts as clipping."""
    mask = ragged_mask(4, 200)
    values, old, error = (random(4, 200, seed=s, dtype=torch.float32) for s in (16, 17, 18))
    returns = values + 0.01 * error
    terms = clipped_value_loss(values, old, returns, mask, value_clip_eps=50.0)
    assert terms.loss_sum.item() == pytest.approx(0.5 * (values - returns)[mask].square().sum().item(), rel=1e-6)
    assert terms.stats["clipfrac"].item() == 0


# Padding and the cut into micro-batches


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> LossTerms:
    return clipped_value_loss(values, old, returns, mask, value_clip_eps=0.2)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_the_cut_into_micro_batches_and_their_padding_change_nothing(loss: Callable[..., LossTerms]) -> None:
    mask = ragged_mask(4, 9)
    tensors = [(x * 0.5).float() for x in policy_case()[:3]]
    whole = tensors[0].clone().requires_grad_()
    terms = loss(whole, *tensors[1:], mask)
    terms.loss_sum.backward()
    assert whole.grad is not None
    for cut in ([[0, 1, 2, 3]], [[3], [1, 0], [2]], [[2, 3], [0, 1]]):
        leaf = tensors[0].clone().requires_grad_()
        parts = []
        for rows in cut:
            width = int(last_position(mask[rows]).max()) + 1  # padded only as far as these rows need
            parts.append(loss(*(x[rows][:, :width] for x in (leaf, *tensors[1:], mask))))
        torch.stack([part.loss_sum for part in parts]).sum().backward()
        assert sum(p.loss_sum.item() for p in parts) == pytest.approx(terms.loss_sum.item(), abs=1e-6)
        for name, value in terms.stats.items():
            assert sum(p.stats[name].item() for p in parts) == pytest.approx(value.item(), abs=1e-5), name
        torch.testing.assert_close(leaf.grad, whole.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_what_stands_under_the_mask_changes_nothing(loss: Callable[..., LossTerms]) -> None:
    *tensors, mask = policy_case()
    plain = loss(*tensors, mask)
    spoilt = loss(*(x.masked_fill(~mask, float("nan")) for x in tensors), mask)
    assert spoilt.loss_sum.item() == plain.loss_sum.item()
    assert {k: v.item() for k, v in spoilt.stats.items()} == {k: v.item() for k, v in plain.stats.items()}
