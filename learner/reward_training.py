"""Training of a reward model on pairs of answers, with the loss of Bradley and Terry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch.nn.functional as F  # noqa: N812, the name it has everywhere
from numpy.typing import NDArray
from torch import Tensor, nn

from learner import lora, models, zero
from learner.packing import flat_states
from learner.ppo import last_position
from learner.supervised import Sequences, SupervisedWorker, pad_sequences, to_device


class Pair(Protocol):
    """Two answers to one prompt, whole conversations: `chosen_ids` and `rejected_ids`, int32."""

    @property
    def chosen_ids(self) -> NDArray[np.int32]: ...
    @property
    def rejected_ids(self) -> NDArray[np.int32]: ...


class RewardTrainingModel(nn.Module):
    """A one-label classification model that answers with the score at the last token of each sequence."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Sequences) -> Tensor:
        """Return scores [B] float32; the last token is found by position, never by comparing with a pad id."""
        states = flat_states(self.model, batch.token_ids, batch.lengths)
        places = states.starts + last_position(batch.mask)
        return states.asked(places, lambda hidden, _: self.model.score(hidden).squeeze(-1).float(), places)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, *, center_coef: float = 0.0) -> Tensor:
    """Return -log sigmoid(c - r) + center_coef (c + r)^2 summed over pairs: scores [B] and [B] -> scalar.

    Bradley and Terry 1952, as used for reward models by Ouyang et al. 2022 (arXiv 2203.02155), equation 1. It leaves
    what is added to both scores of a prompt open; the second term, of Eisenstein et al. 2023 (arXiv 2312.09244), ties
    it down, so that scores of different prompts can be compared.
    """
    return -F.logsigmoid(chosen - rejected).sum() + center_coef * (chosen + rejected).square().sum()


@dataclass(frozen=True, eq=False)
class _Pair:
    chosen_ids: NDArray[np.int32]
    rejected_ids: NDArray[np.int32]


class RewardModelWorker(SupervisedWorker):
    """One rank of reward-model training: the Bradley-Terry loss on pairs of a chosen and a rejected answer."""

    metric_prefix = "reward_model"

    def network(self, adapted: Callable[[Any, str], Any]) -> nn.Module:
        model = self.setup.model
        assert model.path is not None
        with zero.partitioned_loading(self.setup.learner, "reward", device=self.setup.device):
            start = models.load_scalar_model(
                model.path, attn_implementation=model.attn_implementation, trust_remote_code=model.trust_remote_code
            )
        return RewardTrainingModel(adapted(start, lora.SEQ_CLS))

    def loss(self, rows: Sequence[Pair]) -> tuple[Tensor, dict[str, float]]:
        both = [row.chosen_ids for row in rows] + [row.rejected_ids for row in rows]
        chosen, rejected = self.engine(to_device(pad_sequences(both, [0] * len(both)), self.device)).chunk(2)
        loss = bradley_terry_loss(chosen, rejected, center_coef=self.setup.center_coef)
        margin = (chosen - rejected).detach()
        return loss, {
            "loss": float(loss.detach()),
            "right": float((margin > 0).sum()),
            "margin": float(margin.sum()),
            "count": self.count(rows),
        }

    def length(self, row: Pair) -> int:
        return 2 * max(len(row.chosen_ids), len(row.rejected_ids))

    def count(self, rows: Sequence[Pair]) -> float:
        return float(len(rows))

    def describe(self, total: dict[str, float]) -> dict[str, float]:
        return {
            "loss": total["loss"] / total["count"],
            "accuracy": total["right"] / total["count"],
            "margin_mean": total["margin"] / total["count"],
        }

    def blank(self) -> Pair:
        return _Pair(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int32))
