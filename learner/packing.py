"""Networks read sequences one after another in one row, without padding between them.

`packed` is an attention function beside those of transformers, under which no sequence sees another. Whatever else a
transformer computes, it computes for each token by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, the name it has everywhere
from torch import Tensor, nn

from conf.schema import ConfigError, ModelConfig

Say = Callable[[Tensor, Tensor], Tensor]
LOGIT_BYTES = 256 << 20  # of float32 logits that are held at once; there are a few tensors of that size
PACKED = "packed"  # model.attn_implementation; any other is one of transformers', and its batches are padded


def is_padded(model: ModelConfig) -> bool:
    """Return whether batches of a network with these settings are computed with their padding."""
    return model.attn_implementation != PACKED


def register() -> None:
    """Make `packed` known to transformers. May be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, no_mask)


def checked(model: Any, path: str) -> Any:
    """Return a Hugging Face model, if it keeps packed sequences apart or is not asked to.

    Raises:
        ConfigError: its attention is code of its own, which never hears of `packed`, or it has a state that goes on
            from one sequence to the next.
    """
    kept_apart = model._supports_attention_backend and not model._is_stateful
    if model.config._attn_implementation == PACKED and not kept_apart:
        remedy = f"{type(model).__name__} at {path} mixes sequences that stand in one row; set it to sdpa, or to eager"
        raise ConfigError("model.attn_implementation", PACKED, remedy)
    return model


def flat_states(model: Any, token_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last hidden states of padded sequences without their padding, as far as the attention allows.

    Args:
        model: a Hugging Face model with a head, of which the body is run.
        token_ids: [B, L] int64, padded on the right.
        lengths: [B] int64, above 0.

    Returns:
        states [P, H], and [B] int64: where in them each sequence begins. P is the number of tokens, or B x L where the
        model's attention is not `packed`; causal attention never sees what stands to the right.
    """
    rows, width = token_ids.shape
    if model.config._attn_implementation != PACKED:
        hidden = model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1), torch.arange(0, rows * width, width, device=token_ids.device)
    places = torch.arange(width, device=token_ids.device).expand(rows, width)
    real = places < lengths.unsqueeze(-1)
    ends = lengths.cumsum(0)
    bounds = F.pad(ends, (1, 0)).to(torch.int32)
    hidden = model.base_model(
        input_ids=token_ids[real].unsqueeze(0),
        position_ids=places[real].unsqueeze(0),
        use_cache=False,
        # The names under which transformers hands these through a model to its attention.
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=width,
        max_length_k=width,
    ).last_hidden_state
    return hidden.squeeze(0), ends - lengths


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


def in_chunks(model: Any) -> None:
    """Let the head of a Hugging Face language model compute its logits in chunks.

    One with adapters stays as it is: it is several modules, which ZeRO-3 expects to run as often on every rank.
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        VocabularyHead.of(head, max_bytes=LOGIT_BYTES)


def of_states(head: nn.Module, states: Tensor, say: Say, rows: Tensor) -> Tensor:
    """Return what `say(logits, rows)` says of states [N, H] and `rows` [N, ...] under a head: [N, ...]."""
    if isinstance(head, VocabularyHead):
        said: Tensor = head(states, say, rows)
        return said
    return say(head(states), rows)


class VocabularyHead(nn.Linear):
    """A language model's head that says what is asked of the logits of each state, and never holds those of all.

    A linear layer is made one by `of`, which leaves its parameters, and their names, as they are.
    """

    rows_at_once: int

    @staticmethod
    def of(head: nn.Linear, *, max_bytes: int) -> VocabularyHead:
        """Return `head` itself, changed; so many bytes of logits in float32 are held at once, of one state at least."""
        head.__class__ = VocabularyHead
        assert isinstance(head, VocabularyHead)
        head.rows_at_once = max(max_bytes // (4 * head.out_features), 1)
        return head

    def forward(self, states: Tensor, *asked: Any) -> Tensor:
        """Return the logits [N, V] of states [N, H]; or, with (say, rows), what `say(logits, rows)` says: [N, ...].

        `rows` has N rows, of which `say` gets those of its logits. With gradients the logits of a chunk are computed
        again on the way back; ZeRO-3 has gathered the weight by then, as for any module.
        """
        if not asked:
            return super().forward(states)
        say, rows = asked
        chunks = list(zip(states.split(self.rows_at_once), rows.split(self.rows_at_once), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            said = [self._said(say, *chunk) for chunk in chunks]
        else:
            from torch.utils.checkpoint import checkpoint

            said = [checkpoint(self._said, say, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(said)

    def _said(self, say: Say, states: Tensor, rows: Tensor) -> Tensor:
        said: Tensor = say(F.linear(states, self.weight, self.bias), rows)
        return said
