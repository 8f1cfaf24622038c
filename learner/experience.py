"""What the learner trains on: scored rollouts collated, and what the networks said of them.

Scored rollouts become a `Batch` (tensors, padded on the right), and a batch with what the networks said of it becomes
an `Experience`. Each is frozen and complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.rollout import ScoredRollout

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of scored rollouts as tensors; prompt and response stand together, padded on the right.

    Networks leave the pads out, or never see them from where tokens stand (learner/packing.py). The logits (and the
    value) for response token t of row b are those at position `state_index[b, t]`, one before the token itself.
    """

    token_ids: Tensor  # [B, L] int64
    state_index: Tensor  # [B, T] int64
    response_ids: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] bool: the policy wrote the token
    rollout_logprobs: Tensor  # [B, T] float32, of the engine while sampling
    scores: Tensor  # [B] float32
    final_index: Tensor  # [B] int64: where the last response token stands in token_ids
    truncated: Tensor  # [B] bool: the response was cut
    groups: Tensor  # [B] int64: the prompt's id, the same for all its samples
    baselines: Tensor  # [B] float32: what the greedy response to the prompt scored; 0 where that was not asked

    @property
    def lengths(self) -> Tensor:
        """[B] int64: prompt and response tokens of each row."""
        return self.final_index + 1

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
    final_index = torch.zeros(num_rows, dtype=torch.int64)
    for row, rollout in enumerate(rollouts):
        start, count = len(rollout.prompt.token_ids), len(rollout.response_ids)
        assert start > 0, "a prompt has at least one token: the state in which the first response token is chosen"
        response = torch.from_numpy(rollout.response_ids.astype(np.int64))
        token_ids[row, :start] = torch.from_numpy(rollout.prompt.token_ids.astype(np.int64))
        token_ids[row, start : start + count] = response
        state_index[row, :count] = torch.arange(start - 1, start - 1 + count)
        response_ids[row, :count] = response
        final_index[row] = start + count - 1
        mask[row, :count] = torch.from_numpy(rollout.response_mask.copy())
        rollout_logprobs[row, :count] = torch.from_numpy(rollout.rollout_logprobs.astype(np.float32))
    return Batch(
        token_ids,
        state_index,
        response_ids,
        mask,
        rollout_logprobs,
        scores=torch.tensor([s.score for s in scored], dtype=torch.float32),
        final_index=final_index,
        truncated=torch.tensor([r.finish_reason == "length" for r in rollouts]),
        groups=torch.tensor([r.prompt.id for r in rollouts], dtype=torch.int64),
        baselines=torch.tensor([s.baseline for s in scored], dtype=torch.float32),
    )


@dataclass(frozen=True, eq=False)
class Values:
    """What the critic says of a batch."""

    tokens: Tensor  # [B, T] float32: of the state in which token t is chosen
    final: Tensor  # [B] float32: of the state after the last response token


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the networks say of a batch before the update, without gradient."""

    old_logprobs: Tensor  # [B, T] float32, of the learner; -inf for a token outside what top-k and top-p keep
    ref_logprobs: Tensor  # [B, T] float32
    entropy: Tensor  # [B, T] float32
    values: Values | None  # None: there is no critic


@dataclass(frozen=True, eq=False)
class RolloutEvaluation:
    """What the networks say of one rollout before the update: its row of an `Evaluation`, as it travels."""

    after_updates: int  # how many updates the policy had had in its process
    old_logprobs: Floats  # [T], of its own response tokens, like the others
    ref_logprobs: Floats  # [T]
    entropy: Floats  # [T]
    values: tuple[Floats, float] | None  # [T] and of the state after the last token; None: there is no critic


def apart(batch: Batch, seen: Evaluation, *, after_updates: int) -> list[RolloutEvaluation]:
    """Return the rows of an evaluation of `batch`, without padding, on the CPU."""
    counts = (batch.final_index - batch.state_index[:, 0]).tolist()  # tokens from the first response token to the last
    logprobs, ref_logprobs, entropy = (
        tensor.cpu().numpy() for tensor in (seen.old_logprobs, seen.ref_logprobs, seen.entropy)
    )
    values = None if seen.values is None else (seen.values.tokens.cpu().numpy(), seen.values.final.tolist())
    return [
        RolloutEvaluation(
            after_updates,
            logprobs[row, :count].copy(),
            ref_logprobs[row, :count].copy(),
            entropy[row, :count].copy(),
            None if values is None else (values[0][row, :count].copy(), values[1][row]),
        )
        for row, count in enumerate(counts)
    ]


def together(batch: Batch, rows: Sequence[RolloutEvaluation]) -> Evaluation:
    """Return what was said of each rollout of `batch` as one evaluation, on its device.

    Raises:
        ValueError: a row is not as long as the rollout in its place.
    """
    device, shape = batch.mask.device, tuple(batch.mask.shape)
    counts = (batch.final_index - batch.state_index[:, 0]).tolist()

    def padded(of_rows: Sequence[Floats]) -> Tensor:
        if [len(row) for row in of_rows] != counts:
            raise ValueError(f"evaluations of {[len(row) for row in of_rows]} tokens for responses of {counts}")
        result = np.zeros(shape, np.float32)
        for row, of_row in enumerate(of_rows):
            result[row, : len(of_row)] = of_row
        return torch.from_numpy(result).to(device)

    of_critic = [row.values for row in rows if row.values is not None]
    values = None
    if of_critic:
        final = torch.tensor([last for _, last in of_critic], dtype=torch.float32, device=device)
        values = Values(padded([tokens for tokens, _ in of_critic]), final)
    return Evaluation(
        padded([row.old_logprobs for row in rows]),
        padded([row.ref_logprobs for row in rows]),
        padded([row.entropy for row in rows]),
        values,
    )


def sampled_by_both(batch: Batch, old_logprobs: Tensor) -> Tensor:
    """Return which response tokens have a probability in the engine and in the learner: [B, T] bool.

    Rounding at the edge of top-k or top-p can keep a token in one and remove it in the other. What is not a number is
    not removed here: it has to be seen.
    """
    return batch.mask & ~torch.isneginf(old_logprobs) & ~torch.isneginf(batch.rollout_logprobs)


@dataclass(frozen=True, eq=False)
class Experience:
    """A batch with everything that an update needs."""

    batch: Batch
    evaluation: Evaluation
    mask: Tensor  # [B, T] bool: the tokens in the losses
    anchor_logprobs: Tensor  # [B, T] float32: of the policy that the ratio compares with; finite in the mask
    importance: Tensor  # [B, T] float32: what corrects the gap to the engine; 1 where nothing does
    advantages: Tensor  # [B, T] float32
    returns: Tensor | None  # [B, T] float32: what the critic learns; None without a critic


def blank_batch() -> Batch:
    """Return a batch of one response token that stands for nothing.

    ZeRO-3 gathers parameters in every forward pass, so all ranks must run the same number of them; a rank that has
    fewer micro-batches runs this one, with weight zero.
    """
    number = torch.zeros((1, 1), dtype=torch.int64)
    return Batch(
        token_ids=torch.zeros((1, 2), dtype=torch.int64),
        state_index=number,
        response_ids=number,
        mask=torch.ones((1, 1), dtype=torch.bool),
        rollout_logprobs=torch.zeros((1, 1)),
        scores=torch.zeros(1),
        final_index=torch.ones(1, dtype=torch.int64),
        truncated=torch.zeros(1, dtype=torch.bool),
        groups=torch.zeros(1, dtype=torch.int64),
        baselines=torch.zeros(1),
    )
