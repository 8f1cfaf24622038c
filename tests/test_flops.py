"""How many operations a pass takes, beside torch's own counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from learner import models
from learner.costs import Costs, PassCost, passes_flops
from learner.flops import matrix_rate
from tests.tiny_models import FAMILIES, tiny_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_costs_what_torch_counts(family: str, tmp_path: Path) -> None:
    """Torch counts attention as if there were no causality: a token attends to all L, not to (L + 1) / 2."""
    model = models.load_causal_lm(str(tiny_checkpoint(tmp_path, family)), attn_implementation="eager")
    cost = PassCost.of(model, model.get_output_embeddings())
    length, rows = 12, 3
    ids = torch.randint(4, 200, (rows, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    whole = rows * 4 * cost.attention * length**2
    causal = rows * 4 * cost.attention * length * (length + 1) / 2
    forward = cost.forward([length] * rows, rows * length)
    # The gradient of the embeddings needs no product, and no gradient flows into what came before them.
    assert counter.get_total_flops() == pytest.approx(3 * (forward - causal + whole), rel=0.02)
    assert cost.training([length] * rows, rows * length) == 3 * forward


def test_a_cost_by_hand() -> None:
    """Sequences of 2 and 3 tokens: 5 tokens, 3 + 6 pairs that attend."""
    cost = PassCost(body=100, head=10, attention=7)
    assert cost.forward([2, 3], 4) == 2 * 100 * 5 + 2 * 10 * 4 + 4 * 7 * (3 + 6)


def test_an_update_runs_each_network_once_and_trains_two() -> None:
    policy, critic = PassCost(100, 10, 0), PassCost(50, 0, 0)
    of_policy, of_critic = policy.forward([4], 2), critic.forward([4], 2)
    both = passes_flops(Costs(policy, critic), [4], 2, epochs=2, train_policy=True)
    assert both == (1 + 1 + 2 * 3) * of_policy + (1 + 2 * 3) * of_critic
    assert passes_flops(Costs(policy, critic), [4], 2, epochs=2, train_policy=False) == 2 * of_policy + 7 * of_critic
    assert passes_flops(Costs(policy, None), [4], 2, epochs=1, train_policy=True) == 5 * of_policy


def test_the_rate_of_this_device_is_measured_and_no_random_state_touched() -> None:
    before = torch.get_rng_state()
    assert matrix_rate(torch.device("cpu"), torch.float32, repeats=1) > 1e8
    assert torch.equal(torch.get_rng_state(), before)
