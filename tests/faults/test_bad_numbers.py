"""Numbers that are none, that are all alike or that are too few: from the reward to the weights.

About a minute, most of it for one learner rank that takes real steps.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.reward_http import ANSWER_BYTES, TOKEN_VARIABLE, HTTPReward
from actors.reward_source import SourceError
from actors.rollout import Prompt, Rollout, ScoredRollout
from conf.schema import (
    AlgorithmConfig,
    GeneratorConfig,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    RewardSourceConfig,
    ShapingConfig,
)
from learner.networks import LearnerSetup
from learner.ranks import Ranks
from tests.learner_ranks import on_ranks
from tests.reward_rollouts import rollout
from tests.tiny_models import tiny_checkpoint

# Servers that answer for ever -----------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
Talk = Callable[[socket.socket], None]


@contextmanager
def talking(talk: Talk) -> Iterator[str]:
    """The address of a server that reads a request and then does what `talk` says, in a thread."""
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                try:
                    talk(connection)
                except OSError:  # the client has had enough
                    continue

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(timeout=30)
    assert not thread.is_alive()


def drop_by_drop(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
    for _ in range(1000):
        connection.sendall(b" ")
        time.sleep(0.05)


def header_by_header(connection: socket.socket) -> None:
    connection.sendall(HEAD)
    for number in range(1000):
        connection.sendall(f"X-{number}: 1\r\n".encode())
        time.sleep(0.05)


def without_end(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"\r\n")
    while True:
        connection.sendall(b" " * 65536)


def never(connection: socket.socket) -> None:
    while connection.recv(1 << 16):  # until the client hangs up
        pass


def asked(url: str, timeout_s: float) -> list[Any]:
    source = RewardSourceConfig(type="http", url=url, timeout_s=timeout_s, concurrency=1)
    return list(HTTPReward(source, key="reward.sources[0]").score([rollout("q", "a")]))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize("talk", [drop_by_drop, header_by_header, never])
def test_a_server_that_does_not_come_to_an_end_is_late(talk: Talk) -> None:
    start = time.monotonic()
    with talking(talk) as url, pytest.raises(SourceError, match=r"did not answer within 0\.5 s; raise reward\.sources"):
        asked(url, timeout_s=0.5)
    assert time.monotonic() - start < 10


def test_an_answer_without_end_is_cut_off() -> None:
    with talking(without_end) as url, pytest.raises(SourceError, match=r"answered more than 1049600 bytes for 1 texts"):
        asked(url, timeout_s=60)
    assert ANSWER_BYTES + 1024 == 1049600


def token_in_json(connection: socket.socket) -> None:
    body = rb'{"you sent": "Bearer s3\/cret"}'  # as some languages write a slash
    connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)


def test_a_token_that_is_sent_back_is_hidden_however_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "s3/cret")
    with (
        talking(token_in_json) as url,
        pytest.raises(SourceError, match=r"something else than .*Bearer \.\.\.") as caught,
    ):
        asked(url, timeout_s=5)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_clock_that_is_set_moves_no_deadline(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is a late answer waited for longer, nor one in time given up."""
    real, count = time.time, iter(range(1_000_000))
    monkeypatch.setattr(time, "time", lambda: real() + (jump if next(count) else 0.0))

    def in_time(connection: socket.socket) -> None:
        time.sleep(0.2)
        connection.sendall(HEAD + b'Content-Length: 15\r\n\r\n{"scores": [3]}')

    start = time.monotonic()
    with talking(drop_by_drop) as url, pytest.raises(SourceError, match=r"did not answer within 0\.5 s"):
        asked(url, timeout_s=0.5)
    assert time.monotonic() - start < 10
    with talking(in_time) as url:
        assert asked(url, timeout_s=10.0) == [3.0]


# Rollouts -------------------------------------------------------------------------------------------------------------


def sampled(number: int, length: int, *, sample: int = 0, truncated: bool = False) -> Rollout:
    rng = np.random.default_rng([number, sample, length])
    return Rollout(
        prompt=Prompt(number, rng.integers(4, 64, 3).astype(np.int32), "", ()),
        sample=sample,
        response_ids=rng.integers(4, 64, length).astype(np.int32),
        rollout_logprobs=np.full(length, -5.5, dtype=np.float32),
        response_mask=np.ones(length, dtype=np.bool_),
        policy_versions=np.zeros(length, dtype=np.int32),
        finish_reason="length" if truncated else "stop",
        text="",
    )


def test_a_response_of_no_tokens_is_no_rollout() -> None:
    with pytest.raises(AssertionError, match="a response has at least one token"):
        sampled(0, 0)


# Updates --------------------------------------------------------------------------------------------------------------

ALGORITHM = AlgorithmConfig(num_steps=10, prompts_per_step=4, samples_per_prompt=2, mini_batch_size=4)
ESTIMATORS = ("gae", "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax")


def batch(
    score: Callable[[int], float] = lambda index: float(index % 3),
    *,
    length: int = 4,
    prompts: int = 4,
    cut: bool = False,
) -> list[list[ScoredRollout]]:
    """Eight rollouts in two mini-batches."""
    rollouts = [sampled(index % prompts, length, sample=index // prompts, truncated=cut) for index in range(8)]
    scored = [ScoredRollout(one, score(index), baseline=1.0) for index, one in enumerate(rollouts)]
    return [scored[:4], scored[4:]]


def scenarios() -> dict[str, tuple[AlgorithmConfig, list[list[ScoredRollout]]]]:
    cases = {
        f"equal {name}": (replace(ALGORITHM, estimator=name, kl_coef=0.0), batch(lambda i: 1.0)) for name in ESTIMATORS
    }
    cases |= {f"least {name}": (replace(ALGORITHM, estimator=name), batch(length=1, prompts=1)) for name in ESTIMATORS}
    cases["all cut"] = (replace(ALGORITHM, mask_truncated=True), batch(cut=True))
    cases["one rollout"] = (replace(ALGORITHM, mini_batch_size=4), [batch()[0][:1]])
    cases["huge"] = (ALGORITHM, batch(lambda i: 1e30 if i == 0 else 0.0))
    return cases


def run(ranks: Ranks, checkpoint: str) -> dict[str, Any]:
    from learner import zero
    from learner.worker import LearnerWorker

    optimizer = OptimizerConfig(lr=1e-3)
    results = {}
    for name, (algorithm, mini_batches) in scenarios().items():
        setup = LearnerSetup(
            ModelConfig(path=checkpoint, tokenizer=checkpoint),
            algorithm,
            ShapingConfig(),
            LearnerConfig(dtype="float32", policy=optimizer, critic=optimizer),
            GeneratorConfig(),
            checkpoint,
            (),
            "cpu",
            0,
            60.0,
        )
        worker = LearnerWorker(setup, ranks)

        def weights(worker: Any = worker) -> dict[str, Any]:
            state = zero.full_state(worker.policy.module.model, dtype="float32")
            return {parameter: tensor.clone().numpy() for parameter, tensor in state.items()}

        before = weights()
        metrics = worker.update(mini_batches, kl_coef=algorithm.kl_coef, seed=0, step=0)
        results[name] = {"metrics": metrics, "before": before, "weights": weights()}
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    (of_rank,) = on_ranks(run, 1, str(checkpoint))
    found: dict[str, Any] = of_rank
    return found


def moved(done: dict[str, Any]) -> bool:
    assert all(np.isfinite(tensor).all() for tensor in done["weights"].values())
    return any(not np.array_equal(done["before"][name], tensor) for name, tensor in done["weights"].items())


def losses_are_numbers(done: dict[str, Any]) -> bool:
    return all(math.isfinite(value) for name, value in done["metrics"].items() if name.endswith("loss"))


@pytest.mark.ranks
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rewards_that_are_all_alike_make_no_nan(results: dict[str, Any], estimator: str) -> None:
    done = results[f"equal {estimator}"]
    assert losses_are_numbers(done)
    assert done["metrics"]["policy/skipped_nonfinite"] == 0
    assert math.isfinite(done["metrics"]["advantages/mean"])
    # Of a comparison with equals nothing is learnt. The critic has a guess of its own, which differs from the score.
    assert moved(done) == (estimator == "gae"), done["metrics"]


@pytest.mark.ranks
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_responses_of_one_token_to_one_prompt_are_trained_on(results: dict[str, Any], estimator: str) -> None:
    done = results[f"least {estimator}"]
    assert losses_are_numbers(done)
    assert done["metrics"]["policy/skipped_nonfinite"] == 0
    assert moved(done)


@pytest.mark.ranks
def test_one_rollout_alone_is_an_update(results: dict[str, Any]) -> None:
    assert losses_are_numbers(results["one rollout"])
    assert moved(results["one rollout"])


@pytest.mark.ranks
def test_a_batch_of_cut_responses_that_are_masked_changes_nothing(results: dict[str, Any]) -> None:
    done = results["all cut"]
    assert done["metrics"]["policy/skipped_empty"] == 2
    assert done["metrics"]["policy/masked_rollouts"] == 8
    assert not moved(done)


@pytest.mark.ranks
def test_a_huge_reward_leaves_weights_that_are_numbers(results: dict[str, Any]) -> None:
    """1e30, squared, is more than float32 holds: the steps that it reaches are skipped and counted."""
    done = results["huge"]
    moved(done)
    assert done["metrics"]["policy/skipped_nonfinite"] >= 1
