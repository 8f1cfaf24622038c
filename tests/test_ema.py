"""The average of the weights in ZeRO-3 shards against its closed form in float64. About 40 seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conf.schema import LearnerConfig, LoraConfig, OptimizerConfig
from learner import lora
from learner.ranks import Ranks
from tests.learner_ranks import on_ranks
from tests.tiny_models import tiny_checkpoint

pytestmark = pytest.mark.ranks

DECAY, UPDATES = 0.8, 5
OPTIMIZER = OptimizerConfig(lr=1e-2, scheduler="constant", weight_decay=0.0)
KINDS = ("float32", "bfloat16", "whole", "lora")

Arrays = dict[str, Any]


class Net(nn.Module):
    """Parameters with an odd number of elements, so that two ranks have padding at the end of a shard."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh())
        return y


class Policy(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = lora.adapted(model, LoraConfig(rank=3), seed=0, task=lora.CAUSAL_LM)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def run(ranks: Ranks, folder: Path) -> dict[str, dict[str, Any]]:
    from learner import zero

    zero.join(ranks, device="cpu", timeout_s=60)
    return {kind: average(ranks, kind, folder) for kind in KINDS}


def average(ranks: Ranks, kind: str, folder: Path) -> dict[str, Any]:
    """Train a little with an average; return the optimizer's whole weights after each step and what the average did.

    In the kind "whole" DeepSpeed keeps the small parameters whole on every rank between steps.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    from learner import zero
    from learner.ema import PolicyEMA

    network: nn.Module = Policy(folder) if kind == "lora" else Net()
    learner = LearnerConfig(
        dtype="bfloat16" if kind == "bfloat16" else "float32",
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 10**6 if kind == "whole" else 0}},
    )
    engine = zero.trained_engine(network, learner, OPTIMIZER, device="cpu", num_updates=100)
    model: nn.Module = engine.module.model if kind == "lora" else engine.module
    dtype = next(model.parameters()).dtype
    torch.manual_seed(1 + ranks.rank)
    x = torch.randint(4, 260, (2, 6)) if kind == "lora" else torch.randn(4, 5).to(dtype)

    def masters() -> Arrays:
        return {
            name: safe_get_full_fp32_param(parameter).numpy().copy()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def held() -> Arrays:
        """What a gather sees: rank 0 and every other rank the same."""
        return {name: tensor.float().numpy() for name, tensor in zero.trained_state(model).items()}

    @torch.no_grad()
    def said() -> Any:
        return engine(x).float().numpy().copy()

    ema = PolicyEMA(model, decay=DECAY)
    history = [masters()]
    for _ in range(UPDATES):
        engine.backward(engine(x).float().square().mean())
        engine.step()
        ema.update()
        history.append(masters())
    before, said_before = held(), said()
    with ema.swapped_in():  # said() comes first and last: it leaves parameters whole that the swap must see to
        said_inside, inside, merged_inside = said(), held(), zero.full_state(model, dtype="float32")
        said()
    said_after, after = said(), held()
    with pytest.raises(OSError), ema.swapped_in():  # noqa: PT011
        raise OSError
    after_error = held()
    shards = {name: shard.values.clone() for name, shard in ema.shards().items()}
    again = PolicyEMA(model, decay=DECAY)
    for name, shard in again.shards().items():
        shard.values.copy_(shards[name])
    engine.backward(engine(x).float().square().mean())
    engine.step()
    for one in (ema, again):
        one.update()
    return {
        "history": history,
        "before": before,
        "inside": inside,
        "after": after,
        "after_error": after_error,
        "said_before": said_before,
        "said_inside": said_inside,
        "said_after": said_after,
        "merged_inside": {name: tensor.numpy() for name, tensor in merged_inside.items()},
        "shards": {name: shard.numpy() for name, shard in shards.items()},
        "continued": [{n: shard.values.numpy().copy() for n, shard in one.shards().items()} for one in (ema, again)],
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def results(request: pytest.FixtureRequest, base: Path) -> list[dict[str, Any]]:
    return on_ranks(run, request.param, base)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def closed_form(history: list[Arrays]) -> Arrays:
    """decay^T w_0 + (1 - decay) * the sum over t of decay^(T - t) w_t, in float64."""
    last = len(history) - 1
    weights = [DECAY**last, *((1 - DECAY) * DECAY ** (last - t) for t in range(1, last + 1))]
    return {
        name: sum(weight * step[name].astype(np.float64) for weight, step in zip(weights, history, strict=True))
        for name in history[0]
    }


def test_the_shards_hold_the_closed_form(results: list[dict[str, Any]], kind: str) -> None:
    """Also in bfloat16, where the average follows the optimizer's weights and not the model's rounded ones."""
    for name, want in closed_form(results[0][kind]["history"]).items():
        shards = np.concatenate([result[kind]["shards"][name] for result in results])
        assert len(shards) == want.size, "without padding"
        np.testing.assert_allclose(shards, want.ravel(), atol=2e-7, rtol=1e-6, err_msg=name)


def test_inside_the_block_the_model_is_the_average(results: list[dict[str, Any]], kind: str) -> None:
    rtol = 2**-8 if kind == "bfloat16" else 1e-6
    for result in results:
        for name, want in closed_form(result[kind]["history"]).items():
            np.testing.assert_allclose(result[kind]["inside"][name], want, atol=2e-7, rtol=rtol, err_msg=name)
        assert np.abs(result[kind]["said_inside"] - result[kind]["said_before"]).max() > 1e-3


def test_after_the_block_the_weights_are_back_bit_for_bit(results: list[dict[str, Any]], kind: str) -> None:
    for result in results:
        before = result[kind]["before"]
        for when in ("after", "after_error"):
            for name, weight in result[kind][when].items():
                np.testing.assert_array_equal(weight, before[name], err_msg=name)
        np.testing.assert_array_equal(result[kind]["said_after"], result[kind]["said_before"])
        assert any((result[kind]["inside"][name] != before[name]).any() for name in before)


def test_a_loaded_average_goes_on_as_the_one_that_was_saved(results: list[dict[str, Any]], kind: str) -> None:
    for result in results:
        (one, other), saved = result[kind]["continued"], result[kind]["shards"]
        for name, shard in one.items():
            np.testing.assert_array_equal(other[name], shard, err_msg=name)
        assert any((shard != saved[name]).any() for name, shard in one.items()), "and it does go on"


def test_two_ranks_train_on_other_data_and_average_the_same(results: list[dict[str, Any]], kind: str) -> None:
    for other in results[1:]:
        for name, weight in results[0][kind]["inside"].items():
            np.testing.assert_array_equal(other[kind]["inside"][name], weight, err_msg=name)


def test_with_adapters_their_average_alone_is_merged(results: list[dict[str, Any]], base: Path) -> None:
    result = results[0]["lora"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    wanted = closed_form(result["history"])
    assert all(".lora_" in name for name in wanted)
    for name, weight in result["merged_inside"].items():
        path = name.removesuffix(".weight")
        want = plain[name].double().numpy()
        if f"{path}.lora_A.default.weight" in wanted:
            up, down = wanted[f"{path}.lora_B.default.weight"], wanted[f"{path}.lora_A.default.weight"]
            want = want + (32.0 / 3) * (up @ down)
        np.testing.assert_allclose(weight, want, atol=1e-6, err_msg=name)
