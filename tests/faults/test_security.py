"""What is never run, never shown and never answered: code in files, secrets, and requests without the token.

The source is read for the first; a real Ray cluster and a real server are asked for the others. About half a minute.
"""

from __future__ import annotations

import ast
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests

from actors.reward_http import TOKEN_VARIABLE, Secret, reward_token
from conf.schema import ClusterConfig, ConfigError, GeneratorConfig, RewardConfig, RewardSourceConfig
from examples.reward_server import REMEMBERED, RewardServer
from tests.reward_rollouts import rollout
from tests.test_reward_http import serving

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("actors", "learner", "cluster", "conf", "examples", "benchmarks")
SOURCES = [Path("launch.py"), *sorted(p.relative_to(ROOT) for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))]


def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def calls(path: Path) -> Iterator[tuple[str, ast.Call, str]]:
    """Each call: what is called, as it is written; the call; and the function that it stands in."""

    def walk(node: ast.AST, inside: str) -> Iterator[tuple[str, ast.Call, str]]:
        for child in ast.iter_child_nodes(node):
            name = child.name if isinstance(child, ast.FunctionDef) else inside
            if isinstance(child, ast.Call):
                yield ast.unparse(child.func), child, name
            yield from walk(child, name)

    yield from walk(parsed(path), "")


# Code in files --------------------------------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUN_TEXT = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
LOAD = re.compile(r"(?:^|\.)(?:torch\.load|np\.load|numpy\.load|yaml\.(?:unsafe_|full_)?load(?:_all)?|torch_load)$")


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_that_is_read_can_run_code(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not UNPICKLERS & {module.split(".")[0] for module in modules}, f"{path} imports {modules}"
    for name, call, _ in calls(path):
        assert name not in RUN_TEXT, f"{path}:{call.lineno} calls {name}"
        assert not LOAD.search(name), f"{path}:{call.lineno} calls {name}"
        shell = [keyword for keyword in call.keywords if keyword.arg in ("shell", "allow_pickle", "weights_only")]
        assert not shell, f"{path}:{call.lineno} passes {shell[0].arg}"


def test_the_scan_finds_what_it_is_for() -> None:
    assert all(LOAD.search(name) for name in ("torch.load", "np.load", "yaml.load", "yaml.unsafe_load"))
    assert not any(LOAD.search(name) for name in ("json.loads", "yaml.safe_load", "OmegaConf.load", "load_file"))
    assert len(SOURCES) > 60


NO_CODE = ("GenerationConfig", "PeftConfig", "PeftModel")  # their files hold numbers alone
OFF = {
    ("learner/models.py", "initial_causal_lm"),
    ("benchmarks/learner.py", "__init__"),  # models that the benchmarks have made
    ("benchmarks/trl_ppo.py", "main"),
    ("benchmarks/trl_ppo.py", "model"),
}  # whatever the setting says


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_code_of_a_checkpoint_runs_only_where_the_setting_says_so(path: Path) -> None:
    for name, call, inside in calls(path):
        owner, _, method = name.rpartition(".")
        if method not in ("from_pretrained", "from_config") or owner in NO_CODE:
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        where = f"{path}:{call.lineno} ({inside})"
        if method == "from_pretrained" and (str(path), inside) not in OFF:
            asked = given.get("trust_remote_code", "nothing, which leaves it off whatever the setting says")
            assert asked.endswith("trust_remote_code"), f"{where} passes {asked}"
        if "ModelFor" in owner and method == "from_pretrained":
            assert given.get("use_safetensors") == "True", f"{where} would read a pickle"


def test_vllm_is_told_to_read_safetensors_alone() -> None:
    found = {}
    for path in (Path("actors/generator.py"), Path("actors/reward_vllm.py")):
        for name, call, _ in calls(path):
            if name in ("EngineArgs", "LLM"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                found[name] = (given.get("load_format"), given.get("trust_remote_code"))
    assert found == dict.fromkeys(("EngineArgs", "LLM"), ("'safetensors'", "trust_remote_code"))


# The reward server of the examples ------------------------------------------------------------------------------------


def ones(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    if "raise" in responses:
        raise ValueError("no score for this")
    return [1.0 for _ in responses]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_the_server_listens_on_this_machine_alone_unless_it_has_a_token() -> None:
    with RewardServer(ones) as server:
        assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(ValueError, match=r"0\.0\.0\.0 can be reached from other machines: set a token"):
        RewardServer(ones, host="0.0.0.0")
    RewardServer(ones, host="0.0.0.0", token="t").server_close()


def test_the_command_takes_no_token_on_its_command_line_and_asks_for_one_to_be_reached() -> None:
    command = [sys.executable, "examples/reward_server.py", "--port", "0", "--host", "0.0.0.0"]
    environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"--host: 0.0.0.0 can be reached from other machines; set {TOKEN_VARIABLE}" in done.stderr
    assert "--token" not in done.stderr


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "s3cret", "Basic s3cret", "Bearer ö", "bearer s3cre"]
)
def test_without_the_token_nothing_is_answered_or_looked_at(header: str | None) -> None:
    with serving(RewardServer(ones, token="s3cret")) as server:
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        answer = requests.post(server.url, json={"messages": ["a"]}, headers=headers, timeout=10)
        assert answer.status_code == 401
        assert "a bearer token is needed" in answer.text
        assert "s3cret" not in answer.text
        assert server.bodies == []


def test_with_the_token_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.reward import make_source

    monkeypatch.setenv(TOKEN_VARIABLE, "another")
    with serving(RewardServer(ones, token="s3cret")) as server:
        config = RewardSourceConfig(type="http", url=server.url)
        source = make_source(config, key="reward.sources[0]", device="cpu", token=Secret("s3cret"))
        assert source.score([rollout("q", "a")]) == [1.0]
        with pytest.raises(ConfigError, match=rf"answers 401 .*{TOKEN_VARIABLE}"):
            make_source(config, key="reward.sources[0]", device="cpu").score([rollout("q", "a")])


def test_a_request_that_is_too_large_is_refused_before_it_is_read() -> None:
    with serving(RewardServer(ones, max_bytes=1000)) as server:
        assert requests.post(server.url, json={"messages": ["a" * 900]}, timeout=10).status_code == 200
        answer = requests.post(server.url, json={"messages": ["a" * 200_000]}, timeout=10)
        assert answer.status_code == 413
        assert "a request has 1000 bytes at most; lower reward.batch_size" in answer.text
        assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        ("Content-Length: 10", b"not json..", 400),
        ("Content-Length: 2", b"[]", 400),
        ("Content-Length: 100000", b"[" * 100_000, 400),
        ("Content-Length: -5", b"", 411),
        ("Content-Length: 1e3", b"", 411),
        ("X: y", b"", 411),
        ("Transfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n", 411),
    ],
)
def test_a_request_that_is_none_is_answered_and_does_no_harm(head: str, body: bytes, status: int) -> None:
    with serving(RewardServer(ones)) as server:
        with socket.create_connection(server.server_address[:2], timeout=10) as client:  # type: ignore[arg-type]
            client.sendall(f"POST / HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
            assert client.recv(1000).split()[1] == str(status).encode()
        assert requests.post(server.url, json={"messages": ["a"]}, timeout=10).json() == {"scores": [1.0]}


def test_a_client_that_is_slow_is_let_go() -> None:
    with (
        serving(RewardServer(ones, client_timeout_s=2.0)) as server,
        socket.create_connection(server.server_address[:2], timeout=10) as client,  # type: ignore[arg-type]
    ):
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        start = time.monotonic()
        assert b" 408 " in client.recv(1000)
        assert time.monotonic() - start < 7


def test_a_client_that_sends_drop_by_drop_is_let_go() -> None:
    with (
        serving(RewardServer(ones, client_timeout_s=2.0)) as server,
        socket.create_connection(server.server_address[:2], timeout=10) as client,  # type: ignore[arg-type]
    ):
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        done = threading.Event()

        def drops() -> None:
            while not done.wait(0.05):
                try:
                    client.sendall(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=drops)
        thread.start()
        assert b" 408 " in client.recv(1000)
        done.set()
        thread.join()


def test_a_function_that_raises_is_an_answer() -> None:
    with serving(RewardServer(ones)) as server:
        answer = requests.post(server.url, json={"messages": ["raise"]}, timeout=10)
        assert answer.status_code == 500
        assert answer.text == "the reward function raised ValueError: no score for this"


def test_the_server_does_not_grow_with_what_it_is_asked() -> None:
    with RewardServer(ones) as server:
        for number in range(3 * REMEMBERED):
            server.take({"messages": [str(number)]}, None)
        assert len(server.bodies) == len(server.authorisations) == REMEMBERED
        assert server.bodies[-1] == {"messages": [str(3 * REMEMBERED - 1)]}


# Secrets --------------------------------------------------------------------------------------------------------------


def test_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, " s3cret\n")
    token = reward_token()
    assert token == Secret("s3cret")
    assert "s3cret" not in f"{token} {token!r} {[token]}"
    monkeypatch.delenv(TOKEN_VARIABLE)
    assert reward_token() == Secret("")


def test_no_secret_is_in_what_a_run_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings as they are saved, and what W&B writes down of the machine and of its environment."""
    from dataclasses import asdict

    from cluster.tracking import Tracker
    from conf.load import load_config, to_yaml

    mark = f"planted{uuid.uuid4().hex}"
    for name in VARIABLES:
        monkeypatch.setenv(name, f"{mark}{name}")
    config = load_config(["experiment=quickstart", "tracking.wandb=offline", "tracking.tensorboard=true"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    with Tracker(tmp_path, config.tracking, name="x", resolved_config=asdict(config)) as tracker:
        tracker.log("ppo", 1, {"policy/loss": 1.0})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [str(path) for path in files if mark.encode() in path.read_bytes()] == []


VARIABLES = (TOKEN_VARIABLE, "WANDB_API_KEY", "HF_TOKEN")


class Cluster:
    """What was seen while a cluster of a run's own scored a rollout with a reward actor."""

    def __init__(self, mark: str) -> None:
        import ray

        from cluster.rewards import RewardProcess, RewardSetup
        from cluster.session import ray_session

        limits = ClusterConfig(device="cpu")
        with (
            serving(RewardServer(ones, token=f"{mark}{TOKEN_VARIABLE}")) as server,
            ray_session(limits, GeneratorConfig()) as session,
            session.placed({"reward": RewardProcess}) as placement,
        ):
            config = RewardConfig(sources=(RewardSourceConfig(type="http", url=server.url),))
            setup = RewardSetup(config, None, None, "cpu", False, reward_token())
            process = placement.start(RewardProcess, placement.places("reward")[0])
            ray.get(process.start.remote(setup))
            ((judged,), _) = ray.get(process.score.remote([rollout("q", "a")]))
            self.score = judged.score
            self.environment = placement.environment
            self.mode = os.environ.get("RAY_AUTH_MODE")
            address = ray.get_runtime_context().gcs_address
            self.token = os.environ["RAY_AUTH_TOKEN"]
            self.without_token = gcs_status(address)
            self.with_another = gcs_status(address, "Bearer " + "0" * 64)
            self.with_token = gcs_status(address, f"Bearer {self.token}")
            self.command_lines = b"".join(command_lines())
            self.logs = Path(ray._private.worker._global_node.get_session_dir_path())
        self.files = {str(path): path.read_bytes() for path in self.logs.rglob("*") if path.is_file()}


def gcs_status(address: str, authorisation: str | None = None) -> str:
    """How the head of the cluster answers the first thing that a driver asks."""
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        metadata = [] if authorisation is None else [("authorization", authorisation)]
        try:
            ask(b"", timeout=60, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes()
        except OSError:  # it has ended
            continue


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Cluster]]:
    mark = f"planted{uuid.uuid4().hex}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        for name in VARIABLES:
            patch.setenv(name, f"{mark}{name}")
        yield mark, Cluster(mark)


@pytest.mark.ray
def test_the_token_of_the_reward_server_reaches_the_reward_actor(cluster: tuple[str, Cluster]) -> None:
    assert cluster[1].score == 1.0


@pytest.mark.ray
@pytest.mark.parametrize("name", VARIABLES)
def test_no_secret_is_in_a_log_of_ray_or_on_a_command_line(cluster: tuple[str, Cluster], name: str) -> None:
    mark, seen = cluster
    assert len(seen.files) > 5
    assert [path for path, content in seen.files.items() if f"{mark}{name}".encode() in content] == []
    assert f"{mark}{name}".encode() not in seen.command_lines
    assert mark not in repr(seen.environment)


@pytest.mark.ray
def test_the_token_of_the_cluster_is_in_no_log_of_ray_and_on_no_command_line(cluster: tuple[str, Cluster]) -> None:
    token = cluster[1].token.encode()
    assert len(token) == 64
    assert [path for path, content in cluster[1].files.items() if token in content] == []
    assert token not in cluster[1].command_lines
    assert "RAY_AUTH_TOKEN" not in os.environ, "it is gone with the cluster"


@pytest.mark.ray
def test_a_cluster_answers_only_those_who_have_its_token(cluster: tuple[str, Cluster]) -> None:
    seen = cluster[1]
    assert seen.mode == "token"
    assert (seen.without_token, seen.with_another, seen.with_token) == ("UNAUTHENTICATED", "UNAUTHENTICATED", "OK")


def test_an_address_without_a_cluster_is_one_message_at_once() -> None:
    from cluster.session import ray_session

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        start = time.monotonic()
        message = rf"^cluster\.address='{re.escape(address)}': no Ray cluster answers there"
        with (
            pytest.raises(ConfigError, match=message),
            ray_session(ClusterConfig(device="cpu", address=address), GeneratorConfig()),
        ):
            pass
    assert time.monotonic() - start < 10
