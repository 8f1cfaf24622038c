"""learner.distribution.kept against vLLM's own top-k and top-p. Fifteen seconds, nearly all the import of vLLM."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.distribution import SampledFrom, kept, token_logprobs
from tests.test_ppo_maths import random

pytestmark = pytest.mark.engine

WAYS = [
    (top_k, top_p)
    for top_k in (0, 1, 5, 20, 199, 200)
    for top_p in (1.0, 0.999, 0.95, 0.9, 0.5, 0.1, 1e-9)
    if top_k or top_p < 1
]


@pytest.fixture(scope="module")
def by_vllm() -> Callable[[Tensor, int, float], Tensor]:
    """vLLM's processed logits: -inf outside of what it keeps."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    def processed(logits: Tensor, top_k: int, top_p: float) -> Tensor:
        rows, vocabulary = logits.shape
        k = torch.full((rows,), top_k, dtype=torch.int32) if 0 < top_k < vocabulary else None
        p = torch.full((rows,), top_p, dtype=torch.float32) if top_p < 1.0 else None
        done: Tensor = apply_top_k_top_p_pytorch(logits.clone(), k, p, allow_cpu_sync=True)
        return done

    return processed


@pytest.mark.parametrize("ties", [False, True])
def test_the_kept_tokens_are_those_of_vllm(by_vllm: Callable[[Tensor, int, float], Tensor], ties: bool) -> None:
    """Bit for bit, with ties at the edges as well. (PPO details 5)"""
    logits = random(300, 200, seed=0, scale=3.0, dtype=torch.float32)
    if ties:
        logits = logits.round()
    for top_k, top_p in WAYS:
        expected = by_vllm(logits, top_k, top_p).isfinite()
        assert torch.equal(kept(logits, top_k=top_k, top_p=top_p), expected), (top_k, top_p)


def test_the_log_probabilities_are_those_that_vllm_reports(by_vllm: Callable[[Tensor, int, float], Tensor]) -> None:
    """logprobs_mode=processed_logprobs is log_softmax of the processed logits. (PPO details 5)"""
    logits = random(50, 200, seed=1, scale=3.0, dtype=torch.float32)
    for top_k, top_p in WAYS:
        expected = by_vllm(logits / 0.7, top_k, top_p).log_softmax(-1)
        sampled_from = SampledFrom(temperature=0.7, top_k=top_k, top_p=top_p)
        for token in range(0, 200, 17):
            got = token_logprobs(logits, torch.full((50,), token), sampled_from)
            torch.testing.assert_close(got, expected[:, token], atol=2e-6, rtol=0)
