"""Rows of each format against conversations, prompts and token ids that were written by hand. About three seconds.

The two chat templates are Hugging Face template strings in the manner of ChatML and of Llama 3.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from actors.formats import RowFormat
from actors.prompts import PromptSource
from actors.rollout import Prompt
from actors.supervised_rows import check_columns, preference_pairs, supervised_examples
from conf.schema import ConfigError, DataConfig, DataSourceConfig
from tests.tiny_models import BOS_ID, EOS_ID, tiny_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SOURCE = ("sft.data_path", "rows.json")
ALPACA = DataConfig(format="alpaca")
SHAREGPT = DataConfig(format="sharegpt")


def tokenizer(template: str) -> Any:
    made = tiny_tokenizer()
    made.chat_template = template
    return made


def text_ids(text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def turns(*contents: str, system: str | None = None) -> tuple[dict[str, str], ...]:
    """Messages in turn of user and assistant, after one of the system if it is given."""
    led = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return (*led, *({"role": roles[place % 2], "content": text} for place, text in enumerate(contents)))


def sharegpt(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in pairs]


def asked(row: Mapping[str, Any], data: DataConfig) -> tuple[Mapping[str, str], ...]:
    return RowFormat.of(data).conversation(row, 1).messages


def refused(row: Mapping[str, Any], data: DataConfig) -> str:
    """The message for `row` as the second of two."""
    with pytest.raises(ConfigError) as caught:
        RowFormat.of(data).conversation(row, 2)
    return str(caught.value)


def only_prompt(row: dict[str, Any], data: DataConfig, template: str) -> Prompt:
    (prompt,) = PromptSource([row], tokenizer(template), data, seed=0).all()
    return prompt


# What a row asks ------------------------------------------------------------------------------------------------------

HISTORY = [["hello", "hi"], ["how?", "so"]]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "add", "input": "1 2", "output": "3"}, turns("add\n1 2")),
        ({"instruction": "add", "input": "", "output": "3"}, turns("add")),
        ({"instruction": "add"}, turns("add")),
        ({"instruction": "add", "input": None, "system": None, "history": None, "output": None}, turns("add")),
        ({"instruction": "", "input": "1 2"}, turns("1 2")),
        ({"instruction": "add", "system": "be brief"}, turns("add", system="be brief")),
        ({"instruction": "add", "system": ""}, turns("add", system=None)),
        ({"instruction": "why?", "history": HISTORY}, turns("hello", "hi", "how?", "so", "why?")),
        ({"instruction": "a", "history": [], "system": "s"}, turns("a", system="s")),
        ({"instruction": "a", "history": [("b", "c")], "system": "s"}, turns("b", "c", "a", system="s")),
    ],
)
def test_alpaca_rows_ask_what_llamafactory_says(row: dict[str, Any], messages: tuple[Any, ...]) -> None:
    assert asked(row, ALPACA) == messages


TALK = (("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))


@pytest.mark.parametrize(
    ("row", "messages", "answer"),
    [
        ({"conversations": sharegpt(*TALK)}, turns("a", "b", "c"), "d"),
        ({"conversations": sharegpt(*TALK[:3])}, turns("a", "b", "c"), None),
        ({"conversations": sharegpt(*TALK), "system": "s"}, turns("a", "b", "c", system="s"), "d"),
        ({"conversations": sharegpt(*TALK), "system": None}, turns("a", "b", "c"), "d"),
        ({"conversations": sharegpt(("system", "t"), *TALK), "system": "s"}, turns("a", "b", "c", system="t"), "d"),
        ({"messages": list(turns("a", "b", system="s"))}, turns("a", system="s"), "b"),
        ({"conversations": list(turns("a"))}, turns("a"), None),
        ({"conversations": None, "messages": sharegpt(("user", "a"), ("assistant", "b"))}, turns("a"), "b"),
        ({"messages": [{"role": None, "content": None, "from": "human", "value": "a"}]}, turns("a"), None),
    ],
)
def test_sharegpt_rows_ask_up_to_the_users_last_turn(
    row: dict[str, Any], messages: tuple[Any, ...], answer: str | None
) -> None:
    found = RowFormat.of(SHAREGPT).conversation(row, 1)
    assert found.messages == messages
    assert found.answer == answer


def test_a_rows_own_system_prompt_comes_before_that_of_the_settings() -> None:
    alpaca, talk = (dataclasses.replace(data, system_prompt="ours") for data in (ALPACA, SHAREGPT))
    assert asked({"instruction": "a"}, alpaca) == turns("a", system="ours")
    assert asked({"instruction": "a", "system": "own"}, alpaca) == turns("a", system="own")
    assert asked({"conversations": sharegpt(*TALK[:1])}, talk) == turns("a", system="ours")
    assert asked({"conversations": sharegpt(*TALK[:1]), "system": "own"}, talk) == turns("a", system="own")
    assert asked({"prompt": "a"}, DataConfig(system_prompt="ours")) == turns("a", system="ours")


def test_a_source_says_only_what_differs() -> None:
    sources = (
        DataSourceConfig(path="a"),
        DataSourceConfig(path="b", format="alpaca", system_prompt="own"),
        DataSourceConfig(path="c", prompt_key="question"),
    )
    data = DataConfig(sources=sources, prompt_key="ask", system_prompt="ours")
    first, second, third = (RowFormat.of(data, number) for number in range(3))
    assert first.conversation({"ask": "a"}, 1).messages == turns("a", system="ours")
    assert second.conversation({"instruction": "a"}, 1).messages == turns("a", system="own")
    assert third.conversation({"question": "a"}, 1).messages == turns("a", system="ours")
    with pytest.raises(ConfigError, match=r"^data\.sources\[1\]\.format='alpaca': row 7 has no 'instruction'"):
        second.conversation({"question": "a"}, 7)
    with pytest.raises(ConfigError, match=r"^data\.sources\[2\]\.prompt_key='question': row 7 has no such key"):
        third.conversation({"ask": "a"}, 7)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a"}, "row 2 has no 'instruction'; it has prompt"),
        ({"instruction": 3}, "row 2 has no text under 'instruction'; it holds 3"),
        ({"instruction": "a", "input": ["b"]}, "row 2 has no text under 'input'; it holds ['b']"),
        ({"instruction": "a", "system": 1}, "row 2 has no text under 'system'"),
        ({"instruction": " ", "input": ""}, "row 2 is empty"),
        ({"instruction": "a", "history": "b"}, "row 2 has a 'history' that is no list of [user, assistant] pairs"),
        ({"instruction": "a", "history": [["b"]]}, "row 2 has a 'history'"),
        ({"instruction": "a", "history": [["b", None]]}, "row 2 has a 'history'"),
    ],
)
def test_an_alpaca_row_that_asks_nothing_is_named(row: dict[str, Any], fault: str) -> None:
    answer = refused(row, ALPACA)
    assert answer.startswith("data.format='alpaca': ")
    assert fault in answer


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a"}, "row 2 has no list of messages under 'conversations' or 'messages'; it has prompt"),
        ({"conversations": "a"}, "row 2 has no list of messages"),
        ({"conversations": []}, "row 2 is empty"),
        ({"conversations": sharegpt(("system", "s"))}, "row 2 is empty"),
        ({"conversations": sharegpt(("human", " "), ("gpt", "b"))}, "row 2 is empty"),
        ({"conversations": sharegpt(("gpt", "a"))}, "row 2 has message 1 of the assistant where the user's turn is"),
        (
            {"conversations": sharegpt(("system", "s"), ("human", "a"), ("human", "b"))},
            "row 2 has message 3 of the user where the assistant's turn is; user and assistant have to alternate",
        ),
        (
            {"conversations": sharegpt(("human", "a"), ("system", "s"))},
            "row 2 has message 2 of the system where the assistant's turn is",
        ),
        (
            {"conversations": sharegpt(("human", "a"), ("function_call", "f"), ("observation", "o"))},
            "row 2 has message 2 with the role 'function_call': tools cannot be used; leave the row out",
        ),
        ({"conversations": sharegpt(("observation", "o"))}, "message 1 with the role 'observation': tools cannot"),
        ({"messages": [{"role": "tool", "content": "o"}]}, "message 1 with the role 'tool': tools cannot"),
        (
            {"messages": [*turns("a"), {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]},
            "message 2 with the role 'assistant': tools cannot",
        ),
        ({"conversations": sharegpt(("narrator", "a"))}, "message 1 with the role 'narrator'; known are system, user"),
        (
            {"conversations": [{"from": "human"}]},
            "message 1 without the text fields role and content, or from and value",
        ),
        ({"conversations": ["a"]}, "message 1 without the text fields"),
        ({"conversations": sharegpt(("human", "a")), "system": 3}, "row 2 has no text under 'system'"),
    ],
)
def test_a_sharegpt_row_that_cannot_be_used_is_named(row: dict[str, Any], fault: str) -> None:
    answer = refused(row, SHAREGPT)
    assert answer.startswith("data.format='sharegpt': ")
    assert fault in answer


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ([*turns("a"), *turns("b")], "row 2 has message 2 of the user where the assistant's turn is"),
        ([{"role": "tool", "content": "a"}], "row 2 has message 1 with the role 'tool'"),
        (list(turns("a", "b")), "row 2 ends with a message of the assistant, so nothing is left to answer"),
    ],
)
def test_chat_messages_of_the_format_prompt_take_turns_too(prompt: Any, fault: str) -> None:
    assert asked({"prompt": list(turns("a", "b", "c"))}, DataConfig()) == turns("a", "b", "c")
    assert fault in refused({"prompt": prompt}, DataConfig())


def test_without_a_template_a_row_is_one_message() -> None:
    plain = [dataclasses.replace(data, chat_template=False) for data in (ALPACA, SHAREGPT)]
    assert asked({"instruction": "a", "input": "b"}, plain[0]) == turns("a\nb")
    assert asked({"conversations": sharegpt(*TALK[:2])}, plain[1]) == turns("a")
    for row, data in (({"instruction": "a", "system": "s"}, plain[0]), ({"conversations": sharegpt(*TALK)}, plain[1])):
        assert "row 2 holds several chat messages, which need data.chat_template=true" in refused(row, data)


# Prompts, examples and pairs ------------------------------------------------------------------------------------------

ROW: dict[str, Any] = {
    "instruction": "why?",
    "input": "",
    "output": "so",
    "history": [["hello", "hi"]],
    "system": "be brief",
}
CHATML_PROMPT = (
    "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"
    "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA3_PROMPT = (
    "<bos><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nwhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.mark.parametrize(("template", "expected"), [(CHATML, CHATML_PROMPT), (LLAMA3, LLAMA3_PROMPT)])
def test_several_turns_and_a_system_prompt_through_a_real_template(template: str, expected: str) -> None:
    talk = sharegpt(("human", "hello"), ("gpt", "hi"), ("human", "why?"), ("gpt", "so"))
    rows: list[tuple[dict[str, Any], DataConfig]] = [
        (ROW, ALPACA),
        ({"conversations": talk, "system": "be brief"}, SHAREGPT),
        ({"prompt": list(turns("hello", "hi", "why?", system="be brief"))}, DataConfig()),
        ({"prompt": list(turns("hello", "hi", "why?"))}, DataConfig(system_prompt="be brief")),
    ]
    for row, data in rows:
        prompt = only_prompt(row, data, template)
        assert prompt.text == expected
        special = [BOS_ID] if expected.startswith("<bos>") else []
        assert prompt.token_ids.tolist() == special + text_ids(expected.removeprefix("<bos>"))
        assert prompt.messages == turns("hello", "hi", "why?", system="be brief")


def test_a_prompt_keeps_every_column_of_its_row_untouched() -> None:
    row = {"conversations": sharegpt(*TALK), "answer": 7, "metadata": {"deep": [1, None]}, "tests": ["x"]}
    before = copy.deepcopy(row)
    prompt = only_prompt(row, SHAREGPT, CHATML)
    assert prompt.row is row
    assert row == before


def test_the_answer_to_learn_is_the_output_or_the_last_turn() -> None:
    for row, data in ((ROW, ALPACA), ({"conversations": sharegpt(("human", "why?"), ("gpt", "so"))}, SHAREGPT)):
        (example,) = supervised_examples([row], tokenizer(CHATML), data, source=SOURCE)
        prompt = only_prompt(dict(row), data, CHATML).token_ids.tolist()
        assert example.token_ids.tolist() == [*prompt, *text_ids("so"), EOS_ID]
        assert example.num_prompt_tokens == len(prompt)


PAIR_ANSWERS: list[tuple[Any, Any]] = [
    ("yes", "no"),
    ({"from": "gpt", "value": "yes"}, {"from": "gpt", "value": "no"}),
    ({"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}),
    ([{"role": "assistant", "content": "yes"}], [{"from": "gpt", "value": "no"}]),
    (list(turns("a", "b", "c", "yes")), list(turns("a", "b", "c ", "no", system="whatever"))),
]


@pytest.mark.parametrize(("chosen", "rejected"), PAIR_ANSWERS)
def test_pairs_are_text_or_messages_that_end_with_the_answer(chosen: Any, rejected: Any) -> None:
    row = {"conversations": sharegpt(*TALK[:3]), "system": "s", "chosen": chosen, "rejected": rejected}
    (pair,) = preference_pairs([row], tokenizer(CHATML), SHAREGPT, chat_template=None, source=SOURCE)
    asked_text = "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in turns("a", "b", "c", system="s")
    )
    assert pair.chosen_ids.tolist() == text_ids(f"{asked_text}<|im_start|>assistant\nyes<|im_end|>\n")
    assert pair.rejected_ids.tolist() == text_ids(f"{asked_text}<|im_start|>assistant\nno<|im_end|>\n")
    alpaca = {"instruction": "a", "input": "b", "chosen": "yes", "rejected": "no"}
    (pair,) = preference_pairs([alpaca], tokenizer(CHATML), ALPACA, chat_template=None, source=SOURCE)
    assert pair.chosen_ids.tolist() == text_ids(
        "<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("row", "data", "columns", "fault"),
    [
        ({"instruction": "a", "output": ""}, ALPACA, ("answer",), "row 1 has no text under 'output'; it holds ''"),
        ({"instruction": "a", "answer": "b"}, ALPACA, ("answer",), "row 1 has no text under 'output'; it has instr"),
        ({"messages": list(turns("a"))}, SHAREGPT, ("answer",), "row 1 does not end with an answer of the assistant"),
        (
            {"instruction": "a", "chosen": {"from": "human", "value": "b"}},
            ALPACA,
            ("chosen",),
            "row 1 under 'chosen' ends with a message of the user, not of the assistant",
        ),
        (
            {"instruction": "a", "chosen": list(turns("z", "b"))},
            ALPACA,
            ("chosen",),
            "row 1 under 'chosen' answers another conversation than that of the row",
        ),
        (
            {"instruction": "a", "chosen": "b", "rejected": [{"from": "function_call", "value": "c"}]},
            ALPACA,
            ("chosen", "rejected"),
            "row 1 under 'rejected' has message 1 with the role 'function_call': tools cannot be used",
        ),
        ({"instruction": "a", "chosen": []}, ALPACA, ("chosen",), "row 1 has no text under 'chosen'; it holds []"),
    ],
)
def test_an_answer_that_is_none_is_blamed_on_its_set(
    row: dict[str, Any], data: DataConfig, columns: tuple[str, ...], fault: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_columns([row], data, columns, source=SOURCE)
    assert str(caught.value).startswith("sft.data_path='rows.json': ")
    assert fault in str(caught.value)
