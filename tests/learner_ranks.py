"""Runs learner ranks as processes of this machine, without Ray: what several tests of the learner need."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from actors.rollout import Prompt, Rollout, ScoredRollout
from learner.zero import Ranks


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def quiet_process() -> None:
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")
    import torch

    torch.set_num_threads(1)


def _run(function: Callable[..., Any], ranks: Ranks, args: tuple[Any, ...]) -> Any:
    try:
        return function(ranks, *args)
    except BaseException:
        traceback.print_exc()
        raise


def on_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300) -> list[Any]:
    """Return what function(ranks, *args) returned on each of `world_size` new processes, in rank order."""
    port = free_port()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(world_size, mp_context=context, initializer=quiet_process) as pool:
        futures = [
            pool.submit(_run, function, Ranks(rank, world_size, "127.0.0.1", port), args) for rank in range(world_size)
        ]
        return [future.result(timeout=timeout_s) for future in futures]


def random_rollouts(count: int, *, seed: int, vocab_size: int = 64) -> list[ScoredRollout]:
    """Return rollouts of random tokens, lengths and scores."""
    rng = np.random.default_rng(seed)
    scored = []
    for index in range(count):
        prompt_length, length = int(rng.integers(2, 8)), int(rng.integers(1, 10))
        prompt = Prompt(index, rng.integers(4, vocab_size, prompt_length).astype(np.int32), "", ())
        rollout = Rollout(
            prompt=prompt,
            sample=0,
            response_ids=rng.integers(4, vocab_size, length).astype(np.int32),
            rollout_logprobs=rng.normal(-3, 1, length).astype(np.float32),
            response_mask=np.ones(length, dtype=np.bool_),
            policy_versions=np.zeros(length, dtype=np.int32),
            finish_reason="stop",
            text="",
        )
        scored.append(ScoredRollout(rollout, float(rng.normal())))
    return scored
