"""learner.estimators by hand, and groups over micro-batches and ranks. Ten seconds, nearly all to start two ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.rollout import ScoredRollout
from conf.schema import AlgorithmConfig
from learner.estimators import Estimate, Rewarded, make_estimator
from learner.experience import Batch, Values, collate
from learner.ranks import Ranks
from tests.batches import cut_up, one_rank, random_rollouts, scored, tensor
from tests.learner_ranks import on_ranks

ESTIMATORS = ("gae", "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax")


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    with one_rank():
        yield


def algorithm(estimator: str, **changes: Any) -> AlgorithmConfig:
    return AlgorithmConfig(estimator=estimator, samples_per_prompt=2, **changes)


def rewarded(batch: Batch, rewards: Tensor, values: Values | None = None) -> Rewarded:
    return Rewarded(batch, values, rewards)


def close(got: Tensor, want: Sequence[Sequence[float]]) -> None:
    torch.testing.assert_close(got, tensor(want), atol=1e-5, rtol=0)


# By hand


def totals_of(estimator: str, groups: list[list[float]]) -> list[list[float]]:
    """What the tokens of each response get; a response is one token and has its whole reward there."""
    batches = [collate([scored([1], [2], group=number) for _ in group]) for number, group in enumerate(groups)]
    items = [rewarded(batch, tensor([[r] for r in group])) for batch, group in zip(batches, groups, strict=True)]
    return [one.advantages.flatten().tolist() for one in make_estimator(algorithm(estimator))(items)]


def test_groups_by_hand() -> None:
    groups = [[1.0, 2.0, 6.0], [5.0, 5.0], [7.0]]  # means 3, 5, 7; the last has lost its other samples
    assert totals_of("dr_grpo", groups) == [[-2, -1, 3], [0, 0], [0]]
    assert totals_of("reinforce_pp_baseline", groups) == [[-2, -1, 3], [0, 0], [0]]  # whitened later
    assert totals_of("rloo", groups) == [[1 - 4, 2 - 3.5, 6 - 1.5], [0, 0], [0]]
    first, *others = totals_of("grpo", groups)  # std of 1, 2, 6: sqrt((4 + 1 + 9) / 2) = sqrt(7)
    assert first == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5], abs=1e-5)
    assert others == [[0, 0], [0]]


def test_a_group_compares_what_the_responses_earned_in_all_and_gives_it_to_every_token() -> None:
    """The KL penalties of all tokens are in it; a token that another wrote earns nothing. (PPO details 3)"""
    batch = collate([scored([1], [2, 3, 4], mask=[True, False, True]), scored([1], [2, 3])])
    items = [rewarded(batch, tensor([[0.5, 99.0, 1.5], [1.0, -1.0]]))]
    (estimate,) = make_estimator(algorithm("dr_grpo"))(items)
    close(estimate.advantages, [[1.0, 0.0, 1.0], [-1.0, -1.0]])
    assert estimate.returns is None


def test_reinforce_and_remax_by_hand() -> None:
    batch = collate([scored([1], [2, 3, 4], baseline=0.5), scored([1], [2, 3], mask=[True, False], baseline=-1.0)])
    items = [rewarded(batch, tensor([[1.0, 0.0, 2.0], [4.0, 9.0]]))]
    (plain,) = make_estimator(algorithm("remax"))(items)
    close(plain.advantages, [[2.5, 1.5, 1.5], [5.0, 0.0]])
    (discounted,) = make_estimator(algorithm("remax", gamma=0.5))(items)  # 1 + 0/2 + 2/4, 0 + 2/2, 2
    close(discounted.advantages, [[1.0, 0.5, 1.5], [5.0, 0.0]])
    without = collate([scored([1], [2, 3, 4]), scored([1], [2, 3], mask=[True, False])])  # no greedy response: 0
    (estimate,) = make_estimator(algorithm("reinforce_pp"))([rewarded(without, tensor([[1.0, 0.0, 2.0], [4.0, 9.0]]))])
    close(estimate.advantages, [[3.0, 2.0, 2.0], [4.0, 0.0]])


def of_critic(**changes: Any) -> Estimate:
    """Of a response that was cut and one that ended, two tokens each: rewards 0, 1 and values 0.5, 0.25, then 2."""
    batch = collate([scored([1], [2, 3], cut=True), scored([1], [2, 3])])
    values = Values(tensor([[0.5, 0.25], [0.5, 0.25]]), torch.tensor([2.0, 2.0]))
    (estimate,) = make_estimator(algorithm("gae", **changes))([rewarded(batch, tensor([[0, 1], [0, 1]]), values)])
    return estimate


def test_a_response_that_was_cut_is_worth_nothing_more_unless_it_is_bootstrapped() -> None:
    """(PPO details 2)"""
    plain = of_critic(gae_lambda=0.5)  # errors -0.25 and 0.75
    close(plain.advantages, [[0.125, 0.75], [0.125, 0.75]])
    assert plain.returns is not None
    close(plain.returns, [[0.625, 1.0], [0.625, 1.0]])
    bootstrapped = of_critic(gae_lambda=0.5, bootstrap_truncated=True)  # errors of the one that was cut: -0.25, 2.75
    close(bootstrapped.advantages, [[1.125, 2.75], [0.125, 0.75]])
    assert bootstrapped.returns is not None
    close(bootstrapped.returns, [[1.625, 3.0], [0.625, 1.0]])


def test_the_critic_may_have_a_lambda_of_its_own_and_the_policy_one_by_length() -> None:
    decoupled = of_critic(gae_lambda=0.0, critic_gae_lambda=1.0)
    close(decoupled.advantages, [[-0.25, 0.75]] * 2)
    assert decoupled.returns is not None
    close(decoupled.returns, [[1.0, 1.0]] * 2)
    adaptive = of_critic(gae_lambda=0.0, length_adaptive_alpha=2.0)  # lambda = 1 - 1 / (2 x 2) = 0.75
    close(adaptive.advantages, [[-0.25 + 0.75 * 0.75, 0.75]] * 2)
    assert adaptive.returns is not None
    close(adaptive.returns, [[0.25, 1.0]] * 2)  # those of lambda 0


# However the train batch is cut and dealt


Found = dict[tuple[int, ...], list[float]]


def estimates(rollouts: Sequence[ScoredRollout], sizes: Sequence[int], estimator: str) -> Found:
    """The advantages of each rollout's tokens by the tokens of prompt and response, padding left out."""
    batches = cut_up(rollouts, sizes) if rollouts else []
    items = []
    for batch in batches:
        rewards = batch.rollout_logprobs * 0.1 + torch.where(batch.mask, batch.scores.unsqueeze(-1), 0.0)
        values = Values(batch.rollout_logprobs * 0.2, batch.scores)
        items.append(rewarded(batch, rewards, values if estimator == "gae" else None))
    found: Found = {}
    changes = {"bootstrap_truncated": True} if estimator == "gae" else {}
    for batch, estimate in zip(batches, make_estimator(algorithm(estimator, **changes))(items), strict=True):
        assert estimate.advantages.dtype == torch.float32
        assert not estimate.advantages[~batch.mask].any()
        for row, of_row in enumerate(estimate.advantages):
            tokens = tuple(batch.token_ids[row, : int(batch.final_index[row]) + 1].tolist())
            found[tokens] = of_row[: int((batch.response_ids[row] > 0).sum())].tolist()
    return found


def assert_equal(got: Found, want: Found) -> None:
    assert got.keys() == want.keys()
    assert all(got[key] == pytest.approx(want[key], abs=1e-6) for key in want)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_neither_padding_nor_the_cut_into_micro_batches_changes_anything(estimator: str) -> None:
    rollouts = random_rollouts(14, seed=0)
    whole = estimates(rollouts, [14], estimator)
    assert len(whole) == 14
    assert any(any(tokens) for tokens in whole.values())
    for sizes in ([1] * 14, [5, 9], [2, 3, 4, 5]):
        assert_equal(estimates(rollouts, sizes, estimator), whole)


DEALT: tuple[list[int], ...] = (
    [7, 7],  # groups of three are on both ranks
    [14, 0],  # a rank has nothing
    [1, 13],
)


def on_two_ranks(ranks: Ranks) -> list[dict[str, Found]]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://{ranks.address}:{ranks.port}", rank=ranks.rank, world_size=ranks.world_size
    )
    rollouts = random_rollouts(14, seed=0)
    results = []
    for first, second in DEALT:
        mine = rollouts[:first] if ranks.rank == 0 else rollouts[first : first + second]
        sizes = [len(mine) // 2, len(mine) - len(mine) // 2] if len(mine) > 1 else [len(mine)]
        results.append({name: estimates(mine, sizes, name) for name in ESTIMATORS})
    torch.distributed.destroy_process_group()
    return results


@pytest.mark.ranks
def test_groups_are_compared_over_all_ranks() -> None:
    one, other = on_ranks(on_two_ranks, 2)
    for dealt, of_one, of_other in zip(DEALT, one, other, strict=True):
        for name in ESTIMATORS:
            assert len(of_one[name]) == dealt[0]
            assert_equal(of_one[name] | of_other[name], estimates(random_rollouts(14, seed=0), [14], name))
