"""What a signal does to a run: at once where nothing would be lost, after the step at hand where steps are taken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from cluster.signals import Stopped, StopRequest, kept_from_children


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A request that was made keeps its handlers, since the process is about to end; this one is not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def request(grace_s: float = 60.0) -> StopRequest:
    return StopRequest(grace_s=grace_s, note=lambda text: None)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_outside_the_steps_the_run_stops_at_once(signum: int, code: int) -> None:
    with pytest.raises(Stopped) as caught, request().listening():
        os.kill(os.getpid(), signum)
    assert caught.value.exit_code(saved=True) == code


def test_between_steps_the_loop_is_asked_to_stop_and_nothing_is_raised() -> None:
    stop = request()
    with stop.listening(), stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers send it twice
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def sleep_after_sigterm(stop: StopRequest, *, seconds: float) -> None:
    with stop.listening(), stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)


def test_a_step_that_outlasts_the_grace_time_is_given_up() -> None:
    stop = request(grace_s=0.4)
    with pytest.raises(Stopped) as caught:
        sleep_after_sigterm(stop, seconds=5)
    assert caught.value.exit_code(saved=False) == 143


def test_the_handlers_of_before_come_back_if_nobody_asked() -> None:
    before = signal.getsignal(signal.SIGINT)
    with request().listening():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_a_time_limit_does_not_come_between_the_stop_and_its_end() -> None:
    stop = request(grace_s=4.0)
    with stop.listening(), stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        stopped = stop.stop()
        time.sleep(2.5)
    assert stop.stopped is stopped


def test_a_sigterm_after_ctrl_c_has_its_time_limit() -> None:
    stop = request()
    with stop.listening(), stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 55


def sleep(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.ray
def test_a_wait_of_rays_ends_with_the_signal_and_not_with_the_wait() -> None:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    stop, sleeping = request(), ray.remote(sleep).remote(60.0)
    start = time.monotonic()
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    try:
        with pytest.raises(KeyboardInterrupt), stop.listening():
            ray.get(sleeping, timeout=50)
    finally:
        ray.shutdown()
    assert stop.stopped is not None
    assert stop.stopped.exit_code(saved=True) == 0
    assert time.monotonic() - start < 25


SECOND = """
import os, signal, sys, time
from cluster.signals import StopRequest
stop = StopRequest(grace_s=60, note=lambda text: None)
with stop.listening(), stop.deferred():
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
"""


def test_a_second_ctrl_c_leaves_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert done.stdout == "still here\n"


def test_processes_that_are_started_apart_do_not_hear_the_scheduler() -> None:
    with kept_from_children():
        child = subprocess.Popen(["sleep", "30"])
    child.terminate()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
    finally:
        child.kill()
        child.wait()
