"""One run at a time on a folder, and no lock that outlives its holder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.run_lock import run_lock
from conf.schema import ConfigError

PROJECT = Path(__file__).resolve().parent.parent
HOLD = """
import subprocess, sys, time
from pathlib import Path
from cluster.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "30"]) if sys.argv[2:] else None
    print(child.pid if child else 0, flush=True)
    time.sleep(60)
"""


def holder(folder: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """A process that holds the folder, and the id of its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *arguments], cwd=PROJECT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_second_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    process, _ = holder(tmp_path)
    try:
        with pytest.raises(ConfigError) as refused, run_lock(tmp_path):
            pytest.fail("two runs on one folder")
    finally:
        process.kill()
        process.wait()
    assert refused.value.key == "run.dir"
    assert f"process {process.pid} on {socket.gethostname()} is at work on a run there" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_goes_with_its_holder_even_if_a_child_lives_on(tmp_path: Path, number: signal.Signals) -> None:
    process, child = holder(tmp_path, "with a child")
    try:
        process.send_signal(number)
        process.wait()
        assert (tmp_path / ".lock").read_text().startswith(f"process {process.pid} ")
        with run_lock(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_lock_is_given_back_after_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        _ = 1 / 0
    with run_lock(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} "), run_lock(tmp_path):
        pytest.fail("two runs on one folder")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ConfigError, match=r"nothing can be written there \(Is a directory\)"), run_lock(tmp_path):
        pytest.fail("no lock")
