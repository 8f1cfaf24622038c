"""Sequence parallelism: neighbouring ranks share the tokens of each micro-batch, and at attention its heads.

DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509), whose exchange this uses: each rank computes its part of the
tokens, and for attention tokens are exchanged for heads and back. All ranks of a group are given the same rollouts, so
what is summed over rollouts is summed over one rank of each group: `hands`. Without groups of that kind there is
nothing to form, and every rank is a hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import ConfigError
from learner.ranks import Ranks


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share tokens with this one."""

    size: int
    place: int  # of this rank
    group: Any  # torch's
    hands: Any  # torch's group of the ranks that have this place in their groups

    def own(self, num_tokens: int) -> slice:
        """Return which of so many tokens, a multiple of `size`, this rank computes."""
        part = num_tokens // self.size
        return slice(self.place * part, (self.place + 1) * part)

    def all_have(self, has: bool) -> bool:
        """Return whether every rank of the group has what this one has or lacks. A collective of the group."""
        everyone = torch.tensor(int(has), dtype=torch.int64, device=collective_device())
        dist.all_reduce(everyone, op=dist.ReduceOp.MIN, group=self.group)
        return bool(everyone)

    def completed(self, own: Tensor, mine: Tensor) -> Tensor:
        """Return rows [N, ...] of which each rank of the group has some: `own` [n, ...], where `mine` [N] is True.

        A collective of the group. Gradients go to this rank's rows alone; the others have theirs from the same loss.
        """
        rows = own.new_zeros(mine.shape + own.shape[1:])
        rows[mine] = own
        everyone = rows.detach().clone()
        dist.all_reduce(everyone, group=self.group)
        return torch.where(mine.reshape(-1, *[1] * (own.dim() - 1)), rows, everyone)


def collective_device() -> torch.device:
    """Return the device on which the ranks' backend takes tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


_formed: SequenceGroup | None = None


def form(ranks: Ranks, *, timeout_s: float) -> None:
    """Form the groups in which the learner's ranks share tokens. A collective of all ranks, once in a process."""
    global _formed
    size, limit = ranks.sequence_parallel_size, timedelta(seconds=timeout_s)
    if size == 1:
        _formed = None
        return
    # Every rank has to make every group.
    together = [dist.new_group(range(first, first + size), timeout=limit) for first in range(0, ranks.world_size, size)]
    hands = [dist.new_group(range(place, ranks.world_size, size), timeout=limit) for place in range(size)]
    place = ranks.rank % size
    _formed = SequenceGroup(size, place, together[ranks.hand], hands[place])


def sequence_group() -> SequenceGroup | None:
    """Return the group that this rank is in; None if every rank computes its rollouts alone."""
    return _formed


def hands() -> Any:
    """Return torch's group over which rollouts are summed; None for all ranks."""
    return None if _formed is None else _formed.hands


def check_shareable(config: Any, path: str) -> None:
    """Raise ConfigError unless the tokens of a Hugging Face config's model can be shared by the ranks of a group.

    Its heads must divide. Rotary embeddings that change with the longest position would be computed from each rank's
    own part of the positions.
    """
    if _formed is None:
        return
    changing = [kind for kind in rotary_kinds(config) if kind == "longrope" or "dynamic" in kind]
    if changing:
        why = f"the rotary embeddings of {path} are {changing[0]}, which looks at all positions of a row; set it to 1"
        raise ConfigError("learner.sequence_parallel_size", _formed.size, why)
    text, size = config.get_text_config(), _formed.size
    keys = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if text.num_attention_heads % size or (keys % size and size % keys):
        why = f"{path} has {text.num_attention_heads} heads and {keys} for keys, which so many ranks cannot share"
        raise ConfigError("learner.sequence_parallel_size", size, f"{why}; set it to a divisor of both")


def rotary_kinds(config: Any) -> list[str]:
    """Return the kinds of rotary embeddings that a Hugging Face config names, of all its layer types."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    layers = parameters.values() if "rope_type" not in parameters else [parameters]
    return [one["rope_type"] for one in layers if isinstance(one, dict) and one.get("rope_type")]


@cache
def exchanging(attention: Any, group: SequenceGroup, num_heads: int, num_keys: int, width: int) -> Any:
    """Return an attention function that sees all tokens and a part of the heads, around one that sees all it is given.

    Args:
        attention: of transformers' interface.
        num_heads: of the queries of the whole model; num_keys: of its keys; width: of each.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF(
        attn=attention,
        batch_size=1,
        attn_head_count=num_heads,
        attn_head_size=width,
        kv_head_count=num_keys,
        num_hidden_layers=1,  # looked at when debugging alone
        process_group=group.group,
        seq_length_is_variable=True,
    )
