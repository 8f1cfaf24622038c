"""Sequences in one row without padding: each is read as if it stood alone. Several seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conf.schema import ConfigError
from learner import models, sequence_groups
from learner.attention import PACKED, packed_attention, register
from learner.batching import micro_batches
from learner.distribution import SampledFrom, logprobs_and_entropy
from learner.experience import collate
from learner.models import PolicyModel, PolicyOutput
from learner.packing import VocabularyHead, flat_states
from tests.batches import random_rollouts
from tests.tiny_models import FAMILIES, tiny_checkpoint

LENGTHS = torch.tensor([9, 9, 9, 6, 6, 1])  # runs of equal lengths and one by itself


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: str(tiny_checkpoint(folder / family, family)) for family in FAMILIES}


def sequences() -> Tensor:
    ids = torch.randint(4, 200, (len(LENGTHS), int(LENGTHS.max())), generator=torch.Generator().manual_seed(0))
    return ids.masked_fill(torch.arange(ids.shape[1]) >= LENGTHS[:, None], 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("load", [models.load_causal_lm, models.load_scalar_model])
def test_states_are_those_of_each_sequence_by_itself(folders: dict[str, str], family: str, load: Any) -> None:
    model = load(folders[family], attn_implementation=PACKED)
    alone = load(folders[family], attn_implementation="eager")
    ids = sequences()
    with torch.no_grad():
        flat = flat_states(model, ids, LENGTHS)
        states, starts = flat.hidden, flat.starts
        assert states.shape[0] == int(LENGTHS.sum())
        assert starts.tolist() == [0, 9, 18, 27, 33, 39]
        for row, (start, length) in enumerate(zip(starts.tolist(), LENGTHS.tolist(), strict=True)):
            expected = alone.base_model(ids[row, :length][None]).last_hidden_state[0]
            torch.testing.assert_close(states[start : start + length], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_padded_batches(folders: dict[str, str], family: str, checkpointing: bool) -> None:
    batch = collate(random_rollouts(6, seed=1))
    gradients = []
    for attention in (PACKED, "sdpa"):
        model = models.load_causal_lm(folders[family], attn_implementation=attention).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        output = PolicyOutput.of(PolicyModel(model)(batch, sampled_from=SampledFrom(0.8), with_entropy=True))
        (output.logprobs.sum() + 0.1 * output.entropy.sum()).backward()
        gradients.append({name: one.grad for name, one in model.named_parameters()})
    for name, one in gradients[0].items():
        torch.testing.assert_close(one, gradients[1][name], atol=2e-5, rtol=1e-3, msg=name)


def test_heads_that_ranks_cannot_share_are_refused(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_groups, "_formed", sequence_groups.SequenceGroup(3, 0, None, None))
    with pytest.raises(ConfigError, match=r"learner.sequence_parallel_size=3: .* has 2 heads and 1 for keys"):
        models.load_causal_lm(folders["llama"], attn_implementation=PACKED)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {"full_attention": {"rope_type": "longrope", "rope_theta": 1e4}, "sliding_attention": {"rope_type": "default"}},
    ],
)
def test_positions_that_change_with_the_longest_are_not_shared(
    parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=4)
    monkeypatch.setattr(sequence_groups, "_formed", sequence_groups.SequenceGroup(2, 0, None, None))
    sequence_groups.check_shareable(config, "a model")
    config.rope_parameters = parameters
    with pytest.raises(ConfigError, match=r"rotary embeddings of a model are (dynamic|longrope)"):
        sequence_groups.check_shareable(config, "a model")


def test_no_sequence_sees_another(folders: dict[str, str]) -> None:
    model = models.load_causal_lm(folders["llama"], attn_implementation=PACKED)
    ids = sequences()
    changed = ids.clone()
    changed[3, :6] = 7
    with torch.no_grad():
        one, other = (flat_states(model, either, LENGTHS) for either in (ids, changed))
    before, after, starts = one.hidden, other.hidden, one.starts
    same = torch.ones(len(before), dtype=torch.bool)
    same[starts[3] : starts[3] + 6] = False
    assert torch.equal(before[same], after[same])
    assert not torch.isclose(before[~same], after[~same]).all(-1).any()


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_attention_is_what_a_slow_loop_says(window: int | None, key_heads: int) -> None:
    generator = torch.Generator().manual_seed(2)
    total, heads, width = int(LENGTHS.sum()), 4, 8
    query = torch.randn(1, heads, total, width, generator=generator)
    key, value = (torch.randn(1, key_heads, total, width, generator=generator) for _ in range(2))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)]).int()
    attended, weights = packed_attention(
        nn.Identity(), query, key, value, None, scaling=0.3, sliding_window=window, cu_seq_lens_q=bounds, max_length_q=9
    )
    assert weights is None
    assert attended.shape == (1, total, heads, width)
    for begin, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        for head in range(heads):
            of_key = head * key_heads // heads
            for place in range(begin, end):
                first = begin if window is None else max(begin, place - window + 1)
                scores = 0.3 * query[0, head, place] @ key[0, of_key, first : place + 1].T
                expected = scores.softmax(-1) @ value[0, of_key, first : place + 1]
                torch.testing.assert_close(attended[0, place, head], expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_packed_is_said_and_not_computed_wrongly() -> None:
    one = torch.zeros(1, 1, 3, 4)
    bounds: dict[str, Any] = {"cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32), "max_length_q": 3}
    for named, why in (
        ({}, "the bounds of the sequences do not arrive"),
        (bounds | {"softcap": 30.0}, "softcap"),
        (bounds | {"dropout": 0.1}, "a mask or dropout"),
    ):
        with pytest.raises(NotImplementedError, match=rf"{why}.*set model\.attn_implementation=sdpa"):
            packed_attention(nn.Identity(), one, one, one, None, **named)


def own_attention() -> dict[str, Any]:
    """Architectures with attention of their own, or a state: seen to mix sequences without a word."""
    from transformers import BloomConfig, CodeGenConfig, MambaConfig

    return {
        "bloom": BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4),
        "codegen": CodeGenConfig(vocab_size=260, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
        "mamba": MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2),
    }


@pytest.mark.parametrize("family", ["bloom", "codegen", "mamba"])
def test_an_architecture_that_mixes_packed_sequences_is_refused(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(own_attention()[family]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.attn_implementation='packed'.*mixes sequences.*set it to sdpa"):
        models.load_causal_lm(str(tmp_path), attn_implementation=PACKED)
    if family != "mamba":
        models.load_causal_lm(str(tmp_path), attn_implementation="eager")


# The head in chunks ---------------------------------------------------------------------------------------------------


@contextmanager
def largest_saved() -> Iterator[list[int]]:
    """The number of elements of every tensor that is kept for the way back."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield sizes


def test_chunks_give_the_same_and_never_keep_the_logits_of_all() -> None:
    torch.manual_seed(0)
    num, width, vocabulary = 50, 16, 300
    states, ids = torch.randn(num, width), torch.randint(vocabulary, (num,))
    plain = nn.Linear(width, vocabulary)
    chunked = nn.Linear(width, vocabulary)
    chunked.load_state_dict(plain.state_dict())
    head = VocabularyHead.of(chunked, max_bytes=4 * vocabulary * 7)
    assert head is chunked
    assert list(head.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(head(states), plain(states))

    def say(logits: Tensor, of: Tensor) -> Tensor:
        assert len(logits) <= 7
        return logprobs_and_entropy(logits, of, SampledFrom(0.7), with_entropy=True)

    whole = states.clone().requires_grad_()
    expected = logprobs_and_entropy(plain(whole), ids, SampledFrom(0.7), with_entropy=True)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    parts = states.clone().requires_grad_()
    with largest_saved() as sizes:
        said = head(parts, say, ids)
    assert max(sizes) <= max(vocabulary * width, num * width)
    torch.testing.assert_close(said, expected)
    (said * weights).sum().backward()
    torch.testing.assert_close(parts.grad, whole.grad)
    torch.testing.assert_close(head.weight.grad, plain.weight.grad)
    torch.testing.assert_close(head.bias.grad, plain.bias.grad)
    with torch.no_grad():
        torch.testing.assert_close(head(states, say, ids), expected)


def test_micro_batches_without_padding_hold_as_many_tokens_as_they_may() -> None:
    lengths = [3, 10, 4, 4, 1]
    assert micro_batches(lengths, max_tokens=12, padded=False) == [[1], [2, 3, 0, 4]]
    assert micro_batches([50, 4, 50], max_tokens=12, padded=False) == [[0], [2], [1]]
    assert micro_batches([], max_tokens=12, padded=False) == []


def test_registering_twice_does_no_harm() -> None:
    register()
    register()
