"""PPO as an obvious slow loop: one rollout and one token at a time, in float64, without padding, batches or ranks.

What the learner is compared with. It is written from the papers and uses no code of the learner; of its settings it
knows all that the comparison runs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.rollout import ScoredRollout

Metrics = dict[str, float]
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """What came of the updates."""

    metrics: list[Metrics]  # of each
    policy: list[Arrays]  # the weights after each
    critic: Arrays
    average: Arrays


@dataclass
class Seen:
    """What the networks say of a rollout."""

    logprobs: list[Tensor]
    entropy: list[Tensor]
    values: list[Tensor]
    final_value: Tensor


@dataclass
class Looked:
    """A train batch and all that is known of each rollout before the update."""

    every: list[ScoredRollout]
    written: list[list[int]]  # places of the tokens that the policy wrote
    inside: list[list[int]]  # of those, the ones that the learner could have sampled
    used: list[list[int]]  # of those, the ones in the losses
    old: list[Seen]
    ref: list[Seen]
    engine: list[list[float]]
    advantages: list[dict[int, float]] = field(default_factory=list)
    returns: list[dict[int, float]] = field(default_factory=list)


def plain_updates(setup: Any, batches: Sequence[Sequence[Sequence[ScoredRollout]]], *, kl_coef: float) -> Trained:
    """Take one update for each of `batches`, which are lists of mini-batches."""
    learner = PlainLearner(setup)
    metrics, weights = [], []
    for step, batch in enumerate(batches):
        train_policy = step >= learner.a.critic_warmup_steps
        metrics.append(learner.update(batch, kl_coef=kl_coef, seed=step, train_policy=train_policy))
        weights.append(learner.weights())
    critic = {} if learner.critic is None else named(learner.critic)
    if learner.head is not None:
        critic = named(learner.head)
    return Trained(metrics, weights, critic, {name: t.numpy() for name, t in learner.average.items()})


def named(module: Any) -> Arrays:
    return {name: p.detach().numpy().copy() for name, p in module.named_parameters()}


def mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def std(numbers: Sequence[float]) -> float:
    centre = mean(numbers)
    return math.sqrt(mean([(x - centre) ** 2 for x in numbers]))


class PlainLearner:
    def __init__(self, setup: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        self.setup, self.a = setup, setup.algorithm
        loaded = AutoModelForCausalLM.from_pretrained
        self.policy: Any = loaded(setup.model.path, dtype=torch.float32)
        self.reference: Any = loaded(setup.model.reference or setup.model.path, dtype=torch.float64)
        self.critic: Any = None
        self.head: Any = None
        if setup.model.lora.rank is not None:
            self.policy = self._adapted(self.policy)
        self.policy.double()
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        if self.a.estimator == "gae" and setup.learner.critic_network == "shared":
            width = self.policy.config.hidden_size
            self.head = torch.nn.Linear(width, 1, dtype=torch.float64)
            self.head.weight.data.zero_()
            self.head.bias.data.zero_()
            parameters += list(self.head.parameters())
        self.trained = {"policy": self._optimizer(parameters, setup.learner.policy, self.a.critic_warmup_steps)}
        if self.a.estimator == "gae" and self.head is None:
            self.critic = AutoModelForSequenceClassification.from_pretrained(
                setup.critic_path, num_labels=1, dtype=torch.float64
            )
            self.trained["critic"] = self._optimizer(list(self.critic.parameters()), setup.learner.critic, 0)
        self.average: dict[str, Tensor] = {}
        if setup.learner.ema_decay is not None:
            self.average = {name: p.detach().clone() for name, p in self.policy.named_parameters()}

    def _adapted(self, model: Any) -> Any:
        import peft

        lora = self.setup.model.lora
        torch.manual_seed(self.setup.seed)
        config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)

    def _optimizer(self, parameters: list[Any], config: Any, skipped: int) -> tuple[list[Any], Any, Any, Any]:
        from transformers import get_scheduler

        optimizer = torch.optim.AdamW(
            parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        total = (self.a.num_steps - skipped) * self.a.ppo_epochs * self.a.num_mini_batches
        return parameters, optimizer, get_scheduler(config.scheduler, optimizer, config.warmup_steps, total), config

    def weights(self) -> Arrays:
        import copy

        model = self.policy
        if self.setup.model.lora.rank is not None:
            model = copy.deepcopy(model).merge_and_unload()
        return named(model)

    # What the networks say

    def distribution(self, logits: Tensor) -> Tensor:
        """Log-probabilities [V] of what is sampled from; -inf for what top-k and top-p remove."""
        scaled = logits / self.setup.generator.temperature
        top_k, top_p = self.setup.generator.top_k, self.setup.generator.top_p
        order = sorted(range(len(scaled)), key=lambda i: -float(scaled[i].detach()))
        if top_k:
            order = order[:top_k]
        chances = torch.softmax(scaled.detach()[order], -1).tolist()
        kept, above = [], 0.0
        for index, chance in zip(order, chances, strict=True):
            if above < top_p:
                kept.append(index)
            above += chance
        result = torch.full_like(scaled, -math.inf)
        result[kept] = torch.log_softmax(scaled[kept], -1)
        return result

    def see(self, model: Any, scored: ScoredRollout) -> Seen:
        """What the policy, or the critic, says of each response token."""
        rollout = scored.rollout
        ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.response_ids]).astype(np.int64))
        start, count = len(rollout.prompt.token_ids), len(rollout.response_ids)
        zero = torch.zeros((), dtype=torch.float64)
        seen = Seen([], [], [zero] * count, zero)
        if model is self.critic:
            states = model.base_model(input_ids=ids[None]).last_hidden_state[0]
            value = [model.score(states[start + t - 1])[0] for t in range(count + 1)]
            return Seen([], [], value[:-1], value[-1])
        out = model(input_ids=ids[None], output_hidden_states=True)
        for t in range(count):
            logits = out.logits[0, start + t - 1]
            if model is self.reference:
                logprobs = torch.log_softmax(logits / self.setup.generator.temperature, -1)
            else:
                logprobs = self.distribution(logits)
            seen.logprobs.append(logprobs[ids[start + t]])
            finite = logprobs[torch.isfinite(logprobs)]
            seen.entropy.append(-(finite.exp() * finite).sum())
        if self.head is not None and model is self.policy:
            states = out.hidden_states[-1][0]
            value = [self.head(states[start + t - 1])[0] for t in range(count + 1)]
            seen.values, seen.final_value = value[:-1], value[-1]
        return seen

    # One update

    def update(
        self, mini_batches: Sequence[Sequence[ScoredRollout]], *, kl_coef: float, seed: int, train_policy: bool
    ) -> Metrics:
        a = self.a
        every = [scored for mini_batch in mini_batches for scored in mini_batch]
        place = {id(scored): i for i, scored in enumerate(every)}
        b = self.look(every)
        b.advantages, b.returns = self.advantages(b, self.rewards(b, kl_coef))
        metrics = self.describe(b, kl_coef)
        if a.whitens:
            tokens = [b.advantages[i][t] for i in range(len(every)) for t in b.used[i]]
            centre, width = mean(tokens), std(tokens)
            b.advantages = [{t: (x - centre) / (width + 1e-8) for t, x in of_one.items()} for of_one in b.advantages]
        sums: dict[str, list[float]] = defaultdict(list)
        rng = np.random.default_rng(seed)
        for epoch in range(a.ppo_epochs):
            order = range(len(mini_batches)) if epoch == 0 else rng.permutation(len(mini_batches)).tolist()
            for index in order:
                members = [place[id(s)] for s in mini_batches[index]]
                if not any(b.used[i] for i in members):
                    sums["empty"].append(1)
                    continue
                losses = self.losses(b, members, sums)
                if self.setup.ptx_rows:
                    text = self.text_loss((seed, epoch, index))
                    sums["ptx_loss"].append(float(text.detach()))
                    losses["policy"] = losses["policy"] + a.ptx.coef * text
                self.step(losses if train_policy else {"critic": losses["critic"]}, sums)
        total = sum(sums["tokens"])
        if train_policy:
            metrics |= {
                "policy/loss": mean(sums["policy_loss"]),
                "policy/approx_kl": sum(sums["approx_kl"]) / total,
                "policy/ratio_mean": sum(sums["ratio"]) / total,
                "policy/clipfrac": sum(sums["clipped"]) / total,
                "policy/outside_fraction": sum(sums["outside"]) / total,
            }
        also = [name for name in ("kl_loss", "ptx_loss") if sums[name] and train_policy]
        metrics |= {f"policy/{name}": mean(sums[name]) for name in also}
        if a.estimator == "gae":
            metrics["critic/loss"] = sum(sums["critic_loss"]) / total
            metrics["critic/clipfrac"] = sum(sums["critic_clipped"]) / total
        for name in self.trained:
            if sums[f"{name}_norm"]:
                metrics[f"{name}/grad_norm"] = mean(sums[f"{name}_norm"])
                metrics[f"{name}/lr"] = self.trained[name][1].param_groups[0]["lr"]
        return metrics | {
            "policy/skipped_empty": float(len(sums["empty"])),
            "policy/skipped_ratio": 0.0,
            "policy/skipped_nonfinite": 0.0,
            "policy/early_stops": 0.0,
        }

    def look(self, every: list[ScoredRollout]) -> Looked:
        with torch.no_grad():
            old = [self.see(self.policy, s) for s in every]
            ref = [self.see(self.reference, s) for s in every]
            if self.critic is not None:
                for seen, s in zip(old, every, strict=True):
                    of_critic = self.see(self.critic, s)
                    seen.values, seen.final_value = of_critic.values, of_critic.final_value
        written = [np.flatnonzero(s.rollout.response_mask).tolist() for s in every]
        inside = [[t for t in ts if math.isfinite(seen.logprobs[t])] for ts, seen in zip(written, old, strict=True)]
        used = [
            [] if self.a.mask_truncated and s.rollout.finish_reason == "length" else tokens
            for s, tokens in zip(every, inside, strict=True)
        ]
        engine = [s.rollout.rollout_logprobs.astype(np.float64).tolist() for s in every]
        return Looked(every, written, inside, used, old, ref, engine)

    def rewards(self, b: Looked, kl_coef: float) -> list[dict[int, float]]:
        result = []
        for s, tokens, known, seen, by_ref in zip(b.every, b.written, b.inside, b.old, b.ref, strict=True):
            reward = dict.fromkeys(tokens, 0.0)
            for t in known:
                d = float(seen.logprobs[t] - by_ref.logprobs[t])
                kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[self.a.kl_estimator]
                reward[t] = -kl_coef * kl
            reward[tokens[-1]] += float(np.float32(s.score))
            result.append(reward)
        if self.setup.shaping.whiten_rewards:
            numbers = [x for reward in result for x in reward.values()]
            centre, width = mean(numbers), std(numbers)
            result = [{t: (x - centre) / (width + 1e-8) + centre for t, x in reward.items()} for reward in result]
        return result

    def advantages(
        self, b: Looked, rewards: list[dict[int, float]]
    ) -> tuple[list[dict[int, float]], list[dict[int, float]]]:
        a = self.a
        totals = [sum(reward.values()) for reward in rewards]
        groups = [s.rollout.prompt.id for s in b.every]
        advantages, returns = [], []
        for i, s in enumerate(b.every):
            tokens, reward = b.written[i], rewards[i]
            others = [totals[j] for j in range(len(b.every)) if groups[j] == groups[i] and j != i]
            group = [*others, totals[i]]
            if a.estimator == "gae":
                last = 0.0
                if a.bootstrap_truncated and s.rollout.finish_reason == "length":
                    last = float(b.old[i].final_value)
                values = [float(b.old[i].values[t]) for t in tokens] + [last]
                deltas = [reward[t] + a.gamma * values[k + 1] - values[k] for k, t in enumerate(tokens)]
                lam = a.gae_lambda
                if a.length_adaptive_alpha is not None:
                    lam = max(0.0, 1 - 1 / (a.length_adaptive_alpha * len(tokens)))
                advantages.append(dict(zip(tokens, discounted(deltas, a.gamma * lam), strict=True)))
                target = a.gae_lambda if a.critic_gae_lambda is None else a.critic_gae_lambda
                to_learn = discounted(deltas, a.gamma * target)
                returns.append({t: x + v for t, x, v in zip(tokens, to_learn, values, strict=False)})
                continue
            returns.append({})
            if a.estimator in ("reinforce_pp", "remax"):
                ahead = discounted([reward[t] for t in tokens], a.gamma)
                advantages.append(dict(zip(tokens, [x - s.baseline for x in ahead], strict=True)))
                continue
            match a.estimator:
                case "grpo":
                    width = math.sqrt(sum((x - mean(group)) ** 2 for x in group) / max(len(group) - 1, 1))
                    number = (totals[i] - mean(group)) / (width + 1e-6)
                case "rloo":
                    number = totals[i] - mean(others) if others else 0.0
                case "dr_grpo" | "reinforce_pp_baseline":
                    number = totals[i] - mean(group)
                case _:
                    raise AssertionError(a.estimator)
            advantages.append(dict.fromkeys(tokens, number))
        return advantages, returns

    def describe(self, b: Looked, kl_coef: float) -> Metrics:
        kls = [
            sum(float(b.old[i].logprobs[t] - b.ref[i].logprobs[t]) for t in b.inside[i]) for i in range(len(b.every))
        ]
        trained = [b.advantages[i][t] for i in range(len(b.every)) for t in b.used[i]]
        gaps = [float(b.old[i].logprobs[t]) - b.engine[i][t] for i in range(len(b.every)) for t in b.inside[i]]
        weights = [w for i in range(len(b.every)) for w in self.importance(b.old[i], b.engine[i], b.used[i]).values()]
        count = sum(map(len, b.written))
        metrics = {
            "objective/kl": mean(kls),
            "objective/kl_coef": kl_coef,
            "objective/rlhf_reward": mean([s.score for s in b.every]) - kl_coef * mean(kls),
            "policy/entropy": sum(float(b.old[i].entropy[t]) for i in range(len(b.every)) for t in b.written[i])
            / count,
            "policy/masked_rollouts": float(sum(not tokens for tokens in b.used)),
            "advantages/mean": mean(trained),
            "advantages/std": std(trained),
            "sync/logprob_gap_mean": mean([abs(x) for x in gaps]),
            "sync/logprob_gap_p99": float(np.quantile(np.abs(gaps), 0.99)),
            "sync/logprob_gap_max": max(abs(x) for x in gaps),
            "offpolicy/kl": mean([math.exp(x) - 1 - x for x in gaps]),
            "offpolicy/ratio_max": math.exp(max(gaps)),
            "offpolicy/above_cap_fraction": mean([float(math.exp(x) > self.a.correction_cap) for x in gaps]),
            "offpolicy/weight_mean": mean(weights),
            "offpolicy/outside_fraction": 1 - len(gaps) / count,
        }
        if self.a.estimator == "gae":
            values = [float(b.old[i].values[t]) for i in range(len(b.every)) for t in b.written[i]]
            targets = [b.returns[i][t] for i in range(len(b.every)) for t in b.written[i]]
            errors = [r - v for r, v in zip(targets, values, strict=True)]
            metrics["critic/value_mean"], metrics["critic/return_mean"] = mean(values), mean(targets)
            metrics["critic/explained_variance"] = 1 - std(errors) ** 2 / std(targets) ** 2
        return metrics

    def importance(self, old: Seen, engine: list[float], tokens: list[int]) -> dict[int, float]:
        gaps = {t: float(old.logprobs[t]) - engine[t] for t in tokens}
        match self.a.correction:
            case "none":
                return dict.fromkeys(tokens, 1.0)
            case "token":
                return {t: min(math.exp(gap), self.a.correction_cap) for t, gap in gaps.items()}
            case "sequence":
                return dict.fromkeys(tokens, min(math.exp(sum(gaps.values())), self.a.correction_cap))
            case "icepop":
                ratios = {t: math.exp(gap) for t, gap in gaps.items()}
                return {t: r if self.a.icepop_low <= r <= self.a.icepop_high else 0.0 for t, r in ratios.items()}
        raise AssertionError(self.a.correction)

    def losses(self, b: Looked, members: list[int], sums: dict[str, list[float]]) -> dict[str, Tensor]:
        """The losses of policy and critic over a mini-batch; their figures are appended to `sums`."""
        a = self.a
        low, high = 1 - a.clip_eps, 1 + (a.clip_eps_high or a.clip_eps)
        tokens = sum(len(b.used[i]) for i in members)
        sequences = sum(bool(b.used[i]) for i in members)
        policy_loss, kl_loss, critic_loss = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        for i in members:
            if not b.used[i]:
                continue
            now = self.see(self.policy, b.every[i])
            importance = self.importance(b.old[i], b.engine[i], b.used[i])
            known = [t for t in b.used[i] if math.isfinite(now.logprobs[t].detach())]
            anchor = {t: b.engine[i][t] if a.old_logprobs == "engine" else b.old[i].logprobs[t] for t in known}
            logs = {t: now.logprobs[t] - anchor[t] for t in known}
            per = {
                "token": tokens,
                "sequence": sequences * len(b.used[i]),
                "constant": sequences * self.setup.generator.max_new_tokens,
            }[a.loss_aggregation]
            for t in known:
                log = torch.stack(list(logs.values())).mean() if a.policy_loss == "gspo" else logs[t]
                ratio, advantage = log.exp(), b.advantages[i][t]
                if a.policy_loss == "cispo":
                    weight = ratio.detach().clamp(low, high)
                    gain, clipped = weight * advantage * now.logprobs[t], bool(weight != ratio.detach())
                else:
                    gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
                    if a.dual_clip is not None and advantage < 0:
                        gain = gain.clamp(min=a.dual_clip * advantage)
                    clipped = bool(gain != ratio * advantage)
                policy_loss = policy_loss - importance[t] * gain / per - a.entropy_coef * now.entropy[t] / per
                if a.kl_loss_coef:
                    d = now.logprobs[t] - b.ref[i].logprobs[t]
                    kl = {"k2": d * d / 2, "k3": (-d).exp() - 1 + d}[a.kl_loss_estimator]
                    kl_loss = kl_loss + kl / per
                sums["approx_kl"].append(float(logs[t].detach().exp() - 1 - logs[t].detach()))
                sums["ratio"].append(float(ratio.detach()))
                sums["clipped"].append(float(clipped))
            sums["outside"].append(len(b.used[i]) - len(known))
            sums["ratio"].append(len(b.used[i]) - len(known))
            if a.estimator == "gae":
                values = now.values if self.critic is None else self.see(self.critic, b.every[i]).values
                for t in b.used[i]:
                    error, was = (values[t] - b.returns[i][t]) ** 2, float(b.old[i].values[t])
                    worst = error
                    if a.value_clip_eps is not None:
                        near = values[t].clamp(was - a.value_clip_eps, was + a.value_clip_eps)
                        worst = torch.maximum(error, (near - b.returns[i][t]) ** 2)
                    critic_loss = critic_loss + worst / 2
                    sums["critic_clipped"].append(float(worst > error))
        policy_loss = policy_loss + a.kl_loss_coef * kl_loss
        sums["tokens"].append(tokens)
        sums["policy_loss"].append(float(policy_loss.detach()))
        sums["critic_loss"].append(float(critic_loss.detach()))
        if a.kl_loss_coef:
            sums["kl_loss"].append(float(kl_loss.detach()))
        if a.estimator != "gae":
            return {"policy": policy_loss}
        if self.critic is None:
            return {"policy": policy_loss + a.value_coef * critic_loss / tokens}
        return {"policy": policy_loss, "critic": critic_loss / tokens}

    def text_loss(self, seed: tuple[int, int, int]) -> Tensor:
        rows = self.setup.ptx_rows
        size = min(self.a.ptx.batch_size, len(rows))
        terms = []
        for index in np.random.default_rng(seed).choice(len(rows), size, replace=False):
            ids = torch.from_numpy(rows[index].astype(np.int64))
            logits = self.policy(input_ids=ids[None]).logits[0]
            terms += [-torch.log_softmax(logits[t], -1)[ids[t + 1]] for t in range(len(ids) - 1)]
        return torch.stack(terms).mean()

    def step(self, losses: dict[str, Tensor], sums: dict[str, list[float]]) -> None:
        for name, loss in losses.items():
            parameters, optimizer, scheduler, config = self.trained[name]
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            sums[f"{name}_norm"].append(float(norm))
            optimizer.step()
            scheduler.step()
        if "policy" in losses:
            decay = self.setup.learner.ema_decay
            for key, average in self.average.items():
                weight = dict(self.policy.named_parameters())[key].detach()
                self.average[key] = decay * average + (1 - decay) * weight


def discounted(numbers: Sequence[float], factor: float) -> list[float]:
    """The sum over u >= t of factor^(u - t) x_u, for each t."""
    return [sum(factor ** (u - t) * numbers[u] for u in range(t, len(numbers))) for t in range(len(numbers))]
