"""Rollouts, batches and what networks say of them, made of short lists: what several tests of the learner need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.rollout import Prompt, Rollout, ScoredRollout
from learner.experience import Batch, Evaluation, Experience, Values, collate
from tests.learner_ranks import free_port


def scored(
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    mask: Sequence[bool] | None = None,
    score: float = 0.0,
    **more: Any,
) -> ScoredRollout:
    """A rollout; `more` may have group, cut, logprobs and baseline."""
    length = len(response)
    logprobs = more.get("logprobs", -np.arange(1, length + 1))
    rollout = Rollout(
        prompt=Prompt(id=more.get("group", 0), token_ids=np.array(prompt, np.int32), text="", messages=()),
        sample=0,
        response_ids=np.array(response, np.int32),
        rollout_logprobs=np.array(logprobs, np.float32),
        response_mask=np.array([True] * length if mask is None else mask, np.bool_),
        policy_versions=np.zeros(length, np.int32),
        finish_reason="length" if more.get("cut") else "stop",
        text="",
    )
    return ScoredRollout(rollout, score, more.get("baseline", 0.0))


def tensor(rows: Sequence[Sequence[float]]) -> Tensor:
    """Rows of different lengths as one float32 tensor; zeros fill them up."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in rows], dtype=torch.float32)


def evaluated(
    batch: Batch,
    *,
    old: Tensor | None = None,
    ref: Tensor | None = None,
    values: Tensor | None = None,
    final: Sequence[float] | None = None,
) -> Evaluation:
    """What the networks say of a batch: what is given, and zeros; no values without `values`."""
    zeros = torch.zeros(batch.mask.shape)
    finals = torch.zeros(len(zeros)) if final is None else torch.tensor(final)
    return Evaluation(
        zeros if old is None else old,
        zeros if ref is None else ref,
        entropy=zeros,
        values=None if values is None else Values(values, finals),
    )


def experience(batch: Batch, seen: Evaluation, **given: Tensor) -> Experience:
    """Experience of a batch: what is given, and else the learner's own old log-probabilities and nothing masked."""
    fields = {
        "mask": batch.mask,
        "anchor_logprobs": seen.old_logprobs,
        "importance": batch.mask.float(),
        "advantages": torch.zeros(batch.mask.shape),
        **given,
    }
    return Experience(batch, seen, returns=fields.pop("returns", None), **fields)


def random_rollouts(count: int, *, seed: int, vocabulary: int = 60, longest: int = 9) -> list[ScoredRollout]:
    """Rollouts of random lengths, tokens, masks and scores, every three of a group, some of them cut."""
    rng = np.random.default_rng(seed)
    result = []
    for index in range(count):
        prompt, response = (rng.integers(4, vocabulary, int(rng.integers(1, longest + 1))).tolist() for _ in range(2))
        mask = rng.random(len(response)) < 0.8
        mask[int(rng.integers(len(response)))] = True
        result.append(
            scored(
                prompt,
                response,
                mask=mask.tolist(),
                score=float(rng.normal()),
                group=index // 3,
                cut=bool(rng.random() < 0.3),
                logprobs=rng.normal(-4, 1, len(response)),
                baseline=float(rng.normal()),
            )
        )
    return result


def cut_up(rollouts: Sequence[ScoredRollout], sizes: Sequence[int]) -> list[Batch]:
    """The rollouts in order as batches of these sizes."""
    ends = np.cumsum(sizes).tolist()
    assert ends[-1] == len(rollouts)
    return [collate(rollouts[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, for collectives."""
    where = f"tcp://127.0.0.1:{free_port()}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
