"""One rank of the PPO learner: evaluates its rollouts with policy, critic and reference, and trains on them.

All ranks call the same methods in the same order. Every sum is divided by a count over all ranks, so the result does
not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.rollout import ScoredRollout
from actors.weights import Manifest, manifest_of
from conf.schema import AlgorithmConfig, LearnerConfig, ModelConfig
from learner import advantages as adv
from learner import models, ppo, zero
from learner.collective import highest, summed_stats
from learner.describe import describe
from learner.experience import Batch, Evaluation, Experience, blank_batch, collate, micro_batches
from learner.weight_sender import WeightSender

MiniBatch = list[Experience]


@dataclass(frozen=True)
class LearnerSetup:
    """What every rank of the learner is built from."""

    model: ModelConfig  # `path` and `tokenizer` are set
    algorithm: AlgorithmConfig
    learner: LearnerConfig
    critic_path: str
    temperature: float
    device: str
    seed: int
    collective_timeout_s: float = 1800.0


class LearnerWorker:
    """One rank of the learner group."""

    def __init__(self, setup: LearnerSetup, ranks: zero.Ranks) -> None:
        self.setup, self.ranks = setup, ranks
        zero.join(ranks, device=setup.device, timeout_s=setup.collective_timeout_s)
        torch.manual_seed(setup.seed)
        self.device = torch.device(setup.device)
        self.manifest: Manifest | None = None
        self.sender: WeightSender | None = None
        policy_path = setup.model.path
        assert policy_path is not None
        loading: dict[str, Any] = {
            "attn_implementation": setup.model.attn_implementation,
            "trust_remote_code": setup.model.trust_remote_code,
        }

        def causal_lm(path: str) -> models.PolicyModel:
            return models.PolicyModel(models.load_causal_lm(path, **loading))

        algorithm, learner = setup.algorithm, setup.learner
        num_updates = algorithm.num_steps * algorithm.ppo_epochs * algorithm.num_mini_batches
        engine: dict[str, Any] = {"device": setup.device, "num_updates": num_updates}
        self.policy = zero.trained_engine(causal_lm(policy_path), learner, learner.policy, **engine)
        critic = models.CriticModel(models.load_scalar_model(setup.critic_path, **loading))
        self.critic = zero.trained_engine(critic, learner, learner.critic, **engine)
        reference = causal_lm(setup.model.reference or policy_path)
        self.reference = zero.frozen_engine(reference, learner, device=setup.device)

    # --- one iteration ---------------------------------------------------------------------------------------------

    def update(self, mini_batches: Sequence[Sequence[ScoredRollout]], *, kl_coef: float, seed: int) -> dict[str, float]:
        """Train on this rank's part of one train batch and return the metrics of the whole, the same on every rank.

        Args:
            mini_batches: this rank's rollouts of each mini-batch; every rank has the same number of mini-batches.
            kl_coef: coefficient of the KL penalty in the token rewards.
            seed: of the order of the mini-batches in epochs after the first; the same on every rank.

        Raises:
            FloatingPointError: a loss is not finite; nothing was stepped with it.
        """
        batches = [self._cut(rollouts) for rollouts in mini_batches]
        evaluations = [self._evaluate(batch, temperature=self.setup.temperature) for batch in batches]
        experience, metrics = self._experience(batches, evaluations, kl_coef=kl_coef)
        return metrics | self._train(experience, seed=seed)

    def kl_to_reference(self, rollouts: Sequence[ScoredRollout], *, temperature: float) -> float:
        """Return the mean over all ranks' rollouts of log p - log p_ref summed over the response.

        `temperature` is the one that they were sampled at, or this is no estimate of a KL.
        """
        batches = self._cut(rollouts)
        stats = {"kl": 0.0, "rollouts": float(len(rollouts))}
        for batch, evaluation in zip(batches, self._evaluate(batches, temperature=temperature), strict=True):
            stats["kl"] += float(ppo.masked_sum(evaluation.old_logprobs - evaluation.ref_logprobs, batch.mask))
        total = summed_stats(stats)
        return total["kl"] / total["rollouts"]

    def _cut(self, rollouts: Sequence[ScoredRollout]) -> list[Batch]:
        lengths = [scored.rollout.num_tokens for scored in rollouts]
        cut = micro_batches(lengths, max_tokens=self.setup.learner.micro_batch_tokens)
        return [collate([rollouts[i] for i in part]).to(self.device) for part in cut]

    def _padded(self, items: Sequence[Any]) -> list[Any]:
        """Return the items, then None as often as another rank has more of them. A collective.

        Not a generator: the ranks must compare their counts before the first of them starts a forward pass.
        """
        return [*items, *[None] * (highest(len(items)) - len(items))]

    @torch.no_grad()
    def _evaluate(self, batches: Sequence[Batch], *, temperature: float) -> list[Evaluation]:
        """Return what the three networks say of this rank's micro-batches. A collective."""
        result = []
        for batch in self._padded(batches):
            seen = batch if batch is not None else blank_batch().to(self.device)
            old_logprobs, entropy = self.policy(seen, temperature=temperature, with_entropy=True)
            ref_logprobs, _ = self.reference(seen, temperature=temperature)
            values = self.critic(seen)
            if batch is not None:
                result.append(Evaluation(old_logprobs, ref_logprobs, values, entropy))
        return result

    def _experience(
        self, batches: Sequence[Sequence[Batch]], evaluations: Sequence[Sequence[Evaluation]], *, kl_coef: float
    ) -> tuple[list[MiniBatch], dict[str, float]]:
        """Return the experience of each mini-batch, advantages whitened over the whole train batch, and its metrics."""
        algorithm = self.setup.algorithm
        experience = [
            [self._estimate(batch, evaluation, kl_coef=kl_coef) for batch, evaluation in zip(*pair, strict=True)]
            for pair in zip(batches, evaluations, strict=True)
        ]
        flat = [item for mini_batch in experience for item in mini_batch]
        metrics = describe(flat, kl_coef=kl_coef)
        if algorithm.whiten_advantages:
            mean, std = metrics["advantages/mean"], metrics["advantages/std"]
            experience = [
                [
                    Experience(
                        item.batch,
                        item.evaluation,
                        adv.whiten(item.advantages, item.batch.mask, mean=mean, std=std),
                        item.returns,
                    )
                    for item in mini_batch
                ]
                for mini_batch in experience
            ]
        return experience, metrics

    def _estimate(self, batch: Batch, evaluation: Evaluation, *, kl_coef: float) -> Experience:
        algorithm = self.setup.algorithm
        scores = batch.scores
        if algorithm.score_clip is not None:
            scores = scores.clamp(-algorithm.score_clip, algorithm.score_clip)
        kl = ppo.kl_penalty(evaluation.old_logprobs, evaluation.ref_logprobs, estimator=algorithm.kl_estimator)
        rewards = ppo.token_rewards(scores, kl, batch.mask, kl_coef=kl_coef)
        advantages, returns = adv.gae(
            rewards, evaluation.values, batch.mask, gamma=algorithm.gamma, gae_lambda=algorithm.gae_lambda
        )
        return Experience(batch, evaluation, advantages, returns)

    def _train(self, experience: Sequence[MiniBatch], *, seed: int) -> dict[str, float]:
        """Run ppo_epochs over the mini-batches and return the metrics of the update."""
        algorithm = self.setup.algorithm
        total: dict[str, float] = {}
        grad_norms: dict[str, list[float]] = {"policy": [], "critic": []}
        rng = np.random.default_rng(seed)
        for epoch in range(algorithm.ppo_epochs):
            order = list(range(len(experience))) if epoch == 0 else rng.permutation(len(experience)).tolist()
            for index in order:
                step = self._train_mini_batch(experience[index], grad_norms)
                total = {name: total.get(name, 0.0) + value for name, value in step.items()}
        tokens = total["tokens"]
        return {
            "policy/loss": total["policy_loss"] / tokens,
            "policy/approx_kl": total["approx_kl"] / tokens,
            "policy/clipfrac": total["policy_clipfrac"] / tokens,
            "policy/ratio_mean": total["ratio"] / tokens,
            "policy/grad_norm": float(np.mean(grad_norms["policy"])),
            "policy/lr": float(self.policy.get_lr()[0]),
            "critic/loss": total["critic_loss"] / tokens,
            "critic/clipfrac": total["critic_clipfrac"] / tokens,
            "critic/grad_norm": float(np.mean(grad_norms["critic"])),
            "critic/lr": float(self.critic.get_lr()[0]),
        }

    def _train_mini_batch(self, mini_batch: MiniBatch, grad_norms: dict[str, list[float]]) -> dict[str, float]:
        """Take one optimizer step of policy and critic; return sums over the tokens of all ranks."""
        algorithm = self.setup.algorithm
        tokens = summed_stats({"tokens": float(sum(item.batch.num_response_tokens for item in mini_batch))})["tokens"]
        stats = dict.fromkeys(
            ("policy_loss", "approx_kl", "policy_clipfrac", "ratio", "critic_loss", "critic_clipfrac"), 0.0
        )
        items = self._padded(mini_batch)
        for item in items:
            if item is None:
                logprobs, _ = self.policy(blank_batch().to(self.device), temperature=self.setup.temperature)
                self._backward(self.policy, logprobs.sum() * 0.0, tokens)
                continue
            logprobs, _ = self.policy(item.batch, temperature=self.setup.temperature)
            terms = ppo.clipped_policy_loss(
                logprobs,
                item.evaluation.old_logprobs,
                item.advantages,
                item.batch.mask,
                clip_eps=algorithm.clip_eps,
            )
            self._backward(self.policy, terms.loss_sum, tokens)
            stats["policy_loss"] += float(terms.loss_sum.detach())
            stats["policy_clipfrac"] += float(terms.stats["clipfrac"])
            stats["approx_kl"] += float(terms.stats["approx_kl"])
            stats["ratio"] += float(terms.stats["ratio"])
        for item in items:
            if item is None:
                self._backward(self.critic, self.critic(blank_batch().to(self.device)).sum() * 0.0, tokens)
                continue
            terms = ppo.clipped_value_loss(
                self.critic(item.batch),
                item.evaluation.values,
                item.returns,
                item.batch.mask,
                value_clip_eps=algorithm.value_clip_eps,
            )
            self._backward(self.critic, terms.loss_sum, tokens)
            stats["critic_loss"] += float(terms.loss_sum.detach())
            stats["critic_clipfrac"] += float(terms.stats["clipfrac"])
        total = summed_stats(stats)
        for name in ("policy", "critic"):
            if not math.isfinite(total[f"{name}_loss"]):
                raise FloatingPointError(f"the {name} loss is {total[f'{name}_loss']}: no step was taken with it")
        for name, engine in (("policy", self.policy), ("critic", self.critic)):
            engine.step()
            grad_norms[name].append(zero.finite_grad_norm(engine, name))
        return total | {"tokens": tokens}

    def _backward(self, engine: Any, loss_sum: Tensor, tokens: float) -> None:
        # DeepSpeed averages gradients over ranks; the sum over ranks divided by the global count is wanted.
        engine.backward(loss_sum * (self.ranks.world_size / tokens))

    # --- weights ---------------------------------------------------------------------------------------------------

    def open_sync(self, *, dtype: str, num_receivers: int, host: str, timeout_s: float) -> list[dict[str, Any]]:
        """Open the rendezvous of the weight sync; return what each receiver needs to join, from rank 0 alone."""
        self.manifest = manifest_of(self.policy.module.model, dtype)
        if self.ranks.rank != 0:
            return []
        self.sender = WeightSender(self.manifest, num_receivers=num_receivers, host=host, timeout=timeout_s)
        return [self.sender.receiver_info(1 + index) for index in range(num_receivers)]

    def connect_sync(self) -> None:
        """Return when every receiver has joined."""
        if self.sender is not None:
            self.sender.connect()

    def send_weights(self, version: int) -> None:
        """Send the policy's weights to every receiver. A collective: all ranks gather, rank 0 sends."""
        assert self.manifest is not None, "open_sync comes first"
        groups = zero.gathered_groups(self.policy.module.model, self.manifest)
        if self.sender is not None:
            self.sender.send(groups, version=version)
        for _ in groups:
            pass

    def export(self, folder: Path) -> None:
        """Write policy and critic as Hugging Face checkpoints to `folder`/policy and `folder`/critic. A collective."""
        tokenizer = self.setup.model.tokenizer
        assert tokenizer is not None
        first = self.ranks.rank == 0
        for name, engine in (("policy", self.policy), ("critic", self.critic)):
            state = zero.full_state(engine.module.model, dtype=self.setup.learner.dtype, keep=first)
            if first:
                models.save_pretrained(engine.module.model, state, folder / name, tokenizer=tokenizer)
