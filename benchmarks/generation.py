"""Tokens per second of Manta's generators beside vLLM's own `LLM.generate`.

    python -m benchmarks.generation [--rounds 5] [--threads 1]

Three contestants sample the same responses, token for token, with the same seeds and engine settings, each engine in
a process of its own: `LLM.generate`; `VLLMGenerator`; and a `GeneratorGroup` as in a run, whose Ray process hands
rollouts to the object store in chunks and their descriptions to the driver. While one is measured the others wait.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from actors.generator import SampleRequest, VLLMGenerator, sampling_seed
from actors.rollout import Prompt
from benchmarks import counting
from benchmarks.report import Result, in_turns, median_ratio, seconds
from conf.schema import ClusterConfig, GeneratorConfig

NUM_PROMPTS, SAMPLES, SEED, CHUNK = 64, 4, 0, 64
WORKLOADS = ("64", "lognormal")
Responses = list[tuple[tuple[int, int], list[int]]]  # ((prompt, sample), token ids)
REFERENCE = "LLM.generate"


def settings() -> GeneratorConfig:
    """Return the engine's settings, the same for all."""
    return GeneratorConfig(
        max_new_tokens=counting.MAX_LENGTH, max_model_len=counting.PROMPT_LENGTH + counting.MAX_LENGTH
    )


def prompts_of(workload: str) -> list[Prompt]:
    """Return the prompts of a workload."""
    ids = counting.prompts(counting.lengths(workload, NUM_PROMPTS), seed=SEED)
    return [
        Prompt(id=number, token_ids=np.array(of_one, np.int32), text="", messages=())
        for number, of_one in enumerate(ids)
    ]


def requests_of(workload: str) -> list[SampleRequest]:
    """Return what is to be sampled, as a `GeneratorProcess` asks for it."""
    return [
        SampleRequest(prompt, sample, sampling_seed(SEED, prompt.id, sample), 1.0, counting.MAX_LENGTH)
        for prompt in prompts_of(workload)
        for sample in range(SAMPLES)
    ]


def digest(responses: Responses) -> str:
    """Return a fingerprint of all tokens."""
    return hashlib.sha256(repr(sorted(responses)).encode()).hexdigest()[:16]


def serve_vllm(conn: Connection, model: str) -> None:
    """Answer each workload that comes with the seconds of `LLM.generate` and the digest."""
    from actors.generator import _engine_args, _sampling_params, configure_environment

    configure_environment("cpu")
    from vllm import LLM

    llm = LLM.from_engine_args(_engine_args(model, settings(), device="cpu", seed=SEED, trust_remote_code=False))

    def sample(workload: str) -> tuple[float, str]:
        requests = requests_of(workload)
        outputs: list[Any] = []

        def generate() -> None:
            given = [{"prompt_token_ids": request.prompt.token_ids.tolist()} for request in requests]
            params = [_sampling_params(request, settings(), [counting.EOS_ID]) for request in requests]
            outputs.extend(llm.generate(given, params, use_tqdm=False))

        took = seconds(generate)
        keys = [(request.prompt.id, request.sample) for request in requests]
        return took, digest([(key, list(one.outputs[0].token_ids)) for key, one in zip(keys, outputs, strict=True)])

    answer(conn, sample)


def serve_generator(conn: Connection, model: str) -> None:
    """Answer each workload that comes with the seconds of `VLLMGenerator.generate` and the digest."""
    generator = VLLMGenerator(model, settings(), device="cpu", seed=SEED)

    def sample(workload: str) -> tuple[float, str]:
        requests = requests_of(workload)
        rollouts: list[Any] = []
        took = seconds(lambda: rollouts.extend(generator.generate(requests)))
        return took, digest([(one.key, one.response_ids.tolist()) for one in rollouts])

    answer(conn, sample)


def answer(conn: Connection, sample: Callable[[str], tuple[float, str]]) -> None:
    """Say that all is ready, and answer until there is nothing more."""
    conn.send(None)
    while (workload := conn.recv()) is not None:
        conn.send(sample(workload))


@contextmanager
def served(serve: Callable[[Connection, str], None], model: str) -> Iterator[Callable[[str], tuple[float, str]]]:
    """Yield a function that asks a new process."""
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=serve, args=(theirs, model), daemon=True)
    process.start()
    theirs.close()
    ours.recv()

    def ask(workload: str) -> tuple[float, str]:
        ours.send(workload)
        took, tokens = ours.recv()
        return float(took), str(tokens)

    try:
        yield ask
    finally:
        ours.send(None)
        process.join()


@contextmanager
def grouped(model: str, *, threads: int) -> Iterator[Callable[[str], tuple[float, str]]]:
    """Yield a function that asks a group of one generator, as a run does."""
    import ray

    from cluster.driver import Sampling
    from cluster.generators import GeneratorGroup, GeneratorProcess, GeneratorSetup
    from cluster.reactor import Reactor
    from cluster.recoveries import Recoveries
    from cluster.session import ray_session

    cluster = ClusterConfig(device="cpu", threads=threads)
    setup = GeneratorSetup(model, model, model, settings(), "cpu", SEED, trust_remote_code=False)
    with ray_session(cluster, settings()) as session, session.placed({"generator": GeneratorProcess}) as placement:
        group = GeneratorGroup(
            placement,
            setup,
            chunk_size=CHUNK,
            limits=cluster,
            recoveries=Recoveries(limit=0, note=print),
            reactor=Reactor(),
        )
        group.members.wait_begun()

        def sample(workload: str) -> tuple[float, str]:
            prompts = prompts_of(workload)
            sampling = Sampling(SAMPLES, 1.0, counting.MAX_LENGTH, SEED)
            chunks: list[Any] = []
            took = seconds(lambda: chunks.extend(group.sample(prompts, sampling)))
            rollouts = [one for chunk in chunks for one in ray.get(chunk.payload)]
            return took, digest([(one.key, one.response_ids.tolist()) for one in rollouts])

        yield sample


def measured(
    workload: str, contestants: Mapping[str, Callable[[str], tuple[float, str]]], *, rounds: int
) -> Sequence[dict[str, Any]]:
    """Return the rows of one workload."""
    digests = {name: ask(workload)[1] for name, ask in contestants.items()}  # warms up, too
    if len(set(digests.values())) > 1:
        raise SystemExit(f"the contestants did not sample the same: {digests}")
    tokens = SAMPLES * sum(counting.lengths(workload, NUM_PROMPTS))

    def rate(ask: Callable[[str], tuple[float, str]]) -> float:
        return tokens / ask(workload)[0]

    rates = in_turns({name: partial(rate, ask) for name, ask in contestants.items()}, rounds=rounds)
    return [
        {
            "workload": workload,
            "contestant": name,
            "tokens_per_s": statistics.median(rates[name]),
            "ratio": median_ratio(rates[name], rates[REFERENCE]),
            "rounds": [round(one) for one in rates[name]],
        }
        for name in contestants
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of OpenMP, of each engine")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(asked.threads), "OMP_WAIT_POLICY": "passive"}  # for all that is started
    with tempfile.TemporaryDirectory() as folder:
        paths = counting.make(Path(folder), [], seed=SEED)
        model = str(paths.policy)
        with (
            served(serve_vllm, model) as vllm,
            served(serve_generator, model) as generator,
            grouped(model, threads=asked.threads) as group,
        ):
            contestants = {REFERENCE: vllm, "VLLMGenerator": generator, "GeneratorGroup": group}
            rows = [row for workload in WORKLOADS for row in measured(workload, contestants, rounds=asked.rounds)]
    Result(
        name="generation",
        rows=rows,
        configuration={
            "model": counting.DESCRIPTION,
            "requests": f"{NUM_PROMPTS} prompts of {counting.PROMPT_LENGTH} tokens, {SAMPLES} samples each",
            "threads": asked.threads,
            "chunk": CHUNK,
            "rounds": asked.rounds,
        },
        notes=[f"ratio: to {REFERENCE}, the median over rounds; all sampled the same tokens"],
    ).say(asked.json)


if __name__ == "__main__":
    main()
