"""Supervised fine-tuning: cross-entropy on the answers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, the name it has everywhere
from numpy.typing import NDArray
from torch import Tensor, nn

from learner import lora, models, zero
from learner.packing import flat_states, in_chunks, of_states
from learner.supervised import Sequences, SupervisedWorker, pad_sequences, to_device


class Example(Protocol):
    """A prompt and its answer: `token_ids` int32 [L], of which the first `num_prompt_tokens` are not trained on."""

    @property
    def token_ids(self) -> NDArray[np.int32]: ...
    @property
    def num_prompt_tokens(self) -> int: ...


class SFTModel(nn.Module):
    """A causal language model that answers with the summed loss on the answers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        in_chunks(model)

    def forward(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        """Return (negative log-likelihood summed over answer tokens, how many of them the model ranks first)."""
        states = flat_states(self.model, batch.token_ids, batch.lengths)
        places = states.starts.unsqueeze(-1) + torch.arange(batch.token_ids.shape[1] - 1, device=batch.mask.device)
        labels = batch.token_ids[:, 1:][batch.label_mask]
        head = self.model.get_output_embeddings()
        said = states.asked(
            places[batch.label_mask], lambda hidden, rows: of_states(head, hidden, token_losses, rows), labels
        )
        losses, right = said.unbind(-1)
        return losses.sum(), right.sum().detach()


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each label, and 1 where the model ranks it first: [N, V], [N] -> [N, 2] float32."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return torch.stack([losses, (logits.argmax(-1) == labels).float()], dim=-1)


@dataclass(frozen=True, eq=False)
class _Example:
    token_ids: NDArray[np.int32]
    num_prompt_tokens: int


class SFTWorker(SupervisedWorker):
    """One rank of supervised fine-tuning: cross-entropy on the answers alone."""

    metric_prefix = "sft"

    def network(self, adapted: Callable[[Any, str], Any]) -> nn.Module:
        model, attention = self.setup.model, self.setup.model.attn_implementation
        if model.init_config is not None:
            start = models.initial_causal_lm(model.init_config, seed=self.setup.seed, attn_implementation=attention)
        else:
            assert model.path is not None
            with zero.partitioned_loading(self.setup.learner, "policy", device=self.setup.device):
                start = models.load_causal_lm(
                    model.path, attn_implementation=attention, trust_remote_code=model.trust_remote_code
                )
        return SFTModel(adapted(start, lora.CAUSAL_LM))

    def loss(self, rows: Sequence[Example]) -> tuple[Tensor, dict[str, float]]:
        batch = pad_sequences([row.token_ids for row in rows], [row.num_prompt_tokens for row in rows])
        loss, right = self.engine(to_device(batch, self.device))
        return loss, {"loss": float(loss.detach()), "right": float(right), "count": self.count(rows)}

    def length(self, row: Example) -> int:
        return len(row.token_ids)

    def count(self, rows: Sequence[Example]) -> float:
        return float(sum(len(row.token_ids) - row.num_prompt_tokens for row in rows))

    def describe(self, total: dict[str, float]) -> dict[str, float]:
        return {"loss": total["loss"] / total["count"], "token_accuracy": total["right"] / total["count"]}

    def blank(self) -> Example:
        return _Example(np.zeros(2, dtype=np.int32), 1)
