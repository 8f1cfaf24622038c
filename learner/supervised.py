"""Supervised fine-tuning and reward-model training, one rank of each, on the same ZeRO-3 engines as PPO.

Both train on rows of token ids and are driven a step at a time; sums are divided by counts over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, the name it has everywhere
from numpy.typing import NDArray
from torch import Tensor, nn

from conf.schema import LearnerConfig, ModelConfig, OptimizerConfig
from learner import models, zero
from learner.collective import highest, summed_stats
from learner.experience import micro_batches
from learner.ppo import last_position


class Example(Protocol):
    """A prompt and its answer: `token_ids` int32 [L], of which the first `num_prompt_tokens` are not trained on."""

    @property
    def token_ids(self) -> NDArray[np.int32]: ...
    @property
    def num_prompt_tokens(self) -> int: ...


class Pair(Protocol):
    """Two answers to one prompt, whole conversations: `chosen_ids` and `rejected_ids`, int32."""

    @property
    def chosen_ids(self) -> NDArray[np.int32]: ...
    @property
    def rejected_ids(self) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class SupervisedSetup:
    """What every rank of a supervised stage is built from."""

    model: ModelConfig  # `tokenizer` is set, and `path` or `init_config`
    learner: LearnerConfig
    optimizer: OptimizerConfig
    num_steps: int
    device: str
    seed: int
    center_coef: float = 0.0  # of a reward model's loss
    collective_timeout_s: float = 1800.0


@dataclass(frozen=True, eq=False)
class Sequences:
    """Whole sequences padded on the right, which causal attention never sees."""

    token_ids: Tensor  # [B, L] int64
    mask: Tensor  # [B, L] bool: a real token
    num_prompt_tokens: Tensor  # [B] int64

    @property
    def label_mask(self) -> Tensor:
        """[B, L - 1] bool: the token after this position is trained on."""
        positions = torch.arange(1, self.mask.shape[1], device=self.mask.device)
        return self.mask[:, 1:] & (positions >= self.num_prompt_tokens.unsqueeze(-1))


def pad_sequences(sequences: Sequence[NDArray[np.int32]], num_prompt_tokens: Sequence[int]) -> Sequences:
    """Return the sequences as one padded batch on the CPU."""
    longest = max(len(ids) for ids in sequences)
    token_ids = torch.zeros((len(sequences), longest), dtype=torch.int64)
    mask = torch.zeros((len(sequences), longest), dtype=torch.bool)
    for row, ids in enumerate(sequences):
        token_ids[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        mask[row, : len(ids)] = True
    return Sequences(token_ids, mask, torch.tensor(num_prompt_tokens))


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


class RewardTrainingModel(nn.Module):
    """A one-label classification model that answers with the score at the last token of each sequence."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Sequences) -> Tensor:
        """Return scores [B] float32; the last token is found by position, never by comparing with a pad id."""
        hidden = self.model.base_model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        scores: Tensor = self.model.score(hidden[rows, last_position(batch.mask)]).squeeze(-1).float()
        return scores


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, *, center_coef: float = 0.0) -> Tensor:
    """Return -log sigmoid(c - r) + center_coef (c + r)^2 summed over pairs: scores [B] and [B] -> scalar.

    Bradley and Terry 1952, as used for reward models by Ouyang et al. 2022 (arXiv 2203.02155), equation 1. It leaves
    what is added to both scores of a prompt open; the second term, of Eisenstein et al. 2023 (arXiv 2312.09244), ties
    it down, so that scores of different prompts can be compared.
    """
    return -F.logsigmoid(chosen - rejected).sum() + center_coef * (chosen + rejected).square().sum()


Row = TypeVar("Row")


class SupervisedWorker:
    """One rank that trains one network; subclasses say what a micro-batch is and what its loss is."""

    metric_prefix: str

    def __init__(self, setup: SupervisedSetup, ranks: zero.Ranks) -> None:
        self.setup, self.ranks = setup, ranks
        zero.join(ranks, device=setup.device, timeout_s=setup.collective_timeout_s)
        torch.manual_seed(setup.seed)
        self.device = torch.device(setup.device)
        self.engine = zero.trained_engine(
            self.network(), setup.learner, setup.optimizer, device=setup.device, num_updates=setup.num_steps
        )

    def network(self) -> nn.Module:
        raise NotImplementedError

    def loss(self, rows: Sequence[Any]) -> tuple[Tensor, dict[str, float]]:
        """Return the loss summed over `rows` and the sums that its metrics need, `count` among them."""
        raise NotImplementedError

    def length(self, row: Any) -> int:
        raise NotImplementedError

    def describe(self, total: dict[str, float]) -> dict[str, float]:
        """Return the metrics that sums over all ranks give."""
        raise NotImplementedError

    def blank(self) -> Any:
        """Return a row that stands for nothing, for a rank that has fewer micro-batches than another."""
        raise NotImplementedError

    def count(self, rows: Sequence[Any]) -> float:
        """Return how many terms the loss of `rows` sums over."""
        raise NotImplementedError

    def train_step(self, rows: Sequence[Any]) -> dict[str, float]:
        """Take one optimizer step on this rank's rows of a batch; return metrics over all ranks.

        Raises:
            FloatingPointError: the loss is not finite; no step was taken with it.
        """
        count = summed_stats({"count": self.count(rows)})["count"]
        total: dict[str, float] = {}
        for part in self._parts(rows):
            loss, sums = self.loss(part if part is not None else [self.blank()])
            weight = self.ranks.world_size / count if part is not None else 0.0
            self.engine.backward(loss * weight)
            total = added(total, sums, weight=float(part is not None))
        total = summed_stats(total)
        if not math.isfinite(total["loss"]):
            raise FloatingPointError(f"the {self.metric_prefix} loss is {total['loss']}: no step was taken with it")
        self.engine.step()
        return {f"{self.metric_prefix}/{name}": value for name, value in self.describe(total).items()} | {
            f"{self.metric_prefix}/grad_norm": zero.finite_grad_norm(self.engine, self.metric_prefix),
            f"{self.metric_prefix}/lr": float(self.engine.get_lr()[0]),
        }

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Return the same metrics on held-out rows, each named `eval_...`, without training. A collective."""
        total: dict[str, float] = {}
        for part in self._parts(rows):
            _, sums = self.loss(part if part is not None else [self.blank()])
            total = added(total, sums, weight=float(part is not None))
        return {
            f"{self.metric_prefix}/eval_{name}": value for name, value in self.describe(summed_stats(total)).items()
        }

    def export(self, folder: Path) -> None:
        """Write the network as a Hugging Face checkpoint. A collective."""
        tokenizer = self.setup.model.tokenizer
        assert tokenizer is not None
        first = self.ranks.rank == 0
        state = zero.full_state(self.engine.module.model, dtype=self.setup.learner.dtype, keep=first)
        if first:
            models.save_pretrained(self.engine.module.model, state, folder, tokenizer=tokenizer)

    def _parts(self, rows: Sequence[Row]) -> Iterator[list[Row] | None]:
        """Yield the rows cut into micro-batches, then None as often as another rank has more of them."""
        cut = micro_batches([self.length(row) for row in rows], max_tokens=self.setup.learner.micro_batch_tokens)
        most = highest(len(cut))  # before the first forward pass of any rank
        for part in cut:
            yield [rows[i] for i in part]
        for _ in range(most - len(cut)):
            yield None


def added(total: dict[str, float], sums: dict[str, float], *, weight: float) -> dict[str, float]:
    return {name: total.get(name, 0.0) + weight * value for name, value in sums.items()}


@dataclass(frozen=True, eq=False)
class _Example:
    token_ids: NDArray[np.int32]
    num_prompt_tokens: int


@dataclass(frozen=True, eq=False)
class _Pair:
    chosen_ids: NDArray[np.int32]
    rejected_ids: NDArray[np.int32]


class SFTWorker(SupervisedWorker):
    """One rank of supervised fine-tuning: cross-entropy on the answers alone."""

    metric_prefix = "sft"

    def network(self) -> nn.Module:
        model = self.setup.model
        if model.init_config is not None:
            return SFTModel(
                models.initial_causal_lm(
                    model.init_config, seed=self.setup.seed, attn_implementation=model.attn_implementation
                )
            )
        assert model.path is not None
        return SFTModel(
            models.load_causal_lm(
                model.path, attn_implementation=model.attn_implementation, trust_remote_code=model.trust_remote_code
            )
        )

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


class RewardModelWorker(SupervisedWorker):
    """One rank of reward-model training: the Bradley-Terry loss on pairs of a chosen and a rejected answer."""

    metric_prefix = "reward_model"

    def network(self) -> nn.Module:
        model = self.setup.model
        assert model.path is not None
        return RewardTrainingModel(
            models.load_scalar_model(
                model.path, attn_implementation=model.attn_implementation, trust_remote_code=model.trust_remote_code
            )
        )

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


def to_device(batch: Sequences, device: torch.device) -> Sequences:
    return Sequences(batch.token_ids.to(device), batch.mask.to(device), batch.num_prompt_tokens.to(device))
