"""A learner rank that leaves its GPU to others, and comes back: nothing of it is lost. With real gloo ranks.

On a CPU everything is moved to new memory of the same kind, so that whatever is forgotten would go on in the old one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.ranks import Ranks
from learner.resting import kept_tensors, move
from tests.learner_ranks import on_ranks
from tests.test_learner import checkpoints_in, hand, make_setup, train_batch

UPDATES = 2
SETUPS: dict[str, dict[str, Any]] = {
    "vapo": {},
    "shared critic, entropy, KL loss": {"dtype": "bfloat16"},
    "rloo, gspo, lora": {},
}


def test_views_of_one_storage_stay_views_of_one_storage() -> None:
    flat = torch.arange(12.0)
    views = [flat, flat[2:5], flat.view(3, 4).t()]
    other = torch.ones(3, dtype=torch.bfloat16)
    old = flat.untyped_storage().data_ptr()
    expected = [view.clone() for view in views]
    assert move([*views, other, torch.empty(0)], torch.device("cpu")) == 48 + 6
    assert {view.untyped_storage().data_ptr() for view in views} == {flat.untyped_storage().data_ptr()} != {old}
    assert all(torch.equal(view, was) for view, was in zip(views, expected, strict=True))
    views[1].fill_(-1)
    assert flat[2:5].tolist() == [-1, -1, -1]
    assert views[2][2, 0] == -1
    assert torch.equal(other, torch.ones(3, dtype=torch.bfloat16))


def train_twice(ranks: Ranks, models: dict[str, str]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return, for each setup, what a worker that rests before every update has come to, and one that never does."""
    return {
        name: train_pair(ranks, make_setup(name, models, micro_batch_tokens=10_000, **learner))
        for name, learner in SETUPS.items()
    }


def train_pair(ranks: Ranks, setup: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    from learner import zero
    from learner.worker import LearnerWorker

    def result(worker: LearnerWorker, metrics: dict[str, float]) -> dict[str, Any]:
        found: dict[str, Any] = {name: value for name, value in metrics.items() if not name.startswith("t")}
        for name, engine in worker._engines.items():
            state = zero.full_state(engine.module.model, dtype="float32")
            found |= {f"{name} {key}": tensor.numpy() for key, tensor in state.items()}
        average = worker.networks.average
        shards: dict[str, Tensor] = {} if average is None else {k: s.values for k, s in average.shards().items()}
        return found | {f"average {key}": tensor.float().numpy() for key, tensor in shards.items()}

    results = []
    for rests in (True, False):
        worker = LearnerWorker(setup, ranks)
        for step in range(UPDATES):
            if rests:
                before = [tensor.detach() for tensor in kept_tensors(worker.policy) if tensor.numel()]
                worker.rest()
                moved = {tensor.data_ptr() for tensor in kept_tensors(worker.policy) if tensor.numel()}
                assert not {old.data_ptr() for old in before} & moved, "on a GPU this would have been left behind"
                worker.rest()
                worker.rise()
                worker.rise()
            hands = [hand(part, ranks, step=step, index=index) for index, part in enumerate(train_batch(step))]
            nothing = [[None] * len(of_rank) for of_rank in hands]
            metrics = worker.update(hands, nothing, kl_coef=0.1, seed=step, step=step)
        results.append(result(worker, metrics))
    return results[0], results[1]


@pytest.mark.ranks
def test_a_rank_that_rests_learns_what_one_learns_that_does_not(tmp_path: Path) -> None:
    for of_rank in on_ranks(train_twice, 2, checkpoints_in(tmp_path)):
        for name, (rested, restless) in of_rank.items():
            assert rested.keys() == restless.keys()
            for key, value in rested.items():
                assert np.array_equal(value, restless[key]), f"{name}: {key}"
