"""Rows that are learnt from as they stand: examples with their answers, pairs of answers, and plain text.

Tokenizers are Hugging Face's and are handed in. Knows nothing of models, of losses or of batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.formats import RowFormat, Source
from actors.rendering import render_conversation, tokenise_prompts, without_end
from actors.rollout import IntArray
from actors.rows import read_rows
from conf.schema import ConfigError, DataConfig, PTXConfig

Rows = Sequence[Mapping[str, Any]]


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


def supervised_examples(
    rows: Rows, tokenizer: Any, data: DataConfig, *, source: Source, max_tokens: int | None = None
) -> list[SupervisedExample]:
    """The rows as examples: the prompt as the policy reads it, then the row's answer and EOS.

    `source` is the key and the value of the setting that named the rows. Left out are prompts of more than
    `data.max_prompt_tokens` and examples of more than `max_tokens` tokens. Raises ConfigError, naming the row where
    there is one, for what cannot be used and if nothing is left.
    """
    form = RowFormat.of(data)
    answers = [form.answer(row, number, column="answer", source=source) for number, row in enumerate(rows, start=1)]
    answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    examples = [
        SupervisedExample(np.array([*prompt.token_ids, *ids, tokenizer.eos_token_id], np.int32), len(prompt.token_ids))
        for prompt, ids in zip(tokenise_prompts(rows, tokenizer, form), answer_ids, strict=True)
        if len(prompt.token_ids) <= data.max_prompt_tokens
    ]
    fitting = [example for example in examples if max_tokens is None or len(example.token_ids) <= max_tokens]
    if not fitting:
        remedy = f"data.max_prompt_tokens={data.max_prompt_tokens} and the model's context {max_tokens} leave none"
        raise ConfigError(*source, f"{remedy} of its {len(rows)} examples")
    return fitting


def preference_pairs(
    rows: Rows,
    tokenizer: Any,
    data: DataConfig,
    *,
    chat_template: bool | None,
    source: Source,
    max_tokens: int | None = None,
) -> list[PreferencePair]:
    """The rows as pairs: the conversation answered with the row's `chosen` and its `rejected`, rendered and closed.

    `tokenizer` is the reward model's own and `chat_template` is that of the source of scores that it will be, so that
    what is trained on is what will be scored. Left out are pairs with a conversation of more than `max_tokens` tokens;
    otherwise as `supervised_examples`.
    """
    from jinja2 import TemplateError

    pairs, form = [], RowFormat.of(data)
    for number, row in enumerate(rows, start=1):
        chosen, rejected = (form.answer(row, number, column=name, source=source) for name in ("chosen", "rejected"))
        if chosen == rejected:
            raise ConfigError(*source, f"row {number} has the same text under 'chosen' and 'rejected'")
        messages = form.conversation(row, number).messages
        try:
            ids = [render_conversation(tokenizer, messages, answer, chat_template) for answer in (chosen, rejected)]
        except TemplateError as error:
            raise ConfigError(*source, f"the tokenizer's template refuses row {number}: {error}") from error
        if max_tokens is None or max(map(len, ids)) <= max_tokens:
            pairs.append(PreferencePair(np.array(ids[0], np.int32), np.array(ids[1], np.int32)))
    if not pairs:
        raise ConfigError(*source, f"all {len(rows)} pairs are longer than the model's context of {max_tokens} tokens")
    return pairs


def check_columns(rows: Rows, data: DataConfig, columns: Sequence[str], *, source: Source) -> None:
    """Raises ConfigError naming the first row without a usable conversation, or without one of these answers to it.

    `columns` are answer, or chosen and rejected; what a row of another format calls `answer` is meant by it too.
    """
    form = RowFormat.of(data)
    for number, row in enumerate(rows, start=1):
        form.conversation(row, number)
        for column in columns:
            form.answer(row, number, column=column, source=source)


def ptx_rows(config: PTXConfig, tokenizer: Any) -> list[IntArray]:
    """Each text of `config.path` as token ids: what the tokenizer adds in front by default, the text, EOS.

    Cut to the first `max_tokens`, so a text that is longer has no EOS. Left out are rows of fewer than two tokens, in
    which nothing is predicted. int32 arrays of shape [L]. Raises ConfigError, naming the row where there is one, for a
    row without text and if nothing is left.
    """
    assert config.path is not None, "the caller has checked algorithm.ptx.path"
    rows = read_rows(config.path, config.split, key="algorithm.ptx.path")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get(config.text_key), str) or not row[config.text_key].strip():
            remedy = f"row {number} of {config.path} has no text under this key; it has {', '.join(map(str, row))}"
            raise ConfigError("algorithm.ptx.text_key", config.text_key, remedy)
    texts = tokenizer([row[config.text_key] for row in rows])["input_ids"]
    ended = [[*without_end(ids, tokenizer), tokenizer.eos_token_id][: config.max_tokens] for ids in texts]
    kept = [np.array(ids, np.int32) for ids in ended if len(ids) >= 2]
    if not kept:
        raise ConfigError("algorithm.ptx.path", config.path, f"none of its {len(rows)} texts has a token beside EOS")
    return kept
