"""The loss of the critic, learner.ppo, against hand-computed numbers, slow loops and finite differences. A second."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.ppo import LossTerms, clipped_value_loss, last_position
from tests.test_ppo_maths import ragged_mask, random


def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, old values, returns and a mask with holes."""
    old, returns = random(4, 9, seed=13), random(4, 9, seed=14)
    return old + random(4, 9, seed=15, scale=0.4), old, returns, ragged_mask(4, 9)


def clipped(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> LossTerms:
    return clipped_value_loss(values, old, returns, mask, value_clip_eps=0.2)


def plain(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> LossTerms:
    return clipped_value_loss(values, old, returns, mask, value_clip_eps=None)


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
    values, old, returns, mask = case()
    leaf = values.clone().requires_grad_()
    terms = clipped(leaf, old, returns, mask)
    terms.loss_sum.backward()
    assert leaf.grad is not None
    total, num_clipped = 0.0, 0
    for b in range(4):
        for t in range(9):
            v, o, target = values[b, t].item(), old[b, t].item(), returns[b, t].item()
            clipped_value = min(max(v, o - 0.2), o + 0.2)
            cut = (clipped_value - target) ** 2 > (v - target) ** 2
            if not mask[b, t]:
                assert leaf.grad[b, t] == 0
                continue
            total += 0.5 * max((v - target) ** 2, (clipped_value - target) ** 2)
            num_clipped += cut
            assert leaf.grad[b, t].item() == pytest.approx(0.0 if cut else v - target, abs=1e-12)
    assert terms.loss_sum.item() == pytest.approx(total, abs=1e-12)
    assert terms.stats["clipfrac"].item() == num_clipped > 3
    assert torch.autograd.gradcheck(lambda x: clipped(x, old, returns, mask).loss_sum, leaf)


def test_without_a_clip_it_is_plain_regression() -> None:
    values, old, returns, mask = case()
    leaf = values.clone().requires_grad_()
    terms = plain(leaf, old, returns, mask)
    terms.loss_sum.backward()
    steps = [(b, t) for b in range(4) for t in range(9) if mask[b, t]]
    expected = sum(0.5 * (values[s].item() - returns[s].item()) ** 2 for s in steps)
    assert terms.loss_sum.item() == pytest.approx(expected, abs=1e-12)
    assert terms.loss_sum.item() < clipped(values, old, returns, mask).loss_sum.item()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, torch.where(mask, values - returns, 0.0), atol=1e-12, rtol=0)
    assert terms.stats["clipfrac"].item() == 0
    assert not terms.stats["clipfrac"].requires_grad


def test_a_wide_value_clip_is_plain_regression() -> None:
    """And rounding never counts as clipping."""
    mask = ragged_mask(4, 200)
    values, old, error = (random(4, 200, seed=s, dtype=torch.float32) for s in (16, 17, 18))
    returns = values + 0.01 * error
    terms = clipped_value_loss(values, old, returns, mask, value_clip_eps=50.0)
    assert terms.loss_sum.item() == pytest.approx(0.5 * (values - returns)[mask].square().sum().item(), rel=1e-6)
    assert terms.stats["clipfrac"].item() == 0


# Padding and the cut into micro-batches


@pytest.mark.parametrize("loss", [clipped, plain])
def test_the_cut_into_micro_batches_and_their_padding_change_nothing(loss: Callable[..., LossTerms]) -> None:
    *tensors, mask = case()
    tensors = [x.float() for x in tensors]
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
        assert sum(p.loss_sum.item() for p in parts) == pytest.approx(terms.loss_sum.item(), rel=1e-6)
        assert sum(p.stats["clipfrac"].item() for p in parts) == terms.stats["clipfrac"].item()
        torch.testing.assert_close(leaf.grad, whole.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", [clipped, plain])
def test_what_stands_under_the_mask_changes_neither_loss_nor_gradient(loss: Callable[..., LossTerms]) -> None:
    *tensors, mask = case()
    gradients = []
    for fill in (0.0, float("nan"), float("inf")):
        leaf, *others = (x.masked_fill(~mask, fill) for x in tensors)
        leaf.requires_grad_()
        terms = loss(leaf, *others, mask)
        assert terms.loss_sum.item() == loss(*tensors, mask).loss_sum.item()
        assert terms.stats["clipfrac"].item() == loss(*tensors, mask).stats["clipfrac"].item()
        terms.loss_sum.backward()
        assert leaf.grad is not None
        assert (leaf.grad[~mask] == 0).all()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_a_mask_without_tokens_gives_zero() -> None:
    values, old, returns, mask = case()
    terms = clipped(values, old, returns, torch.zeros_like(mask))
    assert terms.loss_sum.item() == terms.stats["clipfrac"].item() == 0
