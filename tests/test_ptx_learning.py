"""TextLoss.learn against a slow loop over a Hugging Face model, in a group of one and on two ranks. Fifteen seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.rollout import IntArray
from conf.schema import PTXConfig
from learner.models import PolicyModel, load_causal_lm
from learner.ptx import TextLoss
from learner.ranks import Ranks
from tests.learner_ranks import on_ranks
from tests.tiny_models import tiny_checkpoint

COEF, MAX_TOKENS, SEED = 3.0, 24, (0, 1, 2)


def text_loss(count: int, *, max_tokens: int = MAX_TOKENS) -> TextLoss:
    """Of mini-batches of at most 6 rows, of 2 to 11 tokens each."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(4, 64, int(rng.integers(2, 12))).astype(np.int32) for _ in range(count)]
    return TextLoss(rows, PTXConfig(coef=COEF, path="text.jsonl", batch_size=6), max_tokens=max_tokens, padded=True)


class PlainEngine(nn.Module):
    """Stands in for DeepSpeed's: it takes a network forward and back, and the gradients stay where they fall."""

    device = torch.device("cpu")

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        self.module = PolicyModel(load_causal_lm(checkpoint, attn_implementation="sdpa"))

    def forward(self, *args: Any, **how: Any) -> Any:
        return self.module(*args, **how)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.module.model.parameters() if p.grad is not None])


def slow_loss(model: Any, rows: list[IntArray]) -> Tensor:
    """Mean negative log-likelihood of a token, one row and one token at a time, by the model's own logits."""
    terms = []
    for row in rows:
        logits = model(input_ids=torch.tensor(row[None].astype(np.int64))).logits[0]
        terms += [-torch.log_softmax(logits[t - 1], -1)[int(row[t])] for t in range(1, len(row))]
    return torch.stack(terms).mean()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("policy")))


@pytest.fixture
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("max_tokens", [1, MAX_TOKENS, 10**6])
def test_the_loss_is_the_mean_negative_log_likelihood_of_a_token(checkpoint: str, max_tokens: int) -> None:
    """Whatever the cut into micro-batches; its gradient has the coefficient. (PPO details 8)"""
    engine = PlainEngine(checkpoint)
    loss = text_loss(9, max_tokens=max_tokens)
    share = loss.learn(engine, SEED)
    gradient = engine.gradient()
    engine.zero_grad()
    expected = slow_loss(engine.module.model, loss.mini_batch(SEED))
    expected.backward()
    assert share == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, COEF * engine.gradient(), atol=1e-5, rtol=1e-4)
    assert gradient.abs().max() > 1e-2


def learn(ranks: Ranks, checkpoint: str) -> list[dict[str, Any]]:
    from learner import zero

    zero.join(ranks, device="cpu", timeout_s=60)
    results = []
    for count in (1, 9):
        engine, loss = PlainEngine(checkpoint), text_loss(count)
        share = loss.learn(engine, SEED)
        gradient = engine.gradient()
        dist.all_reduce(gradient)
        rows = [row.tolist() for row in loss.mini_batch(SEED)]
        results.append({"share": share, "gradient": (gradient / ranks.world_size).numpy(), "rows": rows})
    return results


@pytest.mark.ranks
def test_ranks_draw_the_same_rows_and_share_the_loss(checkpoint: str) -> None:
    """Of one row, the second rank has none and takes part all the same."""
    engine = PlainEngine(checkpoint)
    for count, first, second in zip((1, 9), *on_ranks(learn, 2, checkpoint), strict=True):
        rows = text_loss(count).mini_batch(SEED)
        assert first["rows"] == second["rows"] == [row.tolist() for row in rows]
        assert (second["share"] == 0) == (count == 1)
        engine.zero_grad()
        expected = slow_loss(engine.module.model, rows)
        (COEF * expected).backward()
        assert first["share"] + second["share"] == pytest.approx(expected.item(), rel=1e-5)
        np.testing.assert_allclose(first["gradient"], engine.gradient().numpy(), atol=1e-5, rtol=1e-4)
