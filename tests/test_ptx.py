"""learner.ptx: which rows are drawn, and that their loss is that of a language model. Five seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.rollout import IntArray
from conf.schema import PTXConfig
from learner.models import PolicyModel, PolicyOutput, load_causal_lm
from learner.ptx import WHOLE, TextLoss, text_batches
from tests.tiny_models import tiny_checkpoint


def rows(count: int) -> list[IntArray]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, 60, int(n)).astype(np.int32) for n in rng.integers(2, 12, count)]


def text_loss(count: int, batch_size: int) -> TextLoss:
    return TextLoss(
        rows(count), PTXConfig(coef=2.0, path="text.jsonl", batch_size=batch_size), max_tokens=24, padded=True
    )


def test_the_rows_follow_from_the_seed_and_none_comes_twice() -> None:
    text = text_loss(20, 6)
    one, again, other = ([row.tolist() for row in text.mini_batch(seed)] for seed in ((0, 1, 2), (0, 1, 2), (0, 1, 3)))
    assert one == again != other
    every = [row.tolist() for row in rows(20)]
    assert len(one) == 6
    assert len({every.index(row) for row in one}) == 6


def test_fewer_rows_than_a_mini_batch_are_all_taken() -> None:
    chosen = [row.tolist() for row in text_loss(4, 100).mini_batch((0, 0, 0))]
    assert sorted(chosen) == sorted(row.tolist() for row in rows(4))


def test_every_token_but_the_first_is_predicted() -> None:
    batches = text_batches(rows(9), max_tokens=24, padded=True)
    assert len(batches) > 1
    assert sum(batch.num_response_tokens for batch in batches) == sum(len(row) - 1 for row in rows(9))
    for batch in batches:
        followed = batch.token_ids.gather(1, (batch.state_index + 1).clamp(max=batch.token_ids.shape[1] - 1))
        assert torch.equal(followed[batch.mask], batch.response_ids[batch.mask])


def test_the_loss_is_that_of_a_language_model(tmp_path: Path) -> None:
    model = load_causal_lm(str(tiny_checkpoint(tmp_path)), attn_implementation="sdpa")
    policy = PolicyModel(model)
    with torch.no_grad():
        ours = sum(
            float(-PolicyOutput.of(policy(batch, sampled_from=WHOLE)).logprobs.sum())
            for batch in text_batches(rows(9), max_tokens=24, padded=True)
        )
        theirs = 0.0
        for row in rows(9):
            ids = torch.from_numpy(row.astype(np.int64))[None]
            theirs += float(model(input_ids=ids, labels=ids).loss) * (len(row) - 1)
    assert ours == pytest.approx(theirs, rel=1e-5)
