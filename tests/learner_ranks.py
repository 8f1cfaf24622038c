"""Runs learner ranks as processes of this machine, without Ray: what several tests of the learner need."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any

from learner.ranks import Ranks

# Ranks are forked from a process that has imported these once, which takes many times as long as most tests.
IMPORTED = (
    "torch",
    "deepspeed",
    "peft",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.optimization",
    "learner.worker",
    "learner.sft",
    "learner.reward_training",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)


def free_port() -> int:
    """Return a free port, of those that the kernel gives to nobody who asks for any: it is bound only later."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


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


def on_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300, sequence_parallel_size: int = 1
) -> list[Any]:
    """Return what function(ranks, *args) returned on each of `world_size` new processes, in rank order."""
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with ProcessPoolExecutor(world_size, mp_context=context, initializer=quiet_process) as pool:
        places = [Ranks(rank, world_size, "127.0.0.1", port, sequence_parallel_size) for rank in range(world_size)]
        futures = [pool.submit(_run, function, place, args) for place in places]
        return [future.result(timeout=timeout_s) for future in futures]
