"""A small reward server: scores texts with a Python function, in the formats of LLaMA-Factory and of OpenRLHF.

    python examples/reward_server.py --port 8000 --function examples.functions:brevity

and in the settings a source of scores of type http, with url http://127.0.0.1:8000 and format llamafactory or openrlhf.
Needs the standard library alone, so it can be copied to where the scores are made. It answers this machine alone,
unless `--host` names another address; then, and whenever the environment variable MANTA_REWARD_TOKEN is set, it asks
for that as a bearer token, which a run sends if it has the same variable. There is no encryption: over a network that
is not yours, put a proxy in front that has it. With `--faults` it answers wrongly, one fault a request in turn, which
shows what a run does when its server fails.
"""

from __future__ import annotations

import argparse
import hmac
import importlib
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

TOKEN_VARIABLE = "MANTA_REWARD_TOKEN"
LOOPBACK = ("127.0.0.1", "localhost")
MAX_BYTES = 64 << 20  # of a request
CLIENT_TIMEOUT_S = 30.0  # for a client to send its whole request
LINGER_S = 2.0  # for a client that is refused to stop sending, or it would not see why
REMEMBERED = 100  # requests
FAULTS = ("ok", "slow", "500", "length", "nan", "not_json", "close")

Function = Callable[[list[str], list[str], list[Mapping[str, Any]]], Sequence[float]]


class RewardServer(ThreadingHTTPServer):
    """Listens on `port` of `host` (0: a free one, which `url` names) and scores what is posted to it.

    `function` is called with prompts, responses and rows as a reward function is. LLaMA-Factory's format has the whole
    conversation as one text, which is passed as the response of an empty prompt; OpenRLHF's has the label, which is
    passed as the answer of the row. With a `token` only requests that bear it are answered. A request of more than
    `max_bytes`, or that takes longer than `client_timeout_s` to arrive, is refused. `faults` are what the first
    requests meet, in turn; later ones are answered well.
    """

    daemon_threads = True

    def __init__(
        self,
        function: Function,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        token: str = "",
        max_bytes: int = MAX_BYTES,
        client_timeout_s: float = CLIENT_TIMEOUT_S,
        faults: Iterable[str] = (),
        slow_s: float = 5.0,
    ) -> None:
        """Raises ValueError for a host that others can reach without a token, OSError for a port that is taken."""
        if host not in LOOPBACK and not token:
            raise ValueError(f"{host} can be reached from other machines: set a token")
        super().__init__((host, port), _Handler)
        self.function, self.slow_s = function, slow_s
        self.max_bytes, self.client_timeout_s = max_bytes, client_timeout_s
        self.bodies: list[Mapping[str, Any]] = []  # of the last requests
        self.authorisations: list[str | None] = []
        self._expected = f"Bearer {token}".encode() if token else None
        self._faults, self._lock = iter(faults), Lock()

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def admits(self, authorisation: str | None) -> bool:
        """Whether a request with this header may be answered; the time that takes says nothing of the token."""
        return self._expected is None or hmac.compare_digest((authorisation or "").encode(), self._expected)

    def take(self, body: Mapping[str, Any], authorisation: str | None) -> str:
        """Notes a request; the fault that it meets."""
        with self._lock:
            self.bodies.append(body)
            self.authorisations.append(authorisation)
            del self.bodies[:-REMEMBERED], self.authorisations[:-REMEMBERED]
            return next(self._faults, "ok")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing, if the client is gone, as it may be after a slow answer; otherwise the traceback."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """What is answered to `body` where nothing goes wrong. Raises KeyError for another format."""
        if "messages" in body:
            texts = list(body["messages"])
            return {"scores": self._scored([""] * len(texts), texts, [{} for _ in texts])}
        prompts = list(body["prompts"])
        responses = [text.removeprefix(prompt) for text, prompt in zip(body["query"], prompts, strict=True)]
        scores = self._scored(prompts, responses, [{"answer": label} for label in body["labels"]])
        return {"rewards": scores, "scores": scores, "extra_logs": {}}

    def _scored(self, prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]]) -> list[float]:
        return [float(score) for score in self.function(prompts, responses, rows)]


class _RefusedError(Exception):
    """A request that is not looked at: the status and the reason that it is answered with."""

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason
        super().__init__(reason)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.client_timeout_s)  # for each time that something is waited for

    def do_POST(self) -> None:
        try:
            body = self._body()
        except _RefusedError as refused:
            self._send(refused.status, refused.reason.encode(), "text/plain")
            self._linger()
            return
        fault = self.server.take(body, self.headers.get("Authorization"))
        if fault == "close":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(self.server.slow_s)
        if fault == "500":
            self._send(500, b"the model ran out of memory", "text/plain")
            return
        if fault == "not_json":
            self._send(200, b"<html>Welcome</html>", "text/html")
            return
        try:
            answer = self.server.answer(body)
        except KeyError as error:
            self._send(400, f"the request has no {error}".encode(), "text/plain")
            return
        except Exception as error:  # of any kind, being the function's: the one who asked is told
            self._send(500, f"the reward function raised {type(error).__name__}: {error}".encode(), "text/plain")
            return
        self._send(200, json.dumps(spoilt(answer, fault)).encode(), "application/json")

    def _body(self) -> dict[str, Any]:
        """The JSON object that is posted. Raises _RefusedError."""
        if not self.server.admits(self.headers.get("Authorization")):
            raise _RefusedError(401, f"a bearer token is needed: set {TOKEN_VARIABLE} to that of the server")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise _RefusedError(411, "a request has to say its Content-Length")
        if int(length) > self.server.max_bytes:
            raise _RefusedError(413, f"a request has {self.server.max_bytes} bytes at most; lower reward.batch_size")
        try:
            body = json.loads(self._read(int(length)))
        except (ValueError, RecursionError):
            raise _RefusedError(400, "the request is not JSON") from None
        if not isinstance(body, dict):
            raise _RefusedError(400, "the request is no JSON object")
        return body

    def _read(self, length: int) -> bytes:
        """Raises _RefusedError for a client that does not send `length` bytes in time."""
        deadline, parts = time.monotonic() + self.server.client_timeout_s, []
        while length > 0:
            try:
                part = self.rfile.read1(length)
            except TimeoutError:
                part = b""
            if not part or time.monotonic() > deadline:
                raise _RefusedError(408, f"the request was not there within {self.server.client_timeout_s:g} s")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _linger(self) -> None:
        """Ends the connection of a client that may be sending still, once it had time to read the answer."""
        self.close_connection = True
        deadline = time.monotonic() + LINGER_S
        with suppress(OSError):  # it is gone
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_S)
            while time.monotonic() < deadline and self.connection.recv(1 << 16):
                pass

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged for each request."""


def spoilt(answer: Mapping[str, Any], fault: str) -> dict[str, Any]:
    """`answer` with its last score missing ("length") or not a number ("nan"), or as it is."""
    ends: dict[str, list[float]] = {"length": [], "nan": [float("nan")]}
    if fault not in ends:
        return dict(answer)
    return {name: [*value[:-1], *ends[fault]] if isinstance(value, list) else value for name, value in answer.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--function", default="examples.functions:brevity", metavar="MODULE:FUNCTION")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; another one needs a token")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--faults", default="", help=f"of {', '.join(FAULTS)}, with commas; over and over in turn")
    arguments = parser.parse_args()
    faults = [fault for fault in arguments.faults.split(",") if fault]
    for fault in faults:
        if fault not in FAULTS:
            parser.error(f"--faults: {fault} is none of {', '.join(FAULTS)}")
    sys.path.append(str(Path.cwd()))
    module, _, name = arguments.function.partition(":")
    function: Function = getattr(importlib.import_module(module), name)
    # Not an option, since every user of the machine sees the command line of a process.
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        server = RewardServer(
            function, arguments.port, host=arguments.host, token=token, faults=itertools.cycle(faults)
        )
    except ValueError:
        parser.error(f"--host: {arguments.host} can be reached from other machines; set {TOKEN_VARIABLE} to a token")
    except OSError as error:
        parser.error(f"cannot listen on port {arguments.port} of {arguments.host}: {error.strerror}; choose another")
    with server:
        print(f"scoring with {arguments.function} at {server.url}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)


if __name__ == "__main__":
    main()
