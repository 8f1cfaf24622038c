"""What the supervised stages share: one rank that trains one network on rows of token ids, on ZeRO-3 engines.

Driven a step at a time; sums are divided by counts over all ranks. What a row and a loss are, `sft` and
`reward_training` say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from conf.schema import LearnerConfig, LoraConfig, ModelConfig, OptimizerConfig
from learner import checkpoint, lora, zero
from learner.batching import micro_batches
from learner.collective import evened, summed_stats
from learner.exports import export
from learner.packing import is_padded
from learner.ranks import Ranks

Row = TypeVar("Row")


@dataclass(frozen=True)
class SupervisedSetup:
    """What every rank of a supervised stage is built from."""

    model: ModelConfig  # `tokenizer` is set, and `path` or `init_config`
    learner: LearnerConfig
    optimizer: OptimizerConfig
    num_steps: int
    device: str
    seed: int
    lora: LoraConfig = field(default_factory=LoraConfig)
    center_coef: float = 0.0  # of a reward model's loss
    collective_timeout_s: float = 1800.0


@dataclass(frozen=True, eq=False)
class Sequences:
    """Whole sequences padded on the right, which causal attention never sees."""

    token_ids: Tensor  # [B, L] int64
    mask: Tensor  # [B, L] bool: a real token
    num_prompt_tokens: Tensor  # [B] int64

    @property
    def lengths(self) -> Tensor:
        """[B] int64: the tokens of each sequence."""
        return self.mask.sum(-1)

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


class SupervisedWorker:
    """One rank that trains one network; subclasses say what a micro-batch is and what its loss is."""

    metric_prefix: str

    def __init__(self, setup: SupervisedSetup, ranks: Ranks) -> None:
        self.setup, self.ranks = setup, ranks
        zero.join(ranks, device=setup.device, timeout_s=setup.collective_timeout_s)
        torch.manual_seed(setup.seed)
        self.device = torch.device(setup.device)
        network = self.network(self._adapted)
        self.engine = zero.trained_engine(
            network, setup.learner, setup.optimizer, device=setup.device, num_updates=setup.num_steps
        )

    def network(self, adapted: Callable[[Any, str], Any]) -> nn.Module:
        """Return what is trained; `adapted` puts adapters, if the settings ask for them, into a Hugging Face model.

        Its second argument is the task by PEFT's name.
        """
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
        self.engine.eval()  # adapters may have dropout
        for part in self._parts(rows):
            _, sums = self.loss(part if part is not None else [self.blank()])
            total = added(total, sums, weight=float(part is not None))
        self.engine.train()
        return {
            f"{self.metric_prefix}/eval_{name}": value for name, value in self.describe(summed_stats(total)).items()
        }

    def snapshot(self) -> checkpoint.Snapshot:
        """Return copies of all that this rank's later steps depend on; to be called between steps."""
        return checkpoint.take(self.ranks, {"network": self.engine}, average=None, counters={})

    def restore(self, folder: Path) -> None:
        """Go on from what as many ranks, or another number, have written to `folder`. A collective.

        Raises:
            ConfigError: a file cannot be read, or is of another model.
        """
        checkpoint.put_back(folder, self.ranks, {"network": self.engine}, average=None)

    def export(self, folder: Path) -> None:
        """Write the network as a Hugging Face checkpoint. A collective."""
        dtype, keep = self.setup.learner.dtype, self.ranks.rank == 0
        export(self.engine.module.model, folder, dtype=dtype, settings=self.setup.model, keep=keep)

    def _adapted(self, model: Any, task: str) -> Any:
        if self.setup.lora.rank is None:
            return model
        return lora.adapted(model, self.setup.lora, seed=self.setup.seed, task=task)

    def _parts(self, rows: Sequence[Row]) -> list[list[Row] | None]:
        """Return the rows cut into micro-batches, then None as often as another rank has more of them."""
        cut = micro_batches(
            [self.length(row) for row in rows],
            max_tokens=self.setup.learner.micro_batch_tokens,
            padded=is_padded(self.setup.model),
        )
        return evened([[rows[i] for i in part] for part in cut])


def added(total: dict[str, float], sums: dict[str, float], *, weight: float) -> dict[str, float]:
    return {name: total.get(name, 0.0) + weight * value for name, value in sums.items()}


def to_device(batch: Sequences, device: torch.device) -> Sequences:
    return Sequences(batch.token_ids.to(device), batch.mask.to(device), batch.num_prompt_tokens.to(device))
