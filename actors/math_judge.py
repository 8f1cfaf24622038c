"""Whether two answers are equal as mathematics, judged by the package math-verify in a process of its own.

A response of the policy may hold an expression that takes for ever (9^{9^{9^9}}). math-verify's own time limit is a
signal, which works in a main thread alone, and a Ray actor may not run in one. Here the operating system ends the
process when its processor time is up, whatever it computes, and the next answer gets a new one. Run as a script this
file is that process, so it imports the standard library alone until then.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from actors.reward_source import Fault

LIMIT_S = 5.0  # of processor time, for reading both answers and comparing them
UNREADABLE = "unreadable"  # what the process says of a right answer in which it finds no mathematics
_MARKS = ("$", r"\boxed", r"\(", r"\[", r"\begin")  # one of them says where the mathematics is


class MathJudge:
    """Compares answers, one at a time from whatever thread; the process starts with the first."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None

    def verdict(self, answer: str | float, response: str) -> float | Fault:
        """1.0 if the response holds an answer that equals `answer`, 0.0 if not; a fault if that cannot be said.

        A fault is a right answer that cannot be read, or a comparison of more than `limit_s` seconds.
        Raises RuntimeError if math-verify cannot be started.
        """
        from actors.reward_source import Fault

        text = answer if isinstance(answer, str) else format(Decimal(str(answer)), "f")
        with self._lock:
            verdict = self._ask(as_latex(text), response)
        if verdict is None:
            return Fault(f"math-verify took more than {self.limit_s:g} s to compare with {text!r:.100}", True)
        if verdict == UNREADABLE:
            return Fault(f"math-verify finds no mathematics in the right answer {text!r:.100}", True)
        return float(verdict)

    def close(self) -> None:
        """Ends the process. The next verdict starts another."""
        with self._lock:
            self._end()

    def _ask(self, answer: str, response: str) -> Any:
        """What the process answers; None if it was ended over it."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([answer, response]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        status = self._end()
        if status != -signal.SIGPROF:
            raise RuntimeError(f"the process that runs math-verify ended with status {status}")
        return None

    def _start(self) -> subprocess.Popen[str]:
        # -P: this file's folder is no place to import from, or our modules would hide others of the same name.
        command = [sys.executable, "-P", str(Path(__file__)), str(self.limit_s)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        assert process.stdout is not None
        self._process = process
        if process.stdout.readline() != "ready\n":
            status = self._end()
            raise RuntimeError(f"math-verify could not be started (status {status}); see its message above")
        return process

    def _end(self) -> int | None:
        if self._process is None:
            return None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what it did not read is of no use any more
            self._process.stdin.close()
        status = self._process.wait()
        self._process = None
        return status


def as_latex(answer: str) -> str:
    """`answer` marked as mathematics as a whole, unless it says itself where its mathematics is."""
    return answer if any(mark in answer for mark in _MARKS) else rf"\boxed{{{answer}}}"


def judge(answer: str, response: str) -> float | str:
    """1.0 or 0.0, or UNREADABLE. A response that cannot be compared with the answer does not equal it."""
    from math_verify import verify

    right = _read(answer)
    if not right:
        return UNREADABLE
    return float(verify(right, _read(response), timeout_seconds=None))


@lru_cache(maxsize=1024)  # all samples of a prompt have the same right answer
def _read(text: str) -> list[Any]:
    from math_verify import parse

    found: list[Any] = parse(text, fallback_mode="no_fallback", parsing_timeout=None)
    return found


def serve(requests: TextIO, answers: TextIO, limit_s: float, judged: Callable[[str, str], float | str]) -> None:
    """Answers each line of `requests` on a line of `answers`; ended by SIGPROF if one takes more than `limit_s`."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    judged("1", "1")  # what the first use alone has to do
    print("ready", file=answers, flush=True)
    for line in requests:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        answer = judged(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    import logging

    logging.disable(logging.WARNING)  # that no time limit is set, each time
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = sys.stderr  # what a library prints is no answer
    serve(sys.stdin, channel, float(sys.argv[1]), judge)
