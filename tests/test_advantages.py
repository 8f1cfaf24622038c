"""learner.advantages against hand-computed numbers, slow float64 sums over the formulas and properties. A second."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.advantages import (
    dr_grpo,
    gae,
    grpo,
    length_adaptive_lambda,
    mean_and_std,
    moments,
    returns_to_go,
    rloo,
    spread,
    whiten,
)

HOLES = [
    [1, 1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 1, 0, 0, 0],
    [1, 0, 0, 1, 1, 0, 1, 0],  # another wrote tokens 1, 2 and 5
    [0, 0, 1, 0, 0, 0, 0, 0],
]


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask with padding and with holes; other numbers stand where the mask is False."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(4, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return rewards, values, torch.tensor(HOLES, dtype=torch.bool)


def written(mask: Tensor, row: int) -> list[int]:
    return [t for t in range(mask.shape[1]) if mask[row, t]]


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.2]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, gae_lambda=0.5)
    # deltas: .9*.4-.5 = -.14, .9*.2-.4 = -.22, 1-.2 = .8; A2 = .8, A1 = -.22+.45*.8 = .14, A0 = -.14+.45*.14 = -.077
    torch.testing.assert_close(advantages, torch.tensor([[-0.077, 0.14, 0.8]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, torch.tensor([[0.423, 0.54, 1.0]]), atol=1e-6, rtol=0)


def test_gae_carries_over_tokens_that_the_policy_did_not_write_by_hand() -> None:
    """(PPO details 3)"""
    mask = torch.tensor([[True, False, True, False]])
    rewards, values = torch.tensor([[0.1, 50.0, 1.0, 50.0]]), torch.tensor([[0.5, 70.0, 0.2, 70.0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.5)
    # Two time steps: A1 = 1-.2 = .8, A0 = .1+.9*.2-.5 + .45*.8 = .14
    torch.testing.assert_close(advantages, torch.tensor([[0.14, 0.0, 0.8, 0.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, torch.tensor([[0.64, 0.0, 1.0, 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.95, 0.0])
def test_gae_equals_the_sum_over_discounted_errors(gamma: float, gae_lambda: float) -> None:
    rewards, values, mask = case()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    for row in range(4):
        steps = written(mask, row)
        r, v = [rewards[row, t].item() for t in steps], [values[row, t].item() for t in steps] + [0.0]
        for i, t in enumerate(steps):  # equation 16 as a sum, not as a recursion
            deltas = [r[k] + gamma * v[k + 1] - v[k] for k in range(i, len(steps))]
            expected = sum((gamma * gae_lambda) ** j * delta for j, delta in enumerate(deltas))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + v[i], abs=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_one_is_the_discounted_return_minus_the_value(gamma: float) -> None:
    rewards, values, mask = case()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=1.0)
    for row in range(4):
        steps = written(mask, row)
        for i, t in enumerate(steps):
            discounted = sum(gamma**j * rewards[row, s].item() for j, s in enumerate(steps[i:]))
            assert returns[row, t].item() == pytest.approx(discounted, abs=1e-12)
            assert advantages[row, t].item() == pytest.approx(discounted - values[row, t].item(), abs=1e-12)


def test_lambda_zero_is_the_one_step_error() -> None:
    rewards, values, mask = case()
    advantages, _ = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0)
    for row in range(4):
        steps = written(mask, row)
        for t, following in zip(steps, [*steps[1:], None], strict=True):
            next_value = 0.0 if following is None else values[row, following].item()
            expected = rewards[row, t].item() + 0.9 * next_value - values[row, t].item()
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)


def test_a_perfect_critic_leaves_no_advantage() -> None:
    rewards, _, mask = case()
    _, returns = gae(rewards, torch.zeros_like(rewards), mask, gamma=0.9, gae_lambda=1.0)
    for gae_lambda in (0.0, 0.5, 1.0):
        advantages, again = gae(rewards, returns, mask, gamma=0.9, gae_lambda=gae_lambda)
        torch.testing.assert_close(advantages, torch.zeros_like(advantages), atol=1e-12, rtol=0)
        torch.testing.assert_close(again, returns, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_and_what_stands_under_the_mask_change_nothing(dtype: torch.dtype) -> None:
    rewards, values, mask = case(dtype)
    plain = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.95)
    junk = torch.full((4, 3), float("nan"), dtype=dtype)
    padded = gae(
        torch.cat([rewards.masked_fill(~mask, float("nan")), junk], 1),
        torch.cat([values.masked_fill(~mask, float("nan")), junk], 1),
        torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1),
        gamma=0.9,
        gae_lambda=0.95,
    )
    for before, after in zip(plain, padded, strict=True):
        assert before.dtype == after.dtype == dtype
        assert torch.equal(after[:, :8], before)
        assert (after[:, 8:] == 0).all()
        assert (before[~mask] == 0).all()


def test_each_row_is_on_its_own() -> None:
    rewards, values, mask = case()
    whole = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.95)
    for row in range(4):
        alone = gae(*(x[row : row + 1] for x in (rewards, values, mask)), gamma=0.9, gae_lambda=0.95)
        assert torch.equal(alone[0][0], whole[0][row])
        assert torch.equal(alone[1][0], whole[1][row])


# The end of a response


def test_a_truncated_response_bootstraps_only_when_a_final_value_is_given() -> None:
    """By hand: one response ended, the other was cut after a state of value 2. (PPO details 2)"""
    rewards, values = torch.tensor([[0.0, 1.0, 9.0]] * 2), torch.tensor([[0.5, 0.2, 9.0]] * 2)
    mask = torch.tensor([[True, True, False]] * 2)
    plain, _ = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.5)
    # A1 = 1-.2 = .8, A0 = .9*.2-.5 + .45*.8 = .04
    torch.testing.assert_close(plain, torch.tensor([[0.04, 0.8, 0.0]] * 2), atol=1e-6, rtol=0)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.5, final_values=torch.tensor([0.0, 2.0]))
    # A1 = 1+.9*2-.2 = 2.6, A0 = -.32 + .45*2.6 = .85
    assert torch.equal(advantages[0], plain[0])
    torch.testing.assert_close(advantages[1], torch.tensor([0.85, 2.6, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(returns[1], torch.tensor([1.35, 2.8, 0.0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("gae_lambda", [1.0, 0.95, 0.0])
def test_a_final_value_is_one_more_step_that_earns_it(gae_lambda: float) -> None:
    """The reward gamma * V on the last written token, holes and padding or not. (PPO details 2)"""
    rewards, values, mask = case()
    final = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = gae(rewards, values, mask, gamma=0.9, gae_lambda=gae_lambda, final_values=final)
    more = rewards.clone()
    for row in range(4):
        more[row, written(mask, row)[-1]] += 0.9 * final[row]
    for left, right in zip(got, gae(more, values, mask, gamma=0.9, gae_lambda=gae_lambda), strict=True):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)
    zeros = gae(rewards, values, mask, gamma=0.9, gae_lambda=gae_lambda, final_values=torch.zeros(4))
    assert torch.equal(zeros[0], gae(rewards, values, mask, gamma=0.9, gae_lambda=gae_lambda)[0])


# A lambda for each response


def test_each_response_has_its_lambda() -> None:
    rewards, values, mask = case(torch.float32)
    numbers = [1.0, 0.3, 0.95, 0.0]
    together = gae(rewards, values, mask, gamma=0.9, gae_lambda=torch.tensor(numbers, dtype=torch.float64))
    for row, number in enumerate(numbers):
        alone = gae(*(x[row : row + 1] for x in (rewards, values, mask)), gamma=0.9, gae_lambda=number)
        for left, right in zip(together, alone, strict=True):
            assert left.dtype == torch.float32
            torch.testing.assert_close(left[row], right[0], atol=1e-6, rtol=0)


def test_length_adaptive_lambda_by_hand() -> None:
    """Lengths 100, 20, 40, 5, 0 at alpha 0.05; the tokens of others are no part of the length."""
    mask = torch.zeros(5, 120, dtype=torch.bool)
    for row, length in enumerate([100, 20, 40, 5, 0]):
        mask[row, : 2 * min(length, 20) : 2] = True  # every other token
        mask[row, 40 : 40 + length - 20] = length > 20
    assert mask.sum(-1).tolist() == [100, 20, 40, 5, 0]
    lambdas = length_adaptive_lambda(mask, alpha=0.05)
    torch.testing.assert_close(lambdas, torch.tensor([0.8, 0.0, 0.5, 0.0, 0.0]), atol=1e-6, rtol=0)


def test_length_adaptive_lambda_spreads_over_alpha_times_the_length() -> None:
    """What the paper derives it from: 1 + lambda + lambda^2 + ... is alpha * length."""
    mask = torch.ones(1, 400, dtype=torch.bool)
    lam = length_adaptive_lambda(mask, alpha=0.05).item()
    assert sum(lam**j for j in range(10_000)) == pytest.approx(0.05 * 400, rel=1e-5)


# Returns without a critic


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_to_go_equal_a_slow_sum_and_carry_over_tokens_of_others(gamma: float) -> None:
    """(PPO details 3)"""
    rewards, _, mask = case()
    returns = returns_to_go(rewards.masked_fill(~mask, float("nan")), mask, gamma=gamma)
    for row in range(4):
        steps = written(mask, row)
        for i, t in enumerate(steps):
            expected = sum(gamma**j * rewards[row, s].item() for j, s in enumerate(steps[i:]))
            assert returns[row, t].item() == pytest.approx(expected, abs=1e-12)
    assert (returns[~mask] == 0).all()


def test_a_score_at_the_end_comes_back_to_every_token() -> None:
    """A token of the environment costs no step of the discount. (PPO details 3)"""
    mask = torch.tensor([[True, False, True, True, False]])
    rewards = torch.tensor([[0.0, 0.0, 0.0, 8.0, 0.0]])
    assert returns_to_go(rewards, mask, gamma=0.5).tolist() == [[2, 0, 4, 8, 0]]
    assert returns_to_go(rewards, mask, gamma=1.0).tolist() == [[8, 0, 8, 8, 0]]


def test_spread_by_hand() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    assert spread(torch.tensor([2.0, 3.0, -1.0]), mask).tolist() == [[2, 0, 2], [0, 0, 0], [-1, -1, 0]]
    assert spread(torch.tensor([2.0, float("nan"), -1.0]), mask)[1].tolist() == [0, 0, 0]
    assert spread(torch.zeros(3, dtype=torch.float64), mask).dtype == torch.float64


# Over groups

GROUPS = [7, -2, 7, 7, 900, -2, 7, 5, 5, 5]
TOTALS = [1.0, 0.5, 0.0, 0.25, 3.0, -1.5, 2.75, 0.1, 0.1, 0.1]


def grouped(totals: list[float] = TOTALS, groups: list[int] = GROUPS) -> tuple[Tensor, Tensor]:
    return torch.tensor(totals, dtype=torch.float64), torch.tensor(groups)


def test_group_baselines_by_hand() -> None:
    totals, groups = grouped([1.0, 2.0, 3.0, 10.0, 20.0], [0, 0, 0, 4, 4])
    assert dr_grpo(totals, groups).tolist() == [-1, 0, 1, -5, 5]
    assert rloo(totals, groups).tolist() == [1 - 2.5, 0, 3 - 1.5, -10, 10]
    std = 50**0.5  # of 10 and 20, with Bessel's correction; of 1, 2, 3 it is 1
    expected = [-1 / (1 + 1e-6), 0, 1 / (1 + 1e-6), -5 / (std + 1e-6), 5 / (std + 1e-6)]
    assert grpo(totals, groups).tolist() == pytest.approx(expected, abs=1e-12)


def test_group_baselines_equal_a_slow_loop() -> None:
    totals, groups = grouped()
    for i, (total, group) in enumerate(zip(TOTALS, GROUPS, strict=True)):
        members = [r for r, g in zip(TOTALS, GROUPS, strict=True) if g == group]
        others = [r for j, (r, g) in enumerate(zip(TOTALS, GROUPS, strict=True)) if g == group and j != i]
        n, mean = len(members), sum(members) / len(members)
        std = (sum((r - mean) ** 2 for r in members) / (n - 1)) ** 0.5 if n > 1 else 0.0
        assert grpo(totals, groups)[i].item() == pytest.approx((total - mean) / (std + 1e-6), abs=1e-9)
        assert dr_grpo(totals, groups)[i].item() == pytest.approx(total - mean, abs=1e-12)
        baseline = sum(others) / len(others) if others else total
        assert rloo(totals, groups)[i].item() == pytest.approx(total - baseline, abs=1e-12)


@pytest.mark.parametrize("baseline", [grpo, dr_grpo, rloo])
def test_a_group_of_equal_totals_or_of_one_gives_exactly_zero(baseline: Callable[[Tensor, Tensor], Tensor]) -> None:
    """0.1 three times has a sum that is not 0.3."""
    advantages = baseline(*grouped())
    assert advantages.dtype == torch.float64
    for group in (900, 5):
        assert all(advantages[i].item() == 0.0 for i in range(10) if GROUPS[i] == group)
    large = baseline(*grouped([1e9 + 0.1] * 7, [1] * 7))
    assert large.tolist() == [0.0] * 7


@pytest.mark.parametrize("baseline", [grpo, dr_grpo, rloo])
def test_a_group_sums_to_zero_and_knows_nothing_of_the_others(baseline: Callable[[Tensor, Tensor], Tensor]) -> None:
    totals, groups = grouped()
    advantages = baseline(totals, groups)
    for group in set(GROUPS):
        members = groups == group
        assert advantages[members].sum().item() == pytest.approx(0, abs=1e-12)
        assert torch.equal(baseline(totals[members], groups[members]), advantages[members])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(baseline(totals[order], groups[order]), advantages[order], atol=1e-12, rtol=0)
    torch.testing.assert_close(baseline(totals + 100.0, groups), advantages, atol=1e-9, rtol=0)


def test_grpo_has_no_scale_and_the_others_have_that_of_the_totals() -> None:
    totals, groups = grouped()
    torch.testing.assert_close(grpo(10 * totals, groups), grpo(totals, groups), atol=1e-5, rtol=0)
    torch.testing.assert_close(dr_grpo(10 * totals, groups), 10 * dr_grpo(totals, groups))
    torch.testing.assert_close(rloo(10 * totals, groups), 10 * rloo(totals, groups))


# Whitening


def test_moments_by_hand() -> None:
    values = torch.tensor([[1.0, 3.0, float("nan")], [5.0, float("inf"), 7.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    total = moments(values, mask)
    assert total.tolist() == [4, 16, 84]
    assert total.dtype == torch.float64
    assert mean_and_std(total) == (4.0, 5.0**0.5)
    assert moments(values, torch.zeros_like(mask)).tolist() == [0, 0, 0]


def test_whitening_uses_the_moments_of_the_whole_batch_however_it_is_cut() -> None:
    """(PPO details 4)"""
    values, _, mask = case(torch.float32)
    chosen = values[mask].double()
    mean, std = chosen.mean().item(), chosen.std(unbiased=False).item()
    for cut in ([[0, 1, 2, 3]], [[3], [0, 2], [1]], [[0], [1], [2], [3]]):
        total = torch.stack([moments(values[rows], mask[rows]) for rows in cut]).sum(0)
        assert list(mean_and_std(total)) == pytest.approx([mean, std], abs=1e-12)
        pieces = [whiten(values[rows], mask[rows], mean=mean, std=std) for rows in cut]
        whitened = torch.cat(pieces)[torch.tensor([row for rows in cut for row in rows]).argsort()]
        assert torch.equal(whitened, whiten(values, mask, mean=mean, std=std))
        assert (whitened[~mask] == 0).all()
        assert whitened[mask].double().mean().item() == pytest.approx(0, abs=1e-6)
        assert whitened[mask].double().std(unbiased=False).item() == pytest.approx(1, abs=1e-6)


def test_moments_of_each_part_alone_would_give_another_result() -> None:
    """(PPO details 4)"""
    values, _, mask = case()
    one = mean_and_std(moments(values[:1], mask[:1]))
    assert one != mean_and_std(moments(values, mask))


def test_moments_of_large_numbers_keep_their_spread() -> None:
    values = torch.tensor([[10_000.0, 10_001.0, 10_002.0]])
    mean, std = mean_and_std(moments(values, torch.ones(1, 3, dtype=torch.bool)))
    assert mean == 10_001.0
    assert std == pytest.approx((2 / 3) ** 0.5, rel=1e-7)


def test_equal_values_whiten_to_zero() -> None:
    values, mask = torch.full((2, 3), 0.1), torch.ones(2, 3, dtype=torch.bool)
    mean, std = mean_and_std(moments(values, mask))
    assert whiten(values, mask, mean=mean, std=std).abs().max().item() < 1e-6


def test_no_tokens_have_no_mean() -> None:
    with pytest.raises(AssertionError, match="no tokens"):
        mean_and_std(torch.zeros(3, dtype=torch.float64))
