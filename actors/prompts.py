"""Text into token ids: prompts for the policy, examples and pairs for the supervised stages, conversations for rewards.

Tokenizers are Hugging Face's and are handed in. Knows nothing of models, engines or where the ids go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from actors.rollout import IntArray, Prompt
from conf.schema import ConfigError, DataConfig

Message = Mapping[str, str]

_END_OF_ANSWER = "<<END-OF-ANSWER>>"  # stands in a rendered text until it is cut off there


@dataclass(frozen=True, eq=False)
class SupervisedExample:
    """A prompt with its answer and the EOS token; what is learnt starts after the prompt."""

    token_ids: IntArray  # [L]
    num_prompt_tokens: int


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """Two whole conversations that differ in the answer, as the reward model reads them."""

    chosen_ids: IntArray  # [L]
    rejected_ids: IntArray  # [L']


class PromptSource:
    """Prompts without end, every one once an epoch, in an order that follows from the seed and the epoch alone.

    Prompts of more than `data.max_prompt_tokens` tokens are left out; `num_dropped` counts them.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, data: DataConfig, *, seed: int) -> None:
        """Tokenises all rows. Raises ConfigError, naming the row where there is one, if no prompt is left to draw."""
        if not rows:
            raise ConfigError("data.path", data.path, "holds no rows")
        prompts = tokenise_prompts(rows, tokenizer, data)
        self._prompts = [prompt for prompt in prompts if len(prompt.token_ids) <= data.max_prompt_tokens]
        self.num_dropped = len(prompts) - len(self._prompts)
        if not self._prompts:
            shortest = min(len(prompt.token_ids) for prompt in prompts)
            remedy = f"all {len(prompts)} prompts are longer; the shortest has {shortest} tokens"
            raise ConfigError("data.max_prompt_tokens", data.max_prompt_tokens, remedy)
        self._seed = seed
        self._position = 0
        self._order = self._order_of(0)

    def __len__(self) -> int:
        """How many prompts an epoch has."""
        return len(self._prompts)

    def next_batch(self, count: int) -> list[Prompt]:
        """The next `count` prompts, across epochs where they end; ids count the prompts drawn since the start."""
        return [self._draw() for _ in range(count)]

    def take(self, count: int) -> list[Prompt]:
        """The first `count` prompts in file order, or all if there are fewer; draws nothing."""
        return [replace(prompt, id=number) for number, prompt in enumerate(self._prompts[:count])]

    def all(self) -> list[Prompt]:
        """Every prompt in file order; draws nothing."""
        return self.take(len(self._prompts))

    def state(self) -> dict[str, int]:
        """How many prompts were drawn: all that a resumed run needs beside the seed and the data."""
        return {"position": self._position}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Goes to where `state` was taken, in the same data with the same seed."""
        self._position = state["position"]
        self._order = self._order_of(self._position // len(self._prompts))

    def _draw(self) -> Prompt:
        epoch, place = divmod(self._position, len(self._prompts))
        if place == 0:
            self._order = self._order_of(epoch)
        prompt = replace(self._prompts[self._order[place]], id=self._position)
        self._position += 1
        return prompt

    def _order_of(self, epoch: int) -> list[int]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
        return cast(list[int], order.tolist())


def tokenise_prompts(rows: Sequence[Mapping[str, Any]], tokenizer: Any, data: DataConfig) -> list[Prompt]:
    """One Prompt a row, of any length, numbered from 0.

    With a chat template it ends where the assistant's turn begins, and the template alone writes special tokens;
    without one the tokenizer adds those it adds by default, less an EOS at the end. Raises ConfigError naming the row.
    """
    if data.chat_template and tokenizer.chat_template is None:
        raise ConfigError(
            "data.chat_template", True, "the tokenizer has no chat template; set data.chat_template=false"
        )
    conversations = [_messages(row, number, data) for number, row in enumerate(rows, start=1)]
    if data.chat_template:
        texts = [
            _rendered(conversation, number, tokenizer) for number, conversation in enumerate(conversations, start=1)
        ]
    else:
        texts = [conversation[0]["content"] for conversation in conversations]
    token_ids = tokenizer(texts, add_special_tokens=not data.chat_template)["input_ids"]
    if not data.chat_template:
        token_ids = [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in token_ids]
    return [
        Prompt(id=number, token_ids=np.array(ids, np.int32), text=text, messages=tuple(conversation), row=row)
        for number, (ids, text, conversation, row) in enumerate(zip(token_ids, texts, conversations, rows, strict=True))
    ]


def render_conversation(
    tokenizer: Any, messages: Sequence[Message], response: str, chat_template: bool | None, *, closed: bool = True
) -> list[int]:
    """The token ids of `messages` answered with `response`, as a reward model reads them.

    `chat_template` says whether the tokenizer's template renders them (None: if it has one). `closed`: the answer ends
    as the template ends a turn, or with EOS without a template; otherwise it is left open after its last token.
    """
    if chat_template is None:
        chat_template = tokenizer.chat_template is not None
    if chat_template:
        # An open answer is the closed one up to its last character: a generation prompt instead would miss the header
        # of the turn where a template knows none, and differ where it opens a block of thought.
        mark = "" if closed else _END_OF_ANSWER
        turns = [*messages, {"role": "assistant", "content": response + mark}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        if not closed:
            text, found, _ = text.rpartition(mark)
            if not found:
                raise ConfigError("reward.chat_template", True, "the tokenizer's template leaves out the answer's end")
        return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
    text = "\n\n".join(message["content"] for message in messages) + response
    ids: list[int] = tokenizer(text)["input_ids"]
    if ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]
    return [*ids, tokenizer.eos_token_id] if closed else ids


def supervised_examples(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    data: DataConfig,
    *,
    source: tuple[str, str],
    max_tokens: int | None = None,
) -> list[SupervisedExample]:
    """The rows as examples: the prompt as the policy reads it, then the row's `answer` and EOS.

    `source` is the key and the value of the setting that named the rows. Left out are prompts of more than
    `data.max_prompt_tokens` and examples of more than `max_tokens` tokens. Raises ConfigError, naming the row where
    there is one, for what cannot be used and if nothing is left.
    """
    answers = [_column(row, "answer", number, source) for number, row in enumerate(rows, start=1)]
    answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    examples = [
        SupervisedExample(np.array([*prompt.token_ids, *ids, tokenizer.eos_token_id], np.int32), len(prompt.token_ids))
        for prompt, ids in zip(tokenise_prompts(rows, tokenizer, data), answer_ids, strict=True)
        if len(prompt.token_ids) <= data.max_prompt_tokens
    ]
    fitting = [example for example in examples if max_tokens is None or len(example.token_ids) <= max_tokens]
    if not fitting:
        remedy = f"data.max_prompt_tokens={data.max_prompt_tokens} and the model's context {max_tokens} leave none"
        raise ConfigError(*source, f"{remedy} of its {len(rows)} examples")
    return fitting


def preference_pairs(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    data: DataConfig,
    *,
    chat_template: bool | None,
    source: tuple[str, str],
    max_tokens: int | None = None,
) -> list[PreferencePair]:
    """The rows as pairs: the prompt answered with the row's `chosen` and with its `rejected`, rendered and closed.

    `tokenizer` is the reward model's own and `chat_template` is `reward.chat_template`, so that what is trained on is
    what will be scored. Left out are pairs with a conversation of more than `max_tokens` tokens; otherwise as
    `supervised_examples`.
    """
    pairs = []
    for number, row in enumerate(rows, start=1):
        chosen, rejected = (_column(row, name, number, source) for name in ("chosen", "rejected"))
        if chosen == rejected:
            raise ConfigError(*source, f"row {number} has the same text under 'chosen' and 'rejected'")
        messages = _messages(row, number, data)
        ids = [render_conversation(tokenizer, messages, answer, chat_template) for answer in (chosen, rejected)]
        if max_tokens is None or max(map(len, ids)) <= max_tokens:
            pairs.append(PreferencePair(np.array(ids[0], np.int32), np.array(ids[1], np.int32)))
    if not pairs:
        raise ConfigError(*source, f"all {len(rows)} pairs are longer than the model's context of {max_tokens} tokens")
    return pairs


def check_columns(
    rows: Sequence[Mapping[str, Any]], data: DataConfig, columns: Sequence[str], *, source: tuple[str, str]
) -> None:
    """Raises ConfigError naming the first row without a usable prompt or without text in one of `columns`."""
    for number, row in enumerate(rows, start=1):
        _messages(row, number, data)
        for name in columns:
            _column(row, name, number, source)


def _messages(row: Mapping[str, Any], number: int, data: DataConfig) -> list[Message]:
    """The conversation that row `number` (from 1) asks to be answered, the system prompt in front."""
    if data.prompt_key not in row:
        remedy = f"row {number} has no such key; it has {', '.join(map(str, row)) or 'none'}"
        raise ConfigError("data.prompt_key", data.prompt_key, remedy)
    prompt = row[data.prompt_key]

    def refuse(fault: str) -> ConfigError:
        return ConfigError("data.prompt_key", data.prompt_key, f"row {number} {fault}")

    if isinstance(prompt, str):
        messages: list[Message] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and all(_is_message(message) for message in prompt):
        messages = [{"role": message["role"], "content": message["content"]} for message in prompt]
        if not data.chat_template:
            raise refuse("holds chat messages, which need data.chat_template=true")
    else:
        raise refuse("holds neither text nor a list of chat messages with the text fields role and content")
    if not messages or not messages[-1]["content"].strip():
        raise refuse("is empty; leave it out of the data")
    if messages[-1]["role"] == "assistant":
        raise refuse("ends with a message of the assistant, so nothing is left to answer")
    if data.system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise refuse("begins with a system message of its own; set data.system_prompt=null")
    return [{"role": "system", "content": data.system_prompt}, *messages]


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(field), str) for field in ("role", "content"))


def _rendered(messages: Sequence[Message], number: int, tokenizer: Any) -> str:
    from jinja2 import TemplateError

    try:
        return cast(str, tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        remedy = f"the tokenizer's template refuses row {number}: {error}"
        raise ConfigError("data.chat_template", True, remedy) from error


def _column(row: Mapping[str, Any], name: str, number: int, source: tuple[str, str]) -> str:
    """The text under `name` in row `number` (from 1); `source` is the key and the value of the setting to blame."""
    value = row.get(name)
    if not isinstance(value, str) or not value:
        has = f"it has {', '.join(map(str, row)) or 'no keys'}" if name not in row else f"it holds {value!r:.60}"
        raise ConfigError(*source, f"row {number} has no text under {name!r}; {has}")
    return value
