"""learner.advantages against hand-computed numbers, slow sums over the formulas in float64 and their properties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learner.advantages import gae, mean_and_std, moments, whiten

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
