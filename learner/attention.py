"""An attention function beside those of transformers, under which no sequence of a row sees another."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, the name it has everywhere
from torch import Tensor, nn

from learner.sequence_groups import exchanging, sequence_group

PACKED = "packed"  # model.attn_implementation; any other is one of transformers', and its batches are padded


def register() -> None:
    """Make `packed` known to transformers. May be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, attention)
    AttentionMaskInterface.register(PACKED, no_mask)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """Return `packed_attention` of the whole row, of which this rank has a part where ranks share tokens."""
    compute, group = packed_attention, sequence_group()
    if group is not None:
        compute = exchanging(packed_attention, group, query.shape[1], key.shape[1], query.shape[-1])
    return compute(module, query, key, value, attention_mask, **others)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return causal attention within each of the sequences that stand one after another.

    Args:
        query: [1, heads, N, D]; key and value: [1, key heads, N, D].
        attention_mask: none: `cu_seq_lens_q` says all that a mask would.
        sliding_window: how many tokens, itself included, a token sees; None: all before it.
        cu_seq_lens_q: [B + 1] int32, where each sequence begins and the last one ends; max_length_q: of the longest.

    Returns:
        [1, N, heads, D], and None for the weights, as transformers has it.

    Raises:
        NotImplementedError: the model does not say where its sequences begin, or asks for what this does not do.
    """
    remedy = f"{type(module).__name__} cannot be packed; set model.attn_implementation=sdpa"
    if cu_seq_lens_q is None or max_length_q is None:
        raise NotImplementedError(f"the bounds of the sequences do not arrive at its attention: {remedy}")
    odd = [name for name in ("softcap", "s_aux", "position_bias", "head_mask") if others.get(name) is not None]
    if odd or attention_mask is not None or dropout:
        raise NotImplementedError(f"its attention has {', '.join(odd) or 'a mask or dropout'}: {remedy}")
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _varlen(query, key, value, scaling, window, cu_seq_lens_q, max_length_q), None
    bounds = cu_seq_lens_q.tolist()
    alike = [(length, len(list(same))) for length, same in groupby(end - begin for begin, end in pairwise(bounds))]
    # Split, not sliced: on the way back each slice would fill a gradient of the whole row.
    parts = (one.split([length * count for length, count in alike], dim=2) for one in (query, key, value))
    attended = []
    for (_, count), *heads in zip(alike, *parts, strict=True):
        q, k, v = (_as_batch(one, count) for one in heads)
        attended.append(_causal(q, k, v, scaling, window).transpose(1, 2).flatten(0, 1))
    return torch.cat(attended).unsqueeze(0), None


def no_mask(*_: Any, **__: Any) -> None:
    """Return the mask that `packed` needs."""


def _as_batch(heads: Tensor, count: int) -> Tensor:
    """Return `count` sequences of equal length as a batch: [1, h, count x L, D] -> [count, h, L, D]."""
    batch: Tensor = heads.squeeze(0).unflatten(1, (count, -1)).transpose(0, 1)
    return batch


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Return causal attention over a batch: [B, h, L, D] each, key heads repeated as they are needed."""
    length = query.shape[-2]
    mask = None
    if window is not None and window < length:
        places = torch.arange(length, device=query.device)
        back = places[:, None] - places[None, :]
        mask = (back >= 0) & (back < window)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, bounds: Tensor, longest: int
) -> Tensor:
    """Return the same by torch's kernel for sequences of any lengths. Read, and not yet run, on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))  # [N, heads, D]
    attended = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended.unsqueeze(0)
