"""A small reward server: scores texts with a Python function, in the formats of LLaMA-Factory and of OpenRLHF.

    python examples/reward_server.py --port 8000 --function examples.functions:brevity

and in the settings a source of scores of type http, with url http://127.0.0.1:8000 and format llamafactory or openrlhf.
Needs the standard library alone, so it can be copied to where the scores are made. With `--faults` it answers wrongly,
one fault a request in turn, which shows what a run does when its server fails.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

FAULTS = ("ok", "slow", "500", "length", "nan", "not_json", "close")

Function = Callable[[list[str], list[str], list[Mapping[str, Any]]], Sequence[float]]


class RewardServer(ThreadingHTTPServer):
    """Listens on `port` of this machine (0: a free one, which `url` names) and scores what is posted to it.

    `function` is called with prompts, responses and rows as a reward function is. LLaMA-Factory's format has the whole
    conversation as one text, which is passed as the response of an empty prompt; OpenRLHF's has the label, which is
    passed as the answer of the row. `faults` are what the first requests meet, in turn; later ones are answered well.
    """

    daemon_threads = True

    def __init__(self, function: Function, port: int = 0, *, faults: Iterable[str] = (), slow_s: float = 5.0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.function, self.slow_s = function, slow_s
        self.bodies: list[Mapping[str, Any]] = []  # of the requests so far
        self.authorisations: list[str | None] = []
        self._faults, self._lock = iter(faults), Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def take(self, body: Mapping[str, Any], authorisation: str | None) -> str:
        """Notes a request; the fault that it meets."""
        with self._lock:
            self.bodies.append(body)
            self.authorisations.append(authorisation)
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


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
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
        self._send(200, json.dumps(spoilt(answer, fault)).encode(), "application/json")

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
    with RewardServer(function, arguments.port, faults=itertools.cycle(faults)) as server:
        print(f"scoring with {arguments.function} at {server.url}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)


if __name__ == "__main__":
    main()
