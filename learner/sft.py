"""Supervised fine-tuning: cross-entropy on the answers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch.nn.functional as F  # noqa: N812, the name it has everywhere
from numpy.typing import NDArray
from torch import Tensor, nn

from learner import lora, models
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

    def forward(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        """Return (negative log-likelihood summed over answer tokens, how many of them the model ranks first)."""
        hidden = self.model.base_model(input_ids=batch.token_ids, use_cache=False).last_hidden_state[:, :-1]
        logits = self.model.get_output_embeddings()(hidden[batch.label_mask]).float()  # [N, V]
        labels = batch.token_ids[:, 1:][batch.label_mask]
        return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum().detach()


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
