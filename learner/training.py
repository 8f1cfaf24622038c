"""The optimizer steps of one update: epochs over mini-batches, each a step of policy and critic or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from learner.collective import evened, summed_stats
from learner.distribution import SampledFrom
from learner.experience import Experience
from learner.guard import UpdateGuard, Verdict
from learner.models import PolicyOutput
from learner.networks import LearnerSetup, Networks
from learner.objective import Counts, PolicyObjective
from learner.packing import is_padded
from learner.phases import CRITIC, OPTIMIZER, POLICY, Phases
from learner.ptx import TextLoss
from learner.record import Record
from learner.steps import backward, blank_pass, discard, step


class Training:
    """Takes the optimizer steps of policy and critic."""

    def __init__(self, setup: LearnerSetup, networks: Networks) -> None:
        self.algorithm, self.sampled_from = setup.algorithm, setup.sampled_from
        self.policy, self.critic, self.average = networks.policy, networks.critic, networks.average
        self.objective = PolicyObjective(setup.algorithm, budget=setup.generator.max_new_tokens)
        self.guard = UpdateGuard.of(setup.algorithm)
        self.text: TextLoss | None = None
        if setup.ptx_rows:
            self.text = TextLoss(
                setup.ptx_rows,
                setup.algorithm.ptx,
                max_tokens=setup.learner.micro_batch_tokens,
                padded=is_padded(setup.model),
            )
        self.nonfinite_in_a_row = 0

    def run(
        self, mini_batches: Sequence[Sequence[Experience]], *, seed: int, train_policy: bool, phases: Phases
    ) -> dict[str, float]:
        """Run ppo_epochs over the mini-batches and return the metrics of the update. A collective.

        Args:
            mini_batches: this rank's micro-batches of each; every rank has the same number of mini-batches.
            seed: of the order in epochs after the first, and of the text that is mixed in; the same on every rank.
            train_policy: False leaves the policy alone, and the critic learns.
            phases: where it is recorded how long each phase takes.

        Raises:
            FloatingPointError: `algorithm.max_nonfinite` steps in a row had a loss or a gradient that is not finite.
        """
        engines = self._engines(train_policy)
        record = Record()
        for epoch, index in visits(len(mini_batches), epochs=self.algorithm.ppo_epochs, seed=seed):
            verdict = self._mini_batch(mini_batches[index], engines, record, phases, text_seed=(seed, epoch, index))
            record.verdicts[verdict] += 1
            self._stop_if_broken(verdict, record)
            if verdict is Verdict.EARLY_STOP:
                break
        return record.metrics() | {f"{name}/lr": float(engine.get_lr()[0]) for name, engine in engines.items()}

    def _engines(self, train_policy: bool) -> dict[str, Any]:
        """Return the engines that take steps, by the names in their metrics."""
        engines = {"policy": self.policy} if train_policy else {}
        return engines if self.critic.engine is None else {**engines, "critic": self.critic.engine}

    def _mini_batch(
        self,
        mini_batch: Sequence[Experience],
        engines: Mapping[str, Any],
        record: Record,
        phases: Phases,
        *,
        text_seed: Sequence[int],
    ) -> Verdict:
        """Add up the gradients of one mini-batch, and step with them or throw them away."""
        counts = counts_of(mini_batch)
        if counts.tokens == 0:
            return Verdict.EMPTY
        items = evened(mini_batch)
        sums = dict.fromkeys(self.critic.statistics, 0.0)
        if "policy" in engines:
            sums |= dict.fromkeys(self.objective.statistics, 0.0)
            with phases.record(POLICY):
                self._policy_pass(items, counts, sums)
                if self.text is not None:
                    sums["ptx_loss"] = self.text.learn(self.policy, text_seed)
        with phases.record(CRITIC):
            add(sums, self.critic.learn(items, counts.tokens))
        total = summed_stats(sums)
        record.add(total, counts.tokens)
        verdict = self.guard.verdict(
            [value for name, value in total.items() if name.endswith("loss")],
            mean_ratio=total.get("ratio", counts.tokens) / counts.tokens,
            approx_kl=total.get("approx_kl", 0.0) / counts.tokens,
        )
        if verdict is Verdict.STEP:
            with phases.record(OPTIMIZER):
                return self._step(engines, record)
        for engine in engines.values():
            discard(engine)
        return verdict

    def _policy_pass(self, items: Sequence[Experience | None], counts: Counts, sums: dict[str, float]) -> None:
        """Add up the gradient of the policy's loss, and of the values' where they are learnt beside it."""
        for item in items:
            if item is None:
                blank_pass(self.policy, sampled_from=SampledFrom())
                continue
            output = PolicyOutput.of(
                self.policy(item.batch, sampled_from=self.sampled_from, with_entropy=self.objective.needs_entropy)
            )
            terms = self.objective(output.logprobs, output.entropy, item, counts)
            beside = self.critic.loss_beside_policy(output, item, counts.tokens)
            add(sums, terms.stats)
            if beside is None:
                backward(self.policy, terms.loss_sum)
            else:
                add(sums, beside.stats)
                backward(self.policy, terms.loss_sum + beside.loss_sum)

    def _step(self, engines: Mapping[str, Any], record: Record) -> Verdict:
        """Step every network; one whose gradient is not finite stays as it is."""
        taken = {name: step(engine) for name, engine in engines.items()}
        for name, one in taken.items():
            record.grad_norms[name].append(one.grad_norm)
        if self.average is not None and "policy" in taken and taken["policy"].applied:
            self.average.update()
        return Verdict.STEP if all(one.applied for one in taken.values()) else Verdict.NONFINITE

    def _stop_if_broken(self, verdict: Verdict, record: Record) -> None:
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if verdict is Verdict.NONFINITE else 0
        if self.nonfinite_in_a_row >= self.algorithm.max_nonfinite:
            raise FloatingPointError(
                f"{self.nonfinite_in_a_row} optimizer steps in a row had a loss or a gradient that is not finite "
                f"(algorithm.max_nonfinite); no network takes a step with one of its own that is not. This update so "
                f"far: {record.metrics()}"
            )


def visits(num_mini_batches: int, *, epochs: int, seed: int) -> Iterator[tuple[int, int]]:
    """Yield (epoch, number of the mini-batch): as they are in the first epoch, shuffled in the others."""
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        order = range(num_mini_batches) if epoch == 0 else rng.permutation(num_mini_batches).tolist()
        yield from ((epoch, index) for index in order)


def counts_of(mini_batch: Sequence[Experience]) -> Counts:
    """Return how much of a mini-batch is in the losses. A collective."""
    total = summed_stats(
        {
            "tokens": float(sum(int(item.mask.sum()) for item in mini_batch)),
            "sequences": float(sum(int(item.mask.any(-1).sum()) for item in mini_batch)),
        }
    )
    return Counts(total["tokens"], total["sequences"])


def add(sums: dict[str, float], more: Mapping[str, float | Tensor]) -> None:
    for name, value in more.items():
        sums[name] += float(value)
