"""Reward servers over a real socket: the two formats, and every fault that a server may have. About six seconds."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from actors.reward import Rewards
from actors.reward_http import TOKEN_VARIABLE, HTTPReward, slices
from actors.reward_source import Fault, SourceError
from conf.schema import ConfigError, RewardConfig, RewardSourceConfig
from examples.reward_server import FAULTS, RewardServer
from tests.reward_rollouts import rollout

KEY = "reward.sources[0]"
FOUR = [
    rollout("q", "a" * (number + 1), number=number, sample=1, row={"answer": f"gold {number}"}) for number in range(4)
]
ROOT = Path(__file__).parent.parent


def length(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The length of each response without the prompt that the rollouts of this file have."""
    return [len(response.removeprefix("policy template: q")) for response in responses]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@contextmanager
def serving(server: RewardServer) -> Iterator[RewardServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[RewardServer]:
    with serving(RewardServer(length)) as server:
        yield server


SLOW_S = 4.0  # how long a slow answer takes


def timeout_of(fault: str) -> float:
    """A timeout that a slow answer exceeds, and that no other answer does on a busy machine."""
    return 1.5 if fault == "slow" else 10.0


def source_of(url: str, **settings: Any) -> RewardSourceConfig:
    return RewardSourceConfig(type="http", url=url, **({"timeout_s": 10.0, "concurrency": 1} | settings))


def asked(url: str, **settings: Any) -> list[float | Fault]:
    return HTTPReward(source_of(url, **settings), key=KEY).score(FOUR)


def test_llama_factory_is_sent_whole_conversations(server: RewardServer) -> None:
    assert asked(server.url, model="judge-7b") == [1.0, 2.0, 3.0, 4.0]
    texts = ["policy template: q" + "a" * n for n in (1, 2, 3, 4)]
    assert server.bodies == [{"model": "judge-7b", "messages": texts}]
    assert server.authorisations == [None]


def test_openrlhf_is_sent_queries_prompts_and_labels(server: RewardServer) -> None:
    source = HTTPReward(source_of(server.url, format="openrlhf"), key=KEY)
    assert source.score([*FOUR[:2], rollout("other", "aaa", row={})]) == [1.0, 2.0, 3.0]
    prompts = ["policy template: q", "policy template: q", "policy template: other"]
    queries = [prompt + "a" * n for prompt, n in zip(prompts, (1, 2, 3), strict=True)]
    assert server.bodies == [{"query": queries, "prompts": prompts, "labels": ["gold 0", "gold 1", ""]}]


@pytest.mark.parametrize(
    ("format", "answer", "expected"),
    [
        ("openrlhf", {"rewards": [1, 2, 3, 4], "scores": [0, 0, 0, 0]}, [1.0, 2.0, 3.0, 4.0]),
        ("openrlhf", {"scores": [1, True, 3.5, 4]}, [1.0, 1.0, 3.5, 4.0]),
        ("llamafactory", {"scores": [1, 2, 3, 4]}, [1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_scores_are_found_where_each_format_has_them(
    format: str, answer: dict[str, Any], expected: list[float], server: RewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "answer", lambda body: answer)
    assert asked(server.url, format=format) == expected


def test_requests_are_sent_at_the_same_time_up_to_the_limit() -> None:
    meeting = threading.Barrier(2, timeout=5)

    def together(prompts: Any, responses: Any, rows: Any) -> list[float]:
        meeting.wait()
        return length(prompts, responses, rows)

    with serving(RewardServer(together)) as server:
        assert asked(server.url, concurrency=2) == [1.0, 2.0, 3.0, 4.0]
        assert sorted(len(body["messages"]) for body in server.bodies) == [2, 2]


def test_slices_by_hand() -> None:
    rollouts = [*FOUR, rollout("q", "a")]
    assert [len(part) for part in slices(rollouts, 2)] == [3, 2]
    assert [one for part in slices(rollouts, 2) for one in part] == rollouts
    assert [len(part) for part in slices(rollouts, 8)] == [1] * 5
    assert [len(part) for part in slices(rollouts, 1)] == [5]


def test_a_token_is_sent_and_never_shown(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "s3cret\n")
    assert asked(server.url)[0] == 1.0
    assert server.authorisations == ["Bearer s3cret"]
    monkeypatch.setattr(server, "answer", lambda body: {"your token": "s3cret"})
    with pytest.raises(SourceError) as caught:
        asked(f"{server.url}/score?key=hidden".replace("http://", "http://user:word@"))
    assert f"{KEY}.url {server.url}/score answered something else" in str(caught.value)
    assert not any(secret in str(caught.value) for secret in ("s3cret", "hidden", "word"))
    monkeypatch.setattr(server, "answer", lambda body: {"scores": ["Bearer s3cret"] * 4})
    faults = asked(server.url)
    assert all(isinstance(fault, Fault) and "answered 'Bearer ...'" in fault.message for fault in faults)
    monkeypatch.setenv(TOKEN_VARIABLE, "s3c\nret")
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE) as refused:
        asked(server.url)
    assert "ret'" not in str(refused.value)


CAUSES = {
    "slow": r"did not answer within 1.5 s; raise reward.sources\[0\].timeout_s",
    "500": "answered 500 .*: the model ran out of memory",
    "length": "answered 3 scores for 4 texts",
    "not_json": r"answered no JSON \(text/html\): <html>Welcome",
    "close": "RemoteDisconnected: .*; see that the server runs",
}


@pytest.mark.parametrize("fault", CAUSES)
def test_a_request_that_fails_has_no_scores(fault: str) -> None:
    """(PPO details 13)"""
    with serving(RewardServer(length, faults=[fault], slow_s=SLOW_S)) as server:
        with pytest.raises(SourceError, match=rf"^{re.escape(f'{KEY}.url {server.url}')}:? {CAUSES[fault]}"):
            asked(server.url, timeout_s=timeout_of(fault))
        assert asked(server.url) == [1.0, 2.0, 3.0, 4.0]


def test_one_score_that_is_no_number_is_a_fault_of_its_rollout() -> None:
    """(PPO details 13)"""
    with serving(RewardServer(length, faults=["nan"])) as server:
        *scores, fault = asked(server.url)
    assert scores == [1.0, 2.0, 3.0]
    assert fault == Fault(f"{KEY}.url {server.url} answered nan at position 3 (prompt 3, sample 1)")


@pytest.mark.parametrize("value", ["4", None, [4.0], {}, 1e400])
def test_no_other_value_is_taken_for_a_score(value: Any, server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """(PPO details 13)"""
    monkeypatch.setattr(server, "answer", lambda body: {"scores": [1, 2, 3, value]})
    *scores, fault = asked(server.url)
    assert scores == [1.0, 2.0, 3.0]
    assert isinstance(fault, Fault)


@pytest.mark.parametrize("answer", [{}, {"rewards": [1, 2, 3, 4]}, {"scores": 1}, {"scores": None}])
def test_an_answer_in_another_form_has_no_scores(
    answer: Any, server: RewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(PPO details 13)"""
    monkeypatch.setattr(server, "answer", lambda body: answer)
    with pytest.raises(SourceError, match=r"an object with a list under scores, as .*\.format=llamafactory says"):
        asked(server.url)


def test_of_several_requests_only_the_failed_one_is_made_again() -> None:
    with serving(RewardServer(length, faults=["500"])) as server:
        waits: list[float] = []
        config = RewardConfig(sources=(source_of(server.url, concurrency=2),))
        rewards = Rewards(config, trained=None, device="cpu", sleep=waits.append)
        assert [one.score for one in rewards.score(FOUR)] == [1.0, 2.0, 3.0, 4.0]
        assert rewards.num_retries == 1
        assert sum(len(body["messages"]) for body in server.bodies) == 6, "two of four rollouts were sent again"


@pytest.mark.parametrize("fault", [*CAUSES, "nan"])
def test_after_a_fault_the_next_try_gives_the_scores(fault: str) -> None:
    with serving(RewardServer(length, faults=[fault], slow_s=SLOW_S)) as server:
        sources = (source_of(server.url, timeout_s=timeout_of(fault)),)
        rewards = Rewards(RewardConfig(sources=sources, backoff_s=0), trained=None, device="cpu")
        assert [one.score for one in rewards.score(FOUR)] == [1.0, 2.0, 3.0, 4.0]
        assert rewards.num_retries == 1


@pytest.mark.parametrize("fault", [*CAUSES, "nan"])
@pytest.mark.parametrize("on_failure", ["stop", "drop"])
def test_when_every_try_fails_the_run_stops_or_the_rollouts_are_dropped_and_none_scores_zero(
    fault: str, on_failure: str
) -> None:
    """(PPO details 13)"""
    with serving(RewardServer(length, faults=[fault] * 8, slow_s=SLOW_S)) as server:
        sources = (source_of(server.url, timeout_s=timeout_of(fault)),)
        config = RewardConfig(sources=sources, on_failure=on_failure, retries=1, backoff_s=0)
        rewards = Rewards(config, trained=None, device="cpu")
        message = rf"^reward.sources\[0\] \(http\) gave prompt {3 if fault == 'nan' else 0}, sample 1 no score after 2"
        if on_failure == "stop":
            with pytest.raises(SourceError, match=message):
                rewards.score(FOUR)
            return
        judged = rewards.score(FOUR)
        kept = [1.0, 2.0, 3.0] if fault == "nan" else []
        assert [one.score for one in judged] == kept + [None] * (4 - len(kept))
        assert all(re.match(message.replace("0, sample", r"\d, sample"), str(one.fault)) for one in judged[len(kept) :])
        assert rewards.num_retries == 1


def test_nobody_listening_is_named_with_the_remedy() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/score"
        with pytest.raises(SourceError, match=rf"^{re.escape(KEY)}\.url {url}: ConnectionRefusedError: .* server runs"):
            asked(url)


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_an_answer_that_says_that_the_settings_are_wrong_is_a_wrong_setting(
    status: int, server: RewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = server.RequestHandlerClass
    monkeypatch.setattr(handler, "do_POST", lambda self: self.send_error(status))
    with pytest.raises(ConfigError, match=rf"^{re.escape(KEY)}.url=.*{status} .*{TOKEN_VARIABLE}"):
        asked(server.url)


def test_a_redirect_is_not_followed(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def redirect(handler: Any) -> None:
        handler.send_response(302)
        handler.send_header("Location", server.url)
        handler.end_headers()

    monkeypatch.setattr(server.RequestHandlerClass, "do_POST", redirect)
    with pytest.raises(SourceError, match="answered 302"):
        asked(server.url)


@pytest.mark.parametrize("url", ["http://", "http://127.0.0.1:x/", "http://[::1"])
def test_an_address_that_is_none_is_a_wrong_setting(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a server"):
        asked(url)


def test_the_server_runs_from_the_command_line_with_its_faults_in_turn() -> None:
    command = [sys.executable, "-u", "examples/reward_server.py", "--port", "0", "--faults", "500,ok"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split()[-1]
        try:
            assert line == f"scoring with examples.functions:brevity at {url}\n"
            with pytest.raises(SourceError, match="500"):
                asked(url, format="openrlhf")
            # brevity: half as much at every hundred characters of the response.
            expected = [0.5 ** (n / 100) for n in (1, 2, 3, 4)]
            assert asked(url, format="openrlhf") == pytest.approx(expected)
        finally:
            process.terminate()
    done = subprocess.run([*command[:-1], "fire"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"fire is none of {', '.join(FAULTS)}" in done.stderr


def test_the_server_says_what_a_request_lacks(server: RewardServer) -> None:
    answer = requests.post(server.url, json={"query": []}, timeout=10)
    assert answer.status_code == 400
    assert "prompts" in answer.text
