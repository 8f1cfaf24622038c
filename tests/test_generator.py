"""Sampling with real vLLM on a tiny model, against Hugging Face's logits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.generator import SampleRequest, VLLMGenerator, sampling_seed
from actors.rollout import Prompt, Rollout
from conf.schema import ConfigError, GeneratorConfig
from tests.tiny_models import EOS_ID, VOCAB_SIZE, tiny_checkpoint

CONFIG = GeneratorConfig(max_new_tokens=16, max_model_len=64, max_num_seqs=8, kv_cache_mib=32)


def make_prompt(number: int, length: int = 5) -> Prompt:
    token_ids = np.random.default_rng(number).integers(4, VOCAB_SIZE, length).astype(np.int32)
    return Prompt(id=number, token_ids=token_ids, text="", messages=())


def make_requests(num_prompts: int = 6, samples: int = 2, temperature: float = 1.0) -> list[SampleRequest]:
    return [
        SampleRequest(prompt, sample, sampling_seed(0, prompt.id, sample), temperature, max_new_tokens=16)
        for prompt in map(make_prompt, range(num_prompts))
        for sample in range(samples)
    ]


def by_key(rollouts: Iterator[Rollout] | Sequence[Rollout]) -> dict[tuple[int, int], Rollout]:
    return {rollout.key: rollout for rollout in rollouts}


def assert_same(left: dict[tuple[int, int], Rollout], right: dict[tuple[int, int], Rollout]) -> None:
    assert left.keys() == right.keys()
    for key, rollout in left.items():
        np.testing.assert_array_equal(rollout.response_ids, right[key].response_ids)
        np.testing.assert_allclose(rollout.rollout_logprobs, right[key].rollout_logprobs, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def generator(checkpoint: Path) -> Iterator[VLLMGenerator]:
    generator = VLLMGenerator(str(checkpoint), CONFIG, device="cpu", seed=0)
    yield generator
    generator.shutdown()


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def hf_logprobs(model: Any, rollout: Rollout, temperature: float) -> np.ndarray[Any, Any]:
    """log_softmax(logits / temperature) of each response token, in float32."""
    prompt = len(rollout.prompt.token_ids)
    ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.response_ids])).long()
    with torch.no_grad():
        logits = model(ids[None]).logits[0, prompt - 1 : -1].float()
    logprobs: torch.Tensor = (logits / temperature).log_softmax(-1).gather(1, ids[prompt:, None])[:, 0]
    return logprobs.numpy()


@pytest.mark.engine
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampled_distribution(
    generator: VLLMGenerator, model: Any, temperature: float
) -> None:
    rollouts = list(generator.generate(make_requests(temperature=temperature)))
    assert len(rollouts) == 12
    for rollout in rollouts:
        expected = hf_logprobs(model, rollout, temperature)
        np.testing.assert_allclose(rollout.rollout_logprobs, expected, atol=1e-5, rtol=0)
        assert rollout.response_mask.all()
        assert (rollout.policy_versions == generator.version).all()


@pytest.mark.engine
def test_a_seed_gives_the_same_response_in_any_order_and_company(generator: VLLMGenerator) -> None:
    requests = make_requests()
    together = by_key(generator.generate(requests))
    assert_same(together, by_key(generator.generate(requests[::-1])))
    assert_same(together, by_key([rollout for request in requests for rollout in generator.generate([request])]))


@pytest.mark.engine
def test_samples_of_a_prompt_differ(generator: VLLMGenerator) -> None:
    rollouts = list(generator.generate(make_requests(num_prompts=1, samples=8)))
    assert len({tuple(rollout.response_ids) for rollout in rollouts}) == 8


@pytest.mark.engine
def test_a_response_ends_with_its_eos_or_at_its_length(generator: VLLMGenerator) -> None:
    rollouts = list(generator.generate(make_requests(num_prompts=64, samples=2)))
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    cut = [rollout for rollout in rollouts if rollout.finish_reason == "length"]
    assert stopped
    assert cut
    assert len(stopped) + len(cut) == len(rollouts) == 128
    for rollout in stopped:
        assert list(rollout.response_ids).index(EOS_ID) == len(rollout.response_ids) - 1
        assert "<eos>" not in rollout.text
    for rollout in cut:
        assert len(rollout.response_ids) == 16
        assert EOS_ID not in rollout.response_ids


@pytest.mark.engine
def test_text_is_the_response_decoded_without_special_tokens(generator: VLLMGenerator, checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for rollout in generator.generate(make_requests(num_prompts=2)):
        assert rollout.text == tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True)


@pytest.mark.engine
def test_a_response_is_cut_where_the_context_ends(generator: VLLMGenerator) -> None:
    request = SampleRequest(make_prompt(3, length=60), 0, seed=1, temperature=1.0, max_new_tokens=16)
    (rollout,) = generator.generate([request])
    assert rollout.finish_reason == "stop" or len(rollout.response_ids) == 4


@pytest.mark.engine
def test_the_longest_prompt_gets_one_token_and_a_longer_one_is_refused(generator: VLLMGenerator) -> None:
    fits = SampleRequest(make_prompt(9, length=63), 0, seed=1, temperature=1.0, max_new_tokens=16)
    (rollout,) = generator.generate([fits])
    assert len(rollout.response_ids) == 1
    too_long = SampleRequest(make_prompt(9, length=64), 0, seed=1, temperature=1.0, max_new_tokens=16)
    with pytest.raises(ValueError, match="prompt 9 has 64 tokens; with a context of 64 tokens"):
        generator.generate([fits, too_long])
    empty = SampleRequest(make_prompt(9, length=0), 0, seed=1, temperature=1.0, max_new_tokens=16)
    with pytest.raises(ValueError, match="prompt 9 has 0 tokens"):
        generator.generate([empty])


@pytest.mark.engine
def test_an_abandoned_iterator_leaves_nothing_running(generator: VLLMGenerator) -> None:
    requests = make_requests(num_prompts=12)
    expected = by_key(generator.generate(requests))
    rollouts = generator.generate(requests)
    assert len(list(islice(rollouts, 1))) == 1
    with pytest.raises(RuntimeError, match="still sampling"):
        generator.generate(requests)
    rollouts.close()  # type: ignore[attr-defined]
    assert_same(expected, by_key(generator.generate(requests)))


@pytest.mark.engine
def test_rollouts_are_handed_on_as_they_finish(generator: VLLMGenerator) -> None:
    short = SampleRequest(make_prompt(1), 0, seed=1, temperature=1.0, max_new_tokens=1)
    long = SampleRequest(make_prompt(0), 0, seed=1, temperature=1.0, max_new_tokens=16)
    assert [rollout.prompt.id for rollout in generator.generate([long, short])] == [1, 0]


# From here on engines are shut down, which breaks any other in the process: no test below uses `generator` after that.


@pytest.mark.engine
def test_the_sampling_defaults_of_a_model_change_nothing(
    generator: VLLMGenerator, checkpoint: Path, tmp_path: Path
) -> None:
    expected = by_key(generator.generate(make_requests()))
    folder = tiny_checkpoint(tmp_path, "llama")
    settings = {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "repetition_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": EOS_ID}))
    other = VLLMGenerator(str(folder), CONFIG, device="cpu", seed=0)
    try:
        assert_same(expected, by_key(other.generate(make_requests())))
    finally:
        other.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        other.generate(make_requests())


@pytest.mark.engine
def test_every_stop_token_of_the_generation_config_ends_a_response(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen2", tied=False)
    stops = [EOS_ID, *range(200, VOCAB_SIZE)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    generator = VLLMGenerator(str(folder), CONFIG, device="cpu", seed=0)
    try:
        rollouts = list(generator.generate(make_requests(num_prompts=8)))
    finally:
        generator.shutdown()
    assert len({rollout.response_ids[-1] for rollout in rollouts if rollout.finish_reason == "stop"}) > 1
    for rollout in rollouts:
        assert not set(stops) & set(rollout.response_ids[:-1].tolist())
        assert (rollout.response_ids[-1] in stops) == (rollout.finish_reason == "stop")


@pytest.mark.engine
def test_more_prompt_tokens_than_a_step_takes_are_sampled_all_the_same(checkpoint: Path) -> None:
    generator = VLLMGenerator(str(checkpoint), replace(CONFIG, max_num_seqs=96), device="cpu", seed=0)
    try:
        requests = [SampleRequest(make_prompt(number, 60), 0, number, 1.0, max_new_tokens=2) for number in range(96)]
        budget = generator._engine.vllm_config.scheduler_config.max_num_batched_tokens
        assert 60 * len(requests) > budget, "all would be taken in one step"
        assert budget % 60, "no prompt would be cut in two"
        assert len(list(generator.generate(requests))) == len(requests)
    finally:
        generator.shutdown()


def test_a_model_without_an_eos_token_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        values |= {"eos_token_id": None, "eos_token": None}
        (folder / name).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="EOS"):
        VLLMGenerator(str(folder), CONFIG, device="cpu", seed=0)


def test_sampling_seeds_differ_and_fit_63_bits() -> None:
    seeds = [sampling_seed(run, prompt, sample) for run in range(3) for prompt in range(50) for sample in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert sampling_seed(1, 2, 3) == sampling_seed(1, 2, 3)
