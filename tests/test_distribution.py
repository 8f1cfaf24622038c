"""learner.distribution against hand-computed numbers, slow float64 loops and properties. About a second."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learner.distribution import ROWS_AT_ONCE, SampledFrom, kept, token_entropy, token_logprobs
from tests.test_ppo_maths import random

WAYS = [
    SampledFrom(),
    SampledFrom(temperature=0.6),
    SampledFrom(temperature=1.7),
    SampledFrom(top_k=4),
    SampledFrom(top_p=0.7),
    SampledFrom(top_k=5, top_p=0.8),
    SampledFrom(temperature=0.6, top_k=5, top_p=0.8),
    SampledFrom(temperature=2.5, top_k=7, top_p=0.95),
]


def slow_probabilities(logits: list[float], sampled_from: SampledFrom) -> list[float]:
    """The distribution in float64, said from the other end: likeliest first, until top_p of the rest is reached."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    weights = [math.exp(x / sampled_from.temperature) for x in logits]
    if sampled_from.top_k > 0:
        order = order[: sampled_from.top_k]
    left = sum(weights[i] for i in order)
    chosen: list[int] = []
    for i in order:
        if sum(weights[j] for j in chosen) / left >= sampled_from.top_p:
            break
        chosen.append(i)
    mass = sum(weights[i] for i in chosen)
    return [weights[i] / mass if i in chosen else 0.0 for i in range(len(logits))]


def case() -> Tensor:
    return random(6, 11, seed=0, scale=2.0, dtype=torch.float32)


# Which tokens are kept


def test_kept_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.05, 0.2, 0.15]]).log()
    assert kept(logits, top_k=0, top_p=1.0).tolist() == [[True] * 5]
    assert kept(logits, top_k=2, top_p=1.0).tolist() == [[False, True, False, True, False]]
    # Likeliest first: .5, .7, .85, .95, 1. The first to reach .8 is still in.
    assert kept(logits, top_k=0, top_p=0.8).tolist() == [[False, True, False, True, True]]
    assert kept(logits, top_k=0, top_p=0.6).tolist() == [[False, True, False, True, False]]


def test_top_p_is_of_what_top_k_leaves() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.05, 0.2, 0.15]]).log()
    # Of the three likeliest, .5, .2 and .15, the first two have 82%; of all five they have 70%.
    assert kept(logits, top_k=3, top_p=0.8).tolist() == [[False, True, False, True, False]]
    assert kept(logits, top_k=0, top_p=0.8).tolist() == [[False, True, False, True, True]]


def test_ties_at_the_edge_of_top_k_all_stay() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    assert kept(logits, top_k=2, top_p=1.0).tolist() == [[True, False, True, True, True, False]]


@pytest.mark.parametrize(("top_p", "count"), [(0.75, 3), (0.5, 2), (0.25, 1), (0.76, 4), (0.01, 1), (1.0, 4)])
def test_top_p_removes_a_token_whose_sum_is_exactly_at_the_edge(top_p: float, count: int) -> None:
    """Four equal probabilities are exact in binary: 1/4, 1/2, 3/4, 1 from below."""
    assert kept(torch.zeros(1, 4), top_k=0, top_p=top_p).sum().item() == count


def test_one_token_at_least_is_kept() -> None:
    logits = random(20, 50, seed=1, dtype=torch.float32)
    keep = kept(logits, top_k=0, top_p=1e-9)  # 1 - 1e-9 is 1 in float32
    assert keep.sum(-1).tolist() == [1] * 20
    assert torch.equal(keep.int().argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize("top_k", [0, -1, 11, 12])
def test_a_top_k_of_nothing_or_of_the_vocabulary_keeps_all(top_k: int) -> None:
    assert kept(case(), top_k=top_k, top_p=1.0).all()


def test_each_row_is_on_its_own_however_many_there_are() -> None:
    logits = random(2 * ROWS_AT_ONCE + 7, 9, seed=2, dtype=torch.float32)
    whole = kept(logits, top_k=5, top_p=0.7)
    alone = torch.cat([kept(row[None], top_k=5, top_p=0.7) for row in logits])
    assert torch.equal(whole, alone)
    assert kept(logits[:0], top_k=5, top_p=0.7).shape == (0, 9)


# Log-probabilities


def test_token_logprobs_by_hand() -> None:
    logits = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)]] * 2)
    token_ids = torch.tensor([2, 0])
    expected = {
        SampledFrom(): [5 / 8, 1 / 8],
        SampledFrom(temperature=0.5): [25 / 30, 1 / 30],  # the odds are squared: 1, 4, 25
        SampledFrom(top_k=2): [5 / 7, 0.0],
        SampledFrom(temperature=0.5, top_p=0.9): [25 / 29, 0.0],
        SampledFrom(top_p=0.5): [1.0, 0.0],
    }
    for sampled_from, probabilities in expected.items():
        logprobs = token_logprobs(logits, token_ids, sampled_from)
        torch.testing.assert_close(logprobs, torch.tensor(probabilities).log(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sampled_from", WAYS, ids=str)
def test_log_probabilities_and_entropy_are_of_the_distribution_that_is_sampled_from(sampled_from: SampledFrom) -> None:
    """Every token of the vocabulary, and the entropy, against a slow loop in float64. (PPO details 5)"""
    logits = case()
    entropy = token_entropy(logits, sampled_from)
    num_removed = 0
    for row in range(6):
        logprobs = token_logprobs(logits[row].expand(11, 11), torch.arange(11), sampled_from)
        probabilities = slow_probabilities(logits[row].tolist(), sampled_from)
        num_removed += probabilities.count(0.0)
        for logprob, p in zip(logprobs.tolist(), probabilities, strict=True):
            assert logprob == (pytest.approx(math.log(p), abs=1e-5) if p else -math.inf)
        expected = -sum(p * math.log(p) for p in probabilities if p)
        assert entropy[row].item() == pytest.approx(expected, abs=1e-5)
    assert (num_removed > 10) == (sampled_from.top_k > 0 or sampled_from.top_p < 1)


def test_the_temperature_comes_before_top_p() -> None:
    """Hot logits are nearly equal, so more of them are needed. (PPO details 5)"""
    logits, token_ids = torch.tensor([[4.0, 2.0, 0.0]]), torch.tensor([1])
    assert token_logprobs(logits, token_ids, SampledFrom(top_p=0.8)).item() == -math.inf
    warm = token_logprobs(logits, token_ids, SampledFrom(temperature=4.0, top_p=0.8)).item()
    assert warm == pytest.approx(math.log(1 / (1 + math.exp(0.5))), abs=1e-6)


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits = random(3, 50, seed=1, scale=5.0, dtype=torch.float32).bfloat16()
    token_ids, sampled_from = torch.tensor([1, 2, 3]), SampledFrom(temperature=0.8)
    logprobs, entropy = token_logprobs(logits, token_ids, sampled_from), token_entropy(logits, sampled_from)
    assert logprobs.dtype == entropy.dtype == torch.float32
    exact = torch.log_softmax(logits.double() / 0.8, -1)
    torch.testing.assert_close(logprobs.double(), exact[range(3), token_ids], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), atol=1e-5, rtol=0)
    cut = SampledFrom(top_k=3, top_p=0.9)
    assert token_logprobs(logits, token_ids, cut).dtype == token_entropy(logits, cut).dtype == torch.float32


def test_the_whole_vocabulary_costs_one_copy_of_the_logits() -> None:
    """Autograd keeps logits / T and nothing else of that size."""
    logits, sizes = case().requires_grad_(), {}

    def note(saved: Tensor) -> Tensor:
        if saved.numel() == logits.numel():
            sizes[saved.untyped_storage().data_ptr()] = saved.dtype
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        token_logprobs(logits, torch.zeros(6, dtype=torch.int64), SampledFrom(temperature=0.7))
    assert list(sizes.values()) == [torch.float32]


# Gradients


@pytest.mark.parametrize("sampled_from", WAYS, ids=str)
def test_gradients_of_log_probabilities_and_entropy(sampled_from: SampledFrom) -> None:
    """With q the distribution, d log q(a)/dx is (one-hot - q)/T, and d entropy/dx is -q (log q + entropy)/T."""
    logits = case()
    exact = torch.tensor([slow_probabilities(row, sampled_from) for row in logits.tolist()], dtype=torch.float64)
    token_ids = logits.argmax(-1)
    leaf = logits.clone().requires_grad_()
    token_logprobs(leaf, token_ids, sampled_from).sum().backward()
    assert leaf.grad is not None
    expected = (torch.nn.functional.one_hot(token_ids, 11) - exact) / sampled_from.temperature
    torch.testing.assert_close(leaf.grad.double(), expected, atol=1e-5, rtol=0)
    leaf = logits.clone().requires_grad_()
    token_entropy(leaf, sampled_from).sum().backward()
    assert leaf.grad is not None
    entropy = -torch.special.xlogy(exact, exact).sum(-1, keepdim=True)
    expected = -(torch.special.xlogy(exact, exact) + exact * entropy) / sampled_from.temperature
    torch.testing.assert_close(leaf.grad.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampled_from", [SampledFrom(top_k=3), SampledFrom(top_p=0.5)], ids=str)
def test_a_token_outside_the_kept_set_has_minus_infinity_and_a_finite_gradient(sampled_from: SampledFrom) -> None:
    leaf = case().requires_grad_()
    least = leaf.detach().argmin(-1)
    logprobs = token_logprobs(leaf, least, sampled_from)
    assert logprobs.tolist() == [-math.inf] * 6
    logprobs.sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad[range(6), least] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_entropy_is_finite_whatever_is_removed(scale: float) -> None:
    for sampled_from in (SampledFrom(top_k=1), SampledFrom(top_k=3, top_p=0.9), SampledFrom(top_p=1e-4)):
        leaf = (case() * scale).requires_grad_()
        entropy = token_entropy(leaf, sampled_from)
        entropy.sum().backward()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
        assert (entropy >= 0).all()
        if sampled_from.top_k == 1:
            assert (entropy == 0).all()
            assert (leaf.grad == 0).all()
            assert (token_logprobs(leaf.detach(), leaf.argmax(-1), sampled_from) == 0).all()


def test_the_entropy_of_equal_logits_is_the_logarithm_of_their_number() -> None:
    logits = torch.zeros(1, 16)
    assert token_entropy(logits, SampledFrom(temperature=0.3)).item() == pytest.approx(math.log(16), abs=1e-6)
    assert token_entropy(logits, SampledFrom(top_p=0.5)).item() == pytest.approx(math.log(8), abs=1e-6)
    assert token_entropy(logits, SampledFrom(top_k=4)).item() == pytest.approx(math.log(16), abs=1e-6)  # all tie
