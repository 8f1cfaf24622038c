"""The supervised stages over real gloo ranks: equal to plain PyTorch loops, on one rank, two and four."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.supervised_rows import PreferencePair, SupervisedExample
from cluster.supervised_stage import endless_batches
from conf.schema import LearnerConfig, LoraConfig, ModelConfig, OptimizerConfig
from learner import zero
from learner.ranks import Ranks
from learner.reward_training import RewardModelWorker, bradley_terry_loss
from learner.sft import SFTWorker
from learner.supervised import SupervisedSetup, SupervisedWorker, pad_sequences
from tests.learner_ranks import on_ranks
from tests.tiny_models import tiny_checkpoint

NUM_STEPS = 3


def test_bradley_terry_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    want = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))
    assert float(bradley_terry_loss(chosen, rejected)) == pytest.approx(want, abs=1e-6)
    centred = float(bradley_terry_loss(chosen, rejected, center_coef=0.1))
    assert centred == pytest.approx(want + 0.1 * (1.0**2 + 2.0**2), abs=1e-6)


def test_labels_are_the_answer_tokens_alone() -> None:
    batch = pad_sequences([np.array([5, 6, 7, 8], np.int32), np.array([5, 6], np.int32)], [2, 1])
    # position i predicts token i + 1: tokens 2 and 3 of the first row, token 1 of the second
    assert batch.label_mask.tolist() == [[False, True, True], [True, False, False]]
    assert batch.mask.tolist() == [[True, True, True, True], [True, True, False, False]]


def test_batches_go_through_every_row_before_any_comes_again() -> None:
    batches = endless_batches(list(range(10)), 4, seed=1)
    drawn = [row for _ in range(5) for row in next(batches)]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert drawn[:10] != drawn[10:20]
    again = endless_batches(list(range(10)), 4, seed=1)
    assert [row for _ in range(5) for row in next(again)] == drawn


def examples(step: int) -> list[SupervisedExample]:
    rng = np.random.default_rng(step)
    lengths = [(int(rng.integers(1, 6)), int(rng.integers(1, 8))) for _ in range(7)]
    return [SupervisedExample(rng.integers(4, 60, p + a).astype(np.int32), p) for p, a in lengths]


def pairs(step: int) -> list[PreferencePair]:
    rng = np.random.default_rng(step)
    draw = [rng.integers(4, 60, int(rng.integers(2, 12))).astype(np.int32) for _ in range(14)]
    return [PreferencePair(chosen, rejected) for chosen, rejected in zip(draw[::2], draw[1::2], strict=True)]


def make_setup(path: Path) -> SupervisedSetup:
    return SupervisedSetup(
        model=ModelConfig(path=str(path), tokenizer=str(path)),
        learner=LearnerConfig(dtype="float32", micro_batch_tokens=24),
        optimizer=OptimizerConfig(lr=1e-3, max_grad_norm=0.5, scheduler="linear", warmup_steps=1),
        num_steps=NUM_STEPS,
        device="cpu",
        seed=0,
        collective_timeout_s=60.0,
    )


def run_steps(ranks: Ranks, setup: SupervisedSetup, worker_class: Any, rows_of: Any) -> tuple[Any, Any, Any]:
    worker: SupervisedWorker = worker_class(setup, ranks)
    metrics = [worker.train_step(rows_of(step)[ranks.hand :: ranks.num_hands]) for step in range(NUM_STEPS)]
    state = zero.full_state(worker.engine.module.model, dtype="float32")
    held_out = worker.evaluate(rows_of(99)[ranks.hand :: ranks.num_hands])
    after = zero.full_state(worker.engine.module.model, dtype="float32")
    assert all(torch.equal(state[name], after[name]) for name in state), "evaluation trains nothing"
    return metrics, held_out, {name: tensor.numpy() for name, tensor in state.items()}


def sft_loss(model: Any, rows: list[SupervisedExample]) -> tuple[torch.Tensor, int]:
    loss, count = torch.zeros(()), 0
    for row in rows:
        ids = torch.from_numpy(row.token_ids.astype(np.int64))[None]
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        for place in range(row.num_prompt_tokens, ids.shape[1]):
            loss = loss - logprobs[place - 1, ids[0, place]]
            count += 1
    return loss, count


def reward_loss(model: Any, rows: list[PreferencePair]) -> tuple[torch.Tensor, int]:
    def score(ids: Any) -> torch.Tensor:
        hidden = model.base_model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state
        return torch.as_tensor(model.score(hidden[0, -1])[0])

    margins = torch.stack([score(row.chosen_ids) - score(row.rejected_ids) for row in rows])
    return torch.log1p(torch.exp(-margins)).sum(), len(rows)


def plain_loop(model: Any, rows_of: Any, loss_of: Any, setup: SupervisedSetup) -> tuple[list[float], float]:
    config = setup.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.betas, weight_decay=0.0)
    losses = []
    for step in range(NUM_STEPS):
        # linear with one step of warm-up: 0, then from the peak towards zero
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (0.0 if step == 0 else (NUM_STEPS - step) / (NUM_STEPS - 1))
        loss, count = loss_of(model, rows_of(step))
        optimizer.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()) / count)
    with torch.no_grad():
        loss, count = loss_of(model, rows_of(99))
    return losses, float(loss) / count


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_ranks_equal_a_plain_loop(kind: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "policy", "llama", seed=1)
    if kind == "sft":
        worker, rows_of, loss_of, prefix = SFTWorker, examples, sft_loss, "sft"
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        worker, rows_of, loss_of, prefix = RewardModelWorker, pairs, reward_loss, "reward_model"  # type: ignore[assignment]
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
        path = tmp_path / "with_head"
        model.save_pretrained(path)
    setup = make_setup(path)
    losses, held_out = plain_loop(model, rows_of, loss_of, setup)
    for world_size, shared_by in ((1, 1), (2, 1), (4, 2)):  # the last: each two share the tokens of their rows
        results = on_ranks(run_steps, world_size, setup, worker, rows_of, sequence_parallel_size=shared_by)
        for metrics, evaluated, state in results:
            assert [step[f"{prefix}/loss"] for step in metrics] == pytest.approx(losses, abs=1e-5)
            assert evaluated[f"{prefix}/eval_loss"] == pytest.approx(held_out, abs=1e-5)
            for name, parameter in model.named_parameters():
                assert np.abs(state[name] - parameter.detach().numpy()).max() < 1e-5, name


def run_with_adapters(
    ranks: Ranks, setup: SupervisedSetup, worker_class: Any, rows_of: Any
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The weights after training, and two evaluations of another worker, whose adapters have dropout."""
    _, _, state = run_steps(ranks, setup, worker_class, rows_of)
    worker: SupervisedWorker = worker_class(replace(setup, lora=replace(setup.lora, dropout=0.5)), ranks)
    worker.train_step(rows_of(0)[ranks.rank :: ranks.world_size])
    return state, [worker.evaluate(rows_of(99)[ranks.rank :: ranks.world_size]) for _ in range(2)]


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_with_adapters_a_stage_leaves_an_ordinary_checkpoint_that_differs_by_low_rank(
    kind: str, tmp_path: Path
) -> None:
    """Of each linear layer the change has rank 2 at most; a new head is trained whole; nothing else moves."""
    worker, rows_of = (SFTWorker, examples) if kind == "sft" else (RewardModelWorker, pairs)
    path = tiny_checkpoint(tmp_path / "start", "llama", seed=1)
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
        path = tmp_path / "with_head"
        model.save_pretrained(path)
    kinds: Any = AutoModelForCausalLM if kind == "sft" else AutoModelForSequenceClassification
    before = dict(kinds.from_pretrained(path, dtype=torch.float32).named_parameters())
    setup = replace(make_setup(path), lora=LoraConfig(rank=2, alpha=8.0))
    (after, evaluations), _ = on_ranks(run_with_adapters, 2, setup, worker, rows_of)
    assert after.keys() == before.keys(), "the names of a model without adapters"
    moved = set()
    for name, tensor in after.items():
        change = tensor - before[name].detach().numpy()
        if np.abs(change).max() > 1e-6:
            moved.add(name)
            assert "_proj" in name or name == "score.weight", name
            assert np.linalg.matrix_rank(change, tol=1e-5) <= 2, name
    assert sum("_proj" in name for name in moved) == 14, "every linear layer of both decoder layers"
    assert ("score.weight" in moved) == (kind == "reward")
    assert evaluations[0] == evaluations[1], "held-out rows see no dropout"
