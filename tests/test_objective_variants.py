"""learner.objective: every variant against a slow float64 loop, and what must not leak. A second."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import AlgorithmConfig
from learner.distribution import SampledFrom, token_logprobs
from learner.experience import Evaluation, Experience, blank_batch
from learner.objective import Counts, PolicyObjective
from tests.test_ppo_maths import ragged_mask, random

BUDGET = 11
POLICY_LOSSES: list[dict[str, Any]] = [
    {},
    {"clip_eps": 0.1, "clip_eps_high": 0.3, "dual_clip": 1.3},
    {"policy_loss": "gspo", "clip_eps": 0.05},
    {"policy_loss": "cispo"},
]
EVERY: dict[str, Any] = {"entropy_coef": 0.3, "kl_loss_coef": 0.7}
VARIANTS = [
    (aggregation, more)
    for aggregation in ("token", "sequence", "constant")
    for more in POLICY_LOSSES
    if aggregation == "sequence" or more.get("policy_loss") != "gspo"  # the others are refused by the settings
]


def experience(mask: Tensor, anchor: Tensor, ref: Tensor, importance: Tensor, advantages: Tensor) -> Experience:
    """What the objective looks at, in the dtype that it is given in; it looks at nothing else."""
    nothing = torch.full_like(anchor, math.nan)
    return Experience(
        blank_batch(), Evaluation(nothing, ref, nothing, None), mask, anchor, importance, advantages, None
    )


def case() -> tuple[Tensor, Tensor, Experience]:
    """New log-probabilities and entropy, and a micro-batch of four rows with padding and holes; some are clipped."""
    anchor = -random(4, 9, seed=0).abs() - 0.1
    ref, importance = anchor + random(4, 9, seed=1, scale=0.5), random(4, 9, seed=2).exp()
    item = experience(ragged_mask(4, 9), anchor, ref, importance, random(4, 9, seed=3))
    return anchor + random(4, 9, seed=4, scale=0.4), random(4, 9, seed=5).abs(), item


def counts(item: Experience) -> Counts:
    return Counts(float(item.mask.sum()), float(item.mask.any(-1).sum()))


def slow_loss(algorithm: AlgorithmConfig, logprobs: Tensor, entropy: Tensor, item: Experience, total: Counts) -> float:
    """The whole loss, token by token in Python floats; a token of -inf is passed over and still counted."""
    low, high = algorithm.clip_eps, algorithm.clip_eps_high or algorithm.clip_eps
    loss = 0.0
    for b in range(len(logprobs)):
        length = int(item.mask[b].sum())
        steps = [t for t in range(logprobs.shape[1]) if item.mask[b, t] and logprobs[b, t] > -math.inf]
        moved = {t: logprobs[b, t].item() - item.anchor_logprobs[b, t].item() for t in steps}
        for t in steps:
            of_whole = algorithm.policy_loss == "gspo"
            ratio = math.exp(sum(moved.values()) / len(steps) if of_whole else moved[t])
            advantage, inside = item.advantages[b, t].item(), min(max(ratio, 1 - low), 1 + high)
            policy = -min(ratio * advantage, inside * advantage)
            if algorithm.dual_clip is not None and advantage < 0:
                policy = min(policy, -algorithm.dual_clip * advantage)
            if algorithm.policy_loss == "cispo":
                policy = -inside * advantage * logprobs[b, t].item()
            d = logprobs[b, t].item() - item.evaluation.ref_logprobs[b, t].item()
            kl = {"k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[algorithm.kl_loss_estimator]
            whole = item.importance[b, t].item() * policy
            whole += algorithm.kl_loss_coef * kl - algorithm.entropy_coef * entropy[b, t].item()
            divisors = {"token": total.tokens, "sequence": total.sequences * length}
            loss += whole / divisors.get(algorithm.loss_aggregation, total.sequences * BUDGET)
    return loss


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize(("aggregation", "more"), VARIANTS, ids=str)
def test_the_loss_equals_a_slow_loop(aggregation: str, more: dict[str, Any], gone: bool, estimator: str) -> None:
    """Also if tokens, and a whole response, have left what top-k and top-p keep. (PPO details 8)"""
    algorithm = AlgorithmConfig(loss_aggregation=aggregation, kl_loss_estimator=estimator, **EVERY, **more)
    logprobs, entropy, item = case()
    if gone:
        logprobs[0, 3] = logprobs[1, 0] = logprobs[3] = -math.inf
    for total in (counts(item), Counts(100.0, 17.0)):  # the second: other micro-batches have the rest
        terms = PolicyObjective(algorithm, budget=BUDGET)(logprobs, entropy, item, total)
        assert terms.loss_sum.item() == pytest.approx(slow_loss(algorithm, logprobs, entropy, item, total), rel=1e-6)
        assert terms.stats["outside"].item() == (4 if gone else 0)


@pytest.mark.parametrize("more", POLICY_LOSSES[:3], ids=str)
def test_the_gradient_equals_finite_differences_with_clips_holes_and_weights(more: dict[str, Any]) -> None:
    algorithm = AlgorithmConfig(loss_aggregation="sequence", **EVERY, **more)
    objective = PolicyObjective(algorithm, budget=BUDGET)
    logprobs, entropy, item = case()

    def loss(*inputs: Tensor) -> Tensor:
        return objective(inputs[0], inputs[1], item, counts(item)).loss_sum

    assert torch.autograd.gradcheck(loss, (logprobs.requires_grad_(), entropy.requires_grad_()))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_what_stands_outside_the_mask_changes_neither_loss_nor_gradient_nor_statistics(estimator: str) -> None:
    objective = PolicyObjective(AlgorithmConfig(kl_loss_estimator=estimator, **EVERY), budget=BUDGET)
    logprobs, entropy, item = case()
    fields = (item.anchor_logprobs, item.evaluation.ref_logprobs, item.importance, item.advantages)
    results = []
    for fill in (0.0, math.nan, -math.inf):
        dirty = experience(item.mask, *(x.masked_fill(~item.mask, fill) for x in fields))
        leaves = [x.masked_fill(~item.mask, fill).requires_grad_() for x in (logprobs, entropy)]
        terms = objective(leaves[0], leaves[1], dirty, counts(item))
        terms.loss_sum.backward()
        gradients = [leaf.grad.tolist() for leaf in leaves if leaf.grad is not None]
        results.append((terms.loss_sum.item(), {k: float(v) for k, v in terms.stats.items()}, gradients))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_no_nan_reaches_the_logits_of_a_token_that_top_k_removed(estimator: str) -> None:
    logits = random(5, 6, seed=6).float().requires_grad_()
    worst, best = logits.detach().argmin(-1), logits.detach().argmax(-1)
    tokens = torch.where(torch.arange(5) < 3, worst, best)
    logprobs = token_logprobs(logits, tokens, SampledFrom(top_k=3)).view(1, 5)
    ones = torch.ones(1, 5)
    item = experience(ones.bool(), -ones, -ones, ones, ones)
    objective = PolicyObjective(AlgorithmConfig(kl_loss_estimator=estimator, **EVERY), budget=BUDGET)
    terms = objective(logprobs, ones, item, Counts(5.0, 1.0))
    terms.loss_sum.backward()
    assert terms.stats["outside"].item() == 3
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:3].any()
    assert logits.grad[3:].any()
