"""learner.steps on ZeRO-3 engines: what is added up, what a skipped step leaves, what is thrown away. About 40 seconds.

ZeRO-3 itself skips a step whose gradient is not finite; the learner relies on that, so it is pinned here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.schema import LearnerConfig, OptimizerConfig
from learner.ranks import Ranks
from tests.learner_ranks import on_ranks
from tests.test_ema import Net

pytestmark = pytest.mark.ranks

OPTIMIZER = OptimizerConfig(lr=1e-2, max_grad_norm=0.5, scheduler="linear", warmup_steps=3)
DTYPES = ("float32", "bfloat16")
# What an engine sees before the step that is compared; the numbers are seeds of data.
BEFORE = (
    "nothing",
    "a discarded gradient",
    "two discarded gradients and a look",
    "infinite gradient",
    "NaN on one rank",
)

State = dict[str, Any]


def data(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(ranks: Ranks) -> dict[tuple[str, str], State]:
    from learner import zero

    zero.join(ranks, device="cpu", timeout_s=60)
    zero.join(ranks, device="cpu", timeout_s=60)  # a second time changes nothing
    return {(dtype, before): steps(ranks, dtype, before) for dtype in DTYPES for before in BEFORE}


def steps(ranks: Ranks, dtype: str, before: str) -> State:
    """Take a step, see what `before` says, and take another step of two micro-batches; return what was at the end."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from learner import zero
    from learner.steps import backward, discard, step

    learner = LearnerConfig(dtype=dtype, deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    engine = zero.trained_engine(Net(), learner, OPTIMIZER, device="cpu", num_updates=10)

    def add(seed: int, factor: float = 1.0) -> None:
        backward(engine, engine(data(10 * seed + ranks.rank, next(engine.module.parameters()).dtype)).sum() * factor)

    def state() -> State:
        found = {"lr": np.array(engine.get_lr()[0])}
        for name, parameter in engine.module.named_parameters():
            found[name] = safe_get_full_fp32_param(parameter).numpy().copy()
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"{name}/{moment}"] = safe_get_full_optimizer_state(parameter, moment).numpy().copy()
        (settings,) = {float(one["step"]) for one in engine.optimizer.optimizer.state.values()}
        return found | {"step": np.array(settings)}

    add(1)
    first = step(engine)
    after_first = state()
    skipped = None
    match before:
        case "a discarded gradient":
            add(2, 100.0)
            discard(engine)
        case "two discarded gradients and a look":
            add(2, 100.0)
            add(3, 100.0)
            with torch.no_grad():
                engine(data(4, next(engine.module.parameters()).dtype))
            discard(engine)
        case "infinite gradient":
            add(2)
            add(3, math.inf)
            skipped = step(engine)
        case "NaN on one rank":
            add(2, math.nan if ranks.rank == ranks.world_size - 1 else 1.0)
            skipped = step(engine)
    between = state()
    add(5)
    add(6)
    last = step(engine)
    return {
        "taken": (first.applied, last.applied),
        "norms": (first.grad_norm, last.grad_norm),
        "skipped": None if skipped is None else (skipped.applied, skipped.grad_norm),
        "after_first": after_first,
        "between": between,
        "end": state(),
    }


@pytest.fixture(scope="module", params=[1, 2])
def results(request: pytest.FixtureRequest) -> list[dict[tuple[str, str], State]]:
    return on_ranks(run, request.param)


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_thrown_away_leaves_nothing_behind(
    results: list[dict[tuple[str, str], State]], dtype: str, before: str
) -> None:
    """Weights, moments and scheduler, bit for bit; it ticks once for each step that is taken. (PPO details 10)"""
    for of_rank in results:
        got, want = of_rank[dtype, before], of_rank[dtype, "nothing"]
        assert got["taken"] == (True, True)
        assert equal(got["between"], got["after_first"])
        assert equal(got["end"], want["end"])
        assert got["norms"] == want["norms"]
        assert [float(got[at]["step"]) for at in ("between", "end")] == [1, 2]
        assert [float(got[at]["lr"]) for at in ("between", "end")] == pytest.approx([1e-2 / 3, 2e-2 / 3])
        assert not equal(got["end"], got["between"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(
    results: list[dict[tuple[str, str], State]], dtype: str
) -> None:
    for of_rank in results:
        for before in ("infinite gradient", "NaN on one rank"):
            assert of_rank[dtype, before]["skipped"] == (False, math.inf)


def test_gradients_add_up_over_micro_batches_and_ranks(results: list[dict[tuple[str, str], State]]) -> None:
    """The sum, not DeepSpeed's mean over ranks. (PPO details 8)"""
    net = Net()
    norms = []
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, betas=OPTIMIZER.betas, weight_decay=0.0)
    for lr, seeds in ((0.0, (1,)), (1e-2 / 3, (5, 6))):
        optimizer.zero_grad()
        for seed in seeds:
            for rank in range(len(results)):
                net(data(10 * seed + rank)).sum().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), OPTIMIZER.max_grad_norm)))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    for of_rank in results:
        got = of_rank["float32", "nothing"]
        assert got["norms"] == pytest.approx(norms, rel=1e-5)
        for name, parameter in net.named_parameters():
            np.testing.assert_allclose(got["end"][name], parameter.detach().numpy(), atol=1e-6)
