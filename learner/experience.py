"""From rollouts to what the learner trains on: dealing to ranks, cutting into micro-batches, collating.

Scored rollouts become a `Batch` (tensors, padded on the right), and a batch with what the networks said of it becomes
an `Experience`. Each is frozen and complete. Which rollouts share a mini-batch depends on the seed alone, never on the
number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.rollout import ScoredRollout


def deal(lengths: Sequence[int], *, mini_batch_size: int, num_ranks: int, seed: int) -> list[list[list[int]]]:
    """Return, for each rank and mini-batch, the indices of the rollouts that it trains on.

    The rollouts are shuffled by the seed and cut into mini-batches; each mini-batch is dealt to the ranks, longest
    first to the rank with the fewest tokens so far (ties to the fewer rollouts, then the lower rank).

    Args:
        lengths: tokens of each rollout.
        mini_batch_size: rollouts of one optimizer step over all ranks; divides len(lengths).
        num_ranks: the world size of the learner group.
        seed: of the shuffle.

    Returns:
        result[rank][mini_batch] is a list of indices into `lengths`; a rank may have none.
    """
    assert len(lengths) % mini_batch_size == 0, (len(lengths), mini_batch_size)
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    dealt: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for start in range(0, len(order), mini_batch_size):
        members = order[start : start + mini_batch_size]
        hands: list[list[int]] = [[] for _ in range(num_ranks)]
        loads = [0] * num_ranks
        for index in sorted(members, key=lambda i: (-lengths[i], i)):
            rank = min(range(num_ranks), key=lambda r: (loads[r], len(hands[r]), r))
            hands[rank].append(index)
            loads[rank] += lengths[index]
        for rank, hand in enumerate(hands):
            dealt[rank].append(hand)
    return dealt


def micro_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Return the indices cut into micro-batches of at most `max_tokens` tokens, padding included.

    Sorted by length, longest first, so that little is padded. A single rollout that is longer than the budget stands
    alone.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of scored rollouts as tensors; prompt and response stand together, padded on the right.

    Causal attention never sees what stands to the right, so the pads need no mask. The logits (and the value) for
    response token t of row b are those at position `state_index[b, t]`, which is one before the token itself.
    """

    token_ids: Tensor  # [B, L] int64
    state_index: Tensor  # [B, T] int64
    response_ids: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] bool: the policy wrote the token
    rollout_logprobs: Tensor  # [B, T] float32, of the engine while sampling
    scores: Tensor  # [B] float32

    @property
    def num_response_tokens(self) -> int:
        return int(self.mask.sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def collate(scored: Sequence[ScoredRollout], *, pad_id: int = 0) -> Batch:
    """Return the rollouts as one padded batch on the CPU."""
    rollouts = [s.rollout for s in scored]
    num_rows = len(rollouts)
    longest = max(r.num_tokens for r in rollouts)
    longest_response = max(len(r.response_ids) for r in rollouts)
    token_ids = torch.full((num_rows, longest), pad_id, dtype=torch.int64)
    state_index = torch.zeros((num_rows, longest_response), dtype=torch.int64)
    response_ids = torch.full((num_rows, longest_response), pad_id, dtype=torch.int64)
    mask = torch.zeros((num_rows, longest_response), dtype=torch.bool)
    rollout_logprobs = torch.zeros((num_rows, longest_response), dtype=torch.float32)
    for row, rollout in enumerate(rollouts):
        start, count = len(rollout.prompt.token_ids), len(rollout.response_ids)
        assert start > 0, "a prompt has at least one token: the state in which the first response token is chosen"
        response = torch.from_numpy(rollout.response_ids.astype(np.int64))
        token_ids[row, :start] = torch.from_numpy(rollout.prompt.token_ids.astype(np.int64))
        token_ids[row, start : start + count] = response
        state_index[row, :count] = torch.arange(start - 1, start - 1 + count)
        response_ids[row, :count] = response
        mask[row, :count] = torch.from_numpy(rollout.response_mask.copy())
        rollout_logprobs[row, :count] = torch.from_numpy(rollout.rollout_logprobs.astype(np.float32))
    scores = torch.tensor([s.score for s in scored], dtype=torch.float32)
    return Batch(token_ids, state_index, response_ids, mask, rollout_logprobs, scores)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the three networks say of a batch before the update, without gradient."""

    old_logprobs: Tensor  # [B, T] float32
    ref_logprobs: Tensor  # [B, T] float32
    values: Tensor  # [B, T] float32
    entropy: Tensor  # [B, T] float32


@dataclass(frozen=True, eq=False)
class Experience:
    """A batch with everything that an update needs."""

    batch: Batch
    evaluation: Evaluation
    advantages: Tensor  # [B, T] float32
    returns: Tensor  # [B, T] float32


def blank_batch() -> Batch:
    """Return a batch of one response token that stands for nothing.

    ZeRO-3 gathers parameters in every forward pass, so all ranks must run the same number of them; a rank that has
    fewer micro-batches runs this one, with weight zero.
    """
    zeros = torch.zeros((1, 1), dtype=torch.int64)
    mask = torch.ones((1, 1), dtype=torch.bool)
    return Batch(torch.zeros((1, 2), dtype=torch.int64), zeros, zeros, mask, torch.zeros((1, 1)), torch.zeros(1))
