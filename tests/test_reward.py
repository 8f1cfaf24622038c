"""Reward models against unbatched Hugging Face forwards of hand-written conversations, and their refusals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from actors.reward import FunctionReward, RewardModel, make_reward_source, token_batches
from actors.rollout import Prompt, Rollout
from conf.schema import ConfigError, RewardConfig

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<eos>", "<|user|>", "<|assistant|>", "<|system|>")
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")


def tiny_tokenizer(template: str | None = TEMPLATE, *, reverse: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges whose pad token is its EOS; `reverse` numbers the bytes the other way."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", extra_special_tokens=list(SPECIAL[1:])
    )
    fast.chat_template = template
    return fast


def tiny_config(family: str, *, num_labels: int = 1) -> PreTrainedConfig:
    shared: dict[str, Any] = {
        "vocab_size": 260,
        "num_labels": num_labels,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    shared["initializer_range"] = 0.3
    if family == "gpt2":
        return GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=96, **shared)
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 96}
    return kind(**sizes, **({"head_dim": 16} if family == "qwen3" else {}), **shared)


def save_reward_model(
    folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, auto: Any = None
) -> str:
    torch.manual_seed(3)
    (auto or AutoModelForSequenceClassification).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("reward")
    return {name: save_reward_model(root / name, tiny_config(name), tiny_tokenizer()) for name in FAMILIES}


def rollout(question: str, answer: str, *, finish: str = "stop", number: int = 0) -> Rollout:
    """A rollout whose token ids are those of no tokenizer: a reward source must read the text."""
    length = 3
    return Rollout(
        prompt=Prompt(
            id=number,
            token_ids=np.full(2, 999, np.int32),
            text=f"policy template: {question}",
            messages=({"role": "user", "content": question},),
            row={"number": number},
        ),
        sample=0,
        response_ids=np.full(length, 999, np.int32),
        rollout_logprobs=np.zeros(length, np.float32),
        response_mask=np.ones(length, np.bool_),
        policy_versions=np.zeros(length, np.int32),
        finish_reason=finish,
        text=answer,
    )


def closed_text(question: str, answer: str) -> str:
    return f"<|user|>{question}<eos>\n<|assistant|>{answer}<eos>\n"


def hf_score(path: str, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """The score of `text` alone by Hugging Face's own forward pass, read at the last token."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    model.config.pad_token_id = None  # or HF would look for the last token that is not EOS
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


DIALOGUES = [
    ("2+2?", "4"),
    ("Name a colour of the sky at noon.", "blue, mostly"),
    ("?", ""),
    ("Say a!", "aaaaaaaaaaaa"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_unbatched_hugging_face_forwards(family: str, checkpoints: dict[str, str]) -> None:
    model = RewardModel(checkpoints[family], RewardConfig(), device="cpu")
    scores = model.score([rollout(q, a, number=i) for i, (q, a) in enumerate(DIALOGUES)])
    expected = [hf_score(checkpoints[family], tiny_tokenizer(), closed_text(q, a)) for q, a in DIALOGUES]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert np.ptp(scores) > 0.1, "or the test could not tell one conversation from another"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_does_not_depend_on_its_batch(family: str, checkpoints: dict[str, str]) -> None:
    rollouts = [rollout("q" * (1 + 7 * i % 11), "a" * (1 + 5 * i % 13), number=i) for i in range(12)]
    alone = RewardModel(checkpoints[family], RewardConfig(max_batch_tokens=96), device="cpu")
    together = RewardModel(checkpoints[family], RewardConfig(max_batch_tokens=2000), device="cpu")
    one_by_one = [alone.score([one])[0] for one in rollouts]
    assert together.score(rollouts) == pytest.approx(one_by_one, abs=1e-5)
    assert together.score(rollouts[::-1])[::-1] == pytest.approx(one_by_one, abs=1e-5)
    assert alone.score(rollouts) == pytest.approx(one_by_one, abs=1e-5)
    assert alone.score([]) == []


def test_forward_passes_keep_to_the_token_budget(checkpoints: dict[str, str]) -> None:
    model = RewardModel(checkpoints["llama"], RewardConfig(max_batch_tokens=60), device="cpu")
    shapes: list[tuple[int, ...]] = []
    model.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.score([rollout("q" * n, "a") for n in (1, 20, 2, 30, 3)])
    # Seven tokens stand around each question: 37 | 27, 10 | 9, 8.
    assert shapes == [(1, 37), (2, 27), (2, 9)]


def test_token_batches_by_hand() -> None:
    assert list(token_batches([3, 10, 4, 4, 1], 12)) == [[1], [2, 3, 0], [4]]
    assert list(token_batches([5], 5)) == [[0]]
    assert list(token_batches([], 5)) == []


def test_an_own_tokenizer_and_template_read_the_text(tmp_path: Path) -> None:
    """A template without a generation prompt, as reward models have: a cut answer still has its header."""
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}<eos>{% endfor %}"
    other = tiny_tokenizer(template, reverse=True)
    path = save_reward_model(tmp_path / "other", tiny_config("qwen2"), other)
    model = RewardModel(path, RewardConfig(), device="cpu")
    scores = model.score([rollout("2+2?", "4"), rollout("2+2?", "4", finish="length")])
    texts = ["[user] 2+2?<eos>[assistant] 4<eos>", "[user] 2+2?<eos>[assistant] 4"]
    assert scores == pytest.approx([hf_score(path, other, text) for text in texts], abs=1e-5)
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)


def decoded(model: RewardModel, one: Rollout) -> str:
    return str(model.tokenizer.decode(model.render(one), clean_up_tokenization_spaces=False))


def test_a_cut_response_is_left_open(checkpoints: dict[str, str]) -> None:
    model = RewardModel(checkpoints["llama"], RewardConfig(), device="cpu")
    assert decoded(model, rollout("2+2?", "4")) == closed_text("2+2?", "4")
    cut = rollout("2+2?", "It is ", finish="length")
    assert decoded(model, cut) == "<|user|>2+2?<eos>\n<|assistant|>It is "
    expected = hf_score(model.path, tiny_tokenizer(), "<|user|>2+2?<eos>\n<|assistant|>It is ")
    assert model.score([cut]) == pytest.approx([expected], abs=1e-5)
    empty = rollout("2+2?", "", finish="length")
    assert decoded(model, empty) == "<|user|>2+2?<eos>\n<|assistant|>"


@pytest.mark.parametrize("has_template", [True, False])
def test_without_a_template_the_text_is_prompt_response_eos(tmp_path: Path, has_template: bool) -> None:
    path = save_reward_model(
        tmp_path / "plain", tiny_config("gpt2"), tiny_tokenizer(TEMPLATE if has_template else None)
    )
    model = RewardModel(path, RewardConfig(chat_template=False if has_template else None), device="cpu")
    assert decoded(model, rollout("2+2=", "4")) == "2+2=4<eos>"
    assert decoded(model, rollout("2+2=", "4", finish="length")) == "2+2=4"
    expected = hf_score(path, tiny_tokenizer(), "2+2=4<eos>")
    assert model.score([rollout("2+2=", "4")]) == pytest.approx([expected], abs=1e-5)


def test_bfloat16_keeps_the_head_in_float32(checkpoints: dict[str, str]) -> None:
    model = RewardModel(checkpoints["qwen3"], RewardConfig(dtype="bfloat16"), device="cpu")
    assert {p.dtype for p in model.model.base_model.parameters()} == {torch.bfloat16}
    assert model.model.score.weight.dtype == torch.float32
    exact = RewardModel(checkpoints["qwen3"], RewardConfig(), device="cpu")
    rollouts = [rollout(q, a) for q, a in DIALOGUES]
    assert model.score(rollouts) == pytest.approx(exact.score(rollouts), abs=0.15)
    assert model.score(rollouts) != exact.score(rollouts)


def test_the_model_neither_trains_nor_drops(checkpoints: dict[str, str]) -> None:
    model = RewardModel(checkpoints["gpt2"], RewardConfig(), device="cpu")
    assert AutoConfig.from_pretrained(checkpoints["gpt2"]).resid_pdrop > 0
    assert not any(module.training for module in model.model.modules())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def refused(path: str, config: RewardConfig | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        RewardModel(path, config or RewardConfig(path=path), device="cpu")
    assert caught.value.key.startswith("reward.")
    return str(caught.value)


def test_checkpoints_that_cannot_score_are_refused(tmp_path: Path) -> None:
    two = save_reward_model(tmp_path / "two", tiny_config("llama", num_labels=2), tiny_tokenizer())
    assert refused(two).startswith("reward.path=")
    assert "2 labels" in refused(two)

    policy = save_reward_model(tmp_path / "policy", tiny_config("llama"), tiny_tokenizer(), AutoModelForCausalLM)
    assert "score.weight" in refused(policy)

    bert = BertConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, num_labels=1
    )
    assert "no `score` head" in refused(save_reward_model(tmp_path / "bert", bert, tiny_tokenizer()))

    plain = save_reward_model(tmp_path / "plain", tiny_config("llama"), tiny_tokenizer(None))
    assert "reward.chat_template=True" in refused(plain, RewardConfig(path=plain, chat_template=True))

    endless = tiny_tokenizer(None)
    endless.eos_token = None
    assert "neither a chat template nor an EOS" in refused(
        save_reward_model(tmp_path / "endless", tiny_config("llama"), endless)
    )

    assert "is not a Hugging Face checkpoint" in refused(str(tmp_path / "nowhere"))


def test_a_token_that_the_embedding_lacks_is_refused(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.vocab_size = 50
    model = RewardModel(save_reward_model(tmp_path, config, tiny_tokenizer()), RewardConfig(), device="cpu")
    with pytest.raises(ConfigError, match=r"^reward\.path=.* its tokenizer gives token \d+, its embedding has 50 rows"):
        model.score([rollout("b", "b")])


def test_a_conversation_that_does_not_fit_is_named(checkpoints: dict[str, str]) -> None:
    model = RewardModel(checkpoints["llama"], RewardConfig(), device="cpu")
    with pytest.raises(ValueError, match=r"prompt 7, sample 0, has 106 tokens .* context is 96"):
        model.score([rollout("fits", "a"), rollout("q" * 99, "a", number=7)])
    narrow = RewardModel(checkpoints["llama"], RewardConfig(max_batch_tokens=20), device="cpu")
    with pytest.raises(ConfigError, match=r"reward.max_batch_tokens=20: .* prompt 8, sample 0, has 37 tokens"):
        narrow.score([rollout("q" * 30, "a", number=8)])


def test_a_score_of_a_model_that_is_not_finite_stops(checkpoints: dict[str, str]) -> None:
    model = RewardModel(checkpoints["llama"], RewardConfig(), device="cpu")
    model.model.score.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"reward model .*llama returned nan at position 0 \(prompt 5, sample 0\)"):
        model.score([rollout("2+2?", "4", number=5)])


def test_the_settings_name_one_source(checkpoints: dict[str, str]) -> None:
    path, function = checkpoints["llama"], "tests.test_reward_function:length_reward"
    make: Callable[..., object] = make_reward_source
    assert isinstance(make(RewardConfig(function=function), device="cpu"), FunctionReward)
    made = make(RewardConfig(path="unused"), path=path, device="cpu")
    assert isinstance(made, RewardModel)
    assert made.path == path
    assert isinstance(make(RewardConfig(path=path), device="cpu"), RewardModel)
    with pytest.raises(ConfigError, match=r"reward\.path=None"):
        make(RewardConfig(), device="cpu")
    with pytest.raises(ConfigError, match=r"reward.function=.* scores already"):
        make(dataclasses.replace(RewardConfig(), function=function), path=path, device="cpu")
