"""One rank of the PPO learner: evaluates its rollouts with policy, critic and reference, and trains on them.

All ranks call the same methods in the same order. Every sum is divided by a count over all ranks, so the result does
not depend on how many there are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from actors.rollout import Rollout, ScoredRollout
from actors.weight_transport import HOST
from actors.weights import Manifest
from learner import checkpoint, lora, models, zero
from learner.batching import micro_batches
from learner.collective import evened, summed_stats
from learner.costs import passes_flops
from learner.describe import describe
from learner.divergence import mean_kl
from learner.experience import Batch, Evaluation, RolloutEvaluation, apart, blank_batch, collate, together
from learner.exports import export
from learner.flops import matrix_rate
from learner.networks import FrozenReference, LearnerSetup, make_networks
from learner.packing import is_padded
from learner.phases import EVALUATION, Phases
from learner.preparation import Preparation, whitened
from learner.ranks import Ranks
from learner.resting import Rest
from learner.sequence_groups import sequence_group
from learner.training import Training
from learner.weight_sender import WeightSender


class LearnerWorker:
    """One rank of the learner group."""

    def __init__(self, setup: LearnerSetup, ranks: Ranks) -> None:
        self.setup, self.ranks = setup, ranks
        zero.join(ranks, device=setup.device, timeout_s=setup.collective_timeout_s)
        torch.manual_seed(setup.seed)
        self.device = torch.device(setup.device)
        self.manifest: Manifest | None = None
        self.sender: WeightSender | None = None
        self.rate: float | None = None  # operations per second of this device, measured at the first update
        self.networks = make_networks(setup)
        self.policy = self.networks.policy
        self.prepare = Preparation(setup.algorithm, whiten_rewards=setup.shaping.whiten_rewards)
        self.training = Training(setup, self.networks)
        self.phases = Phases()  # of the last update
        self.num_updates = 0  # in this process
        self.early_s = 0.0  # spent on evaluations since the last update

    # --- one iteration ---------------------------------------------------------------------------------------------

    def evaluate(self, rollouts: Sequence[Rollout] | None) -> list[RolloutEvaluation]:
        """Return what the networks say of this rank's rollouts, while others are still sampled. A collective.

        It holds until the next update. A rank may have none; None is for rollouts that are lost, and then no rank that
        shares their tokens evaluates them.
        """
        start = time.perf_counter()
        group, there = sequence_group(), rollouts is not None
        if group is not None:
            there = group.all_have(there)
        rollouts = (rollouts or []) if there else []
        batches, order = [], []
        for part in self._parts(rollouts):
            batches.append(collate([ScoredRollout(rollouts[i], 0.0) for i in part]).to(self.device))
            order += part
        seen = zip(batches, self._evaluate(batches), strict=True)
        rows = [row for of_batch in seen for row in apart(*of_batch, after_updates=self.num_updates)]
        self.early_s += time.perf_counter() - start
        return [row for _, row in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])]

    def update(
        self,
        mini_batches: Sequence[Sequence[ScoredRollout]],
        evaluated: Sequence[Sequence[RolloutEvaluation | None]] | None = None,
        *,
        kl_coef: float,
        seed: int,
        step: int,
    ) -> dict[str, float]:
        """Train on this rank's part of one train batch and return the metrics of the whole, the same on every rank.

        Args:
            mini_batches: this rank's rollouts of each mini-batch; every rank has the same number of mini-batches.
            evaluated: what `evaluate` has said of each of them, on whichever rank; None where it has not been asked.
            kl_coef: coefficient of the KL penalty in the token rewards.
            seed: of the order of the mini-batches in epochs after the first; the same on every rank.
            step: iterations before this one; the policy is left alone in the first `critic_warmup_steps`.

        Raises:
            FloatingPointError: too many steps in a row had a loss or a gradient that is not finite.
            RuntimeError: an evaluation is of the policy before another update.
        """
        algorithm, self.phases = self.setup.algorithm, Phases()
        parts = [self._parts([scored.rollout for scored in rollouts]) for rollouts in mini_batches]
        cut = [
            [collate([rollouts[i] for i in part]).to(self.device) for part in of_mini_batch]
            for rollouts, of_mini_batch in zip(mini_batches, parts, strict=True)
        ]
        batches = [batch for of_mini_batch in cut for batch in of_mini_batch]
        known = evaluated if evaluated is not None else [[None] * len(rollouts) for rollouts in mini_batches]
        rows = [[of[i] for i in part] for of, cuts in zip(known, parts, strict=True) for part in cuts]
        with self.phases.record(EVALUATION):
            evaluations = self._evaluations(batches, rows)
        experience = self.prepare(batches, evaluations, kl_coef=kl_coef)
        metrics = describe(experience, kl_coef=kl_coef, cap=algorithm.correction_cap)
        metrics |= self._work(batches, train_policy=step >= algorithm.critic_warmup_steps)
        if algorithm.whitens:
            experience = whitened(experience)
        items = iter(experience)
        self.num_updates += 1
        metrics |= self.training.run(
            [[next(items) for _ in of_mini_batch] for of_mini_batch in cut],
            seed=seed,
            train_policy=step >= algorithm.critic_warmup_steps,
            phases=self.phases,
        )
        seconds = summed_stats(self.phases.seconds())
        return metrics | {f"timing/learner_{name}_s": value / self.ranks.num_hands for name, value in seconds.items()}

    def kl_to_reference(self, rollouts: Sequence[ScoredRollout], *, temperature: float) -> float:
        """Return the mean over all ranks' rollouts of log p - log p_ref summed over the response.

        `temperature` is the one that they were sampled at, or this is no estimate of a KL.
        """
        return mean_kl(
            rollouts,
            self.policy,
            self.networks.reference,
            sampled_from=replace(self.setup.sampled_from, temperature=temperature),
            max_tokens=self.setup.learner.micro_batch_tokens,
            padded=is_padded(self.setup.model),
        )

    def _parts(self, rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Return which of the rollouts stand in each micro-batch."""
        lengths = [rollout.num_tokens for rollout in rollouts]
        return micro_batches(
            lengths, max_tokens=self.setup.learner.micro_batch_tokens, padded=is_padded(self.setup.model)
        )

    def _work(self, batches: Sequence[Batch], *, train_policy: bool) -> dict[str, float]:
        """Return the share of computed positions that are padding, and what this update costs. A collective."""
        lengths = [batch.lengths.tolist() for batch in batches]
        states = [batch.num_response_tokens for batch in batches]
        tokens, positions = 0.0, 0.0
        for batch, of_batch in zip(batches, lengths, strict=True):
            tokens += sum(of_batch)
            positions += batch.token_ids.numel() if is_padded(self.setup.model) else sum(of_batch)
        epochs = self.setup.algorithm.ppo_epochs
        flops = sum(
            passes_flops(self.networks.costs, of_batch, asked, epochs=epochs, train_policy=train_policy)
            for of_batch, asked in zip(lengths, states, strict=True)
        )
        if self.rate is None:
            self.rate = matrix_rate(self.device, getattr(torch, self.setup.learner.dtype))
        early_s, self.early_s = self.early_s / self.ranks.num_hands, 0.0
        rate = self.rate * self.ranks.sequence_parallel_size
        total = summed_stats(
            {"tokens": tokens, "positions": positions, "flops": flops, "rate": rate, "early_s": early_s}
        )
        return {
            "timing/early_evaluation_s": total["early_s"],
            "throughput/padding_share": 1 - total["tokens"] / total["positions"],
            "throughput/learner_flops": total["flops"],
            "throughput/learner_flops_limit": total["rate"],
        }

    def _evaluations(
        self, batches: Sequence[Batch], rows: Sequence[Sequence[RolloutEvaluation | None]]
    ) -> list[Evaluation]:
        """Return what the networks say of the micro-batches, asking them where a row is not known. A collective."""
        known = [[row for row in of_batch if row is not None] for of_batch in rows]
        stale = {row.after_updates for of_batch in known for row in of_batch} - {self.num_updates}
        if stale:
            raise RuntimeError(
                f"evaluations after {sorted(stale)} updates are to be trained on after {self.num_updates}: the order "
                "of evaluations and updates is broken"
            )
        whole = [len(of_batch) == len(batch.mask) for of_batch, batch in zip(known, batches, strict=True)]
        asked = iter(self._evaluate([batch for batch, is_whole in zip(batches, whole, strict=True) if not is_whole]))
        return [
            together(batch, of_batch) if is_whole else next(asked)
            for batch, of_batch, is_whole in zip(batches, known, whole, strict=True)
        ]

    @torch.no_grad()
    def _evaluate(self, batches: Sequence[Batch]) -> list[Evaluation]:
        """Return what the networks say of this rank's micro-batches before the update. A collective."""
        sampled_from, result = self.setup.sampled_from, []
        for batch in evened(batches):
            seen = blank_batch().to(self.device) if batch is None else batch
            output = models.PolicyOutput.of(self.policy(seen, sampled_from=sampled_from, with_entropy=True))
            ref_logprobs = self.networks.reference(seen, temperature=sampled_from.temperature)
            values = self.networks.critic.values(seen, output)
            if batch is not None:
                result.append(Evaluation(output.logprobs, ref_logprobs, output.entropy, values))
        return result

    # --- weights ---------------------------------------------------------------------------------------------------

    def open_sync(
        self, *, dtype: str, num_receivers: int, bucket_bytes: int, host: str, timeout_s: float, wire: str = HOST
    ) -> list[dict[str, Any]]:
        """Open the rendezvous of the weight sync with this rank's receivers; return what each needs to join.

        Every rank must be asked, if only for none.
        """
        self.manifest, self.sender = zero.manifest(self.policy.module.model, dtype), None
        if num_receivers == 0:
            return []
        self.sender = WeightSender(
            self.manifest,
            num_receivers=num_receivers,
            bucket_bytes=bucket_bytes,
            device="cuda:0" if self.device.type == "cuda" else "cpu",  # the one that this process sees
            wire=wire,
            host=host,
            timeout=timeout_s,
        )
        return [self.sender.receiver_info(1 + index) for index in range(num_receivers)]

    def connect_sync(self) -> None:
        """Return when every receiver has joined."""
        if self.sender is not None:
            self.sender.connect()

    def send_weights(self, version: int) -> dict[str, float]:
        """Send the policy's weights, merged, to this rank's receivers. A collective: all ranks gather.

        Returns:
            how many bytes, and where the time went: metrics, of a rank that sends.

        Raises:
            RuntimeError: a receiver of this rank is lost or late. The ranks are together all the same.
        """
        assert self.manifest is not None, "open_sync comes first"
        groups = zero.gathered_groups(self.policy.module.model, self.manifest)
        try:
            if self.sender is None:
                return {}
            times = self.sender.send(groups, version=version)
            return {
                "sync/bytes": float(sum(meta.num_bytes for meta in self.manifest)),
                "timing/sync_gather_s": times.gather_s,
                "timing/sync_pack_s": times.pack_s,
                "timing/sync_wait_s": times.wait_s,
            }
        finally:
            for _ in groups:  # the other ranks are in the middle of it, whatever has become of the sending
                pass

    # --- GPUs that are shared with generators ----------------------------------------------------------------------

    def rest(self) -> None:
        """Leave the GPU to others, with everything that is kept between updates on the host. A collective."""
        self._rest.begin()

    def rise(self) -> None:
        """Come back to the GPU. A collective."""
        self._rest.end()

    @cached_property
    def _rest(self) -> Rest:
        reference, average = self.networks.reference, self.networks.average
        engines = [*self._engines.values(), *([reference.engine] if isinstance(reference, FrozenReference) else [])]
        averages = [] if average is None else average.tensors()
        return Rest(engines, averages, self.device)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def snapshot(self) -> checkpoint.Snapshot:
        """Return copies of all that this rank's later updates depend on; to be called between updates."""
        counters = {"nonfinite_in_a_row": self.training.nonfinite_in_a_row}
        return checkpoint.take(self.ranks, self._engines, average=self.networks.average, counters=counters)

    def restore(self, folder: Path) -> None:
        """Go on from what as many ranks, or another number, have written to `folder`. A collective.

        Raises:
            ConfigError: a file cannot be read, or is of another model.
        """
        counters = checkpoint.put_back(folder, self.ranks, self._engines, average=self.networks.average)
        self.training.nonfinite_in_a_row = counters["nonfinite_in_a_row"]

    @property
    def _engines(self) -> dict[str, Any]:
        critic = self.networks.critic.engine
        return {"policy": self.policy} if critic is None else {"policy": self.policy, "critic": critic}

    def export(self, folder: Path) -> None:
        """Write what was trained to `folder`, as Hugging Face checkpoints. A collective.

        `policy`, adapters merged; `policy_ema`, if an average is kept; `adapter`, with LoRA, for PEFT; and the critic:
        `critic`, or `policy/value_head.safetensors`.
        """
        model, average = self.policy.module.model, self.networks.average
        settings, dtype, keep = self.setup.model, self.setup.learner.dtype, self.ranks.rank == 0
        export(model, folder / "policy", dtype=dtype, settings=settings, keep=keep)
        if average is not None:
            with average.swapped_in():
                export(model, folder / "policy_ema", dtype=dtype, settings=settings, keep=keep)
        if lora.is_adapted(model):
            lora.save_adapter(model, folder / "adapter", keep=keep)
        self.networks.critic.export(folder, dtype=dtype, settings=settings, keep=keep)
