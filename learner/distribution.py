"""The distribution that tokens are sampled from: log-probabilities of tokens under it, its entropy, its support.

Pure functions of logits, [N tokens, V vocabulary]. The engine samples from softmax(logits / temperature), which top-k
and top-p may cut; the learner must speak of that very distribution. Nothing here knows of models, engines or masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_AT_ONCE = 256  # `kept` sorts the vocabulary of so many tokens at a time: a sort takes several copies of its input


@dataclass(frozen=True)
class SampledFrom:
    """How a token is drawn: from softmax(logits / temperature), cut by top-k, then by top-p, and renormalised."""

    temperature: float = 1.0  # above 0
    top_k: int = 0  # 0: the whole vocabulary
    top_p: float = 1.0  # above 0; 1: all of it

    @property
    def truncated(self) -> bool:
        """Whether some tokens may have no probability."""
        return self.top_k > 0 or self.top_p < 1.0

    def scaled(self, logits: Tensor) -> Tensor:
        """Return the logits over the temperature, in float32; at 1 they are not copied for it."""
        return logits.float() if self.temperature == 1.0 else logits.float() / self.temperature


def token_logprobs(logits: Tensor, token_ids: Tensor, sampled_from: SampledFrom) -> Tensor:
    """Return log p(token) under the distribution that is sampled from, in float32.

    A token outside the kept set gets -inf; its gradient is finite. That happens to a token that the engine did sample,
    when rounding moves the edge of the set: the caller removes such a token from its masks.

    Args:
        logits: [N, V] of any float dtype.
        token_ids: [N] int64.
        sampled_from: temperature, top-k and top-p.

    Returns:
        [N] float32.
    """
    scaled = sampled_from.scaled(logits)
    if sampled_from.truncated:
        keep = kept(scaled.detach(), top_k=sampled_from.top_k, top_p=sampled_from.top_p)
        scaled = scaled.masked_fill(~keep, -torch.inf)
    return scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(scaled, dim=-1)


def logprobs_and_entropy(logits: Tensor, token_ids: Tensor, sampled_from: SampledFrom, *, with_entropy: bool) -> Tensor:
    """Return `token_logprobs` and `token_entropy`, or zeros for it, of logits [N, V] and ids [N]: [N, 2] float32."""
    logprobs = token_logprobs(logits, token_ids, sampled_from)
    entropy = token_entropy(logits, sampled_from) if with_entropy else torch.zeros_like(logprobs)
    return torch.stack([logprobs, entropy], dim=-1)


def token_entropy(logits: Tensor, sampled_from: SampledFrom) -> Tensor:
    """Return the entropy in nats of the distribution that is sampled from: logits [N, V] -> [N] float32.

    Differentiable; the kept set is a constant of the gradient. A token of probability zero adds nothing to either.
    """
    scaled = sampled_from.scaled(logits)
    if not sampled_from.truncated:
        logprobs = torch.log_softmax(scaled, dim=-1)
        return -(logprobs.exp() * logprobs).sum(-1)
    removed = ~kept(scaled.detach(), top_k=sampled_from.top_k, top_p=sampled_from.top_p)
    logprobs = torch.log_softmax(scaled.masked_fill(removed, -torch.inf), dim=-1)
    return -(logprobs.exp() * logprobs.masked_fill(removed, 0.0)).sum(-1)


def kept(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Return which tokens top-k and then top-p leave: logits [N, V], already divided by T -> bool [N, V].

    The rule of vLLM 0.32, `apply_top_k_top_p_pytorch`. Top-k keeps every logit that is no less than the k-th largest,
    so ties at the edge all stay. Top-p then sorts softmax of what is left in ascending order and removes a token when
    the probability up to and including it is at most 1 - top_p, but never the last one; ties at the edge are cut in the
    order of the sort. 1 - top_p is computed in the dtype of the logits, float32 in the engine. vLLM's Triton kernel,
    which it uses on GPUs, may cut ties at either edge otherwise.

    Args:
        logits: [N, V], not -inf throughout a row.
        top_k: 0, or anything not below V, keeps all.
        top_p: 1 keeps all.
    """
    return torch.cat([_kept(rows, top_k=top_k, top_p=top_p) for rows in logits.split(ROWS_AT_ONCE)])


def _kept(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    cut = 0 < top_k < logits.shape[-1]
    if top_p >= 1.0:
        return logits >= logits.topk(top_k, dim=-1).values[:, -1:] if cut else torch.ones_like(logits, dtype=torch.bool)
    ascending, order = logits.sort(dim=-1)  # of all logits, as the engine does: the sort decides between ties
    if cut:
        ascending = ascending.masked_fill(ascending < ascending[:, -top_k, None], -torch.inf)
    keep = ascending.softmax(dim=-1).cumsum(dim=-1) > 1.0 - logits.new_tensor(top_p)
    keep[:, -1] = True
    return torch.zeros_like(keep).scatter(-1, order, keep)
