"""learner.objective: what the settings put together, by hand and by finite differences. A second."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import AlgorithmConfig
from learner.experience import Experience, collate
from learner.objective import Counts, PolicyObjective, make_policy_loss
from learner.ppo import LossTerms
from tests.batches import cut_up, evaluated, experience, random_rollouts, scored, tensor

WHOLE = Counts(3.0, 2.0)


def objective(**changes: Any) -> PolicyObjective:
    return PolicyObjective(AlgorithmConfig(**changes), budget=10)


def two_responses(**given: Tensor) -> Experience:
    """Two tokens and one, advantages 1, 1 and -2, old log-probabilities -1, those of the reference -1.5."""
    batch = collate([scored([1], [2, 3]), scored([1], [2])])
    seen = evaluated(batch, old=tensor([[-1, -1], [-1]]), ref=tensor([[-1.5, -1.5], [-1.5]]))
    return experience(batch, seen, **{"advantages": tensor([[1, 1], [-2]]), **given})


def value(terms: LossTerms) -> float:
    return float(terms.loss_sum.detach())


# By hand


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token", -(1.1 + 0.9 - 2 * 1.0) / 3),
        ("sequence", -((1.1 + 0.9) / 2 - 2 * 1.0) / 2),
        ("constant", -(1.1 + 0.9 - 2 * 1.0) / 20),
    ],
)
def test_the_loss_by_hand(aggregation: str, expected: float) -> None:
    logprobs = tensor([[math.log(1.1) - 1, math.log(0.9) - 1], [-1]])
    terms = objective(loss_aggregation=aggregation)(logprobs, torch.zeros(2, 2), two_responses(), WHOLE)
    assert value(terms) == pytest.approx(expected, abs=1e-6)
    assert float(terms.stats["policy_loss"]) == value(terms)
    assert float(terms.stats["ratio"]) == pytest.approx(3.0, abs=1e-6)
    assert float(terms.stats["approx_kl"]) == pytest.approx(-math.log(1.1) - math.log(0.9), abs=1e-6)


def test_importance_entropy_and_kl_by_hand() -> None:
    logprobs, entropy = tensor([[-1, -1], [-1]]), tensor([[0.3, 0.6], [0.9]])
    plain = value(objective()(logprobs, entropy, two_responses(), WHOLE))
    assert plain == pytest.approx(0.0, abs=1e-6)
    weighed = objective()(logprobs, entropy, two_responses(importance=tensor([[2.0, 0.5], [0.25]])), WHOLE)
    assert value(weighed) == pytest.approx(-(2.0 + 0.5 - 0.5) / 3, abs=1e-6)
    bonus = objective(entropy_coef=0.1)(logprobs, entropy, two_responses(), WHOLE)
    assert value(bonus) == pytest.approx(-0.1 * 1.8 / 3, abs=1e-6)
    for estimator, kl in (("k2", 0.125), ("k3", math.exp(-0.5) - 1 + 0.5)):
        beside = objective(kl_loss_coef=0.2, kl_loss_estimator=estimator)
        terms = beside(logprobs, entropy, two_responses(), WHOLE)
        assert value(terms) == pytest.approx(0.2 * kl, abs=1e-6)
        assert float(terms.stats["kl_loss"]) == pytest.approx(kl, abs=1e-6)
        assert set(terms.stats) == set(beside.statistics)
    assert set(weighed.stats) == set(objective().statistics)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_entropy_and_kl_are_added_up_as_the_policy_loss_is(aggregation: str) -> None:
    per = {"token": [1 / 3, 1 / 3, 1 / 3], "sequence": [0.25, 0.25, 0.5], "constant": [0.05, 0.05, 0.05]}[aggregation]
    entropy = tensor([[0.3, 0.6], [0.9]])
    terms = objective(loss_aggregation=aggregation, entropy_coef=1.0, kl_loss_coef=1.0, kl_loss_estimator="k2")(
        tensor([[-1, -0.5], [0.5]]), entropy, two_responses(advantages=torch.zeros(2, 2)), WHOLE
    )
    kl = [0.125, 0.5, 2.0]
    expected = sum(w * (k - h) for w, k, h in zip(per, kl, [0.3, 0.6, 0.9], strict=True))
    assert value(terms) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "ratio", "advantage", "expected"),
    [
        ({"clip_eps": 0.1}, 2.0, 1.0, -1.1),
        ({"clip_eps": 0.1, "clip_eps_high": 0.5}, 2.0, 1.0, -1.5),
        ({"clip_eps": 0.1, "clip_eps_high": 0.5}, 0.5, -1.0, 0.9),
        ({"dual_clip": 3.0}, 5.0, -1.0, 3.0),
        ({"policy_loss": "gspo", "loss_aggregation": "sequence", "clip_eps": 0.1}, 2.0, 1.0, -1.1),
        ({"policy_loss": "cispo", "clip_eps": 0.1, "clip_eps_high": 0.5}, 2.0, 1.0, -1.5 * math.log(2.0)),
    ],
)
def test_the_settings_of_the_clip_reach_the_loss(
    settings: dict[str, Any], ratio: float, advantage: float, expected: float
) -> None:
    loss = make_policy_loss(AlgorithmConfig(**settings))
    token = loss(tensor([[math.log(ratio)]]), tensor([[0.0]]), tensor([[advantage]]), torch.tensor([[True]]))
    assert float(token.loss) == pytest.approx(expected, abs=1e-6)


# What is outside

EVERY = {"entropy_coef": 0.1, "kl_loss_coef": 0.2, "kl_loss_estimator": "k2"}


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
def test_a_token_that_left_what_top_k_keeps_adds_nothing_and_is_counted(loss: str) -> None:
    """Neither to the loss nor to the gradient; it stays in what the loss is divided by. (PPO details 5)"""
    of = objective(policy_loss=loss, loss_aggregation="sequence", **EVERY)
    logprobs = tensor([[-0.9, -math.inf], [-1.2]]).requires_grad_()
    entropy = tensor([[0.3, 0.6], [0.9]]).requires_grad_()
    terms = of(logprobs, entropy, two_responses(), WHOLE)
    terms.loss_sum.backward()
    assert logprobs.grad is not None
    assert torch.isfinite(logprobs.grad).all()
    assert float(logprobs.grad[0, 1]) == 0.0
    assert float(terms.stats["outside"]) == 1
    assert float(terms.stats["ratio"]) == pytest.approx(math.exp(0.1) + 1 + math.exp(-0.2), abs=1e-6)
    of_policy = {"cispo": (0.9 * math.exp(0.1), -2.4 * math.exp(-0.2))}.get(loss, (-math.exp(0.1), 2 * math.exp(-0.2)))
    kl = (0.6**2 / 2, 0.3**2 / 2)
    expected = sum(
        weight * (policy - 0.1 * h + 0.2 * k)
        for weight, policy, h, k in zip((0.25, 0.5), of_policy, (0.3, 0.9), kl, strict=True)
    )
    assert value(terms) == pytest.approx(expected, abs=1e-6)


def test_a_log_probability_that_is_not_a_number_is_seen_in_the_loss() -> None:
    terms = objective()(tensor([[math.nan, -1], [-1]]), torch.zeros(2, 2), two_responses(), WHOLE)
    assert math.isnan(value(terms))
    assert float(terms.stats["outside"]) == 0


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
def test_a_micro_batch_without_a_token_in_the_losses_has_a_gradient_of_zero(loss: str) -> None:
    logprobs = tensor([[-0.9, -math.inf], [-1.2]]).requires_grad_()
    item = two_responses(mask=torch.zeros(2, 2, dtype=torch.bool))
    terms = objective(policy_loss=loss, loss_aggregation="sequence", **EVERY)(logprobs, torch.zeros(2, 2), item, WHOLE)
    terms.loss_sum.backward()
    assert value(terms) == 0.0
    assert logprobs.grad is not None
    assert not logprobs.grad.any()
    assert not any(float(stat) for stat in terms.stats.values())


# Properties


def items_of(sizes: list[int]) -> list[Experience]:
    items = []
    for batch in cut_up(random_rollouts(12, seed=2), sizes):
        seen = evaluated(batch, old=batch.rollout_logprobs, ref=batch.rollout_logprobs * 0.95)
        mask = batch.mask & (batch.response_ids % 7 != 0)
        items.append(experience(batch, seen, advantages=batch.rollout_logprobs + 4, mask=mask, importance=mask * 1.5))
    return items


@pytest.mark.parametrize(
    ("loss", "aggregation"),
    [(loss, how) for loss in ("clip", "cispo") for how in ("token", "sequence", "constant")] + [("gspo", "sequence")],
)
def test_neither_padding_nor_the_cut_into_micro_batches_changes_loss_or_gradient(loss: str, aggregation: str) -> None:
    """(PPO details 8)"""
    of = objective(policy_loss=loss, loss_aggregation=aggregation, **EVERY)
    masks = [item.mask for item in items_of([12])]
    counts = Counts(float(sum(mask.sum() for mask in masks)), float(sum(mask.any(-1).sum() for mask in masks)))

    def total(sizes: list[int]) -> tuple[float, float, float]:
        shift = torch.tensor(0.05, requires_grad=True)
        loss_sum, clipped = torch.zeros(()), 0.0
        for item in items_of(sizes):
            old = item.anchor_logprobs
            terms = of(old + shift * (old + 4), old * shift, item, counts)
            loss_sum = loss_sum + terms.loss_sum
            clipped += float(terms.stats["clipfrac"])
        loss_sum.backward()
        assert shift.grad is not None
        return float(loss_sum.detach()), float(shift.grad), clipped

    whole = total([12])
    assert abs(whole[1]) > 1e-3
    for sizes in ([1] * 12, [5, 7], [3, 4, 5]):
        assert total(sizes) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_gradient_equals_finite_differences(estimator: str) -> None:
    algorithm = AlgorithmConfig(entropy_coef=0.3, kl_loss_coef=0.4, kl_loss_estimator=estimator)
    of, item = PolicyObjective(algorithm, budget=10), two_responses()
    ref = item.evaluation.ref_logprobs.double()
    item = replace(
        item,
        evaluation=replace(item.evaluation, ref_logprobs=ref),
        anchor_logprobs=item.anchor_logprobs.double(),
        advantages=item.advantages.double(),
        importance=item.importance.double() * 1.5,
    )

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return of(logprobs, entropy, item, WHOLE).loss_sum

    logprobs = tensor([[-0.9, -1.05], [-1.1]]).double().requires_grad_()
    entropy = tensor([[0.3, 0.6], [0.9]]).double().requires_grad_()
    torch.autograd.gradcheck(loss, (logprobs, entropy))
