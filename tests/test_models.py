"""learner.models: the wrappers against the Hugging Face models that they are around. Several seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conf.schema import ConfigError
from learner import models
from learner.distribution import SampledFrom
from learner.experience import Batch, collate
from learner.models import PolicyModel, PolicyOutput
from learner.packing import FlatStates
from tests.batches import random_rollouts, scored
from tests.tiny_models import FAMILIES, VOCAB_SIZE, tiny_checkpoint, tiny_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: str(tiny_checkpoint(folder / family, family)) for family in FAMILIES}


def batch_of_rollouts() -> Batch:
    return collate(random_rollouts(5, seed=0))


def places(batch: Batch) -> list[tuple[int, int]]:
    return [(row, t) for row, t in batch.mask.nonzero().tolist()]


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_entropy_of_every_token_that_the_policy_wrote(
    folders: dict[str, str], family: str, attention: str
) -> None:
    """Of softmax(logits / temperature), row by row without padding. (PPO details 5)"""
    wrapped = models.load_causal_lm(folders[family], attn_implementation=attention)
    model = models.load_causal_lm(folders[family], attn_implementation="sdpa")
    rollouts = random_rollouts(5, seed=0)
    batch = collate(rollouts)
    with torch.no_grad():
        packed = PolicyModel(wrapped)(batch, sampled_from=SampledFrom(0.7), with_entropy=True)
        output = PolicyOutput.of(packed)
        assert packed.dtype == torch.float32
        for row, one in enumerate(rollouts):
            tokens = [*one.rollout.prompt.token_ids.tolist(), *one.rollout.response_ids.tolist()]
            start = len(one.rollout.prompt.token_ids)
            logprobs = torch.log_softmax(model(input_ids=torch.tensor([tokens])).logits[0].double() / 0.7, -1)
            for t in range(batch.mask.shape[1]):
                if not batch.mask[row, t]:
                    assert float(output.logprobs[row, t]) == float(output.entropy[row, t]) == 0.0
                    continue
                of_token = logprobs[start + t - 1]
                assert float(output.logprobs[row, t]) == pytest.approx(float(of_token[tokens[start + t]]), abs=1e-4)
                entropy = -float((of_token.exp() * of_token).sum())
                assert float(output.entropy[row, t]) == pytest.approx(entropy, abs=1e-4)


def test_what_was_not_asked_for_is_zero(folders: dict[str, str]) -> None:
    batch = batch_of_rollouts()
    model = models.load_causal_lm(folders["llama"], attn_implementation="sdpa")
    output = PolicyOutput.of(PolicyModel(model)(batch, sampled_from=SampledFrom()))
    assert output.logprobs[batch.mask].all()
    for zero in (output.entropy, output.values, output.final_values):
        assert not zero.any()
    assert output.logprobs.shape == output.entropy.shape == output.values.shape == batch.mask.shape
    assert output.final_values.shape == batch.scores.shape


def test_a_mask_without_tokens_gives_zeros_and_a_gradient_of_zero(folders: dict[str, str]) -> None:
    blank = collate([scored([5, 6], [7, 8], mask=[False, False])])
    model = models.load_causal_lm(folders["llama"], attn_implementation="sdpa")
    packed = PolicyModel(model)(blank, sampled_from=SampledFrom(), with_entropy=True)
    packed.sum().backward()
    assert not packed.any()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_values_stand_where_their_states_do() -> None:
    class First(nn.Module):
        """The first number of a state is its value."""

        def forward(self, states: Tensor) -> Tensor:
            return states[:, :1]

    batch = collate([scored([5, 6, 7], [8, 9]), scored([1], [2, 3, 4], mask=[True, False, True])])
    hidden = torch.arange(10.0).view(2, 5, 1).repeat(1, 1, 3)  # a state's value is where it stands, plus 5 a row
    values = models.head_values(First(), FlatStates(hidden.flatten(0, 1), torch.tensor([0, 5])), batch)
    assert values.tolist() == [[2, 3, 0, 4], [5, 0, 7, 8]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_value_head_and_a_critic_of_its_own_say_the_values_of_the_last_states(
    folders: dict[str, str], family: str
) -> None:
    batch = batch_of_rollouts()
    torch.manual_seed(0)
    critic = models.load_scalar_model(folders[family], attn_implementation="sdpa")
    language_model = models.load_causal_lm(folders[family], attn_implementation="sdpa")
    head = models.new_value_head(language_model)
    with torch.no_grad():
        head.weight.normal_()
        own = models.CriticModel(critic)(batch)
        shared = PolicyOutput.of(PolicyModel(language_model, value_head=head)(batch, sampled_from=SampledFrom()))
        hidden = language_model(batch.token_ids, output_hidden_states=True).hidden_states[-1]
        for row, t in places(batch):
            state = hidden[row, batch.state_index[row, t]]
            assert float(own[row, t]) == pytest.approx(float(critic.score(state)), abs=1e-4)
            assert float(shared.values[row, t]) == pytest.approx(float(head(state)), abs=1e-4)
        for row, last in enumerate(batch.final_index.tolist()):
            assert float(own[row, -1]) == pytest.approx(float(critic.score(hidden[row, last])), abs=1e-4)
            assert float(shared.final_values[row]) == pytest.approx(float(head(hidden[row, last])), abs=1e-4)


def test_a_new_value_head_begins_at_zero_and_learns_from_the_first_step(folders: dict[str, str]) -> None:
    model = models.load_causal_lm(folders["llama"], attn_implementation="sdpa")
    head = models.new_value_head(model)
    batch = batch_of_rollouts()
    output = PolicyOutput.of(PolicyModel(model, value_head=head)(batch, sampled_from=SampledFrom()))
    assert not output.values.any()
    assert not output.final_values.any()
    (output.values[batch.mask] - 1).square().sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("load", [models.load_causal_lm, models.load_scalar_model])
def test_dropout_is_off_even_in_training(load: Any, family: str, tmp_path: Path) -> None:
    """So the ratio is 1 before the first update. (PPO details 11)"""
    config = tiny_config(family)
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.5)
    folder = tiny_checkpoint(tmp_path, family)
    config.save_pretrained(folder)
    model = load(str(folder), attn_implementation="sdpa").train()
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    ids = batch_of_rollouts().token_ids
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", models.LOGIT_CHANGES)
def test_architectures_that_change_their_logits_are_refused(name: str, tmp_path: Path) -> None:
    config = tiny_config("llama")
    setattr(config, name, 30.0)
    config.save_pretrained(tiny_checkpoint(tmp_path))
    with pytest.raises(ConfigError, match=name):
        models.load_causal_lm(str(tmp_path), attn_implementation="sdpa")
    with pytest.raises(ConfigError, match=name):
        models.initial_causal_lm(str(tmp_path), seed=0, attn_implementation="sdpa")


def test_random_weights_follow_from_the_seed(tmp_path: Path) -> None:
    tiny_config("qwen2").save_pretrained(tmp_path)
    one, again, other = (
        models.initial_causal_lm(str(tmp_path), seed=seed, attn_implementation="sdpa").state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert one["model.embed_tokens.weight"].shape[0] == VOCAB_SIZE


def test_dropout_is_off_in_the_text_part_of_a_config_and_under_every_name() -> None:
    """(PPO details 11)"""
    from transformers import Gemma3Config, OPTConfig

    nested = models.without_dropout(Gemma3Config(text_config={"attention_dropout": 0.1}))
    assert nested.text_config.attention_dropout == 0.0
    assert models.without_dropout(OPTConfig(layerdrop=0.1)).layerdrop == 0.0
