"""A row of a dataset as a conversation: the turns that ask for an answer, and the answers that the row gives.

Three formats: `prompt`, a text or chat messages under one key; `alpaca` and `sharegpt`, as data/README.md of
LLaMA-Factory describes them. Knows nothing of tokenizers, of files or of the stages that the rows are for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from conf.schema import ConfigError, DataConfig

Message = Mapping[str, str]
Row = Mapping[str, Any]
Source = tuple[str, str]  # the key and the value of the setting that named some rows
Refuse = Callable[[str], ConfigError]

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TOOL_ROLES = ("function_call", "observation", "function", "tool")
FIELDS = (("role", "content"), ("from", "value"))  # of a message, as OpenAI and as sharegpt call them
ANSWER_COLUMNS = {"prompt": "answer", "alpaca": "output"}


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant in turn, the user last.

    `answer` is the last turn of the assistant, which was left out; None if the row ended with the user.
    """

    messages: tuple[Message, ...]  # each with role and content
    answer: str | None = None


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one set hold their conversations; `section` is where the settings that say so stand."""

    section: str
    format: str
    prompt_key: str
    system_prompt: str | None
    chat_template: bool

    @classmethod
    def of(cls, data: DataConfig, number: int | None = None) -> RowFormat:
        """The format of `data`, or of source `number` of it, which says only what differs."""
        if number is None:
            return cls("data", data.format, data.prompt_key, data.system_prompt, data.chat_template)
        source = data.sources[number]
        return cls(
            section=f"data.sources[{number}]",
            format=source.format or data.format,
            prompt_key=source.prompt_key or data.prompt_key,
            system_prompt=data.system_prompt if source.system_prompt is None else source.system_prompt,
            chat_template=data.chat_template,
        )

    def conversation(self, row: Row, number: int) -> Conversation:
        """What row `number` (from 1) asks. Its own system prompt comes before that of the settings.

        Raises ConfigError, naming the row, for one that does not hold what the format says, whose user and assistant
        do not take turns, or which leaves nothing to answer.
        """
        refuse = partial(self._refusal, number)
        read = {"prompt": self._prompt, "alpaca": _alpaca, "sharegpt": _sharegpt}[self.format]
        system, turns = read(row, refuse)
        answer = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else None
        if not turns or not turns[-1]["content"].strip():
            raise refuse("is empty; leave it out of the data")
        system = self.system_prompt if system is None else system
        messages = turns if system is None else [{"role": "system", "content": system}, *turns]
        if len(messages) > 1 and not self.chat_template:
            raise refuse("holds several chat messages, which need data.chat_template=true")
        return Conversation(tuple(messages), answer)

    def answer(self, row: Row, number: int, *, column: str, source: Source) -> str:
        """The answer that row `number` (from 1) gives: `column` is answer, chosen or rejected.

        `answer` is the last turn of the assistant in sharegpt and the column `output` in alpaca. A column holds text,
        or one message, or messages that repeat the question or leave it out; the last is the assistant's. Raises
        ConfigError that blames `source` and names the row.
        """
        if column == "answer" and self.format == "sharegpt":
            answer = self.conversation(row, number).answer
            if not answer:
                raise ConfigError(*source, f"row {number} does not end with an answer of the assistant")
            return answer
        name = ANSWER_COLUMNS.get(self.format, column) if column == "answer" else column
        value = row.get(name)
        if isinstance(value, Mapping | list) and value:
            value = self._last_answer(value, row, number, refuse=lambda fault: _blame(source, number, name, fault))
        if not isinstance(value, str) or not value:
            has = f"it has {', '.join(map(str, row)) or 'no keys'}" if name not in row else f"it holds {value!r:.60}"
            raise ConfigError(*source, f"row {number} has no text under {name!r}; {has}")
        return value

    def _last_answer(self, value: Any, row: Row, number: int, *, refuse: Refuse) -> str:
        *before, last = _messages(value if isinstance(value, list) else [value], refuse)
        if last["role"] != "assistant":
            raise refuse(f"ends with a message of the {last['role']}, not of the assistant")
        asked, repeated = (
            [message["content"].strip() for message in messages if message["role"] != "system"]
            for messages in (self.conversation(row, number).messages, before)
        )
        if repeated and repeated != asked:
            raise refuse("answers another conversation than that of the row")
        return last["content"]

    def _prompt(self, row: Row, refuse: Refuse) -> tuple[str | None, list[Message]]:
        if self.prompt_key not in row:
            raise refuse(f"has no such key; it has {', '.join(map(str, row)) or 'none'}")
        prompt = row[self.prompt_key]
        if isinstance(prompt, str):
            return None, [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list):
            raise refuse("holds neither text nor a list of chat messages")
        system, turns = _turns(prompt, refuse)
        if turns and turns[-1]["role"] == "assistant":
            raise refuse("ends with a message of the assistant, so nothing is left to answer")
        if system is not None and self.system_prompt is not None:
            raise refuse(f"begins with a system message of its own; set {self.section}.system_prompt=null")
        return system, turns

    def _refusal(self, number: int, fault: str) -> ConfigError:
        name = "prompt_key" if self.format == "prompt" else "format"
        return ConfigError(f"{self.section}.{name}", getattr(self, name), f"row {number} {fault}")


def _alpaca(row: Row, refuse: Refuse) -> tuple[str | None, list[Message]]:
    if "instruction" not in row:
        raise refuse(f"has no 'instruction'; it has {', '.join(map(str, row)) or 'no keys'}")
    parts = (_text(row, "instruction", refuse), _text(row, "input", refuse))
    history = row.get("history") or []
    if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
        raise refuse("has a 'history' that is no list of [user, assistant] pairs of text")
    turns: list[Message] = []
    for user, assistant in history:
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    turns.append({"role": "user", "content": "\n".join(part for part in parts if part)})
    return _text(row, "system", refuse) or None, turns


def _sharegpt(row: Row, refuse: Refuse) -> tuple[str | None, list[Message]]:
    values = next((row[name] for name in ("conversations", "messages") if row.get(name) is not None), None)
    if not isinstance(values, list):
        has = ", ".join(map(str, row)) or "no keys"
        raise refuse(f"has no list of messages under 'conversations' or 'messages'; it has {has}")
    system, turns = _turns(values, refuse)
    return (_text(row, "system", refuse) or None) if system is None else system, turns


def _turns(values: list[Any], refuse: Refuse) -> tuple[str | None, list[Message]]:
    """The system message that leads `values`, if one does, and the turns after it, which have to alternate."""
    messages = _messages(values, refuse)
    led = bool(messages) and messages[0]["role"] == "system"
    turns = messages[led:]
    for place, message in enumerate(turns):
        expected = ("user", "assistant")[place % 2]
        if message["role"] != expected:
            fault = f"has message {led + place + 1} of the {message['role']} where the {expected}'s turn is"
            raise refuse(f"{fault}; user and assistant have to alternate")
    return messages[0]["content"] if led else None, turns


def _messages(values: list[Any], refuse: Refuse) -> list[Message]:
    return [_message(value, place, refuse) for place, value in enumerate(values, start=1)]


def _message(value: Any, place: int, refuse: Refuse) -> Message:
    fields = value if isinstance(value, Mapping) else {}
    for role_field, text_field in FIELDS:
        role, text = fields.get(role_field), fields.get(text_field)
        if role in TOOL_ROLES or fields.get("tool_calls"):
            raise refuse(f"has message {place} with the role {role!r}: tools cannot be used; leave the row out")
        if isinstance(role, str) and role not in ROLES:
            raise refuse(f"has message {place} with the role {role!r}; known are {', '.join(ROLES)}")
        if isinstance(role, str) and isinstance(text, str):
            return {"role": ROLES[role], "content": text}
    raise refuse(f"has message {place} without the text fields role and content, or from and value")


def _text(row: Row, name: str, refuse: Refuse) -> str:
    """The text under `name`, empty where there is none."""
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise refuse(f"has no text under {name!r}; it holds {value!r:.60}")
    return value or ""


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _blame(source: Source, number: int, name: str, fault: str) -> ConfigError:
    return ConfigError(*source, f"row {number} under {name!r} {fault}")
