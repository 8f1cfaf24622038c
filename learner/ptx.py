"""Text that is mixed into the policy's loss: Ouyang et al. 2022 (arXiv 2203.02155), equation 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from actors.rollout import IntArray, Prompt, Rollout, ScoredRollout
from conf.schema import PTXConfig
from learner.batching import micro_batches
from learner.collective import evened
from learner.distribution import SampledFrom
from learner.experience import Batch, collate
from learner.models import PolicyOutput
from learner.sequence_groups import hands
from learner.steps import backward, blank_pass

WHOLE = SampledFrom()  # text was not sampled: the whole vocabulary, at temperature 1


class TextLoss:
    """`ptx.coef` times the mean negative log-likelihood of a token of text, over rows that are drawn anew each time.

    Which rows follows from a seed alone, so there is nothing to resume.
    """

    def __init__(self, rows: Sequence[IntArray], ptx: PTXConfig, *, max_tokens: int, padded: bool) -> None:
        """`rows` have at least two tokens each; `max_tokens` go through one forward pass, padding too if `padded`."""
        assert rows, "no rows"
        self.rows, self.coef, self.max_tokens, self.padded = rows, ptx.coef, max_tokens, padded
        self.batch_size = min(ptx.batch_size, len(rows))

    def mini_batch(self, seed: Sequence[int]) -> list[IntArray]:
        """Return the rows of the mini-batch of this seed, no row twice, the same on every rank."""
        chosen = np.random.default_rng(seed).choice(len(self.rows), self.batch_size, replace=False)
        return [self.rows[index] for index in chosen]

    def learn(self, policy: Any, seed: Sequence[int]) -> float:
        """Add up the gradient of the loss over the mini-batch of this seed. A collective.

        Returns this rank's share of the mean before it is multiplied by the coefficient.
        """
        rows = self.mini_batch(seed)
        tokens = sum(len(row) - 1 for row in rows)
        share = 0.0
        own = rows[dist.get_rank(hands()) :: dist.get_world_size(hands())]
        for batch in evened(text_batches(own, max_tokens=self.max_tokens, padded=self.padded)):
            if batch is None:
                blank_pass(policy, sampled_from=WHOLE)
                continue
            logprobs = PolicyOutput.of(policy(batch.to(policy.device), sampled_from=WHOLE)).logprobs
            loss = -logprobs.sum() / tokens
            backward(policy, self.coef * loss)
            share += float(loss.detach())
        return share


def text_batches(rows: Sequence[IntArray], *, max_tokens: int, padded: bool) -> list[Batch]:
    """Return the rows as micro-batches in which every token but the first is to be predicted."""
    cut = micro_batches([len(row) for row in rows], max_tokens=max_tokens, padded=padded)
    return [collate([as_rollout(rows[index]) for index in part]) for part in cut]


def as_rollout(row: IntArray) -> ScoredRollout:
    """Return a text as if the policy had written all of it but the first token."""
    response = row[1:]
    rollout = Rollout(
        prompt=Prompt(id=0, token_ids=row[:1], text="", messages=()),
        sample=0,
        response_ids=response,
        rollout_logprobs=np.zeros(len(response), dtype=np.float32),
        response_mask=np.ones(len(response), dtype=np.bool_),
        policy_versions=np.zeros(len(response), dtype=np.int32),
        finish_reason="stop",
        text="",
    )
    return ScoredRollout(rollout, 0.0)
