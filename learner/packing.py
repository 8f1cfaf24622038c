"""Networks read sequences one after another in one row, without padding between them.

Under the attention `packed` no sequence sees another. Whatever else a transformer computes, it computes for each token
by itself; so ranks may share the tokens of a row, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, the name it has everywhere
from torch import Tensor, nn

from conf.schema import ConfigError, ModelConfig
from learner.attention import PACKED
from learner.sequence_groups import SequenceGroup, check_shareable, sequence_group

Say = Callable[[Tensor, Tensor], Tensor]
LOGIT_BYTES = 256 << 20  # of float32 logits that are held at once; there are a few tensors of that size


def is_padded(model: ModelConfig) -> bool:
    """Return whether batches of a network with these settings are computed with their padding."""
    return model.attn_implementation != PACKED


def checked(model: Any, path: str) -> Any:
    """Return a Hugging Face model, if it keeps packed sequences apart or is not asked to.

    Raises:
        ConfigError: its attention is code of its own, which never hears of `packed`, or it has a state that goes on
            from one sequence to the next; or so many ranks cannot share its tokens.
    """
    kept_apart = model._supports_attention_backend and not model._is_stateful
    if model.config._attn_implementation == PACKED and not kept_apart:
        remedy = f"{type(model).__name__} at {path} mixes sequences that stand in one row; set it to sdpa, or to eager"
        raise ConfigError("model.attn_implementation", PACKED, remedy)
    check_shareable(model.config, path)
    return model


@dataclass(frozen=True, eq=False)
class FlatStates:
    """The last hidden states of sequences that stand one after another; where ranks share tokens, of its own alone."""

    hidden: Tensor  # [P, H]
    starts: Tensor  # [B] int64: where each sequence begins, among the states of all ranks
    group: SequenceGroup | None = None  # with which the tokens are shared

    def asked(self, places: Tensor, say: Say, rows: Tensor) -> Tensor:
        """Return what `say(states, rows)` says of the states at `places` [N] and of `rows` [N, ...]: [N, ...].

        Where ranks share tokens, each asks of its own and hears the rest: a collective of their group.
        """
        if self.group is None:
            return say(self.hidden[places], rows)
        first = self.group.place * len(self.hidden)
        mine = (places >= first) & (places < first + len(self.hidden))
        return self.group.completed(say(self.hidden[places[mine] - first], rows[mine]), mine)


def flat_states(model: Any, token_ids: Tensor, lengths: Tensor) -> FlatStates:
    """Return the last hidden states of padded sequences without their padding, as far as the attention allows.

    Args:
        model: a Hugging Face model with a head, of which the body is run.
        token_ids: [B, L] int64, padded on the right.
        lengths: [B] int64, above 0.

    Returns:
        P states. P is the number of tokens; of tokens that this rank computes, where ranks share them; or B x L where
        the model's attention is not `packed`: causal attention never sees what stands to the right.
    """
    rows, width = token_ids.shape
    if model.config._attn_implementation != PACKED:
        hidden = model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
        return FlatStates(hidden.flatten(0, 1), torch.arange(0, rows * width, width, device=token_ids.device))
    places = torch.arange(width, device=token_ids.device).expand(rows, width)
    real = places < lengths.unsqueeze(-1)
    ids, positions, ends = token_ids[real], places[real], lengths.cumsum(0)
    starts, group = ends - lengths, sequence_group()
    own, longest = slice(None), width
    if group is not None:
        missing = -len(ids) % group.size
        if missing:  # one more sequence, of which nothing is asked, makes the row divide
            ids, positions = F.pad(ids, (0, missing)), torch.cat([positions, places.new_tensor(range(missing))])
            ends = torch.cat([ends, ends[-1:] + missing])
            longest = max(width, missing)
        own = group.own(len(ids))
    bounds = F.pad(ends, (1, 0)).to(torch.int32)
    hidden = model.base_model(
        input_ids=ids[own].unsqueeze(0),
        position_ids=positions[own].unsqueeze(0),
        use_cache=False,
        # The names under which transformers hands these through a model to its attention.
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
    ).last_hidden_state
    return FlatStates(hidden.squeeze(0), starts, group)


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
