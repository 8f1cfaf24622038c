"""learner.experience: dealing, cutting, collating, from rollouts to a loss against slow loops. A second."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.rollout import Prompt, Rollout, ScoredRollout
from learner.advantages import gae, mean_and_std, moments, whiten
from learner.batching import deal, micro_batches
from learner.costs import Costs, PassCost, passes_flops
from learner.distribution import SampledFrom, token_logprobs
from learner.experience import Batch, Evaluation, Values, apart, blank_batch, collate, sampled_by_both, together
from learner.policy_losses import clipped_loss
from learner.ppo import kl_penalty, token_rewards

V = 13  # vocabulary


def scored(
    prompt: list[int],
    response: list[int],
    *,
    mask: list[bool] | None = None,
    score: float = 0.0,
    prompt_id: int = 0,
    truncated: bool = False,
) -> ScoredRollout:
    length = len(response)
    rollout = Rollout(
        prompt=Prompt(id=prompt_id, token_ids=np.array(prompt, np.int32), text="", messages=()),
        sample=0,
        response_ids=np.array(response, np.int32),
        rollout_logprobs=-np.arange(1, length + 1, dtype=np.float32),
        response_mask=np.array(mask if mask is not None else [True] * length, np.bool_),
        policy_versions=np.zeros(length, np.int32),
        finish_reason="length" if truncated else "stop",
        text="",
    )
    return ScoredRollout(rollout, score)


# Evaluations that travel


def said_of(batch: Batch, *, critic: bool) -> Evaluation:
    """Numbers that differ everywhere, zero where there is no token."""
    torch.manual_seed(0)
    there = torch.arange(batch.mask.shape[1]) < (batch.final_index - batch.state_index[:, 0]).unsqueeze(-1)
    logprobs, ref_logprobs, entropy, values = (
        torch.where(there, torch.randn(there.shape), torch.zeros(())) for _ in range(4)
    )
    logprobs[0, 0] = -math.inf
    return Evaluation(logprobs, ref_logprobs, entropy, Values(values, torch.randn(len(there))) if critic else None)


@pytest.mark.parametrize("critic", [True, False])
def test_rows_of_an_evaluation_come_together_in_another_batch(critic: bool) -> None:
    rollouts = [
        scored([1, 2], [3, 4, 5], mask=[True, False, True]),
        scored([1], [3]),
        scored([1, 2, 3], [4, 5, 6, 7, 8]),
        scored([9], [4, 5]),
    ]
    batch = collate(rollouts)
    seen = said_of(batch, critic=critic)
    rows = apart(batch, seen, after_updates=7)
    assert [(row.after_updates, len(row.old_logprobs)) for row in rows] == [(7, 3), (7, 1), (7, 5), (7, 2)]
    order = [3, 0]
    other = collate([rollouts[i] for i in order])
    again = together(other, [rows[i] for i in order])
    for name in ("old_logprobs", "ref_logprobs", "entropy"):
        assert torch.equal(getattr(again, name), getattr(seen, name)[order, :3]), name
    if seen.values is None:
        assert again.values is None
    else:
        assert again.values is not None
        assert torch.equal(again.values.tokens, seen.values.tokens[order, :3])
        assert torch.equal(again.values.final, seen.values.final[order])
    with pytest.raises(ValueError, match=r"evaluations of \[3, 2\] tokens for responses of \[2, 3\]"):
        together(other, [rows[0], rows[3]])


# Dealing to ranks


def test_deal_by_hand() -> None:
    # 5 -> rank 0; 4 -> 1; 3 -> 1 (4 < 5); 3 -> 0 (5 < 7); 2 -> 1 (7 < 8)
    assert deal([5, 4, 3, 3, 2], mini_batch_size=5, num_hands=2, seed=0) == [[[0, 3]], [[1, 2, 4]]]
    assert deal([1, 9], mini_batch_size=2, num_hands=3, seed=0) == [[[1]], [[0]], [[]]]


def lengths_of(count: int) -> list[int]:
    return [int(n) for n in np.random.default_rng(1).integers(1, 90, count)]


@pytest.mark.parametrize("num_hands", [1, 2, 3, 5])
def test_every_rollout_is_dealt_once_to_the_same_mini_batch_for_any_number_of_ranks(num_hands: int) -> None:
    lengths = lengths_of(48)
    dealt = deal(lengths, mini_batch_size=12, num_hands=num_hands, seed=7)
    assert len(dealt) == num_hands
    assert {len(hands) for hands in dealt} == {4}
    together = [sorted(i for hands in dealt for i in hands[k]) for k in range(4)]
    assert [len(members) for members in together] == [12] * 4
    assert sorted(i for members in together for i in members) == list(range(48))
    alone = deal(lengths, mini_batch_size=12, num_hands=1, seed=7)[0]
    assert together == [sorted(members) for members in alone]


def test_dealing_balances_tokens() -> None:
    lengths = lengths_of(64)
    for hands in zip(*deal(lengths, mini_batch_size=32, num_hands=4, seed=0), strict=True):
        loads = [sum(lengths[i] for i in hand) for hand in hands]
        assert max(loads) - min(loads) <= 0.05 * sum(loads) / 4


def test_dealing_balances_attention_too() -> None:
    # Where attention is all that costs, twelve tokens are 78 pairs, and three times seven are 84: as even as can be.
    # By tokens alone the twelve would stand beside seven.
    cost = PassCost(body=0, head=0, attention=1)
    lengths = [12, 7, 7, 7]
    costs = [passes_flops(Costs(cost, None), [length], 1, epochs=1, train_policy=True) for length in lengths]
    assert [c / costs[1] for c in costs] == [pytest.approx(78 / 28), 1, 1, 1]  # L (L + 1) / 2
    by_tokens, by_cost = (deal(of, mini_batch_size=4, num_hands=2, seed=0) for of in (lengths, costs))
    assert sorted(len(hands[0]) for hands in by_tokens) == [2, 2]
    assert sorted(len(hands[0]) for hands in by_cost) == [1, 3]


def test_dealing_depends_on_the_seed_alone() -> None:
    lengths = lengths_of(32)
    one, again, other = (deal(lengths, mini_batch_size=8, num_hands=2, seed=seed) for seed in (3, 3, 4))
    assert one == again != other
    mini_batches = [sorted(one[0][k] + one[1][k]) for k in range(4)]
    assert mini_batches != [list(range(k, k + 8)) for k in range(0, 32, 8)], "the rollouts are shuffled"


@pytest.mark.parametrize("num_hands", [1, 3])
@pytest.mark.parametrize(
    ("count", "sizes"),
    [(1, [1]), (3, [3]), (4, [4]), (5, [3, 2]), (8, [4, 4]), (9, [3, 3, 3]), (10, [4, 3, 3]), (13, [4, 3, 3, 3])],
)
def test_a_batch_that_does_not_divide_is_cut_as_evenly_as_can_be(count: int, sizes: list[int], num_hands: int) -> None:
    dealt = deal(lengths_of(count), mini_batch_size=4, num_hands=num_hands, seed=3)
    together = [[i for hands in dealt for i in hands[k]] for k in range(len(sizes))]
    assert {len(hands) for hands in dealt} == {len(sizes)}
    assert [len(members) for members in together] == sizes
    assert sorted(itertools.chain(*together)) == list(range(count))


def test_a_batch_that_divides_is_cut_into_slices_of_the_shuffled_order() -> None:
    order = np.random.default_rng(11).permutation(12).tolist()
    (dealt,) = deal(lengths_of(12), mini_batch_size=4, num_hands=1, seed=11)
    assert [sorted(members) for members in dealt] == [sorted(order[:4]), sorted(order[4:8]), sorted(order[8:])]


# Cutting into micro-batches


def test_micro_batches_by_hand() -> None:
    assert micro_batches([3, 10, 4, 4, 1], max_tokens=12, padded=True) == [[1], [2, 3, 0], [4]]
    assert micro_batches([3, 50, 4], max_tokens=12, padded=True) == [[1], [2, 0]]  # longer than the budget: alone
    assert micro_batches([50, 50], max_tokens=12, padded=True) == [[0], [1]]
    assert micro_batches([], max_tokens=12, padded=True) == []


@pytest.mark.parametrize("max_tokens", [90, 128, 500, 10**6])
def test_micro_batches_keep_the_budget_and_every_rollout(max_tokens: int) -> None:
    lengths = lengths_of(60)
    cut = micro_batches(lengths, max_tokens=max_tokens, padded=True)
    assert sorted(i for part in cut for i in part) == list(range(60))
    padded = [len(part) * max(lengths[i] for i in part) for part in cut]
    assert max(padded) <= max_tokens
    for part, following in itertools.pairwise(cut):  # each is filled, and the longest go first
        assert (len(part) + 1) * max(lengths[i] for i in part) > max_tokens
        assert min(lengths[i] for i in part) >= max(lengths[i] for i in following)


# Collating


def test_collate_by_hand() -> None:
    batch = collate(
        [scored([5, 6, 7], [8, 9], score=1.5), scored([1], [2, 3, 4], mask=[True, False, True], score=-2.0)], pad_id=12
    )
    assert batch.token_ids.tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 4, 12]]
    assert batch.response_ids.tolist() == [[8, 9, 12], [2, 3, 4]]
    assert batch.mask.tolist() == [[True, True, False], [True, False, True]]
    assert batch.state_index[0, :2].tolist() == [2, 3]
    assert batch.state_index[1].tolist() == [0, 1, 2]
    assert batch.rollout_logprobs.tolist() == [[-1, -2, 0], [-1, -2, -3]]
    assert batch.scores.tolist() == [1.5, -2.0]
    assert batch.num_response_tokens == 4
    assert [getattr(batch, f.name).dtype for f in dataclasses.fields(Batch)] == [
        torch.int64,
        torch.int64,
        torch.int64,
        torch.bool,
        torch.float32,
        torch.float32,
        torch.int64,
        torch.bool,
        torch.int64,
        torch.float32,
    ]


def test_collate_says_where_a_response_ends_whether_it_was_cut_and_what_it_is_compared_with() -> None:
    greedy = dataclasses.replace(scored([4], [5, 6], prompt_id=9), baseline=0.75)
    batch = collate(
        [scored([5, 6, 7], [8, 9], prompt_id=7), greedy, scored([1, 2], [3, 4, 5, 6], truncated=True, prompt_id=7)]
    )
    assert batch.final_index.tolist() == [4, 2, 5]
    assert batch.token_ids.gather(1, batch.final_index[:, None]).flatten().tolist() == [9, 6, 6]
    assert batch.truncated.tolist() == [False, False, True]
    assert batch.groups.tolist() == [7, 9, 7]
    assert batch.baselines.tolist() == [0.0, 0.75, 0.0]


def test_a_response_ends_at_its_last_token_even_if_that_is_masked_or_looks_like_padding() -> None:
    """The end is found by position, never by comparing with an id. (PPO details 12)"""
    batch = collate(
        [scored([5], [6, 0, 0], mask=[True, True, False]), scored([5], [0]), scored([5], [6] * 5)], pad_id=0
    )
    assert batch.final_index.tolist() == [3, 1, 5]
    assert batch.mask.sum(-1).tolist() == [2, 1, 5]


def test_tokens_that_only_one_of_engine_and_learner_keeps_are_in_no_loss_and_nan_is_seen() -> None:
    """(PPO details 5)"""
    batch = collate([scored([1], [2, 3, 4, 5, 6], mask=[True, True, True, False, True])])
    batch.rollout_logprobs[0, 1] = -math.inf
    old = torch.tensor([[-1.0, -1.0, -math.inf, -1.0, math.nan]])
    assert sampled_by_both(batch, old).tolist() == [[True, False, False, False, True]]


def test_a_state_stands_one_before_its_token() -> None:
    batch = collate([scored([5, 6, 7], [8, 9]), scored([1], [2, 3, 4])])
    followed = batch.token_ids.gather(1, (batch.state_index + 1).clamp(max=batch.token_ids.shape[1] - 1))
    assert torch.equal(followed[batch.mask], batch.response_ids[batch.mask])


def test_collate_copies_read_only_arrays() -> None:
    one = scored([5, 6], [7, 8])
    for array in (one.rollout.response_ids, one.rollout.rollout_logprobs, one.rollout.response_mask):
        array.flags.writeable = False  # as they come from an object store
    batch = collate([one])
    for tensor in (batch.token_ids, batch.response_ids, batch.mask, batch.rollout_logprobs):
        tensor.zero_()
    assert one.rollout.response_ids.tolist() == [7, 8]
    assert one.rollout.rollout_logprobs.tolist() == [-1, -2]
    assert one.rollout.response_mask.all()


def test_a_prompt_without_tokens_has_no_state_to_answer_from() -> None:
    with pytest.raises(AssertionError, match="prompt"):
        collate([scored([], [1, 2])])


def test_moving_a_batch_keeps_every_field() -> None:
    batch = collate([scored([5, 6], [7, 8], score=3.0)])
    moved = batch.to(torch.device("cpu"))
    for field in dataclasses.fields(Batch):
        assert torch.equal(getattr(moved, field.name), getattr(batch, field.name)), field.name


def test_a_blank_batch_is_one_valid_token() -> None:
    blank = blank_batch()
    assert blank.num_response_tokens == 1
    real = collate([scored([1], [2])])  # one token too: the places are the same
    for field in dataclasses.fields(Batch):
        one, other = getattr(blank, field.name), getattr(real, field.name)
        assert (one.shape, one.dtype) == (other.shape, other.dtype), field.name
    assert torch.equal(blank.state_index, real.state_index)
    assert torch.equal(blank.final_index, real.final_index)


# From rollouts to a loss. Bigram tables stand for the networks: what they say depends on the last token alone.


@dataclasses.dataclass(frozen=True)
class Tables:
    policy: Tensor  # [V, V]
    old: Tensor  # [V, V]
    reference: Tensor  # [V, V]
    values: Tensor  # [V]


def tables() -> Tables:
    generator = torch.Generator().manual_seed(0)
    policy, old, reference = (torch.randn(V, V, generator=generator) for _ in range(3))
    return Tables(old + 0.2 * policy, old, reference, torch.randn(V, generator=generator))


def train_batch() -> list[ScoredRollout]:
    rng = np.random.default_rng(2)
    rollouts = []
    for _ in range(24):
        prompt, response = (rng.integers(0, V, int(rng.integers(1, 9))).tolist() for _ in range(2))
        mask = [True, *(rng.random(len(response) - 1) < 0.8).tolist()]
        rollouts.append(scored(prompt, response, mask=mask, score=float(rng.normal())))
    return rollouts


TEMPERATURE, KL_COEF, GAMMA, LAMBDA, CLIP = 0.8, 0.3, 0.97, 0.9, 0.2


def packed_loss(
    net: Tables, rollouts: list[ScoredRollout], *, num_hands: int, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """The loss of one mini-batch and the gradient of the policy's table, by the learner's pieces."""
    policy = net.policy.clone().requires_grad_()

    def logprobs(table: Tensor, batch: Batch) -> Tensor:
        states = batch.token_ids.gather(1, batch.state_index)
        rows, tokens = table[states].flatten(0, 1), batch.response_ids.flatten()
        return token_logprobs(rows, tokens, SampledFrom(TEMPERATURE)).view(states.shape)

    lengths = [one.rollout.num_tokens for one in rollouts]
    batches = []
    for hands in deal(lengths, mini_batch_size=len(rollouts), num_hands=num_hands, seed=5):
        mine = [rollouts[i] for i in hands[0]]
        cut = micro_batches([one.rollout.num_tokens for one in mine], max_tokens=max_tokens, padded=True)
        batches += [collate([mine[i] for i in part]) for part in cut]
    advantages = []
    for batch in batches:
        kl = kl_penalty(logprobs(net.old, batch), logprobs(net.reference, batch), estimator="k1")
        rewards = token_rewards(batch.scores, kl, batch.mask, kl_coef=KL_COEF)
        values = net.values[batch.token_ids.gather(1, batch.state_index)]
        advantages.append(gae(rewards, values, batch.mask, gamma=GAMMA, gae_lambda=LAMBDA)[0])
    pairs = list(zip(batches, advantages, strict=True))
    mean, std = mean_and_std(torch.stack([moments(a, b.mask) for b, a in pairs]).sum(0))
    total = torch.zeros(())
    for batch, advantage in pairs:
        white = whiten(advantage, batch.mask, mean=mean, std=std)
        old = logprobs(net.old, batch)
        total = total + clipped_loss(logprobs(policy, batch), old, white, batch.mask, low=CLIP, high=CLIP).loss.sum()
    loss = total / sum(batch.num_response_tokens for batch in batches)
    loss.backward()
    assert policy.grad is not None
    return loss.detach(), policy.grad


def slow_loss(net: Tables, rollouts: list[ScoredRollout]) -> float:
    """The same loss, one token at a time in Python floats, without padding."""

    def logprob(table: Tensor, state: int, token: int) -> float:
        weights = [math.exp(x / TEMPERATURE) for x in table[state].tolist()]
        return math.log(weights[token] / sum(weights))

    ratios, advantages = [], []
    for one in rollouts:
        rollout = one.rollout
        tokens = [*rollout.prompt.token_ids.tolist(), *rollout.response_ids.tolist()]
        start = len(rollout.prompt.token_ids)
        steps = [(tokens[start + t - 1], tokens[start + t]) for t in np.flatnonzero(rollout.response_mask).tolist()]
        rewards = [-KL_COEF * (logprob(net.old, *s) - logprob(net.reference, *s)) for s in steps]
        rewards[-1] += one.score
        values = [net.values[state].item() for state, _ in steps] + [0.0]
        deltas = [r + GAMMA * values[i + 1] - values[i] for i, r in enumerate(rewards)]
        for i in range(len(steps)):
            advantages.append(sum((GAMMA * LAMBDA) ** j * delta for j, delta in enumerate(deltas[i:])))
        ratios += [math.exp(logprob(net.policy, *s) - logprob(net.old, *s)) for s in steps]
    white = (np.array(advantages) - np.mean(advantages)) / np.std(advantages)
    terms = [min(r * a, min(max(r, 1 - CLIP), 1 + CLIP) * a) for r, a in zip(ratios, white.tolist(), strict=True)]
    return float(-sum(terms) / len(terms))


def test_the_loss_of_a_train_batch_does_not_depend_on_ranks_or_micro_batches() -> None:
    net, rollouts = tables(), train_batch()
    expected = slow_loss(net, rollouts)
    whole, gradient = packed_loss(net, rollouts, num_hands=1, max_tokens=10**6)
    assert whole.item() == pytest.approx(expected, abs=1e-5)
    for num_hands, max_tokens in ((1, 16), (2, 40), (3, 16), (5, 1)):
        loss, again = packed_loss(net, rollouts, num_hands=num_hands, max_tokens=max_tokens)
        assert loss.item() == pytest.approx(whole.item(), abs=1e-6)
        torch.testing.assert_close(again, gradient, atol=1e-6, rtol=0)
    assert gradient.abs().max() > 1e-3
