"""Log-probabilities, KL and token rewards of learner.ppo against hand-computed numbers, slow loops and properties."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learner.ppo import (
    MAX_LOG_RATIO,
    KLController,
    kl_penalty,
    last_position,
    masked_sum,
    token_entropy,
    token_logprobs,
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


# Log-probabilities and entropy


def test_token_logprobs_by_hand() -> None:
    logits = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)]] * 2)
    token_ids = torch.tensor([2, 0])
    torch.testing.assert_close(
        token_logprobs(logits, token_ids, temperature=1.0), torch.tensor([5 / 8, 1 / 8]).log(), atol=1e-6, rtol=0
    )
    # At temperature 1/2 the odds are squared: 1, 4, 25 of 30.
    torch.testing.assert_close(
        token_logprobs(logits, token_ids, temperature=0.5), torch.tensor([25 / 30, 1 / 30]).log(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_token_logprobs_and_entropy_equal_a_slow_loop(temperature: float) -> None:
    logits = random(5, 11, seed=0, scale=4.0, dtype=torch.float32)
    token_ids = torch.tensor([0, 10, 3, 3, 7])
    logprobs = token_logprobs(logits, token_ids, temperature=temperature)
    entropy = token_entropy(logits, temperature=temperature)
    for row in range(5):
        weights = [math.exp(x / temperature) for x in logits[row].tolist()]
        probabilities = [w / sum(weights) for w in weights]
        assert logprobs[row].item() == pytest.approx(math.log(probabilities[int(token_ids[row])]), abs=1e-5)
        assert entropy[row].item() == pytest.approx(-sum(p * math.log(p) for p in probabilities), abs=1e-5)


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits = random(3, 50, seed=1, scale=5.0, dtype=torch.float32).bfloat16()
    token_ids = torch.tensor([1, 2, 3])
    logprobs = token_logprobs(logits, token_ids, temperature=0.8)
    assert logprobs.dtype == token_entropy(logits, temperature=0.8).dtype == torch.float32
    exact = torch.log_softmax(logits.double() / 0.8, -1)
    torch.testing.assert_close(logprobs.double(), exact[range(3), token_ids], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        token_entropy(logits, temperature=0.8).double(), -(exact.exp() * exact).sum(-1), atol=1e-5, rtol=0
    )


def test_the_entropy_of_equal_logits_is_the_logarithm_of_their_number() -> None:
    assert token_entropy(torch.zeros(1, 16), temperature=0.3).item() == pytest.approx(math.log(16), abs=1e-6)


def test_the_gradient_of_token_logprobs_is_one_hot_minus_softmax_over_temperature() -> None:
    logits = random(2, 5, seed=2, dtype=torch.float32).requires_grad_()
    token_ids = torch.tensor([4, 1])
    token_logprobs(logits, token_ids, temperature=0.7).sum().backward()
    expected = (torch.nn.functional.one_hot(token_ids, 5) - torch.softmax(logits.detach() / 0.7, -1)) / 0.7
    torch.testing.assert_close(logits.grad, expected, atol=1e-6, rtol=0)


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


def test_one_mismatch_cannot_overflow_k3() -> None:
    k3 = kl_penalty(torch.tensor([-500.0, 500.0]), torch.zeros(2), estimator="k3")
    assert k3.tolist() == pytest.approx([math.exp(MAX_LOG_RATIO) - 1 - 500, math.exp(-MAX_LOG_RATIO) - 1 + 500])


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
    assert masked_sum(values, mask).item() == 7
    assert masked_sum(values, torch.zeros_like(mask)).item() == 0


# The KL coefficient


def test_the_adaptive_coefficient_by_hand() -> None:
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
