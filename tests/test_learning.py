"""Every estimator, policy loss and aggregation learns: a small network finds the answers that are rewarded.

No engine: the test samples from the learner's own network. A minute, all variants in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.rollout import Prompt, Rollout, ScoredRollout
from conf.schema import (
    AlgorithmConfig,
    GeneratorConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ShapingConfig,
)
from learner.networks import LearnerSetup
from learner.packing import flat_states
from learner.ranks import Ranks
from tests.learner_ranks import on_ranks
from tests.tiny_models import tiny_config

pytestmark = pytest.mark.ranks

VOCABULARY, EOS, LONGEST = 8, 2, 3
PROMPTS = ((4, 5), (6, 3))
BEST = (7, 4)  # to be followed by EOS
SAMPLES, UPDATES, KL_COEF = 96, 16, 0.02
GROUPS = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
VARIANTS: dict[str, dict[str, Any]] = {
    "gae": {},
    "gae, shared critic": {"shared": True},
    **{name: {"estimator": name} for name in (*GROUPS, "reinforce_pp", "remax")},
    "clip-higher, dual clip": {"estimator": "grpo", "clip_eps": 0.1, "clip_eps_high": 0.3, "dual_clip": 3.0},
    "gspo": {"estimator": "grpo", "policy_loss": "gspo", "loss_aggregation": "sequence"},
    "cispo": {"estimator": "grpo", "policy_loss": "cispo"},
    "sequence": {"estimator": "rloo", "loss_aggregation": "sequence"},
    "constant": {"estimator": "dr_grpo", "loss_aggregation": "constant"},
    "lora": {"estimator": "rloo", "lora": True},
}
CONTROLS: dict[str, dict[str, Any]] = {
    "gae, the opposite rewarded": {"sign": -1.0},
    "grpo, the opposite rewarded": {"estimator": "grpo", "sign": -1.0},
    "rloo, all rewarded alike": {"estimator": "rloo", "sign": 0.0},
}


@dataclass(frozen=True)
class Outcome:
    before: float  # probability of the best response, mean over the prompts
    after: float  # the least over the prompts
    metrics: dict[str, float]  # of the last update


def make_setup(
    checkpoint: str, *, shared: bool = False, lora: bool = False, sign: float = 1.0, **algorithm: Any
) -> LearnerSetup:
    optimizer = OptimizerConfig(lr=7e-3 if lora else 4.2e-3)
    return LearnerSetup(
        model=ModelConfig(path=checkpoint, tokenizer=checkpoint, lora=LoraConfig(rank=8 if lora else None)),
        algorithm=AlgorithmConfig(
            num_steps=UPDATES,
            prompts_per_step=len(PROMPTS),
            samples_per_prompt=SAMPLES,
            mini_batch_size=len(PROMPTS) * SAMPLES // 2,
            **algorithm,
        ),
        shaping=ShapingConfig(),
        learner=LearnerConfig(
            policy=optimizer,
            critic=optimizer,
            critic_network="shared" if shared else "separate",
            dtype="float32",
        ),
        generator=GeneratorConfig(max_new_tokens=LONGEST),
        critic_path=checkpoint,
        ptx_rows=(),
        device="cpu",
        seed=0,
    )


def score_of(prompt: int, response: list[int]) -> float:
    """A half for the best first token, and a half for ending after one."""
    return 0.5 * (response[0] == BEST[prompt]) + 0.5 * (response[1:] == [EOS])


@torch.no_grad()
def logits_after(model: Any, prompts: torch.Tensor) -> torch.Tensor:
    rows, width = prompts.shape
    states = flat_states(model, prompts, torch.full((rows,), width))
    logits: torch.Tensor = model.get_output_embeddings()(states.hidden[states.starts + width - 1])
    return logits


def sampled(model: Any, count: int, *, generator: torch.Generator | None) -> list[tuple[list[int], list[float]]]:
    """`count` responses to each prompt with their log-probabilities, in the order of the prompts; greedy for None."""
    ids = torch.tensor(PROMPTS).repeat_interleave(count, 0)
    logprobs = []
    for _ in range(LONGEST):
        of_step = torch.log_softmax(logits_after(model, ids), -1)
        token = of_step.argmax(-1, keepdim=True)
        if generator is not None:
            token = torch.multinomial(of_step.exp(), 1, generator=generator)
        logprobs.append(of_step.gather(1, token))
        ids = torch.cat([ids, token], -1)
    responses = []
    for tokens, of_tokens in zip(ids[:, len(PROMPTS[0]) :].tolist(), torch.cat(logprobs, -1).tolist(), strict=True):
        length = tokens.index(EOS) + 1 if EOS in tokens else LONGEST
        responses.append((tokens[:length], of_tokens[:length]))
    return responses


def rollouts(
    model: Any, step: int, *, sign: float, with_greedy: bool, generator: torch.Generator
) -> list[ScoredRollout]:
    greedy = [0.0] * len(PROMPTS)
    if with_greedy:
        greedy = [score_of(prompt, tokens) for prompt, (tokens, _) in enumerate(sampled(model, 1, generator=None))]
    result = []
    for index, (tokens, logprobs) in enumerate(sampled(model, SAMPLES, generator=generator)):
        prompt, sample = divmod(index, SAMPLES)
        rollout = Rollout(
            prompt=Prompt(len(PROMPTS) * step + prompt, np.array(PROMPTS[prompt], dtype=np.int32), "", ()),
            sample=sample,
            response_ids=np.array(tokens, dtype=np.int32),
            rollout_logprobs=np.array(logprobs, dtype=np.float32),
            response_mask=np.ones(len(tokens), dtype=np.bool_),
            policy_versions=np.full(len(tokens), step, dtype=np.int32),
            finish_reason="stop" if tokens[-1] == EOS else "length",
            text="",
        )
        result.append(ScoredRollout(rollout, sign * score_of(prompt, tokens), sign * greedy[prompt]))
    return result


def chances(model: Any) -> list[float]:
    """The probability of the best response to each prompt."""
    prompts = torch.tensor(PROMPTS)
    first = torch.softmax(logits_after(model, prompts), -1)[torch.arange(len(BEST)), torch.tensor(BEST)]
    then = torch.softmax(logits_after(model, torch.cat([prompts, torch.tensor(BEST)[:, None]], -1)), -1)[:, EOS]
    return (first * then).tolist()


def run(ranks: Ranks, checkpoint: str) -> dict[str, Outcome]:
    return {name: learn(ranks, checkpoint, **changes) for name, changes in (VARIANTS | CONTROLS).items()}


def learn(ranks: Ranks, checkpoint: str, *, sign: float = 1.0, **changes: Any) -> Outcome:
    from learner.batching import deal
    from learner.worker import LearnerWorker

    setup = make_setup(checkpoint, **changes)
    worker = LearnerWorker(setup, ranks)
    model = worker.policy.module.model
    generator = torch.Generator().manual_seed(0)
    before = float(np.mean(chances(model)))
    metrics: dict[str, float] = {}
    for step in range(UPDATES):
        scored = rollouts(model, step, sign=sign, with_greedy=setup.algorithm.estimator == "remax", generator=generator)
        lengths = [one.rollout.num_tokens for one in scored]
        (hands,) = deal(lengths, mini_batch_size=setup.algorithm.mini_batch_size, num_hands=1, seed=step)
        metrics = worker.update([[scored[i] for i in hand] for hand in hands], kl_coef=KL_COEF, seed=step, step=step)
    return Outcome(before, min(chances(model)), metrics)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    from transformers import AutoModelForCausalLM

    folder: Path = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config("llama", tied=False, vocab_size=VOCABULARY)
    config.num_hidden_layers = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    done: dict[str, Outcome] = on_ranks(run, 1, str(folder))[0]
    return done


@pytest.mark.parametrize("name", VARIANTS)
def test_the_best_responses_are_found(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.before < 0.1
    assert outcome.after > 0.9
    assert outcome.metrics["sync/logprob_gap_max"] < 1e-4, "what was sampled is what is trained"


@pytest.mark.parametrize("name", CONTROLS)
def test_without_their_reward_they_are_not(outcomes: dict[str, Outcome], name: str) -> None:
    assert outcomes[name].after < 0.1
