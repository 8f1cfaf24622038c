"""Scores of a reward server over HTTP, in the formats of LLaMA-Factory and of OpenRLHF.

Knows requests and the two formats; nothing of what the server scores with. What is not a list of one finite number
for each text is never taken for a score.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from actors.reward_source import Fault, SourceError, finite_number, sample_name
from actors.rollout import Rollout
from conf.schema import ConfigError, RewardSourceConfig

TOKEN_VARIABLE = "MANTA_REWARD_TOKEN"
ANSWER_BYTES, ANSWER_BYTES_PER_SCORE = 1 << 20, 1 << 10  # the longest answer that is read: the one, and the other each
# Answers that say that the settings are wrong, which no other try will change.
REFUSALS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)
MORE_S = 1.0  # than `timeout_s`, after which a request is given up that no limit of its socket has ended
SHOWN_CHARACTERS = 200  # of an answer that is not understood


@dataclass(frozen=True)
class Secret:
    """Text that is sent to those who ask for it and never shown: its repr hides it."""

    value: str = field(repr=False)


def reward_token() -> Secret:
    """The bearer token in the environment variable MANTA_REWARD_TOKEN, or an empty one.

    It is read where the run is started and handed to the processes that need it. It must not be put into their
    environment by Ray, which writes that to its logs.
    """
    return Secret(os.environ.get(TOKEN_VARIABLE, "").strip())


class HTTPReward:
    """Scores of the server at `source.url`, asked with up to `source.concurrency` requests at a time."""

    def __init__(self, source: RewardSourceConfig, *, key: str, token: Secret | None = None) -> None:
        """Does not connect yet. `key` is where the source stands in the settings.

        `token` is the bearer token that is sent, none if it is empty; by default it is `reward_token()`.

        Raises ConfigError for an address that cannot be asked and for a token that no header can carry.
        """
        assert source.url is not None, "checked with the settings"
        try:
            requests.Request("POST", source.url).prepare()
        except (requests.RequestException, ValueError):
            raise ConfigError(f"{key}.url", source.url.rpartition("@")[2], "is no address of a server") from None
        self.source, self.key, self.url = source, key, source.url
        self.name = f"{key}.url {_without_secrets(source.url)}"
        self._token = (reward_token() if token is None else token).value
        if not (self._token.isascii() and self._token.isprintable()):
            raise ConfigError(TOKEN_VARIABLE, "...", "holds characters that no HTTP header can carry")

    def score(self, rollouts: Sequence[Rollout]) -> list[float | Fault]:
        """A score for each rollout. A request that fails is a fault of each rollout in it.

        Raises SourceError if every request failed; ConfigError for an answer that says that address or token are wrong.
        """
        if not rollouts:
            return []
        parts = slices(rollouts, self.source.concurrency)
        answers = self._answers(parts)
        errors = [answer for answer in answers if isinstance(answer, SourceError)]
        if len(errors) == len(answers):
            raise errors[0]
        pairs = zip(parts, answers, strict=True)
        return [score for part, answer in pairs for score in self._scores(part, answer)]

    def _answers(self, parts: Sequence[Sequence[Rollout]]) -> list[list[object] | SourceError]:
        """What the server says to each part, all asked at once; a part that is not answered in time is given up.

        The thread of such a part is left alone: a server that sends one header after the other can hold it for longer
        than any time limit of a socket.
        """
        futures: list[Future[list[object] | SourceError]] = [Future() for _ in parts]
        for future, part in zip(futures, parts, strict=True):
            threading.Thread(target=self._answer, args=(future, part), daemon=True).start()
        done, _ = wait(futures, timeout=self.source.timeout_s + MORE_S)
        return [future.result() if future in done else self._late() for future in futures]

    def _answer(self, future: Future[list[object] | SourceError], rollouts: Sequence[Rollout]) -> None:
        try:
            future.set_result(self._ask(rollouts))
        except SourceError as error:
            future.set_result(error)
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    def _late(self) -> SourceError:
        remedy = f"raise {self.key}.timeout_s, lower reward.batch_size, or see why the server is slow"
        return SourceError(f"{self.name} did not answer within {self.source.timeout_s:g} s; {remedy}")

    def _scores(self, rollouts: Sequence[Rollout], answer: list[object] | SourceError) -> Iterator[float | Fault]:
        if isinstance(answer, SourceError):
            yield from (Fault(f"{answer} ({sample_name(rollout)})") for rollout in rollouts)
            return
        for position, (rollout, value) in enumerate(zip(rollouts, answer, strict=True)):
            number = finite_number(value)
            where = f"at position {position} ({sample_name(rollout)})"
            yield Fault(f"{self.name} answered {self._hidden(repr(value)):.100} {where}") if number is None else number

    def _ask(self, rollouts: Sequence[Rollout]) -> list[object]:
        """The values that the server gives `rollouts`, as many as there are."""
        body = json.dumps(request_body(self.source, rollouts), default=str)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        try:
            with requests.post(
                self.url,
                data=body,
                headers=headers,
                timeout=self.source.timeout_s,
                auth=self._authorise if self._token else None,
                allow_redirects=False,  # a redirected POST would be sent as GET, without its body
                stream=True,
            ) as response:
                content = self._read(response, len(rollouts))
        except (requests.Timeout, TimeoutError):
            raise self._late() from None
        except (requests.RequestException, HTTPError) as error:
            # Not its own message nor its traceback, which show the whole URL.
            raise SourceError(f"{self.name}: {_cause(error)}; see that the server runs and can be reached") from None
        return self._values(response, content, len(rollouts))

    def _read(self, response: requests.Response, count: int) -> bytes:
        """The body of an answer. A server that sends it drop by drop, or without end, is an error and not a hang."""
        deadline = time.monotonic() + self.source.timeout_s
        content, limit = b"", ANSWER_BYTES + count * ANSWER_BYTES_PER_SCORE
        try:
            while part := response.raw.read1(decode_content=True):
                content += part
                if len(content) > limit:
                    raise SourceError(f"{self.name} answered more than {limit} bytes for {count} texts")
                if time.monotonic() > deadline:
                    raise TimeoutError
        except ReadTimeoutError:
            raise TimeoutError from None
        return content

    def _authorise(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def _values(self, response: requests.Response, content: bytes, count: int) -> list[object]:
        status = f"{response.status_code} {self._hidden(response.reason or '')}".strip()
        if response.status_code in REFUSALS:
            remedy = f"the server answers {status}; check the path, and {TOKEN_VARIABLE}"
            raise ConfigError(f"{self.key}.url", _without_secrets(self.url), remedy)
        if response.status_code // 100 != 2:
            raise SourceError(f"{self.name} answered {status}{self._shown(content)}")
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            kind = self._hidden(response.headers.get("Content-Type", "no content type"))
            raise SourceError(f"{self.name} answered no JSON ({kind}){self._shown(content)}") from None
        names = ANSWERS[self.source.format]
        values = next((answer[name] for name in names if name in answer), None) if isinstance(answer, dict) else None
        if not isinstance(values, list):
            expected = (
                f"an object with a list under {' or '.join(names)}, as {self.key}.format={self.source.format} says"
            )
            raise SourceError(f"{self.name} answered something else than {expected}{self._shown(content)}")
        if len(values) != count:
            raise SourceError(f"{self.name} answered {len(values)} scores for {count} texts")
        return values

    def _shown(self, content: bytes) -> str:
        text = self._hidden(" ".join(content[: 10 * SHOWN_CHARACTERS].decode("utf-8", errors="replace").split()))
        return f": {text[:SHOWN_CHARACTERS]}" if text else ", with an empty body"

    def _hidden(self, text: str) -> str:
        """`text` without the token, as it is or as JSON may write it."""
        for token in {self._token, self._token.replace("/", "\\/")} - {""}:
            text = text.replace(token, "...")
        return text


ANSWERS = {"llamafactory": ("scores",), "openrlhf": ("rewards", "scores")}  # where each format has the scores


def request_body(source: RewardSourceConfig, rollouts: Sequence[Rollout]) -> Mapping[str, Any]:
    """What is sent, in `source.format`.

    llamafactory: `model` and `messages`, each the text of a whole conversation, as get_rewards_from_server of
    LLaMA-Factory (src/llamafactory/train/ppo/ppo_utils.py) sends it. It is the rendered prompt and the response;
    LLaMA-Factory's holds the end-of-text token of the response besides, which a rollout's text leaves out.

    openrlhf: `query` (the same text), `prompts` and `labels`, as OpenRLHF sends them to its remote_rm_url and its
    openrlhf/cli/serve_rm.py reads them. A label is what stands under `source.answer_key` in the row, or else "".
    """
    texts = [rollout.prompt.text + rollout.text for rollout in rollouts]
    if source.format == "llamafactory":
        return {"model": source.model, "messages": texts}
    labels = [rollout.prompt.row.get(source.answer_key, "") for rollout in rollouts]
    return {"query": texts, "prompts": [rollout.prompt.text for rollout in rollouts], "labels": labels}


def slices(rollouts: Sequence[Rollout], count: int) -> list[Sequence[Rollout]]:
    """`rollouts` in at most `count` runs whose lengths differ by one at most; none is empty."""
    size, longer = divmod(len(rollouts), count)
    ends = [size * (i + 1) + min(i + 1, longer) for i in range(count)]
    return [rollouts[start:end] for start, end in zip([0, *ends], ends, strict=False) if end > start]


def _without_secrets(url: str) -> str:
    """`url` without user, password and query, which may hold a key."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _cause(error: BaseException) -> str:
    """What went wrong first, below the layers that repeat it with the URL."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"
