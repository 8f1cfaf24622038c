"""The memory that `mode=plan` counts with, beside what learner ranks really take. With real gloo ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from actors.rollout import IntArray, Prompt, Rollout, ScoredRollout
from conf.schema import AlgorithmConfig, GeneratorConfig, LearnerConfig, ModelConfig, ShapingConfig
from learner import sizes, zero
from learner.networks import LearnerSetup
from learner.ranks import Ranks
from tests.learner_ranks import on_ranks
from tests.test_big_models import MIB, Peak

pytestmark = pytest.mark.ranks

PROMPT, RESPONSE, ROLLOUTS = 32, 32, 8
BUDGET = 256  # tokens of a micro-batch


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    vocabulary: int


SHAPES = {"5M": Shape(192, 6, 8192), "12M": Shape(256, 8, 8192), "30M": Shape(448, 8, 8192)}


def write(folder: Path, shape: Shape) -> dict[str, str]:
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.hidden // 64,
        tie_word_embeddings=True,
        pad_token_id=0,
        num_labels=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    LlamaForSequenceClassification(config).save_pretrained(folder / "critic")
    return {name: str(folder / name) for name in ("policy", "critic")}


def make_setup(paths: dict[str, str], **learner: Any) -> LearnerSetup:
    return LearnerSetup(
        model=ModelConfig(path=paths["policy"], tokenizer=paths["policy"]),
        algorithm=AlgorithmConfig(num_steps=2, prompts_per_step=ROLLOUTS, mini_batch_size=ROLLOUTS),
        shaping=ShapingConfig(),
        learner=LearnerConfig(dtype="float32", micro_batch_tokens=BUDGET, **learner),
        generator=GeneratorConfig(max_new_tokens=RESPONSE),
        critic_path=paths["critic"],
        ptx_rows=(),
        device="cpu",
        seed=0,
    )


def rollouts(count: int, vocabulary: int) -> list[ScoredRollout]:
    rng = np.random.default_rng(0)

    def ids(length: int) -> IntArray:
        return rng.integers(4, vocabulary, length).astype(np.int32)

    return [
        ScoredRollout(
            Rollout(
                prompt=Prompt(number, ids(PROMPT), "", ()),
                sample=0,
                response_ids=ids(RESPONSE),
                rollout_logprobs=np.full(RESPONSE, -np.log(vocabulary), np.float32),
                response_mask=np.ones(RESPONSE, np.bool_),
                policy_versions=np.zeros(RESPONSE, np.int32),
                finish_reason="stop",
                text="",
            ),
            float(rng.normal()),
            0.0,
        )
        for number in range(count)
    ]


def measured(ranks: Ranks, setup: LearnerSetup, vocabulary: int) -> int:
    """Return the most memory that a rank takes for its networks and two updates, in bytes."""
    from learner.worker import LearnerWorker

    zero.join(ranks, device="cpu", timeout_s=300)
    hand = rollouts(ROLLOUTS, vocabulary)[ranks.rank :: ranks.world_size]
    with Peak() as peak:
        worker = LearnerWorker(setup, ranks)
        for step in range(2):
            worker.update([hand], [[None] * len(hand)], kl_coef=0.05, seed=0, step=step)
    return peak.bytes


def counted(setup: LearnerSetup, paths: dict[str, str], num_ranks: int) -> int:
    """Return what mode=plan counts for the same."""
    policy = sizes.NetworkSize.of(AutoConfig.from_pretrained(paths["policy"]))
    critic = sizes.NetworkSize.of(AutoConfig.from_pretrained(paths["critic"]), scalar=True)
    config = zero.deepspeed_config(setup.learner, setup.learner.policy, device="cpu", num_ranks=num_ranks)
    states, passing = 0, []
    tokens = min(BUDGET, ROLLOUTS // num_ranks * (PROMPT + RESPONSE))
    for network, trained, asked in ((policy, True, tokens // 2), (policy, False, 0), (critic, True, 0)):
        memory = sizes.rank_memory(
            network, setup.learner, zero=config["zero_optimization"], num_ranks=num_ranks, trained=trained
        )
        states += sum(memory.device.values())
        if trained:
            kept = sizes.activations(network, setup.learner, tokens=tokens, states=asked)
            passing += [sum(memory.passing.values()) + sum(kept.values()), sum(memory.stepping.values())]
    return states + max(passing)


@pytest.mark.parametrize(("size", "num_ranks"), [("5M", 1), ("12M", 1), ("12M", 2), ("30M", 1)])
def test_a_rank_takes_what_is_counted_within_a_fifth(size: str, num_ranks: int, tmp_path: Path) -> None:
    paths = write(tmp_path, SHAPES[size])
    setup = make_setup(paths)
    most = max(on_ranks(measured, num_ranks, setup, SHAPES[size].vocabulary))
    expected = counted(setup, paths, num_ranks)
    print(f"{size}, {num_ranks} ranks: {most / MIB:.0f} MiB measured, {expected / MIB:.0f} counted")
    assert expected == pytest.approx(most, rel=0.2)
