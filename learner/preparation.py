"""From what the networks say of a train batch to what is trained on: rewards, advantages, which tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from conf.schema import AlgorithmConfig
from learner import advantages as adv
from learner import correction, ppo
from learner.collective import token_moments
from learner.estimators import Estimate, Estimator, Rewarded, make_estimator
from learner.experience import Batch, Evaluation, Experience, sampled_by_both


def make_correction(algorithm: AlgorithmConfig) -> correction.Correction:
    """Return the correction of the gap to the engine that `algorithm.correction` names."""
    match algorithm.correction:
        case "none":
            return correction.uncorrected
        case "token":
            return partial(correction.truncated_by_token, cap=algorithm.correction_cap)
        case "sequence":
            return partial(correction.truncated_by_sequence, cap=algorithm.correction_cap)
        case "icepop":
            return partial(correction.icepop, low=algorithm.icepop_low, high=algorithm.icepop_high)
    raise ValueError(f"unknown correction {algorithm.correction!r}")


class Preparation:
    """Turns evaluated micro-batches into experience."""

    def __init__(self, algorithm: AlgorithmConfig, *, whiten_rewards: bool) -> None:
        self.algorithm, self.whiten_rewards = algorithm, whiten_rewards
        self.estimator: Estimator = make_estimator(algorithm)
        self.correction = make_correction(algorithm)

    def __call__(
        self, batches: Sequence[Batch], evaluations: Sequence[Evaluation], *, kl_coef: float
    ) -> list[Experience]:
        """Return the experience of each micro-batch of this rank, advantages not yet whitened. A collective.

        Args:
            batches: all micro-batches of the train batch that this rank has; may be empty.
            evaluations: of each of them.
            kl_coef: coefficient of the KL penalty in the token rewards.
        """
        pairs = list(zip(batches, evaluations, strict=True))
        rewards = [self._token_rewards(*pair, kl_coef) for pair in pairs]
        if self.whiten_rewards:
            rewards = scaled_rewards(rewards, [batch.mask for batch in batches])
        rewarded = [Rewarded(batch, seen.values, reward) for (batch, seen), reward in zip(pairs, rewards, strict=True)]
        estimates = self.estimator(rewarded)
        return [self._experience(*pair, estimate) for pair, estimate in zip(pairs, estimates, strict=True)]

    def _token_rewards(self, batch: Batch, seen: Evaluation, kl_coef: float) -> Tensor:
        kl = ppo.kl_penalty(seen.old_logprobs, seen.ref_logprobs, estimator=self.algorithm.kl_estimator)
        kl = ppo.masked(kl, sampled_by_both(batch, seen.old_logprobs))  # -inf has no penalty
        return ppo.token_rewards(batch.scores, kl, batch.mask, kl_coef=kl_coef)

    def _experience(self, batch: Batch, seen: Evaluation, estimate: Estimate) -> Experience:
        mask = sampled_by_both(batch, seen.old_logprobs)
        if self.algorithm.mask_truncated:
            mask = mask & ~batch.truncated.unsqueeze(-1)
        anchor = batch.rollout_logprobs if self.algorithm.old_logprobs == "engine" else seen.old_logprobs
        return Experience(
            batch,
            seen,
            mask=mask,
            anchor_logprobs=ppo.masked(anchor, mask),
            importance=self.correction(seen.old_logprobs, batch.rollout_logprobs, mask),
            advantages=estimate.advantages,
            returns=estimate.returns,
        )


def scaled_rewards(rewards: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """Return token rewards with standard deviation one over the train batch, their mean as it was. A collective.

    What TRL and LLaMA-Factory call whitening of rewards: whiten(rewards, shift_mean=False).
    """
    moments = token_moments(rewards, masks)
    return [
        ppo.masked(adv.whiten(of_batch, mask, mean=moments.mean, std=moments.std) + moments.mean, mask)
        for of_batch, mask in zip(rewards, masks, strict=True)
    ]


def whitened(experience: Sequence[Experience]) -> list[Experience]:
    """Return the same with advantages of mean zero and standard deviation one. A collective.

    The moments are those of all tokens in the losses, of the whole train batch on all ranks.
    """
    moments = token_moments([item.advantages for item in experience], [item.mask for item in experience])
    return [
        replace(item, advantages=adv.whiten(item.advantages, item.mask, mean=moments.mean, std=moments.std))
        for item in experience
    ]
