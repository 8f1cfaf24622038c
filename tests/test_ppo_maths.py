"""KL, its coefficient and token rewards against hand-computed numbers and properties. A second."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learner.kl_control import KLController
from learner.ppo import (
    MAX_LOG_RATIO,
    kl_penalty,
    last_position,
    masked,
    masked_sum,
    token_rewards,
)


def random(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ragged_mask(num_rows: int, length: int) -> Tensor:
    """Rows of different lengths with one token inside each that the policy did not write."""
    mask = torch.zeros(num_rows, length, dtype=torch.bool)
    for row in range(num_rows):
        mask[row, : length - 2 * row] = True
        mask[row, 1] = False
    return mask


# KL


def test_kl_estimators_by_hand() -> None:
    logprobs, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])  # d = 0.5, -1
    expected = {
        "k1": [0.5, -1.0],
        "k2": [0.125, 0.5],
        "k3": [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1],
    }
    for estimator, numbers in expected.items():
        got = kl_penalty(logprobs, ref, estimator=estimator)
        torch.testing.assert_close(got, torch.tensor([numbers]), atol=1e-6, rtol=0)


def test_k1_and_k3_have_the_kl_as_their_mean_over_samples_of_the_policy() -> None:
    policy = torch.log_softmax(random(8, seed=3), -1)
    reference = torch.log_softmax(random(8, seed=4), -1)
    kl = (policy.exp() * (policy - reference)).sum().item()
    assert kl > 0.2
    for estimator in ("k1", "k3"):  # the exact expectation, no sampling noise
        mean = (policy.exp() * kl_penalty(policy, reference, estimator=estimator)).sum().item()
        assert mean == pytest.approx(kl, abs=1e-12), estimator
    samples = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(5))
    estimates = {e: kl_penalty(policy[samples], reference[samples], estimator=e) for e in ("k1", "k3")}
    for estimator, estimate in estimates.items():
        assert estimate.mean().item() == pytest.approx(kl, abs=0.01), estimator
    assert estimates["k1"].min() < 0 <= estimates["k3"].min()


def test_k2_is_the_kl_to_third_order() -> None:
    policy = torch.log_softmax(random(8, seed=3), -1)
    reference = torch.log_softmax(policy + random(8, seed=4, scale=0.01), -1)
    kl = (policy.exp() * (policy - reference)).sum().item()
    mean = (policy.exp() * kl_penalty(policy, reference, estimator="k2")).sum().item()
    assert mean == pytest.approx(kl, rel=0.02)


def test_k3_is_never_negative_and_zero_only_at_equality() -> None:
    difference = torch.arange(-300, 301, dtype=torch.float64) / 10
    k3 = kl_penalty(difference, torch.zeros_like(difference), estimator="k3")
    assert (k3 >= 0).all()
    assert k3.argmin().item() == 300
    assert k3[300].item() == 0.0


def test_k3_is_clamped_before_exp_so_that_one_mismatch_cannot_overflow() -> None:
    """Neither its value nor its gradient. (PPO details 7)"""
    leaf = torch.tensor([-500.0, 500.0]).requires_grad_()
    k3 = kl_penalty(leaf, torch.zeros(2), estimator="k3")
    assert MAX_LOG_RATIO == 10
    assert k3.tolist() == pytest.approx([math.exp(10) - 1 - 500, math.exp(-10) - 1 + 500])
    k3.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [1.0, 1.0]  # of the linear part: the other is cut off


def expected_gradient(logits: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """The mean over samples of the policy of the gradient of the estimate as a loss, exactly."""
    total = torch.zeros_like(logits)
    probabilities = torch.softmax(logits, -1)
    for token, p in enumerate(probabilities):
        leaf = logits.clone().requires_grad_()
        logprob = torch.log_softmax(leaf, -1)[token]
        kl_penalty(logprob, reference[token], estimator=estimator).backward()
        assert leaf.grad is not None
        total += p * leaf.grad
    return total


def test_as_losses_k1_has_no_gradient_k2_that_of_the_kl_and_k3_that_of_the_other_kl() -> None:
    """Means over samples of the policy: of grad log p, of log(p/q) grad log p, of (1 - q/p) grad log p."""
    logits, reference = random(8, seed=3), torch.log_softmax(random(8, seed=4), -1)
    leaf = logits.clone().requires_grad_()
    policy = torch.log_softmax(leaf, -1)
    (kl,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), leaf, retain_graph=True)
    (other_kl,) = torch.autograd.grad((reference.exp() * (reference - policy)).sum(), leaf)
    assert kl.abs().max() > 0.05
    torch.testing.assert_close(expected_gradient(logits, reference, "k1"), torch.zeros(8).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected_gradient(logits, reference, "k2"), kl, atol=1e-12, rtol=0)
    torch.testing.assert_close(expected_gradient(logits, reference, "k3"), other_kl, atol=1e-12, rtol=0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_of_the_estimators_equal_finite_differences(estimator: str) -> None:
    logprobs, reference = random(3, 5, seed=5).requires_grad_(), random(3, 5, seed=6)
    assert torch.autograd.gradcheck(lambda x: kl_penalty(x, reference, estimator=estimator), logprobs)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(torch.zeros(1), torch.zeros(1), estimator="k4")


# Rewards per token


def test_token_rewards_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False], [True, False, True, False], [True, False, False, False]])
    kl = torch.tensor([[0.1, 0.2, 0.3, 9.0], [1.0, 9.0, -2.0, 9.0], [0.5, 9.0, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0, 0.25]), kl, mask, kl_coef=0.5)
    expected = torch.tensor([[-0.05, -0.1, 1.85, 0.0], [-0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected, atol=1e-6, rtol=0)


def test_the_score_stands_once_on_the_last_token_the_policy_wrote() -> None:
    """Never one past the end, and before tokens that the environment wrote. (PPO details 1)"""
    mask = ragged_mask(4, 9)
    mask[0, -1] = False  # the last token of the row is the environment's
    kl = torch.zeros(4, 9)
    scores = torch.tensor([3.0, -5.0, 7.0, 11.0])
    rewards = token_rewards(scores, kl, mask, kl_coef=0.3)
    for row in range(4):
        last = max(t for t in range(9) if mask[row, t])
        assert [t for t in range(9) if rewards[row, t] != 0] == [last]
        assert rewards[row, last] == scores[row]
    assert last_position(mask).tolist() == [7, 6, 4, 2]


def test_where_a_response_ends_is_found_by_position_when_pad_is_eos() -> None:
    """Ids 7 at the end of two rows: one is the EOS that the policy wrote, the other padding. (PPO details 12)"""
    eos = pad = 7
    responses = [[3, eos, 4, eos], [3, 5]]  # an EOS id inside a response ends nothing either
    ids = torch.tensor([row + [pad] * (5 - len(row)) for row in responses])
    mask = torch.tensor([[t < len(row) for t in range(5)] for row in responses])
    rewards = token_rewards(torch.tensor([2.0, 3.0]), torch.zeros(2, 5), mask, kl_coef=0.1)
    assert rewards.tolist() == [[0, 0, 0, 2, 0], [0, 3, 0, 0, 0]]
    by_id = [int((row == pad).int().argmax()) - 1 for row in ids]  # what looking for the first pad would find
    assert by_id[0] != 3 == last_position(mask)[0]


def test_the_sum_of_rewards_is_score_minus_kl_whatever_stands_under_the_mask() -> None:
    mask = ragged_mask(3, 8)
    kl, scores = random(3, 8, seed=6), random(3, seed=7)
    rewards = token_rewards(scores, kl.masked_fill(~mask, float("nan")), mask, kl_coef=0.2)
    for row in range(3):
        expected = scores[row].item() - 0.2 * sum(kl[row, t].item() for t in range(8) if mask[row, t])
        assert rewards[row].sum().item() == pytest.approx(expected, abs=1e-12)


def test_a_response_without_a_token_of_the_policy_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="at least one token"):
        token_rewards(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool), kl_coef=0.1)


def test_masked_sum_by_hand() -> None:
    values = torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), 4.0, 8.0]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert masked(values, mask).tolist() == [[1, 0, 2], [0, 4, 0]]
    assert masked_sum(values, mask).item() == 7
    assert masked_sum(values, torch.zeros_like(mask)).item() == 0


# The KL coefficient


def test_a_kl_that_is_not_finite_leaves_the_coefficient_alone() -> None:
    controller = KLController(0.2, target=6.0)
    assert controller.updated(float("nan"), num_rollouts=8) == controller
    assert controller.updated(float("inf"), num_rollouts=8) == controller


def test_the_adaptive_coefficient_by_hand() -> None:
    """coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon. (PPO details 15)"""
    controller = KLController(0.2, target=6.0, horizon=10_000)
    assert controller.updated(6.0, num_rollouts=512).coef == pytest.approx(0.2)
    assert controller.updated(6.6, num_rollouts=512).coef == pytest.approx(0.2 * (1 + 0.1 * 0.0512))
    assert controller.updated(60.0, num_rollouts=512).coef == pytest.approx(0.2 * (1 + 0.2 * 0.0512))  # clipped
    assert controller.updated(0.0, num_rollouts=512).coef == pytest.approx(0.2 * (1 - 0.2 * 0.0512))
    assert controller.updated(-5.0, num_rollouts=512).coef == pytest.approx(0.2 * (1 - 0.2 * 0.0512))
    twice = controller.updated(60.0, num_rollouts=512).updated(60.0, num_rollouts=512)
    assert twice.coef == pytest.approx(0.2 * (1 + 0.2 * 0.0512) ** 2)
    assert (twice.target, twice.horizon) == (6.0, 10_000)
    assert controller.coef == 0.2


def test_a_coefficient_without_a_target_stays() -> None:
    controller = KLController(0.05)
    assert controller.updated(1e9, num_rollouts=100) == controller
