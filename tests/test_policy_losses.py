"""learner.policy_losses against numbers by hand, slow float64 loops, finite differences, properties. A second."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from learner.policy_losses import (
    PolicyLoss,
    TokenLoss,
    approx_kl,
    cispo_loss,
    clipped_loss,
    gspo_loss,
    token_weights,
)
from learner.ppo import last_position
from tests.test_ppo_maths import ragged_mask, random

CLIPPED: PolicyLoss = partial(clipped_loss, low=0.2, high=0.3)
DUAL: PolicyLoss = partial(clipped_loss, low=0.2, high=0.3, dual_clip=1.6)
GSPO: PolicyLoss = partial(gspo_loss, low=0.05, high=0.08)
CISPO: PolicyLoss = partial(cispo_loss, low=0.2, high=0.3)
Loss = Callable[..., TokenLoss]
LOSSES = pytest.mark.parametrize("loss", [CLIPPED, DUAL, GSPO, CISPO], ids=["clipped", "dual", "gspo", "cispo"])
AGGREGATIONS = pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])


def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New and old log-probabilities, advantages and a mask with padding and holes; some ratios are clipped."""
    old = -random(4, 9, seed=8).abs()
    return old + random(4, 9, seed=9, scale=0.4), old, random(4, 9, seed=10), ragged_mask(4, 9)


def one(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def at_ratios(loss: Loss, ratios: Tensor, advantages: Tensor, mask: Tensor | None = None) -> TokenLoss:
    return loss(ratios.log(), torch.zeros_like(ratios), advantages, mask if mask is not None else ratios > 0)


def gradient(loss: Loss, logprobs: Tensor, *arguments: Tensor) -> Tensor:
    leaf = logprobs.clone().requires_grad_()
    loss(leaf, *arguments).loss.sum().backward()
    assert leaf.grad is not None
    return leaf.grad


# The clipped loss


def test_clipped_loss_by_hand() -> None:
    ratios, advantages = one(1.0, 1.5, 1.5, 0.5, 0.6, 3.0), one(2.0, 1.0, -1.0, 1.0, -1.0, 100.0)
    mask = torch.tensor([[True, True, True, True, True, False]])
    terms = at_ratios(CLIPPED, ratios, advantages, mask)
    # min(r A, clip(r, .8, 1.3) A) = 2, 1.3 (clipped), -1.5, .5, -.8 (clipped)
    torch.testing.assert_close(terms.loss, one(-2, -1.3, 1.5, -0.5, 0.8, 0))
    torch.testing.assert_close(terms.ratio, one(1.0, 1.5, 1.5, 0.5, 0.6, 0.0))
    assert terms.clipped.tolist() == [[False, True, False, False, True, False]]


@pytest.mark.parametrize("dual_clip", [None, 1.35])
def test_clipped_loss_and_gradient_equal_a_slow_loop(dual_clip: float | None) -> None:
    logprobs, old, advantages, mask = case()
    loss = partial(clipped_loss, low=0.2, high=0.3, dual_clip=dual_clip)
    terms, grad = loss(logprobs, old, advantages, mask), gradient(loss, logprobs, old, advantages, mask)
    num_clipped = num_dual = 0
    for b in range(4):
        for t in range(9):
            ratio, advantage = math.exp(logprobs[b, t] - old[b, t]), advantages[b, t].item()
            if not mask[b, t]:
                assert terms.loss[b, t] == grad[b, t] == terms.ratio[b, t] == 0
                assert not terms.clipped[b, t]
                continue
            gain = min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
            dual = dual_clip is not None and advantage < 0 and ratio > dual_clip
            cut = dual or (ratio > 1.3 and advantage > 0) or (ratio < 0.8 and advantage < 0)
            if dual_clip is not None and advantage < 0:
                gain = max(gain, dual_clip * advantage)
            assert terms.loss[b, t].item() == pytest.approx(-gain, abs=1e-12)
            assert terms.ratio[b, t].item() == pytest.approx(ratio, abs=1e-12)
            assert terms.clipped[b, t].item() == cut
            assert grad[b, t].item() == pytest.approx(0.0 if cut else -advantage * ratio, abs=1e-12)
            num_clipped, num_dual = num_clipped + cut, num_dual + dual
    assert num_clipped > 4
    assert (num_dual > 0) == (dual_clip is not None)


def test_clip_higher_lets_rising_tokens_alone_go_further() -> None:
    ratios, advantages = one(1.25, 1.25, 0.75, 0.75), one(1.0, -1.0, 1.0, -1.0)
    even = at_ratios(partial(clipped_loss, low=0.2, high=0.2), ratios, advantages)
    higher = at_ratios(partial(clipped_loss, low=0.2, high=0.28), ratios, advantages)
    assert even.clipped.tolist() == [[True, False, False, True]]
    assert higher.clipped.tolist() == [[False, False, False, True]]
    torch.testing.assert_close(higher.loss - even.loss, one(-0.05, 0, 0, 0))


def test_dual_clip_by_hand() -> None:
    """For a negative advantage the loss is at most -c A; PPO alone lets it grow with the ratio."""
    ratios, advantages = one(5.0, 5.0, 2.0, 0.5), one(-2.0, 2.0, -2.0, -2.0)
    loss = partial(clipped_loss, low=0.2, high=0.2)
    alone, dual = (at_ratios(x, ratios, advantages) for x in (loss, partial(loss, dual_clip=3.0)))
    torch.testing.assert_close(alone.loss, one(10, -2.4, 4, 1.6))
    torch.testing.assert_close(dual.loss, one(6, -2.4, 4, 1.6))
    assert alone.clipped.tolist() == [[False, True, False, True]]
    assert dual.clipped.tolist() == [[True, True, False, True]]
    assert gradient(partial(loss, dual_clip=3.0), ratios.log(), 0 * ratios, advantages, ratios > 0)[0, 0] == 0


def test_dual_clip_binds_only_for_negative_advantages() -> None:
    logprobs, old, advantages, mask = case()
    logprobs = old + 5 * (logprobs - old)
    alone, dual = CLIPPED(logprobs, old, advantages, mask), DUAL(logprobs, old, advantages, mask)
    assert torch.equal(dual.loss, torch.where(advantages < 0, torch.minimum(alone.loss, -1.6 * advantages), alone.loss))
    bound = dual.clipped & ~alone.clipped
    assert bound.sum() > 2
    assert (advantages[bound] < 0).all()
    assert (dual.ratio[bound] > 1.6).all()
    with pytest.raises(AssertionError):
        clipped_loss(logprobs, old, advantages, mask, low=0.2, high=0.2, dual_clip=1.0)


# GSPO


def test_gspo_loss_by_hand() -> None:
    """Ratios 2 and 1/8 of two tokens: s = 1/2; ratios 2, (masked), 1/2: s = 1."""
    ratios = torch.tensor([[2.0, 0.125, 1.0], [2.0, 64.0, 0.5]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-3.0, -3.0, -3.0]], dtype=torch.float64)
    terms = at_ratios(partial(gspo_loss, low=0.2, high=0.2), ratios, advantages, mask)
    torch.testing.assert_close(terms.ratio, torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(terms.loss, torch.tensor([[-0.5, -0.5, 0.0], [3.0, 0.0, 3.0]], dtype=torch.float64))
    assert not terms.clipped.any()
    terms = at_ratios(partial(gspo_loss, low=0.2, high=0.2), ratios, -advantages, mask)
    torch.testing.assert_close(terms.loss[0], one(0.8, 0.8, 0.0)[0])  # A = -1, s = 1/2: clipped
    assert terms.clipped.tolist() == [[True, True, False], [False, False, False]]


def test_gspo_loss_and_gradient_equal_a_slow_loop() -> None:
    logprobs, old, _, mask = case()
    advantages = random(4, 1, seed=10).expand(4, 9)  # the paper's: one for a response
    terms, grad = GSPO(logprobs, old, advantages, mask), gradient(GSPO, logprobs, old, advantages, mask)
    num_clipped = 0
    for b in range(4):
        steps, advantage = [t for t in range(9) if mask[b, t]], advantages[b, 0].item()
        s = math.exp(sum((logprobs[b, t] - old[b, t]).item() for t in steps) / len(steps))
        gain = min(s * advantage, min(max(s, 0.95), 1.08) * advantage)
        cut = (s > 1.08 and advantage > 0) or (s < 0.95 and advantage < 0)
        for t in range(9):
            inside = t in steps
            assert terms.loss[b, t].item() == pytest.approx(-gain if inside else 0.0, abs=1e-12)
            assert terms.ratio[b, t].item() == pytest.approx(s if inside else 0.0, abs=1e-12)
            assert terms.clipped[b, t].item() == (cut and inside)
            # Equation 10 of the paper times |y|: each token has the gradient s A, all of them have 1/|y| of |y|.
            assert grad[b, t].item() == pytest.approx(-s * advantage if inside and not cut else 0.0, abs=1e-12)
        num_clipped += cut
    assert 0 < num_clipped < 4


def test_gspo_of_one_token_is_the_clipped_loss() -> None:
    logprobs, old, advantages, _ = (x.reshape(36, 1) for x in case())
    mask = torch.ones(36, 1, dtype=torch.bool)
    sequence, token = partial(gspo_loss, low=0.2, high=0.3), CLIPPED
    left, right = sequence(logprobs, old, advantages, mask), token(logprobs, old, advantages, mask)
    assert torch.equal(left.loss, right.loss)
    assert torch.equal(left.ratio, right.ratio)
    assert torch.equal(left.clipped, right.clipped)
    arguments = (logprobs, old, advantages, mask)
    assert torch.equal(gradient(sequence, *arguments), gradient(token, *arguments))


def test_gspo_of_equal_ratios_is_the_clipped_loss() -> None:
    _, old, _, mask = case()
    logprobs, advantages = old + random(4, 1, seed=20, scale=0.3), random(4, 1, seed=21).expand(4, 9)
    sequence = partial(gspo_loss, low=0.2, high=0.3)
    arguments = (logprobs, old, advantages, mask)
    torch.testing.assert_close(sequence(*arguments).loss, CLIPPED(*arguments).loss)
    torch.testing.assert_close(gradient(sequence, *arguments), gradient(CLIPPED, *arguments))


# CISPO


def test_cispo_loss_by_hand() -> None:
    logprobs, ratios, advantages = one(-1.0, -2.0, -3.0, -4.0), one(1.0, 2.0, 0.5, 1.25), one(2.0, 1.0, 1.0, -1.0)
    mask = torch.ones(1, 4, dtype=torch.bool)
    terms = CISPO(logprobs, logprobs - ratios.log(), advantages, mask)
    torch.testing.assert_close(terms.loss, one(2.0, 1.3 * 2, 0.8 * 3, -1.25 * 4))  # weights 1, 1.3, .8, 1.25
    torch.testing.assert_close(terms.ratio, ratios)
    assert terms.clipped.tolist() == [[False, True, True, False]]
    grad = gradient(CISPO, logprobs, logprobs - ratios.log(), advantages, mask)
    torch.testing.assert_close(grad, one(-2.0, -1.3, -0.8, 1.25))  # a cut weight still has a gradient


def test_cispo_gradient_equals_finite_differences_with_the_weight_held_fixed() -> None:
    logprobs, old, advantages, mask = case()
    weight = torch.exp(logprobs - old).clamp(0.8, 1.3)

    def fixed(x: Tensor) -> Tensor:
        return torch.where(mask, -weight * advantages * x, 0.0).sum()

    torch.testing.assert_close(CISPO(logprobs, old, advantages, mask).loss.sum(), fixed(logprobs))
    grad = gradient(CISPO, logprobs, old, advantages, mask)
    for index in range(36):
        shift = torch.zeros(36, dtype=torch.float64)
        shift[index] = 1e-6
        step = shift.view(4, 9)
        numeric = (fixed(logprobs + step) - fixed(logprobs - step)) / 2e-6
        assert grad.view(-1)[index].item() == pytest.approx(numeric.item(), abs=1e-8)


def test_cispo_inside_the_range_has_the_gradient_of_the_clipped_loss() -> None:
    logprobs, old, advantages, mask = case()
    left = gradient(partial(cispo_loss, low=0.99, high=99.0), logprobs, old, advantages, mask)
    right = gradient(partial(clipped_loss, low=0.99, high=99.0), logprobs, old, advantages, mask)
    torch.testing.assert_close(left, right)


def test_cispo_without_a_lower_bound() -> None:
    ratios = one(1e-3, 0.5)
    terms = at_ratios(partial(cispo_loss, low=1.0, high=0.3), ratios, one(1.0, 1.0))
    assert not terms.clipped.any()


# All of them


@pytest.mark.parametrize("loss", [CLIPPED, DUAL, GSPO], ids=["clipped", "dual", "gspo"])
def test_gradients_equal_finite_differences(loss: Loss) -> None:
    logprobs, old, advantages, mask = case()
    leaf = logprobs.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, old, advantages, mask).loss, leaf)


@LOSSES
def test_at_the_old_policy_the_gradient_is_the_policy_gradient(loss: Loss) -> None:
    _, old, advantages, mask = case()
    terms = loss(old, old, advantages, mask)
    assert torch.equal(terms.ratio, mask.double())
    assert not terms.clipped.any()
    expected = torch.where(mask, -advantages, 0.0)
    if loss is GSPO:  # the mean of the advantages of the response
        expected = torch.where(mask, expected.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True), 0.0)
    torch.testing.assert_close(gradient(loss, old, old, advantages, mask), expected)


@LOSSES
def test_ratio_and_clipped_carry_no_gradient(loss: Loss) -> None:
    logprobs, old, advantages, mask = case()
    terms = loss(logprobs.requires_grad_(), old, advantages, mask)
    assert terms.loss.requires_grad
    assert not terms.ratio.requires_grad
    assert terms.clipped.dtype == torch.bool
    assert terms.loss.shape == terms.ratio.shape == terms.clipped.shape == mask.shape


@LOSSES
@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
def test_what_stands_outside_the_mask_changes_neither_loss_nor_gradient(loss: Loss, fill: float) -> None:
    *tensors, mask = case()
    spoilt = [x.masked_fill(~mask, fill) for x in tensors]
    clean, terms = loss(*tensors, mask), loss(*spoilt, mask)
    assert torch.equal(terms.loss, clean.loss)
    assert torch.equal(terms.ratio, clean.ratio)
    assert torch.equal(terms.clipped, clean.clipped)
    assert torch.equal(gradient(loss, *spoilt, mask), gradient(loss, *tensors, mask))
    assert (terms.loss[~mask] == 0).all()


@LOSSES
def test_a_response_without_a_token_in_the_loss_has_none(loss: Loss) -> None:
    *tensors, mask = case()
    fewer = mask.clone()
    fewer[2] = False
    terms, grad = loss(*tensors, fewer), gradient(loss, *tensors, fewer)
    assert (terms.loss[2] == 0).all()
    assert (grad[2] == 0).all()
    others = [0, 1, 3]
    assert torch.equal(terms.loss[others], loss(*tensors, mask).loss[others])
    assert torch.equal(grad[others], gradient(loss, *tensors, mask)[others])


@LOSSES
def test_log_ratios_are_clamped_before_exp_so_that_one_mismatch_cannot_overflow(loss: Loss) -> None:
    """exp(200) is no float32. (PPO details 7)"""
    logprobs, mask = torch.tensor([[200.0], [-200.0]]), torch.ones(2, 1, dtype=torch.bool)
    for sign in (1.0, -1.0):
        advantages = torch.full((2, 1), sign)
        terms = loss(logprobs, torch.zeros(2, 1), advantages, mask)
        assert torch.isfinite(terms.loss).all()
        assert terms.ratio.flatten().tolist() == pytest.approx([math.exp(10), math.exp(-10)])
        assert torch.isfinite(gradient(loss, logprobs, torch.zeros(2, 1), advantages, mask)).all()


# KL of the update


def test_approx_kl_by_hand() -> None:
    ratios = one(1.0, 2.0, 0.5)
    expected = one(0.0, 1 - math.log(2), -0.5 + math.log(2))
    got = approx_kl(ratios.log().requires_grad_(), torch.zeros_like(ratios))
    torch.testing.assert_close(got, expected)
    assert not got.requires_grad


def test_approx_kl_has_the_kl_of_old_from_new_as_its_mean() -> None:
    old, new = torch.log_softmax(random(6, seed=11), -1), torch.log_softmax(random(6, seed=12), -1)
    expectation = (old.exp() * approx_kl(new, old)).sum().item()
    assert expectation == pytest.approx((old.exp() * (old - new)).sum().item(), abs=1e-12)


def test_approx_kl_is_clamped_before_exp() -> None:
    """(PPO details 7)"""
    got = approx_kl(torch.tensor([500.0, -500.0]), torch.zeros(2))
    assert got.tolist() == pytest.approx([math.exp(10) - 11, math.exp(-10) + 9])


# Adding up


def test_token_weights_by_hand() -> None:
    mask = torch.tensor([[True, True, False, True], [True, False, False, False], [False, False, False, False]])
    expected = {  # of a mini-batch of 8 tokens and 5 responses, of which these are three
        "token": [[1 / 8, 1 / 8, 0, 1 / 8], [1 / 8, 0, 0, 0], [0, 0, 0, 0]],
        "sequence": [[1 / 15, 1 / 15, 0, 1 / 15], [1 / 5, 0, 0, 0], [0, 0, 0, 0]],
        "constant": [[1 / 50, 1 / 50, 0, 1 / 50], [1 / 50, 0, 0, 0], [0, 0, 0, 0]],
    }
    for aggregation, numbers in expected.items():
        weights = token_weights(mask, aggregation, num_tokens=8, num_sequences=5, budget=10)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, torch.tensor(numbers), atol=1e-7, rtol=0)


@AGGREGATIONS
def test_no_tokens_at_all_weigh_nothing(aggregation: str) -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for num_sequences in (0, 2):
        weights = token_weights(mask, aggregation, num_tokens=0, num_sequences=num_sequences, budget=3)
        assert (weights == 0).all()


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="median"):
        token_weights(torch.ones(1, 1, dtype=torch.bool), "median", num_tokens=1, num_sequences=1, budget=1)


def slow_mean(losses: Tensor, mask: Tensor, aggregation: str, budget: int) -> float:
    rows = [[losses[b, t].item() for t in range(losses.shape[1]) if mask[b, t]] for b in range(losses.shape[0])]
    if aggregation == "token":
        return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    if aggregation == "sequence":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(sum(row) for row in rows) / (len(rows) * budget)


@LOSSES
@AGGREGATIONS
def test_padding_and_the_cut_into_micro_batches_change_nothing(loss: Loss, aggregation: str) -> None:
    """The weights come from counts over the whole mini-batch, not from each micro-batch's own. (PPO details 8)"""
    *tensors, mask = case()
    tensors = [x.float() for x in tensors]
    weights = partial(token_weights, aggregation=aggregation, num_tokens=float(mask.sum()), num_sequences=4, budget=16)

    def run(cut: list[list[int]], crop: bool) -> tuple[float, Tensor]:
        leaf = tensors[0].clone().requires_grad_()
        total = torch.zeros(())
        for rows in cut:
            width = int(last_position(mask[rows]).max()) + 1 if crop else 9
            part = [x[rows][:, :width] for x in (leaf, *tensors[1:])]
            seen = mask[rows][:, :width]
            total = total + (weights(seen) * loss(*part, seen).loss).sum()
        total.backward()
        assert leaf.grad is not None
        return total.item(), leaf.grad

    expected = slow_mean(loss(*tensors, mask).loss, mask, aggregation, budget=16)
    whole, whole_grad = run([[0, 1, 2, 3]], crop=False)
    assert whole == pytest.approx(expected, abs=1e-6)
    for cut in ([[0, 1, 2, 3]], [[3], [1, 0], [2]], [[2, 3], [0, 1]]):
        total, grad = run(cut, crop=True)
        assert total == pytest.approx(whole, abs=1e-6)
        torch.testing.assert_close(grad, whole_grad, atol=1e-6, rtol=0)


def test_a_mean_of_the_means_of_micro_batches_would_be_another_number() -> None:
    """(PPO details 8)"""
    logprobs, old, advantages, mask = case()
    losses = CLIPPED(logprobs, old, advantages, mask).loss
    whole = slow_mean(losses, mask, "token", 1)
    parts = [slow_mean(losses[rows], mask[rows], "token", 1) for rows in ([0, 1], [2, 3])]
    assert abs(sum(parts) / 2 - whole) > 1e-3


@AGGREGATIONS
def test_what_each_aggregation_holds_equal(aggregation: str) -> None:
    """Every token of the batch; every response; a token, however long its response and the others are."""
    mask = ragged_mask(4, 9)
    num_tokens = float(mask.sum())
    weights = token_weights(mask, aggregation, num_tokens=num_tokens, num_sequences=4, budget=9)
    lengths = mask.sum(-1).tolist()
    expected = {
        "token": [length / num_tokens for length in lengths],
        "sequence": [1 / 4] * 4,
        "constant": [length / (4 * 9) for length in lengths],
    }
    assert weights.sum(-1).tolist() == pytest.approx(expected[aggregation], abs=1e-6)
