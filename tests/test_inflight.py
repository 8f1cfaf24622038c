"""New weights while requests run, with real vLLM: each token is of the weights that it says, over older keys."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine_loop import EngineLoop
from actors.generator import SampleRequest, sampling_seed
from actors.rollout import Prompt, Rollout
from actors.spans import SpanLog
from tests.test_weight_receiver import Pair
from tests.tiny_models import VOCAB_SIZE, tiny_checkpoint

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama"), "float32")
    pair.connect()
    yield pair
    pair.close()


def requests(count: int, *, length: int = 6, max_new_tokens: int = 24) -> list[SampleRequest]:
    draw = np.random.default_rng(5)
    prompts = [Prompt(i, draw.integers(4, VOCAB_SIZE, length).astype(np.int32), "", ()) for i in range(count)]
    return [SampleRequest(p, 0, sampling_seed(0, p.id, 0), 1.0, max_new_tokens) for p in prompts]


def expected_logprobs(old: Any, new: Any, rollout: Rollout, num_old: int) -> np.ndarray[Any, Any]:
    """Hugging Face's log-probabilities of a response of which the first `num_old` tokens were sampled by `old`.

    The last of these is the first that `new` reads: what stands before it is remembered as `old` has computed it.
    """
    ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.response_ids])).long()[None]
    start = len(rollout.prompt.token_ids)
    with torch.no_grad():
        before = old(ids[:, : start + num_old - 1], use_cache=True)
        logits = [before.logits[0, start - 1 :]]
        if num_old < len(rollout.response_ids):
            after = new(ids[:, start + num_old - 1 : -1], past_key_values=before.past_key_values, use_cache=True)
            logits.append(after.logits[0])
    logprobs = torch.cat(logits).log_softmax(-1)
    return logprobs.gather(1, ids[0, start:, None])[:, 0].numpy()


def test_tokens_after_an_update_are_of_the_new_weights_over_the_old_keys(pair: Pair) -> None:
    generator = pair.generator
    pair.change_weights(1)
    pair.sync(1)
    old = copy.deepcopy(pair.model)
    for request in requests(6):
        generator.add(request)
    rollouts = [rollout for _ in range(5) for _, rollout in generator.step()]
    pair.change_weights(2)
    pair.sync(2)
    generator.add(replace(requests(7)[6]))  # one that begins with the new weights
    while len(rollouts) < 7:
        rollouts += [rollout for _, rollout in generator.step()]
    assert len({rollout.key for rollout in rollouts}) == 7
    mixed = 0
    for rollout in rollouts:
        versions = rollout.policy_versions
        num_old = int((versions == 1).sum())
        assert (versions == [1] * num_old + [2] * (len(versions) - num_old)).all()
        if rollout.prompt.id == 6:
            assert num_old == 0
            assert pair.gaps([rollout]).max() < 1e-5
            continue
        assert num_old == min(5, len(versions))
        expected = expected_logprobs(old, pair.model, rollout, num_old)
        np.testing.assert_allclose(rollout.rollout_logprobs, expected, atol=1e-5, rtol=0)
        if num_old < len(versions):
            mixed += 1
            assert pair.gaps([rollout]).max() > 1e-3  # which the new weights alone would not have said
    assert mixed >= 3


def test_keys_of_running_requests_are_not_reused_by_later_ones(pair: Pair) -> None:
    """A prompt of more than a cache block, whose first block is remembered while a request runs over the update."""
    generator = pair.generator
    length = generator._engine.vllm_config.cache_config.block_size + 20
    running, later = requests(1, length=length, max_new_tokens=30)[0], requests(1, length=length)[0]
    generator.add(running)
    for _ in range(2):
        generator.step()
    pair.change_weights(3)
    pair.sync(3)
    number = generator.add(replace(later, seed=1))
    done: dict[int, Rollout] = {}
    while number not in done:
        done |= dict(generator.step())
    generator.abort(range(number))
    assert pair.gaps([done[number]]).max() < 1e-5


def test_the_loop_takes_weights_in_between_steps_of_running_requests(pair: Pair) -> None:
    loop = EngineLoop(lambda: pair.generator, SpanLog())
    start = pair.generator.version
    streams = loop.sample(requests(6))
    first = next(streams)
    pair.change_weights(4)
    loop.call(lambda: pair.sync(start + 1))
    rollouts = [first, *streams]
    assert sorted(place for place, _ in rollouts) == list(range(6))
    assert {int(version) for _, rollout in rollouts for version in rollout.policy_versions} <= {start, start + 1}
    again = list(loop.sample(requests(6)))
    assert pair.gaps([rollout for _, rollout in again]).max() < 1e-5
