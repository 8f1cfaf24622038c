"""Weights in 4 bits against the NormalFloat's own table, and a reference that is loaded so. Several seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actors.four_bits import four_bits
from conf.schema import NF4, AlgorithmConfig, GeneratorConfig, LearnerConfig, ModelConfig, ShapingConfig
from learner import models
from learner.attention import PACKED
from learner.distribution import SampledFrom
from learner.experience import Batch, collate
from learner.models import PolicyModel, PolicyOutput
from learner.networks import LearnerSetup
from learner.ranks import Ranks
from learner.sizes import NetworkSize, rank_memory
from tests.batches import random_rollouts
from tests.learner_ranks import on_ranks
from tests.tiny_models import tiny_checkpoint

BLOCK = 64
# Dettmers et al. 2023, appendix E.
NORMAL_FLOAT = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def quantised(checkpoint: str) -> Any:
    return models.load_causal_lm(checkpoint, attn_implementation=PACKED, **four_bits("float32", device="cpu"))


def whole(checkpoint: str) -> Any:
    return models.load_causal_lm(checkpoint, attn_implementation=PACKED)


def dequantised(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight


def in_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest values of the table, [N, 64] in units of its block's largest number, and that, [N, 1]."""
    blocks = weight.reshape(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks.unsqueeze(-1) / largest.unsqueeze(-1) - NORMAL_FLOAT).abs().argmin(-1)
    return NORMAL_FLOAT[nearest], largest


def test_each_weight_is_the_nearest_normal_float_of_its_block(checkpoint: str, quantised: Any) -> None:
    plain = dict(whole(checkpoint).named_modules())
    names = [name for name, module in quantised.named_modules() if type(module).__name__ == "Linear4bit"]
    assert sorted(names) == sorted(
        name for name, module in plain.items() if isinstance(module, nn.Linear) and name != "lm_head"
    )
    modules = dict(quantised.named_modules())
    for name in names:
        nearest, largest = in_blocks(plain[name].weight.detach())
        got = dequantised(modules[name]).reshape(-1, BLOCK)
        # The largest number of a block is quantised too, to 8 bits.
        torch.testing.assert_close(got, nearest * largest, atol=0.03 * float(largest.max()), rtol=0.03)
        assert len(torch.unique(got[0])) > 4, "a block has many values"
    assert torch.equal(quantised.lm_head.weight, plain["lm_head"].weight)
    assert torch.equal(quantised.model.embed_tokens.weight, plain["model.embed_tokens"].weight)


def said(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return PolicyOutput.of(PolicyModel(model)(batch, sampled_from=SampledFrom())).logprobs


def test_it_says_what_a_model_of_its_weights_says_and_nearly_what_the_whole_one_does(
    checkpoint: str, quantised: Any
) -> None:
    batch = collate(random_rollouts(6, seed=1))
    same, exact = whole(checkpoint), said(whole(checkpoint), batch)
    modules = dict(quantised.named_modules())
    with torch.no_grad():
        for name, module in same.named_modules():
            if type(modules[name]).__name__ == "Linear4bit":
                module.weight.copy_(dequantised(modules[name]))
    got = said(quantised, batch)
    torch.testing.assert_close(got, said(same, batch), atol=1e-5, rtol=1e-5)
    gap = (got - exact)[batch.mask].abs()
    assert 1e-4 < float(gap.mean()) < 0.3


def on_a_rank(ranks: Ranks, setup: LearnerSetup) -> tuple[list[Any], float]:
    """Return what a learner's reference says of a rank's rollouts, and the KL of a judge to the reference."""
    from learner.divergence import JudgeSetup, JudgeWorker
    from learner.worker import LearnerWorker

    rollouts = random_rollouts(6, seed=1)[ranks.rank :: ranks.world_size]
    worker = LearnerWorker(setup, ranks)
    rows = worker.evaluate([scored.rollout for scored in rollouts])
    judged = JudgeSetup(
        model=replace(setup.model, reference=setup.model.path),
        learner=setup.learner,
        generator=setup.generator,
        device="cpu",
    )
    kl = JudgeWorker(judged, ranks).kl_to_reference(rollouts, temperature=1.0)
    return [row.ref_logprobs for row in rows], kl


@pytest.mark.ranks
def test_each_rank_holds_the_reference_in_four_bits_and_so_does_a_judge(checkpoint: str, quantised: Any) -> None:
    setup = LearnerSetup(
        model=ModelConfig(path=checkpoint, tokenizer=checkpoint),
        algorithm=AlgorithmConfig(num_steps=1, prompts_per_step=6, mini_batch_size=6, estimator="reinforce_pp"),
        shaping=ShapingConfig(),
        learner=LearnerConfig(dtype="float32", reference_dtype=NF4),
        generator=GeneratorConfig(max_new_tokens=9),
        critic_path=None,
        ptx_rows=(),
        device="cpu",
        seed=0,
    )
    batch = collate(random_rollouts(6, seed=1))
    expected, exact = said(quantised, batch), said(whole(checkpoint), batch)
    (first, kl), (second, again) = on_ranks(on_a_rank, 2, setup)
    for row, mask in enumerate(batch.mask):
        got = torch.from_numpy((first, second)[row % 2][row // 2])
        torch.testing.assert_close(got, expected[row, : len(got)], atol=1e-5, rtol=1e-5)
        assert int(mask.nonzero().max()) < len(got)
    assert kl == again == pytest.approx(float((exact - expected)[batch.mask].sum()) / 6, abs=1e-5)


def test_what_it_takes_is_what_is_counted(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = models.load_causal_lm(str(tmp_path), attn_implementation=PACKED, **four_bits("float32", device="cpu"))
    held = sum(one.numel() * one.element_size() for one in model.parameters())
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            scales = (state.absmax, state.state2.absmax)
            held += sum(one.numel() * one.element_size() for one in scales)
    learner = LearnerConfig(dtype="float32", reference_dtype=NF4)
    memory = rank_memory(NetworkSize.of(config), learner, zero={}, num_ranks=2, trained=False)
    assert sum(memory.device.values()) == pytest.approx(held, rel=0.01)
