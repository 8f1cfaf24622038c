"""Where values come from: a network of its own, a head on the policy's, or nowhere.

The three have one interface, so that the update does not ask which one it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from conf.schema import ModelConfig
from learner import zero
from learner.experience import Batch, Experience, Values
from learner.exports import export
from learner.models import PolicyOutput
from learner.ppo import LossTerms, clipped_value_loss
from learner.steps import backward, blank_pass

STATISTICS = ("critic_loss", "critic_clipfrac")


class Critic:
    """No critic, which is what estimators without one have; the others say what they do otherwise.

    Every method is a collective.
    """

    engine: Any = None  # whose optimizer steps for the critic alone; None where there is none
    statistics: tuple[str, ...] = ()  # names of the sums over tokens that its loss comes with

    def values(self, batch: Batch, policy_output: PolicyOutput) -> Values | None:
        """Return the values of a batch; `policy_output` is what the policy has just said of it."""
        return None

    def loss_beside_policy(self, policy_output: PolicyOutput, item: Experience, tokens: float) -> LossTerms | None:
        """Return what is added to the policy's loss; None where the values are learnt by themselves.

        `tokens` is how many the mini-batch has in its losses, over all ranks.
        """
        return None

    def learn(self, items: Sequence[Experience | None], tokens: float) -> Mapping[str, float]:
        """Add up the gradient of the value loss over a mini-batch, None for a micro-batch of another rank.

        Returns the statistics of this rank; none where the values are learnt beside the policy.
        """
        return {}

    def export(self, folder: Path, *, dtype: str, settings: ModelConfig, keep: bool) -> None:
        """Write what there is of the critic to `folder`, on the rank that keeps it."""


class SeparateCritic(Critic):
    """A network of its own, with its own optimizer."""

    statistics = STATISTICS

    def __init__(self, engine: Any, *, value_clip_eps: float | None) -> None:
        """`engine` is that of a models.CriticModel."""
        self.engine, self.value_clip_eps = engine, value_clip_eps

    def values(self, batch: Batch, policy_output: PolicyOutput) -> Values:
        values = self.engine(batch)
        return Values(values[:, :-1], values[:, -1])

    def learn(self, items: Sequence[Experience | None], tokens: float) -> Mapping[str, float]:
        sums = dict.fromkeys(STATISTICS, 0.0)
        for item in items:
            if item is None:
                blank_pass(self.engine)
                continue
            terms = value_loss(self.engine(item.batch)[:, :-1], item, self.value_clip_eps)
            backward(self.engine, terms.loss_sum / tokens)
            for name, value in terms.stats.items():
                sums[name] += float(value)
        return sums

    def export(self, folder: Path, *, dtype: str, settings: ModelConfig, keep: bool) -> None:
        """Write `critic`, a Hugging Face checkpoint with one label."""
        export(self.engine.module.model, folder / "critic", dtype=dtype, settings=settings, keep=keep)


class SharedCritic(Critic):
    """A value head on the policy's network: its loss is a part of the policy's, its optimizer is the policy's."""

    statistics = STATISTICS

    def __init__(self, policy: Any, *, value_clip_eps: float | None, value_coef: float) -> None:
        """`policy` is the engine of a models.PolicyModel with a value head."""
        self.policy, self.value_clip_eps, self.value_coef = policy, value_clip_eps, value_coef

    def values(self, batch: Batch, policy_output: PolicyOutput) -> Values:
        return Values(policy_output.values, policy_output.final_values)

    def loss_beside_policy(self, policy_output: PolicyOutput, item: Experience, tokens: float) -> LossTerms:
        terms = value_loss(policy_output.values, item, self.value_clip_eps)
        return LossTerms(self.value_coef * terms.loss_sum / tokens, terms.stats)

    def export(self, folder: Path, *, dtype: str, settings: ModelConfig, keep: bool) -> None:
        """Write `policy/value_head.safetensors`, with `weight` [1, H] and `bias` [1] in float32."""
        from safetensors.torch import save_file

        state = zero.trained_state(self.policy.module.value_head, keep=keep)
        if keep:
            (folder / "policy").mkdir(parents=True, exist_ok=True)
            save_file({name: one.float() for name, one in state.items()}, folder / "policy" / "value_head.safetensors")


def value_loss(values: Tensor, item: Experience, value_clip_eps: float | None) -> LossTerms:
    """Return the value loss of a micro-batch, summed over the tokens in the losses, and `STATISTICS`."""
    assert item.returns is not None, "a critic learns returns"
    assert item.evaluation.values is not None
    old = item.evaluation.values.tokens
    terms = clipped_value_loss(values, old, item.returns, item.mask, value_clip_eps=value_clip_eps)
    return LossTerms(
        terms.loss_sum, {"critic_loss": terms.loss_sum.detach(), "critic_clipfrac": terms.stats["clipfrac"]}
    )
