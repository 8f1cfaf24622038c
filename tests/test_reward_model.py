"""Reward models against unbatched Hugging Face forwards of hand-written conversations, and their refusals.

About twelve seconds, most of them for importing transformers and peft.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
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

from actors.reward import Rewards, SourceError
from actors.reward_model import RewardModel, token_batches
from actors.reward_source import Fault
from actors.rollout import Rollout
from conf.schema import ConfigError, RewardConfig, RewardSourceConfig
from tests.reward_rollouts import rollout

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


KEY = "reward.sources[0]"


def load(path: str, *, device: str = "cpu", **settings: Any) -> RewardModel:
    return RewardModel(RewardSourceConfig(path=path, **settings), key=KEY, device=device)


def scores_of(model: RewardModel, rollouts: list[Rollout]) -> list[float]:
    """The scores of `rollouts`, of which none may be a fault."""
    answers = model.score(rollouts)
    assert not [answer for answer in answers if isinstance(answer, Fault)], answers
    return [float(answer) for answer in answers if not isinstance(answer, Fault)]


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
    model = load(checkpoints[family])
    scores = scores_of(model, [rollout(q, a, number=i) for i, (q, a) in enumerate(DIALOGUES)])
    expected = [hf_score(checkpoints[family], tiny_tokenizer(), closed_text(q, a)) for q, a in DIALOGUES]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert np.ptp(scores) > 0.1, "or the test could not tell one conversation from another"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_does_not_depend_on_its_batch(family: str, checkpoints: dict[str, str]) -> None:
    rollouts = [rollout("q" * (1 + 7 * i % 11), "a" * (1 + 5 * i % 13), number=i) for i in range(12)]
    alone = load(checkpoints[family], max_batch_tokens=96)
    together = load(checkpoints[family], max_batch_tokens=2000)
    one_by_one = [scores_of(alone, [one])[0] for one in rollouts]
    assert scores_of(together, rollouts) == pytest.approx(one_by_one, abs=1e-5)
    assert scores_of(together, rollouts[::-1])[::-1] == pytest.approx(one_by_one, abs=1e-5)
    assert scores_of(alone, rollouts) == pytest.approx(one_by_one, abs=1e-5)
    assert scores_of(alone, []) == []


def test_forward_passes_keep_to_the_token_budget(checkpoints: dict[str, str]) -> None:
    model = load(checkpoints["llama"], max_batch_tokens=60)
    shapes: list[tuple[int, ...]] = []
    model.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    scores_of(model, [rollout("q" * n, "a") for n in (1, 20, 2, 30, 3)])
    # Seven tokens stand around each question: 37 | 27, 10 | 9, 8.
    assert shapes == [(1, 37), (2, 27), (2, 9)]


def test_token_batches_by_hand() -> None:
    assert list(token_batches([3, 10, 4, 4, 1], 12)) == [[1], [2, 3, 0], [4]]
    assert list(token_batches([5], 5)) == [[0]]
    assert list(token_batches([], 5)) == []


def test_long_conversations_are_not_padded_with_short_ones() -> None:
    # 3 x 400 is enough. With a fourth of 200 an eighth of 1600 would be padding, with one of 199 more than that.
    assert list(token_batches([400, 400, 400, 200], 16_000)) == [[0, 1, 2, 3]]
    assert list(token_batches([400, 400, 400, 199], 16_000)) == [[0, 1, 2], [3]]
    assert list(token_batches([400, 400, 10], 16_000)) == [[0, 1, 2]], "two are not enough for a pass"
    lengths = [int(n) for n in np.random.default_rng(0).lognormal(4.0, 1.0, 500).clip(1, 600)]
    batches = list(token_batches(lengths, 4096))
    assert sorted(position for batch in batches for position in batch) == list(range(500))
    padded = [lengths[batch[0]] * len(batch) for batch in batches]
    assert max(padded) <= 4096
    assert sum(padded) < 1.15 * sum(lengths)


def test_an_own_tokenizer_and_template_read_the_text(tmp_path: Path) -> None:
    """A template without a generation prompt, as reward models have: a cut answer has its header (PPO details 14)."""
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}<eos>{% endfor %}"
    other = tiny_tokenizer(template, reverse=True)
    path = save_reward_model(tmp_path / "other", tiny_config("qwen2"), other)
    model = load(path)
    scores = scores_of(model, [rollout("2+2?", "4"), rollout("2+2?", "4", finish="length")])
    texts = ["[user] 2+2?<eos>[assistant] 4<eos>", "[user] 2+2?<eos>[assistant] 4"]
    assert scores == pytest.approx([hf_score(path, other, text) for text in texts], abs=1e-5)
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)


def decoded(model: RewardModel, one: Rollout) -> str:
    return str(
        model.conversations.tokenizer.decode(model.conversations.render(one), clean_up_tokenization_spaces=False)
    )


def test_a_cut_response_is_left_open(checkpoints: dict[str, str]) -> None:
    model = load(checkpoints["llama"])
    assert decoded(model, rollout("2+2?", "4")) == closed_text("2+2?", "4")
    cut = rollout("2+2?", "It is ", finish="length")
    assert decoded(model, cut) == "<|user|>2+2?<eos>\n<|assistant|>It is "
    expected = hf_score(checkpoints["llama"], tiny_tokenizer(), "<|user|>2+2?<eos>\n<|assistant|>It is ")
    assert scores_of(model, [cut]) == pytest.approx([expected], abs=1e-5)
    empty = rollout("2+2?", "", finish="length")
    assert decoded(model, empty) == "<|user|>2+2?<eos>\n<|assistant|>"


@pytest.mark.parametrize("has_template", [True, False])
def test_without_a_template_the_text_is_prompt_response_eos(tmp_path: Path, has_template: bool) -> None:
    path = save_reward_model(
        tmp_path / "plain", tiny_config("gpt2"), tiny_tokenizer(TEMPLATE if has_template else None)
    )
    model = load(path, chat_template=False if has_template else None)
    assert decoded(model, rollout("2+2=", "4")) == "2+2=4<eos>"
    assert decoded(model, rollout("2+2=", "4", finish="length")) == "2+2=4"
    expected = hf_score(path, tiny_tokenizer(), "2+2=4<eos>")
    assert scores_of(model, [rollout("2+2=", "4")]) == pytest.approx([expected], abs=1e-5)


def test_bfloat16_keeps_the_head_in_float32(checkpoints: dict[str, str]) -> None:
    model = load(checkpoints["qwen3"], dtype="bfloat16")
    assert {p.dtype for p in model.model.base_model.parameters()} == {torch.bfloat16}
    assert model.model.score.weight.dtype == torch.float32
    exact = load(checkpoints["qwen3"])
    rollouts = [rollout(q, a) for q, a in DIALOGUES]
    assert scores_of(model, rollouts) == pytest.approx(scores_of(exact, rollouts), abs=0.15)
    assert scores_of(model, rollouts) != scores_of(exact, rollouts)


def test_the_model_neither_trains_nor_drops(checkpoints: dict[str, str]) -> None:
    model = load(checkpoints["gpt2"])
    assert AutoConfig.from_pretrained(checkpoints["gpt2"]).resid_pdrop > 0
    assert not any(module.training for module in model.model.modules())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def refused(path: str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, **settings)
    assert caught.value.key.startswith(f"{KEY}.")
    return str(caught.value)


def test_checkpoints_that_cannot_score_are_refused(tmp_path: Path) -> None:
    two = save_reward_model(tmp_path / "two", tiny_config("llama", num_labels=2), tiny_tokenizer())
    assert refused(two).startswith(f"{KEY}.path=")
    assert "2 labels" in refused(two)

    policy = save_reward_model(tmp_path / "policy", tiny_config("llama"), tiny_tokenizer(), AutoModelForCausalLM)
    assert "score.weight" in refused(policy)

    bert = BertConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, num_labels=1
    )
    assert "no `score` head" in refused(save_reward_model(tmp_path / "bert", bert, tiny_tokenizer()))

    plain = save_reward_model(tmp_path / "plain", tiny_config("llama"), tiny_tokenizer(None))
    assert f"{KEY}.chat_template=True" in refused(plain, chat_template=True)

    endless = tiny_tokenizer(None)
    endless.eos_token = None
    assert "neither a chat template nor an EOS" in refused(
        save_reward_model(tmp_path / "endless", tiny_config("llama"), endless)
    )

    assert "is not a Hugging Face checkpoint" in refused(str(tmp_path / "nowhere"))


def test_a_token_that_the_embedding_lacks_is_refused(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.vocab_size = 50
    model = load(save_reward_model(tmp_path, config, tiny_tokenizer()))
    with pytest.raises(ConfigError, match=r"\.path=.* its tokenizer gives token \d+, its embedding has 50 rows"):
        model.score([rollout("b", "b")])


def test_a_conversation_that_does_not_fit_is_a_fault_of_its_own(checkpoints: dict[str, str]) -> None:
    model = load(checkpoints["llama"])
    fits, long, other = model.score([rollout("2+2?", "4"), rollout("q" * 99, "a", number=7), rollout("?", "")])
    texts = [closed_text("2+2?", "4"), closed_text("?", "")]
    assert [fits, other] == pytest.approx(
        [hf_score(checkpoints["llama"], tiny_tokenizer(), t) for t in texts], abs=1e-5
    )
    assert isinstance(long, Fault)
    assert "prompt 7, sample 0, has 106 tokens" in long.message
    assert "context is 96" in long.message
    assert long.lasting
    assert all(isinstance(answer, Fault) for answer in model.score([rollout("q" * 99, "a")] * 2))


def test_a_conversation_above_the_token_budget_is_a_wrong_setting(checkpoints: dict[str, str]) -> None:
    narrow = load(checkpoints["llama"], max_batch_tokens=20)
    with pytest.raises(ConfigError, match=r"\.max_batch_tokens=20: .* prompt 8, sample 0, has 37 tokens"):
        narrow.score([rollout("q" * 30, "a", number=8)])


def test_a_conversation_that_the_template_refuses_is_a_fault(tmp_path: Path) -> None:
    strict = "{% if messages[0].content == 'bad' %}{{ raise_exception('not this one') }}{% endif %}" + TEMPLATE
    model = load(save_reward_model(tmp_path, tiny_config("llama"), tiny_tokenizer(strict)))
    good, bad = model.score([rollout("good", "a"), rollout("bad", "a", number=3)])
    assert isinstance(good, float)
    assert isinstance(bad, Fault)
    assert "refuses the conversation of prompt 3, sample 0: not this one" in bad.message


def test_a_score_of_a_model_that_is_not_finite_is_a_fault(checkpoints: dict[str, str]) -> None:
    model = load(checkpoints["llama"])
    model.model.score.weight.fill_(math.nan)
    (fault,) = model.score([rollout("2+2?", "4", number=5)])
    assert isinstance(fault, Fault)
    assert re.search(rf"^{re.escape(KEY)}: the reward model .*llama returned nan for prompt 5, sample 0", fault.message)


def test_the_composition_makes_the_model_that_a_reward_stage_trained(checkpoints: dict[str, str]) -> None:
    rewards = Rewards(RewardConfig(), trained=checkpoints["llama"], device="cpu")
    fine, long = rewards.score([rollout("2+2?", "4")]), [rollout("q" * 99, "a", number=7)]
    assert fine[0].score == pytest.approx(hf_score(checkpoints["llama"], tiny_tokenizer(), closed_text("2+2?", "4")))
    with pytest.raises(
        SourceError, match=r"^reward.sources\[0\] \(model\) gave prompt 7, sample 0 no score: .* context"
    ):
        rewards.score(long)
    assert rewards.num_retries == 0


# Adapters.

RANK, ALPHA = 2, 6


def save_adapter(folder: Path, base: str, *, task: str = "SEQ_CLS", head: bool = True) -> str:
    """A LoRA adapter with random factors on the attention of `base`, whose score head is random too."""
    from peft import LoraConfig, get_peft_model

    config = AutoConfig.from_pretrained(base, num_labels=1)
    auto = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type=task)
    adapted = get_peft_model(auto.from_pretrained(base, config=config, dtype=torch.float32), lora)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(folder)
    if not head:
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(file).items() if "score" not in name}, file)
    return str(folder)


def merged_by_hand(folder: Path, base: str, adapter: Path) -> str:
    """A checkpoint with W + alpha / rank B A in place of W (Hu et al. 2021, section 4.1) and the adapter's head."""
    factors = load_file(adapter / "adapter_model.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(
        base, config=AutoConfig.from_pretrained(base, num_labels=1), dtype=torch.float32
    )
    with torch.no_grad():
        model.score.weight.copy_(factors["base_model.model.score.weight"])
        for name, weight in model.named_parameters():
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{prefix}.lora_A.weight" in factors:
                up, down = factors[f"{prefix}.lora_B.weight"], factors[f"{prefix}.lora_A.weight"]
                weight += ALPHA / RANK * up @ down
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal language model; its config says two labels, as Hugging Face's does by default."""
    folder = tmp_path_factory.mktemp("base")
    return save_reward_model(folder, tiny_config("llama", num_labels=2), tiny_tokenizer(), AutoModelForCausalLM)


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_an_adapter_is_merged_into_its_base_with_its_own_head(tmp_path: Path, policy: str, own_tokenizer: bool) -> None:
    adapter = save_adapter(tmp_path / "adapter", policy)
    tokenizer = tiny_tokenizer(reverse=own_tokenizer)
    if own_tokenizer:
        tokenizer.save_pretrained(adapter)
    whole = merged_by_hand(tmp_path / "whole", policy, tmp_path / "adapter")
    model = load(adapter)
    expected = [hf_score(whole, tokenizer, closed_text(q, a)) for q, a in DIALOGUES]
    assert scores_of(model, [rollout(q, a) for q, a in DIALOGUES]) == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 0.1
    assert not any("lora" in name for name, _ in model.model.named_parameters())
    coarse = load(adapter, dtype="bfloat16")
    assert {p.dtype for p in coarse.model.base_model.parameters()} == {torch.bfloat16}
    assert scores_of(coarse, [rollout(q, a) for q, a in DIALOGUES]) == pytest.approx(expected, abs=0.5)


def test_a_base_in_four_bits_scores_as_its_weights_do_under_the_adapter(tmp_path: Path, policy: str) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    adapter = save_adapter(tmp_path / "adapter", policy)
    model = load(adapter, dtype="nf4")
    base = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    of_base, stored = dict(base.named_modules()), 0
    for name, module in model.model.named_modules():
        if isinstance(module, Linear4bit):
            plain: Any = of_base[name.removesuffix(".base_layer")]
            weight: Any = module.weight
            plain.weight.data.copy_(dequantize_4bit(weight.data, weight.quant_state))
            stored += 1
    assert stored == 2 * 7, "every linear layer but the head"
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    same = merged_by_hand(tmp_path / "same", str(tmp_path / "base"), tmp_path / "adapter")
    exact = merged_by_hand(tmp_path / "exact", policy, tmp_path / "adapter")
    got = scores_of(model, [rollout(q, a) for q, a in DIALOGUES])
    expected, before = (
        [hf_score(path, tiny_tokenizer(), closed_text(q, a)) for q, a in DIALOGUES] for path in (same, exact)
    )
    assert got == pytest.approx(expected, abs=1e-4)
    assert max(abs(one - other) for one, other in zip(got, before, strict=True)) > 1e-3


def test_adapters_that_cannot_score_are_refused(tmp_path: Path, policy: str) -> None:
    assert "is an adapter for CAUSAL_LM" in refused(save_adapter(tmp_path / "causal", policy, task="CAUSAL_LM"))
    assert "no score head of shape (1, 32)" in refused(save_adapter(tmp_path / "headless", policy, head=False))
    lost = Path(save_adapter(tmp_path / "lost", policy))
    settings = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/nowhere/at/all"}))
    assert "is not a Hugging Face checkpoint" in refused(str(lost))
