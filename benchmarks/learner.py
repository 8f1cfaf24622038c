"""An update of the learner beside a plain PyTorch loop with the same mathematics, which pads to the longest.

Each contestant has processes of its own, which live through all rounds and wait while the other is measured. Before
anything is timed, both train on the same rollouts and must report the same losses.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from actors.rollout import Prompt, Rollout, ScoredRollout
from benchmarks.report import Result, matrix_rate

PROMPT, RESPONSE, LONGEST = 32, 64, 256  # tokens; the mean of responses, and their limit where lengths vary
KL_COEF, LEARNING_RATE, CLIP, GAMMA, LAMBDA = 0.05, 1e-5, 0.2, 1.0, 0.95
MINI_BATCHES = 4
Batch = list[list[ScoredRollout]]  # mini-batches


def checkpoint(folder: Path, *, hidden: int, layers: int, vocabulary: int) -> Path:
    """Write a Llama of this size with random weights, and a critic of the same, for want of any other."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        num_labels=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    LlamaForSequenceClassification(config).save_pretrained(folder / "critic")
    return folder


def lengths_of(kind: str, count: int, seed: int) -> list[int]:
    """Return response lengths: all alike, or log-normal with the same mean and a limit."""
    if kind == "equal":
        return [RESPONSE] * count
    drawn = np.random.default_rng(seed).lognormal(0.0, 1.0, count)
    lengths: list[int] = np.clip(drawn / drawn.mean() * RESPONSE, 1, LONGEST).round().astype(int).tolist()
    return lengths


def rollouts_of(kind: str, count: int, vocabulary: int, seed: int) -> Batch:
    """Return a train batch of random tokens in mini-batches, the same for all."""
    rng = np.random.default_rng(seed)
    scored = []
    for number, length in enumerate(lengths_of(kind, count, seed)):
        rollout = Rollout(
            Prompt(number, rng.integers(4, vocabulary, PROMPT).astype(np.int32), "", ()),
            0,
            response_ids=rng.integers(4, vocabulary, length).astype(np.int32),
            rollout_logprobs=np.full(length, -np.log(vocabulary), np.float32),
            response_mask=np.ones(length, np.bool_),
            policy_versions=np.zeros(length, np.int32),
            finish_reason="stop",
            text="",
        )
        scored.append(ScoredRollout(rollout, float(rng.normal()), 0.0))
    size = count // MINI_BATCHES
    return [scored[start : start + size] for start in range(0, count, size)]


# The plain loop -------------------------------------------------------------------------------------------------------


class PlainLoop:
    """PPO in plain PyTorch and transformers, one process; every batch is padded to its longest."""

    def __init__(self, folder: Path, budget: int) -> None:
        import torch
        from transformers import LlamaForCausalLM, LlamaForSequenceClassification

        self.budget = budget
        self.policy: Any = LlamaForCausalLM.from_pretrained(folder / "policy", attn_implementation="sdpa")
        self.reference: Any = LlamaForCausalLM.from_pretrained(folder / "policy", attn_implementation="sdpa")
        self.critic: Any = LlamaForSequenceClassification.from_pretrained(folder / "critic", attn_implementation="sdpa")
        self.reference.requires_grad_(False)
        self.optimizers = [
            torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
            for model in (self.policy, self.critic)
        ]

    def update(self, batch: Batch) -> dict[str, float]:
        """Take one update and return its losses."""
        import torch

        cut = [self._cut(mini_batch) for mini_batch in batch]
        with torch.no_grad():
            seen = [[self._evaluated(*part) for part in parts] for parts in cut]
        flat = torch.cat([one["advantages"][one["mask"]] for parts in seen for one in parts])
        mean, std = flat.mean(), flat.std(correction=0)
        losses = {"policy/loss": 0.0, "critic/loss": 0.0}
        for parts in seen:
            tokens = sum(int(one["mask"].sum()) for one in parts)
            for one in parts:
                mask = one["mask"]
                logprobs, _ = self._logprobs(self.policy, one)
                ratio = (logprobs - one["old"]).exp()
                advantages = (one["advantages"] - mean) / (std + 1e-8)
                clipped = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
                loss = -(clipped * mask).sum() / tokens
                loss.backward()
                losses["policy/loss"] += float(loss.detach()) / len(seen)
                values = self._values(one)
                near = one["values"] + (values - one["values"]).clamp(-CLIP, CLIP)
                squares = torch.maximum((values - one["returns"]) ** 2, (near - one["returns"]) ** 2) / 2
                loss = (squares * mask).sum() / tokens
                loss.backward()
                losses["critic/loss"] += float(loss.detach()) * tokens / len(flat)  # a mean over all tokens
            for model, optimizer in zip((self.policy, self.critic), self.optimizers, strict=True):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return losses

    def _cut(self, scored: Sequence[ScoredRollout]) -> list[tuple[Any, Any, Any]]:
        """Return micro-batches padded to the longest of all: ids [B, L], response mask [B, L], scores [B]."""
        import torch

        longest = max(one.rollout.num_tokens for one in scored)
        size = max(self.budget // longest, 1)
        parts = []
        for start in range(0, len(scored), size):
            members = scored[start : start + size]
            ids = torch.zeros((len(members), longest), dtype=torch.int64)
            mask = torch.zeros((len(members), longest), dtype=torch.bool)
            for row, one in enumerate(members):
                tokens = np.concatenate([one.rollout.prompt.token_ids, one.rollout.response_ids])
                ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
                mask[row, PROMPT : len(tokens)] = True
            parts.append((ids, mask, torch.tensor([one.score for one in members])))
        return parts

    def _evaluated(self, ids: Any, mask: Any, scores: Any) -> dict[str, Any]:
        import torch

        one: dict[str, Any] = {"ids": ids, "mask": mask[:, 1:]}
        old, entropy = self._logprobs(self.policy, one)
        ref, _ = self._logprobs(self.reference, one)
        values = self._values(one) * one["mask"]
        rewards = -KL_COEF * (old - ref) * one["mask"]
        last = one["mask"].shape[1] - 1 - one["mask"].flip(1).int().argmax(1)
        rewards[torch.arange(len(ids)), last] += scores
        advantages = torch.zeros_like(rewards)
        carried, after = torch.zeros(len(ids)), torch.zeros(len(ids))
        for t in range(rewards.shape[1] - 1, -1, -1):
            inside = one["mask"][:, t]
            delta = rewards[:, t] + GAMMA * after - values[:, t]
            carried = torch.where(inside, delta + GAMMA * LAMBDA * carried, carried)
            advantages[:, t] = torch.where(inside, carried, 0.0)
            after = torch.where(inside, values[:, t], after)
        return one | {
            "old": old,
            "entropy": entropy,
            "values": values,
            "advantages": advantages,
            "returns": advantages + values,
        }

    def _logprobs(self, model: Any, one: dict[str, Any]) -> tuple[Any, Any]:
        """Return log-probabilities and entropies of the response tokens [B, L - 1], zero elsewhere."""
        import torch

        hidden = model.model(input_ids=one["ids"], use_cache=False).last_hidden_state[:, :-1][one["mask"]]
        logprobs = torch.log_softmax(model.lm_head(hidden), -1)
        of_tokens = logprobs.gather(-1, one["ids"][:, 1:][one["mask"]].unsqueeze(-1)).squeeze(-1)
        blank = torch.zeros(one["mask"].shape)
        entropy = None if torch.is_grad_enabled() else -(logprobs.exp() * logprobs).sum(-1)
        return blank.masked_scatter(one["mask"], of_tokens), entropy

    def _values(self, one: dict[str, Any]) -> Any:
        hidden = self.critic.model(input_ids=one["ids"], use_cache=False).last_hidden_state[:, :-1]
        return self.critic.score(hidden).squeeze(-1)


# The learner ----------------------------------------------------------------------------------------------------------


def learner_rank(folder: Path, budget: int, count: int, rank: int, world_size: int, port: int) -> Any:
    """Return a rank of Manta's learner with the settings of the plain loop."""
    from conf.schema import (
        AlgorithmConfig,
        GeneratorConfig,
        LearnerConfig,
        ModelConfig,
        OptimizerConfig,
        ShapingConfig,
    )
    from learner.networks import LearnerSetup
    from learner.ranks import Ranks
    from learner.worker import LearnerWorker

    optimizer = OptimizerConfig(lr=LEARNING_RATE)
    path = str(folder / "policy")
    setup = LearnerSetup(
        model=ModelConfig(path=path, tokenizer=path),
        algorithm=AlgorithmConfig(prompts_per_step=count, mini_batch_size=count // MINI_BATCHES, kl_coef=KL_COEF),
        shaping=ShapingConfig(),
        learner=LearnerConfig(policy=optimizer, critic=optimizer, dtype="float32", micro_batch_tokens=budget),
        generator=GeneratorConfig(max_new_tokens=LONGEST),
        critic_path=str(folder / "critic"),
        ptx_rows=(),
        device="cpu",
        seed=0,
    )
    return LearnerWorker(setup, Ranks(rank, world_size, "127.0.0.1", port))


class Rank:
    """A rank's share of each train batch."""

    def __init__(self, worker: Any, rank: int, world_size: int) -> None:
        self.worker, self.rank, self.world_size = worker, rank, world_size

    def update(self, batch: Batch) -> dict[str, float]:
        from learner.batching import deal

        own = []
        for mini_batch in batch:
            lengths = [one.rollout.num_tokens for one in mini_batch]
            hands = deal(lengths, mini_batch_size=len(mini_batch), num_hands=self.world_size, seed=0)
            own.append([mini_batch[index] for index in hands[self.rank][0]])
        metrics: dict[str, float] = self.worker.update(own, kl_coef=KL_COEF, seed=0, step=0)
        return metrics


# Processes ------------------------------------------------------------------------------------------------------------


def serve(pipe: Connection, make: Callable[..., Any], arguments: Sequence[Any], threads: int) -> None:
    """Make a contestant in this process, and let it train on whatever comes through the pipe."""
    os.environ.update(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="passive", DS_ACCELERATOR="cpu")
    import torch

    torch.set_num_threads(threads)
    contestant = make(*arguments)
    while (batch := pipe.recv()) is not None:
        start = time.perf_counter()
        metrics = contestant.update(batch)
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
        pipe.send((time.perf_counter() - start, metrics, peak))


def make_rank(folder: Path, budget: int, count: int, rank: int, world_size: int, port: int) -> Rank:
    return Rank(learner_rank(folder, budget, count, rank, world_size, port), rank, world_size)


class Contestant:
    """One or more processes that train together."""

    def __init__(self, make: Callable[..., Any], arguments: Sequence[Sequence[Any]], *, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for of_process in arguments:
            own, other = context.Pipe()
            process = context.Process(target=serve, args=(other, make, of_process, threads), daemon=True)
            process.start()
            self.pipes.append(own)
            self.processes.append(process)
        self.peak_mib, self.metrics = 0.0, dict[str, float]()

    def update(self, batch: Batch) -> float:
        """Return the seconds of an update."""
        for pipe in self.pipes:
            pipe.send(batch)
        answers: list[tuple[float, dict[str, float], float]] = [pipe.recv() for pipe in self.pipes]
        self.metrics, self.peak_mib = answers[0][1], sum(peak for *_, peak in answers)
        return max(seconds for seconds, *_ in answers)

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def measured(folder: Path, kind: str, world_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one comparison: medians over the rounds, taken in turns."""
    count, budget = options.rollouts, options.budget
    batch = rollouts_of(kind, count, options.vocabulary, seed=1)
    tokens = sum(one.rollout.num_tokens for mini_batch in batch for one in mini_batch)
    plain = Contestant(PlainLoop, [(folder, budget)], threads=options.cores)
    port = free_port()
    ranks = [(folder, budget, count, rank, world_size, port) for rank in range(world_size)]
    learner = Contestant(make_rank, ranks, threads=max(options.cores // world_size, 1))
    plain.update(batch)
    learner.update(batch)
    for name in ("policy/loss", "critic/loss"):
        one, other = plain.metrics[name], learner.metrics[name]
        if abs(one - other) > 1e-4 * max(abs(other), 1e-2):
            raise SystemExit(f"the contestants do not compute the same: {name} is {one} and {other}")
    of_plain, of_learner, rates = [], [], []
    for _ in range(options.rounds):
        rates.append(matrix_rate(threads=options.cores))
        of_plain.append(plain.update(batch))
        of_learner.append(learner.update(batch))
    plain.end()
    learner.end()
    needed = learner.metrics["throughput/learner_flops"]
    return {
        "lengths": kind,
        "ranks": world_size,
        "plain_s": statistics.median(of_plain),
        "learner_s": statistics.median(of_learner),
        "speed_ratio": statistics.median(p / m for p, m in zip(of_plain, of_learner, strict=True)),
        "tokens_per_s": tokens / statistics.median(of_learner),
        "plain_mib": plain.peak_mib,
        "learner_mib": learner.peak_mib,
        "memory_ratio": learner.peak_mib / plain.peak_mib,
        "share_of_limit": needed / statistics.median(of_learner) / statistics.median(rates),
        "plain_share_of_limit": needed / statistics.median(of_plain) / statistics.median(rates),
        "padding_share": learner.metrics["throughput/padding_share"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", nargs="+", choices=("equal", "lognormal"), default=["equal", "lognormal"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--budget", type=int, default=2048, help="learner.micro_batch_tokens, of both contestants")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="threads, shared by the ranks")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--json", type=Path, help="a file for the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = checkpoint(Path(work), hidden=options.hidden, layers=options.layers, vocabulary=options.vocabulary)
        rows = [measured(folder, kind, ranks, options) for kind in options.lengths for ranks in options.ranks]
    settings = {name: value for name, value in vars(options).items() if name not in ("json",)}
    Result("learner", rows, settings | {"prompt": PROMPT, "response": RESPONSE, "longest": LONGEST}).say(options.json)


if __name__ == "__main__":
    main()
