"""Reward models in vLLM's pooling runner against transformers. About a minute, for two engines and their imports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.reward_model import Conversations, RewardModel
from actors.reward_source import Fault
from actors.reward_vllm import VLLMRewardModel, kv_cache_bytes
from actors.rollout import Rollout
from conf.schema import ConfigError, RewardSourceConfig
from tests.reward_rollouts import rollout
from tests.tiny_models import CONTEXT_LENGTH, tiny_config, tiny_tokenizer

KEY = "reward.sources[0]"


def reward_checkpoint(folder: Path, family: str) -> str:
    """A random reward model whose scores are of size 1 to 10."""
    from transformers import AutoModelForSequenceClassification

    config = tiny_config(family)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.score.weight.normal_(std=0.5)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def rollouts() -> list[Rollout]:
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(32, 127, length))) for length in (1, 3, 20, 90, 150, 7, 40, 11)]
    return [
        rollout(words[number], words[-number], number=number, finish="length" if number % 3 == 0 else "stop")
        for number in range(len(words))
        if len(words[number]) + len(words[-number]) < 200
    ]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return reward_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def source_of(path: str) -> RewardSourceConfig:
    return RewardSourceConfig(path=path, engine="vllm", max_batch_tokens=512)


@pytest.fixture(scope="module")
def served(path: str) -> Iterator[VLLMRewardModel]:
    model = VLLMRewardModel(source_of(path), key=KEY, device="cpu")
    yield model
    model.shutdown()


@pytest.mark.engine
def test_scores_equal_those_of_transformers(served: VLLMRewardModel, path: str) -> None:
    expected = RewardModel(RewardSourceConfig(path=path), key=KEY, device="cpu").score(rollouts())
    scores = served.score(rollouts())
    assert scores == pytest.approx(expected, abs=1e-4)
    numbers = [score for score in scores if not isinstance(score, Fault)]
    assert max(numbers) - min(numbers) > 1, "or a sigmoid could pass"
    assert [served.score([one])[0] for one in rollouts()] == pytest.approx(expected, abs=1e-4)
    assert served.score([]) == []


@pytest.mark.engine
def test_a_conversation_that_does_not_fit_is_a_fault_of_its_own(served: VLLMRewardModel, path: str) -> None:
    fits = rollout("a", "b")
    before, long, after = served.score([fits, rollout("q" * CONTEXT_LENGTH, "a", number=7), fits])
    assert isinstance(long, Fault)
    assert "prompt 7, sample 0" in long.message
    assert long.lasting
    (expected,) = RewardModel(RewardSourceConfig(path=path), key=KEY, device="cpu").score([fits])
    assert [before, after] == pytest.approx([expected] * 2, abs=1e-4)


def test_what_vllm_is_not_known_to_score_alike_is_refused(tmp_path: Path) -> None:
    gpt2 = reward_checkpoint(tmp_path / "gpt2", "gpt2")
    message = r"^reward.sources\[0\].engine='vllm': .* is GPT2ForSequenceClassification; .* set .*engine=transformers"
    with pytest.raises(ConfigError, match=message):
        VLLMRewardModel(source_of(gpt2), key=KEY, device="cpu")


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = reward_checkpoint(tmp_path / "base", "llama")
    lora = LoraConfig(r=1, target_modules=["q_proj"], task_type="SEQ_CLS")
    get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"\.engine='vllm': .* is an adapter, which only transformers merges"):
        VLLMRewardModel(source_of(str(tmp_path / "adapter")), key=KEY, device="cpu")


def test_room_for_keys_and_values_by_hand(tmp_path: Path) -> None:
    source = RewardSourceConfig(path=reward_checkpoint(tmp_path, "llama"), max_batch_tokens=100_000)
    config = Conversations(source, key=KEY, trust_remote_code=False).model_config
    # keys and values of 2 layers, 1 head of 32 numbers of 4 bytes, for 200,000 tokens
    assert kv_cache_bytes(config, source) == 2 * 2 * 1 * 32 * 4 * 200_000
    assert kv_cache_bytes(config, source_of("")) == 64 << 20
