"""Conversations into token ids: prompts as the policy reads them, whole conversations as a reward model reads them.

Tokenizers are Hugging Face's and are handed in. Knows nothing of models, of engines or of where the ids go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from actors.formats import Message, RowFormat
from actors.rollout import Prompt
from conf.schema import ConfigError

_END_OF_ANSWER = "<<END-OF-ANSWER>>"  # stands in a rendered text until it is cut off there


def tokenise_prompts(rows: Sequence[Mapping[str, Any]], tokenizer: Any, form: RowFormat) -> list[Prompt]:
    """One Prompt a row, of any length, numbered from 0; a prompt keeps its row as it is.

    With a chat template it ends where the assistant's turn begins, and the template alone writes special tokens;
    without one the tokenizer adds those it adds by default, less an EOS at the end. Raises ConfigError naming the row.
    """
    if form.chat_template and tokenizer.chat_template is None:
        raise ConfigError(
            "data.chat_template", True, "the tokenizer has no chat template; set data.chat_template=false"
        )
    conversations = [form.conversation(row, number).messages for number, row in enumerate(rows, start=1)]
    if form.chat_template:
        texts = [_rendered(messages, number, tokenizer, form) for number, messages in enumerate(conversations, start=1)]
    else:
        texts = [messages[0]["content"] for messages in conversations]
    token_ids = tokenizer(texts, add_special_tokens=not form.chat_template)["input_ids"]
    if not form.chat_template:
        token_ids = [without_end(ids, tokenizer) for ids in token_ids]
    return [
        Prompt(id=number, token_ids=np.array(ids, np.int32), text=text, messages=messages, row=row)
        for number, (ids, text, messages, row) in enumerate(zip(token_ids, texts, conversations, rows, strict=True))
    ]


def render_conversation(
    tokenizer: Any, messages: Sequence[Message], response: str, chat_template: bool | None, *, closed: bool = True
) -> list[int]:
    """The token ids of `messages` answered with `response`, as a reward model reads them.

    `chat_template` says whether the tokenizer's template renders them (None: if it has one). `closed`: the answer ends
    as the template ends a turn, or with EOS without a template; otherwise it is left open after its last token. Raises
    jinja2.TemplateError for a conversation that the template refuses.
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
                remedy = "its chat template leaves out the end of the answer; set chat_template=false in its source"
                raise ConfigError("reward.sources", tokenizer.name_or_path, remedy)
        return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
    text = "\n\n".join(message["content"] for message in messages) + response
    ids = without_end(tokenizer(text)["input_ids"], tokenizer)
    return [*ids, tokenizer.eos_token_id] if closed else ids


def without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """`ids` less an EOS at the end, which some tokenizers append by themselves."""
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _rendered(messages: Sequence[Message], number: int, tokenizer: Any, form: RowFormat) -> str:
    from jinja2 import TemplateError

    try:
        return cast(str, tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        where = "" if form.section == "data" else f" of {form.section}"
        remedy = f"the tokenizer's template refuses row {number}{where}: {error}"
        raise ConfigError("data.chat_template", True, remedy) from error
