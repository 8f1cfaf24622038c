"""The shards of a ZeRO-3 engine: what they hold, and that an engine made of them goes on as the one before it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.schema import ConfigError, LearnerConfig, OptimizerConfig
from learner.ranks import Ranks
from tests.learner_ranks import on_ranks
from tests.test_ema import Net

pytestmark = pytest.mark.ranks

OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, max_grad_norm=0.5, scheduler="linear", warmup_steps=3)
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "deepspeed": PARTITIONED},
    "bfloat16": {"dtype": "bfloat16", "deepspeed": PARTITIONED},
    "small parameters whole": {"dtype": "bfloat16"},
    "groups of a few parameters": {"dtype": "float32", "deepspeed": {"zero_optimization": {"sub_group_size": 4}}},
    "offloaded": {"dtype": "bfloat16", "offload_optimizer": "cpu"},
}
NUMELS = {"first.weight": 15, "first.bias": 3, "second.weight": 3, "second.bias": 1}
KINDS = ("master", "exp_avg", "exp_avg_sq")

Arrays = dict[str, Any]


def run(ranks: Ranks) -> dict[str, dict[str, Any]]:
    from learner import zero

    zero.join(ranks, device="cpu", timeout_s=60)
    return {name: handed_over(ranks, settings) for name, settings in SETTINGS.items()}


def handed_over(ranks: Ranks, settings: dict[str, Any]) -> dict[str, Any]:
    """Train an engine, make another of its shards, and train both; return what they hold and say."""
    from learner import shards, zero
    from learner.steps import backward, step

    def new_engine() -> Any:
        return zero.trained_engine(Net(), LearnerConfig(**settings), OPTIMIZER, device="cpu", num_updates=10)

    def data(engine: Any, seed: int) -> Tensor:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * seed + ranks.rank))
        return x.to(next(engine.module.parameters()).dtype)

    def train(engine: Any, seed: int) -> float:
        backward(engine, engine(data(engine, seed)).square().sum())
        return step(engine).grad_norm

    def held(engine: Any) -> Arrays:
        return {name: shard.values.float().numpy().copy() for name, shard in shards.shards(engine).items()}

    @torch.no_grad()
    def said(engine: Any) -> Any:
        return engine(data(engine, 99)).float().numpy().copy()

    engine, other = new_engine(), new_engine()
    before_any_step = {"shards": sorted(held(engine)), "facts": shards.facts(engine)}
    for seed in range(2):
        train(engine, seed)
    for seed in range(5, 8):
        train(other, seed)
        said(other)  # leaves parameters whole
    backward(other, other(data(other, 8)).sum())  # and a gradient that no step has taken
    for parameter in shards.trained_parameters(engine).values():
        poison_padding(engine, parameter)
    live = shards.shards(engine)
    facts = json.loads(json.dumps(shards.facts(engine)))
    saved = {name: shard.values.clone() for name, shard in live.items()}
    shards.prepare(other, facts)
    for name, shard in shards.shards(other).items():
        shard.values.copy_(saved[name])
    shards.settle(other, facts)
    result: dict[str, Any] = {
        "before any step": before_any_step,
        "places": {name: (shard.start, len(shard.values), shard.numel) for name, shard in live.items()},
        "numels": shards.numels(engine, facts),
        "facts": [facts, shards.facts(other)],
        "held": [held(engine), held(other)],
        "said": [said(engine), said(other)],
        "whole": {n: t.float().numpy() for n, t in zero.trained_state(other.module).items()},
    }
    result["norms"] = [[train(one, seed) for seed in (3, 4)] for one in (engine, other)]
    result |= {"held later": [held(engine), held(other)], "lr": [engine.get_lr()[0], other.get_lr()[0]]}
    for name, key in (("swap_optimizer", "learner.offload_optimizer"), ("params_in_nvme_and_cpu", "learner.offload_p")):
        setattr(engine.optimizer, name, True)
        with pytest.raises(ConfigError, match=f"{key}.*='nvme': a checkpoint copies what is in memory"):
            shards.shards(engine)
        setattr(engine.optimizer, name, False)
    return result


def poison_padding(engine: Any, parameter: Any) -> None:
    """Make NaN of what is behind the valid elements: DeepSpeed leaves there what was in memory before."""
    from learner.shards import shard_of

    for key in (None, "exp_avg", "exp_avg_sq"):
        partition, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, True, key)
        partition.detach()[len(shard_of(parameter, partition).values) :] = float("nan")


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return on_ranks(run, request.param)


@pytest.fixture(params=SETTINGS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_shards_of_all_ranks_are_the_whole_without_padding(results: list[dict[str, Any]], kind: str) -> None:
    of_ranks = [result[kind] for result in results]
    assert of_ranks[0]["numels"] == {f"{k}/{name}": numel for name, numel in NUMELS.items() for k in KINDS}
    for name, numel in of_ranks[0]["numels"].items():
        places = [one["places"][name] for one in of_ranks]
        assert [start for start, _, _ in places] == np.cumsum([0, *(length for _, length, _ in places)])[:-1].tolist()
        assert sum(length for _, length, _ in places) == numel
        assert {whole for _, _, whole in places} == {numel}
        together = np.concatenate([one["held"][0][name] for one in of_ranks])
        assert np.isfinite(together).all(), f"{name}: padding is in it"
        if name.startswith("master/"):
            computed = of_ranks[0]["whole"][name.removeprefix("master/")].ravel()
            np.testing.assert_allclose(computed, together, rtol=2**-8 if "float32" not in kind else 0)


def test_an_engine_made_of_shards_is_the_same_bit_for_bit(results: list[dict[str, Any]], kind: str) -> None:
    for result in results:
        of_kind = result[kind]
        first, second = of_kind["held"]
        for name, values in first.items():
            np.testing.assert_array_equal(second[name], values, err_msg=name)
        np.testing.assert_array_equal(*of_kind["said"])
        assert of_kind["facts"][0] == json.loads(json.dumps(of_kind["facts"][1]))
        assert of_kind["facts"][0]["scalars"] == {"step": [2.0, "float32", "cpu"]}


def test_and_it_trains_on_as_the_other_would(results: list[dict[str, Any]], kind: str) -> None:
    for result in results:
        of_kind = result[kind]
        assert of_kind["norms"][0] == of_kind["norms"][1]
        assert of_kind["lr"][0] == of_kind["lr"][1] == pytest.approx(1e-2 * (10 - 4) / (10 - 3))
        first, second = of_kind["held later"]
        for name, values in first.items():
            np.testing.assert_array_equal(second[name], values, err_msg=name)
        assert any((first[name] != of_kind["held"][0][name]).any() for name in first), "and it does train"


def test_before_the_first_step_there_are_masters_alone(results: list[dict[str, Any]], kind: str) -> None:
    found = results[0][kind]["before any step"]
    assert found["shards"] == sorted(f"master/{name}" for name in NUMELS)
    assert found["facts"]["states"] == found["facts"]["scalars"] == {}
