"""learner.critics: the three kinds and their loss, by hand. A second; tests/test_learner.py trains with each."""

from __future__ import annotations

import math

import pytest
import torch

from learner.critics import STATISTICS, Critic, SeparateCritic, SharedCritic, value_loss
from learner.experience import Batch, Experience, collate
from learner.models import PolicyOutput
from tests.batches import evaluated, experience, scored, tensor


def item() -> Experience:
    """Old values 1, 2 and 3, returns 2, 2 and 0; the second token of the first response is in no loss."""
    batch = collate([scored([1], [2, 3]), scored([1], [2])])
    return experience(
        batch,
        evaluated(batch, values=tensor([[1, 2], [3]])),
        returns=tensor([[2, 2], [0]]),
        mask=torch.tensor([[True, False], [True, False]]),
    )


def output(values: list[list[float]]) -> PolicyOutput:
    zeros = torch.zeros(2, 2)
    return PolicyOutput(zeros, zeros, tensor(values).requires_grad_(), torch.tensor([7.0, 8.0]))


def test_value_loss_by_hand() -> None:
    values = tensor([[1.5, math.nan], [2.0]]).requires_grad_()
    plain = value_loss(values, item(), None)
    assert float(plain.loss_sum) == pytest.approx((0.5**2 + 2.0**2) / 2)
    assert {name: float(value) for name, value in plain.stats.items()} == {
        "critic_loss": float(plain.loss_sum),
        "critic_clipfrac": 0.0,
    }
    clipped = value_loss(values, item(), 0.2)  # 1.5 -> 1.2, 2.0 -> 2.8
    assert float(clipped.loss_sum) == pytest.approx((0.8**2 + 2.8**2) / 2)
    assert float(clipped.stats["critic_clipfrac"]) == 2
    plain.loss_sum.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[-0.5, 0.0], [2.0, 0.0]]


def test_a_shared_critic_takes_its_values_and_its_loss_from_the_policy() -> None:
    critic = SharedCritic(None, value_clip_eps=None, value_coef=0.1)
    said = output([[1.5, 9.0], [2.0]])
    values = critic.values(item().batch, said)
    assert values.tokens is said.values
    assert values.final.tolist() == [7.0, 8.0]
    terms = critic.loss_beside_policy(said, item(), tokens=8.0)
    assert float(terms.loss_sum) == pytest.approx(0.1 * (0.5**2 + 2.0**2) / 2 / 8)
    assert float(terms.stats["critic_loss"]) == pytest.approx((0.5**2 + 2.0**2) / 2), "not multiplied"
    assert critic.learn([item(), None], 8.0) == {}
    assert critic.engine is None
    assert set(terms.stats) == set(critic.statistics) == set(STATISTICS)


def test_a_separate_critic_says_the_values_of_its_own_network() -> None:
    def network(batch: Batch) -> torch.Tensor:
        return batch.response_ids.new_tensor([[1, 2, 3], [4, 5, 6]]).float()

    critic = SeparateCritic(network, value_clip_eps=None)
    said = output([[9.0, 9.0], [9.0]])
    values = critic.values(item().batch, said)
    assert values.tokens.tolist() == [[1, 2], [4, 5]]
    assert values.final.tolist() == [3, 6]
    assert critic.engine is network
    assert critic.loss_beside_policy(said, item(), 8.0) is None


def test_without_a_critic_there_are_no_values_and_nothing_is_learnt() -> None:
    critic, said = Critic(), output([[1.0, 1.0], [1.0]])
    assert critic.values(item().batch, said) is None
    assert critic.loss_beside_policy(said, item(), 8.0) is None
    assert critic.learn([item(), None], 8.0) == {}
    assert critic.engine is None
    assert critic.statistics == ()
