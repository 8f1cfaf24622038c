"""The learner over real gloo ranks: one rank equals a plain PyTorch loop, and two ranks equal one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from actors.rollout import ScoredRollout
from conf.schema import AlgorithmConfig, LearnerConfig, ModelConfig, OptimizerConfig
from learner.experience import deal, micro_batches
from learner.worker import LearnerSetup, LearnerWorker
from learner.zero import Ranks
from tests.learner_ranks import on_ranks, random_rollouts
from tests.tiny_models import tiny_checkpoint

pytestmark = pytest.mark.ranks

NUM_STEPS, NUM_ROLLOUTS, MINI_BATCH, EPOCHS = 3, 12, 6, 2
TEMPERATURE, KL_COEF, LAMBDA, CLIP = 0.8, 0.1, 0.9, 0.2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    policy = tiny_checkpoint(folder / "policy", "llama", seed=1)
    reference = tiny_checkpoint(folder / "reference", "llama", seed=2)
    critic = folder / "critic"
    language_model = AutoModelForSequenceClassification.from_pretrained(
        tiny_checkpoint(folder / "third", "llama", seed=3), num_labels=1, dtype=torch.float32
    )
    language_model.save_pretrained(critic)
    return policy, reference, critic


def make_setup(checkpoints: tuple[Path, Path, Path], **changes: Any) -> LearnerSetup:
    learner: dict[str, Any] = {"dtype": "float32", "micro_batch_tokens": 20, **changes}
    policy, reference, critic = map(str, checkpoints)
    optimizer = OptimizerConfig(lr=1e-3, max_grad_norm=0.5, scheduler="linear", warmup_steps=2, weight_decay=0.01)
    return LearnerSetup(
        model=ModelConfig(path=policy, tokenizer=policy, reference=reference),
        algorithm=AlgorithmConfig(
            num_steps=NUM_STEPS,
            prompts_per_step=NUM_ROLLOUTS,
            mini_batch_size=MINI_BATCH,
            ppo_epochs=EPOCHS,
            gae_lambda=LAMBDA,
            clip_eps=CLIP,
            kl_coef=KL_COEF,
        ),
        learner=LearnerConfig(
            policy=optimizer,
            critic=replace(optimizer, lr=2e-3),
            **learner,
        ),
        critic_path=critic,
        temperature=TEMPERATURE,
        device="cpu",
        seed=0,
        collective_timeout_s=60.0,
    )


def run_updates(ranks: Ranks, setup: LearnerSetup) -> tuple[list[dict[str, float]], dict[str, Any], dict[str, Any]]:
    """Take NUM_STEPS updates on one rank; return the metrics of each and the final weights of policy and critic."""
    from learner import zero

    worker = LearnerWorker(setup, ranks)
    metrics = []
    for step in range(NUM_STEPS):
        scored = random_rollouts(NUM_ROLLOUTS, seed=step)
        hands = deal(
            [s.rollout.num_tokens for s in scored],
            mini_batch_size=MINI_BATCH,
            num_ranks=ranks.world_size,
            seed=step,
        )
        mine = [[scored[i] for i in hand] for hand in hands[ranks.rank]]
        metrics.append(worker.update(mine, kl_coef=KL_COEF, seed=step))
    return (
        metrics,
        {name: t.numpy() for name, t in zero.full_state(worker.policy.module.model, dtype="float32").items()},
        {name: t.numpy() for name, t in zero.full_state(worker.critic.module.model, dtype="float32").items()},
    )


def plain_loop(setup: LearnerSetup) -> tuple[list[dict[str, float]], dict[str, Any], dict[str, Any]]:
    """The same three updates as an obvious loop over single rollouts, with no code of the learner in it."""
    from transformers import AutoModelForCausalLM, get_scheduler

    assert setup.model.path is not None
    assert setup.model.reference is not None
    policy = AutoModelForCausalLM.from_pretrained(setup.model.path, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(setup.model.reference, dtype=torch.float32)
    critic = AutoModelForSequenceClassification.from_pretrained(setup.critic_path, num_labels=1, dtype=torch.float32)
    optimizers = []
    for model, config in ((policy, setup.learner.policy), (critic, setup.learner.critic)):
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        total = NUM_STEPS * EPOCHS * (NUM_ROLLOUTS // MINI_BATCH)
        optimizers.append((model, optimizer, get_scheduler(config.scheduler, optimizer, config.warmup_steps, total)))

    def tokens_of(scored: ScoredRollout) -> tuple[torch.Tensor, int]:
        rollout = scored.rollout
        ids = np.concatenate([rollout.prompt.token_ids, rollout.response_ids]).astype(np.int64)
        return torch.from_numpy(ids)[None], len(rollout.prompt.token_ids)

    def logprobs_of(model: Any, scored: ScoredRollout) -> torch.Tensor:
        ids, start = tokens_of(scored)
        scaled = torch.log_softmax(model(input_ids=ids).logits[0] / TEMPERATURE, -1)
        return torch.stack([scaled[i - 1, ids[0, i]] for i in range(start, ids.shape[1])])

    def values_of(scored: ScoredRollout) -> torch.Tensor:
        ids, start = tokens_of(scored)
        hidden = critic.base_model(input_ids=ids).last_hidden_state[0]
        return torch.stack([critic.score(hidden[i - 1])[0] for i in range(start, ids.shape[1])])

    metrics = []
    for step in range(NUM_STEPS):
        scored = random_rollouts(NUM_ROLLOUTS, seed=step)
        with torch.no_grad():
            old = [logprobs_of(policy, s) for s in scored]
            ref = [logprobs_of(reference, s) for s in scored]
            values = [values_of(s) for s in scored]
        advantages, returns = [], []
        for s, old_lp, ref_lp, value in zip(scored, old, ref, values, strict=True):
            reward = -KL_COEF * (old_lp - ref_lp)
            reward[-1] += s.score
            steps = len(reward)
            delta = [reward[t] + (value[t + 1] if t + 1 < steps else 0.0) - value[t] for t in range(steps)]
            weighted = [[LAMBDA ** (k - t) * delta[k] for k in range(t, steps)] for t in range(steps)]
            adv = torch.stack([torch.stack(terms).sum() for terms in weighted])
            advantages.append(adv)
            returns.append(adv + value)
        every = torch.cat(advantages).double()
        advantages = [((a.double() - every.mean()) / (every.std(correction=0) + 1e-8)).float() for a in advantages]
        shuffled = np.random.default_rng(step).permutation(NUM_ROLLOUTS).tolist()
        parts = [shuffled[i : i + MINI_BATCH] for i in range(0, NUM_ROLLOUTS, MINI_BATCH)]
        order_rng = np.random.default_rng(step)
        losses = []
        for epoch in range(EPOCHS):
            order = range(len(parts)) if epoch == 0 else order_rng.permutation(len(parts)).tolist()
            for index in order:
                count = sum(len(old[i]) for i in parts[index])
                policy_loss, critic_loss = torch.zeros(()), torch.zeros(())
                for i in parts[index]:
                    ratio = (logprobs_of(policy, scored[i]) - old[i]).exp()
                    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                    policy_loss = policy_loss - torch.min(ratio * advantages[i], clipped * advantages[i]).sum()
                    value = values_of(scored[i])
                    near = values[i] + (value - values[i]).clamp(-CLIP, CLIP)
                    worst = torch.max((value - returns[i]) ** 2, (near - returns[i]) ** 2)
                    critic_loss = critic_loss + 0.5 * worst.sum()
                for (model, optimizer, scheduler), loss in zip(optimizers, (policy_loss, critic_loss), strict=True):
                    optimizer.zero_grad()
                    (loss / count).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    scheduler.step()
                losses.append((float(policy_loss.detach()), float(critic_loss.detach()), count))
        total = sum(count for _, _, count in losses)
        metrics.append(
            {
                "policy/loss": sum(p for p, _, _ in losses) / total,
                "critic/loss": sum(c for _, c, _ in losses) / total,
                "objective/kl": float(sum((o - r).sum() for o, r in zip(old, ref, strict=True))) / NUM_ROLLOUTS,
            }
        )
    return (
        metrics,
        {name: p.detach().numpy() for name, p in policy.named_parameters()},
        {name: p.detach().numpy() for name, p in critic.named_parameters()},
    )


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.fixture(scope="module")
def one_rank(checkpoints: tuple[Path, Path, Path]) -> Any:
    return on_ranks(run_updates, 1, make_setup(checkpoints))[0]


def test_one_rank_equals_a_plain_loop(checkpoints: tuple[Path, Path, Path], one_rank: Any) -> None:
    metrics, policy, critic = one_rank
    want_metrics, want_policy, want_critic = plain_loop(make_setup(checkpoints))
    for got, want in zip(metrics, want_metrics, strict=True):
        for name, value in want.items():
            assert got[name] == pytest.approx(value, abs=2e-5), name
    assert furthest(policy, want_policy) < 1e-5
    assert furthest(critic, want_critic) < 1e-5


def uneven_cuts(setup: LearnerSetup) -> bool:
    counts = []
    for step in range(NUM_STEPS):
        lengths = [s.rollout.num_tokens for s in random_rollouts(NUM_ROLLOUTS, seed=step)]
        hands = deal(lengths, mini_batch_size=MINI_BATCH, num_ranks=2, seed=step)
        cuts = [
            [
                len(micro_batches([lengths[i] for i in part], max_tokens=setup.learner.micro_batch_tokens))
                for part in hand
            ]
            for hand in hands
        ]
        counts += list(zip(*cuts, strict=True))
    return any(one != other for one, other in counts)


def test_two_ranks_equal_one(checkpoints: tuple[Path, Path, Path], one_rank: Any) -> None:
    setup = make_setup(checkpoints)
    assert uneven_cuts(setup), "some rank has fewer micro-batches than the other, and must not leave it waiting"
    first, second = on_ranks(run_updates, 2, setup)
    assert first[0] == second[0], "every rank reports the same metrics"
    for got, want in zip(first[0], one_rank[0], strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert got[name] == pytest.approx(value, abs=1e-5, rel=1e-4), name
    assert furthest(first[1], one_rank[1]) < 1e-5
    assert furthest(first[2], one_rank[2]) < 1e-5


def test_the_cut_into_micro_batches_changes_nothing(checkpoints: tuple[Path, Path, Path], one_rank: Any) -> None:
    _, policy, critic = on_ranks(run_updates, 1, make_setup(checkpoints, micro_batch_tokens=10_000))[0]
    assert furthest(policy, one_rank[1]) < 1e-5
    assert furthest(critic, one_rank[2]) < 1e-5


def test_gradient_checkpointing_changes_nothing(checkpoints: tuple[Path, Path, Path], one_rank: Any) -> None:
    _, policy, _ = on_ranks(run_updates, 1, make_setup(checkpoints, gradient_checkpointing=True))[0]
    assert furthest(policy, one_rank[1]) < 1e-5


def test_bfloat16_follows_float32(checkpoints: tuple[Path, Path, Path], one_rank: Any) -> None:
    metrics, _, _ = on_ranks(run_updates, 1, make_setup(checkpoints, dtype="bfloat16"))[0]
    for got, want in zip(metrics, one_rank[0], strict=True):
        assert got["objective/kl"] == pytest.approx(want["objective/kl"], abs=0.3)
        assert got["policy/entropy"] == pytest.approx(want["policy/entropy"], abs=0.05)
