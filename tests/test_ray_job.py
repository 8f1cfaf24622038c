"""The way in on a cluster: `ray job submit` to one that runs already, with real Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runs import ENVIRONMENT, PROJECT, SMALL, metrics_of, reached, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.system]

RAY = str(Path(sys.executable).with_name("ray"))
OPEN = {"RAY_AUTH_MODE": "disabled"}  # on both sides: a cluster of the test alone
GRACE = {"env_vars": {**ENVIRONMENT, "RAY_JOB_STOP_WAIT_TIME_S": "60"}}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A head node: where jobs are submitted to, and where its cluster is joined."""

    jobs: str
    cluster: str


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Yield a head node; it is a child of this process, and is killed with the tests."""
    port, gcs = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # short, as for sockets
        log = (tmp_path_factory.mktemp("head") / "log").open("w")
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--num-cpus=4", f"--port={gcs}", f"--temp-dir={folder}",
             f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"],
            env=os.environ | ENVIRONMENT | OPEN, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}"
            assert wait_for(lambda: job(address, "list").returncode == 0, seconds=120), Path(log.name).read_text()
            yield Head(address, f"127.0.0.1:{gcs}")
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started ends with it; asked to, it takes half a minute
            process.wait(60)


def job(address: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RAY, "job", words[0], f"--address={address}", *words[1:]],
        cwd=PROJECT, env=os.environ | OPEN, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def submit(address: str, *words: str, wait: bool = True) -> tuple[str, subprocess.CompletedProcess[str]]:
    """Submit a run as a user does; return the job's id and what was printed."""
    name = f"run_{free_port()}"
    options = ["--working-dir=.", f"--submission-id={name}", f"--runtime-env-json={json.dumps(GRACE)}"]
    options += [] if wait else ["--no-wait"]
    done = job(address, "submit", *options, "--", sys.executable, "launch.py", *words)
    return name, done


def status(address: str, name: str) -> str:
    code = (
        f"from ray.job_submission import JobSubmissionClient as C; print(C({address!r}).get_job_status({name!r}).value)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | OPEN, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def free_cores(head: Head) -> float:
    """Return how many of the cluster's cores nobody has reserved."""
    code = (
        f"import ray; ray.init({head.cluster!r}, logging_level='ERROR', log_to_driver=False); "
        "print('CORES', ray.available_resources().get('CPU', 0.0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | OPEN, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split("CORES")[1])


def test_submit_follow_stop_and_go_on(head: Head, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*SMALL, f"run.dir={run_dir}", "resume=auto", "sft.num_steps=150", "checkpoint.every=5"]
    name, submitted = submit(head.jobs, *words, wait=False)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    reached_it = wait_for(lambda: reached(run_dir, "sft", 5), seconds=300)
    assert reached_it, job(head.jobs, "logs", name).stdout
    assert job(head.jobs, "stop", name).returncode == 0
    assert wait_for(lambda: status(head.jobs, name) == "STOPPED", seconds=90)
    log = job(head.jobs, "logs", name).stdout
    assert "sft" in log, "what a terminal would show"
    assert "everything up to here is saved" in log
    assert wait_for(lambda: free_cores(head) == 4.0, seconds=120), "what a job has reserved goes with it"
    assert not (run_dir / "summary.json").exists()

    _, again = submit(head.jobs, *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on from" in again.stdout
    assert "succeeded" in again.stdout + again.stderr
    assert json.loads((run_dir / "summary.json").read_text())["experiment"] == "quickstart"
    steps = [(row["stage"], row["step"]) for row in metrics_of(run_dir)]
    assert steps == [
        *(("sft", step) for step in range(1, 151)),
        *(("reward", step) for step in range(1, 4)),
        *(("ppo", step) for step in range(4)),
    ], "each step once"


def test_a_mistake_ends_the_job_with_its_message(head: Head) -> None:
    _, done = submit(head.jobs, *SMALL, "run.dir=runs/here")
    assert done.returncode == 1, "as ray says of every job that failed"
    assert "run.dir='runs/here': a job runs in a copy of the project that Ray deletes" in done.stdout + done.stderr


def test_the_upload_is_small(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(PROJECT), package, include_gitignore=True)
    assert package.stat().st_size < 2 << 20
    with zipfile.ZipFile(package) as content:
        names = content.namelist()
    for needed in ("launch.py", "conf/config.yaml", "examples/tiny_llama/config.json", "cluster/stages.py"):
        assert any(name.endswith(needed) for name in names), needed
    for left_out in (".venv/", ".git/", "runs/", "tests/", "checkpoints/"):
        assert not any(f"/{left_out}" in f"/{name}" for name in names), left_out
