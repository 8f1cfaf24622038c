"""Rows from files, prompts in order, and text as token ids, against hand-written texts and a byte-level tokenizer.

About four seconds, most of them for importing transformers and datasets.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.formats import RowFormat
from actors.prompts import PromptSource
from actors.rendering import render_conversation, tokenise_prompts
from actors.rollout import Prompt
from actors.rows import read_rows
from actors.supervised_rows import check_columns, preference_pairs, ptx_rows, supervised_examples
from conf.schema import ConfigError, DataConfig, PTXConfig
from tests.tiny_models import BOS_ID, EOS_ID, tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = DataConfig(chat_template=False)


def tokenizer(template: str | None = TEMPLATE, *, bos: bool = False, eos: bool = False) -> Any:
    """A byte-level tokenizer that adds bos or eos by default, as asked."""
    from tokenizers.processors import TemplateProcessing

    made = tiny_tokenizer()
    made.chat_template = template
    if bos or eos:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{'<bos> ' if bos else ''}$A{' <eos>' if eos else ''}",
            special_tokens=[("<bos>", BOS_ID), ("<eos>", EOS_ID)],
        )
    return made


def text_ids(text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    return ids


def rows(*prompts: Any) -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in prompts]


def source(count: int = 5, *, seed: int = 3, data: DataConfig = PLAIN) -> PromptSource:
    return PromptSource(rows(*(f"prompt {number}" for number in range(count))), tokenizer(), data, seed=seed)


def tokenised(given: Sequence[Mapping[str, Any]], made: Any, data: DataConfig) -> list[Prompt]:
    return tokenise_prompts(given, made, RowFormat.of(data))


def texts(prompts: Sequence[Any]) -> list[str]:
    return [prompt.text for prompt in prompts]


# Rows -----------------------------------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def unreadable(path: str, split: str = "train", **how: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_rows(path, split, **how)
    return str(caught.value)


def test_jsonl_rows_in_order(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a\u2028b", "n": [1, None]}, ensure_ascii=False)
    path = write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + f'{{"prompt": "é"}}\r\n{line}\n\n'.encode())
    assert read_rows(path, "train") == [{"prompt": "é"}, {"prompt": "a\u2028b", "n": [1, None]}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON: Expecting value at column"),
        (b'{"prompt": "a"}\n\n{"prompt": "b"}\n', "line 2 is not JSON"),
        (b'{"prompt": "a"}\n["b"]\n', "line 2 is no JSON object but list"),
        (b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "\xff"}', "line 3 is not UTF-8 (byte 13)"),
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", content)
    answer = unreadable(path, key="sft.data_path")
    assert answer.startswith(f"sft.data_path={path!r}: ")
    assert message in answer


def test_a_json_file_holds_one_array_or_an_object_a_line(tmp_path: Path) -> None:
    expected = [{"instruction": "é", "history": [["a", "b"]]}, {"instruction": "c"}]
    pretty = json.dumps(expected, ensure_ascii=False, indent=2)
    assert read_rows(write(tmp_path / "array.json", "\ufeff\n" + pretty + "\n\n"), "train") == expected
    lines = "".join(json.dumps(row) + "\n" for row in expected)
    assert read_rows(write(tmp_path / "lines.json", lines), "train") == expected
    assert "line 1 is no JSON object but list" in unreadable(write(tmp_path / "array.jsonl", json.dumps(expected)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n {"a": }]', "line 2 is not JSON: Expecting value at column 8"),
        (b'[{"a": 1}, "b"]', "row 2 is no JSON object but str"),
        (b'[{"a": "\xff"}]', "is not UTF-8 (byte 9)"),
        (b" []", "holds no rows"),
        (b"", "holds no rows"),
    ],
)
def test_an_array_that_cannot_be_read_is_one_message(tmp_path: Path, content: bytes, message: str) -> None:
    answer = unreadable(write(tmp_path / "rows.json", content), key="data.sources[1].path")
    assert answer.startswith("data.sources[1].path=")
    assert message in answer


def test_parquet_rows_with_chat_messages(tmp_path: Path) -> None:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    expected = [{"prompt": [{"role": "user", "content": "a"}], "n": 1}, {"prompt": [], "n": 2}]
    parquet.write_table(pyarrow.Table.from_pylist(expected), tmp_path / "rows.parquet")
    assert read_rows(str(tmp_path / "rows.parquet"), "train") == expected
    assert "cannot be read as parquet" in unreadable(write(tmp_path / "no.parquet", "text"))


def test_saved_datasets_with_and_without_splits(tmp_path: Path) -> None:
    import datasets

    train, test = (datasets.Dataset.from_list(rows(*words)) for words in (("a", "b"), ("c",)))
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "two"))
    assert read_rows(str(tmp_path / "one"), "train") == rows("a", "b")
    assert read_rows(str(tmp_path / "two"), "test") == rows("c")
    answer = unreadable(str(tmp_path / "two"), "validation", key="data.eval_path")
    assert answer.startswith("data.eval_split='validation': ")
    assert "it has train, test" in answer
    answer = unreadable(str(tmp_path / "two"), "validation", key="data.sources[1].path")
    assert answer.startswith("data.sources[1].split='validation': ")


def test_a_dataset_that_cannot_be_reached_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    answer = unreadable("nobody/no-such-dataset")
    assert answer.startswith("data.path='nobody/no-such-dataset': no jsonl, json or parquet file, and no dataset")
    assert "\n" not in answer
    (tmp_path / "empty").mkdir()
    assert "no jsonl, json or" in unreadable(str(tmp_path / "empty"))
    assert "cannot be read" in unreadable(str(tmp_path / "none.jsonl"))


# Prompts --------------------------------------------------------------------------------------------------------------


def test_with_a_template_it_alone_writes_special_tokens() -> None:
    data = DataConfig(system_prompt="be brief")
    (prompt,) = tokenised(rows("hi"), tokenizer(bos=True), data)
    assert prompt.text == "<bos><system>be brief<user>hi<assistant>"
    assert prompt.token_ids.tolist() == [BOS_ID, *text_ids("<system>be brief<user>hi<assistant>")]
    assert prompt.token_ids.dtype == np.int32
    assert prompt.messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"})
    assert prompt.row == {"prompt": "hi"}


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_without_a_template_the_tokenizer_adds_its_bos(bos: bool, eos: bool) -> None:
    (prompt,) = tokenised(rows("hi"), tokenizer(None, bos=bos, eos=eos), PLAIN)
    assert prompt.text == "hi"
    assert prompt.token_ids.tolist() == [BOS_ID] * bos + text_ids("hi")
    assert prompt.messages == ({"role": "user", "content": "hi"},)


def test_chat_messages_and_another_key() -> None:
    turns = [{"role": "user", "content": "a", "id": 3}, {"role": "assistant", "content": "b"}]
    turns.append({"role": "user", "content": "c"})
    (prompt,) = tokenised([{"chat": turns}], tokenizer(), DataConfig(prompt_key="chat"))
    assert prompt.text == "<bos><user>a<assistant>b<eos><user>c<assistant>"
    assert prompt.messages[0] == {"role": "user", "content": "a"}


STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
SYSTEM_TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
ANSWERED = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("second", "template", "data", "message"),
    [
        ({"text": "b"}, TEMPLATE, DataConfig(), "data.prompt_key='prompt': row 2 has no such key; it has text"),
        ({"prompt": " \n"}, TEMPLATE, DataConfig(), "row 2 is empty"),
        ({"prompt": []}, TEMPLATE, DataConfig(), "row 2 is empty"),
        ({"prompt": 3}, TEMPLATE, DataConfig(), "row 2 holds neither text nor a list of chat messages"),
        ({"prompt": None}, TEMPLATE, DataConfig(), "row 2 holds neither"),
        (
            {"prompt": [{"role": "user"}]},
            TEMPLATE,
            DataConfig(),
            "row 2 has message 1 without the text fields role and",
        ),
        ({"prompt": ANSWERED}, TEMPLATE, DataConfig(), "row 2 ends with a message of the assistant"),
        (
            {"prompt": SYSTEM_TURNS},
            None,
            PLAIN,
            "row 2 holds several chat messages, which need data.chat_template=true",
        ),
        ({"prompt": SYSTEM_TURNS}, TEMPLATE, DataConfig(system_prompt="x"), "begins with a system message of its own"),
        ({"prompt": SYSTEM_TURNS}, STRICT, DataConfig(), "template refuses row 2: no system role"),
        ({"prompt": "b"}, None, DataConfig(), "data.chat_template=True: the tokenizer has no chat template; set data"),
    ],
)
def test_a_row_that_makes_no_prompt_is_named(
    second: Mapping[str, Any], template: str | None, data: DataConfig, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tokenised([{"prompt": "a"}, second], tokenizer(template), data)
    assert message in str(caught.value)


def test_over_long_prompts_are_dropped_and_counted() -> None:
    data = DataConfig(chat_template=False, max_prompt_tokens=3)
    made = PromptSource(rows("abc", "abcd", "ab", "abcde"), tokenizer(), data, seed=0)
    assert made.num_dropped == 2
    assert len(made) == 2
    assert texts(made.all()) == ["abc", "ab"]
    with pytest.raises(ConfigError, match=r"^data\.max_prompt_tokens=3: all 2 prompts are longer; the shortest has 4"):
        PromptSource(rows("abcd", "abcde"), tokenizer(), data, seed=0)
    with pytest.raises(ConfigError, match="holds no rows"):
        PromptSource([], tokenizer(), data, seed=0)


def test_every_prompt_once_an_epoch_with_ids_that_go_on() -> None:
    made = source(5)
    drawn = [prompt for size in (3, 4, 6, 2) for prompt in made.next_batch(size)]
    assert [prompt.id for prompt in drawn] == list(range(15))
    epochs = [texts(drawn[start : start + 5]) for start in (0, 5, 10)]
    assert all(sorted(epoch) == [f"prompt {number}" for number in range(5)] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_the_order_follows_from_the_seed_and_the_epoch() -> None:
    long = texts(source(40).next_batch(80))
    assert texts(source(40).next_batch(80)) == long
    assert texts(source(40, seed=4).next_batch(80)) != long
    assert long[:40] != [f"prompt {number}" for number in range(40)]


@pytest.mark.parametrize("position", [0, 3, 5, 7, 10])
def test_a_restored_position_goes_on_as_if_never_left(position: int) -> None:
    made = source(5)
    made.next_batch(position)
    state = json.loads(json.dumps(made.state()))
    restored = source(5)
    restored.load_state(state)
    for ours, theirs in zip(made.next_batch(9), restored.next_batch(9), strict=True):
        assert (ours.id, ours.text) == (theirs.id, theirs.text)
    assert restored.state() == {"position": position + 9}


def test_evaluation_takes_file_order_and_draws_nothing() -> None:
    made = source(5)
    assert texts(made.take(2)) == ["prompt 0", "prompt 1"]
    assert [prompt.id for prompt in made.take(99)] == [0, 1, 2, 3, 4]
    assert texts(made.all()) == texts(made.take(5))
    assert made.state() == {"position": 0}


# Examples, pairs and conversations ------------------------------------------------------------------------------------

SOURCE = ("sft.data_path", "rows.jsonl")


def test_a_supervised_example_is_prompt_answer_eos() -> None:
    (example,) = supervised_examples(
        [{"prompt": "hi", "answer": "yo"}], tokenizer(bos=True), DataConfig(), source=SOURCE
    )
    prompt = [BOS_ID, *text_ids("<user>hi<assistant>")]
    assert example.token_ids.tolist() == [*prompt, *text_ids("yo"), EOS_ID]
    assert example.num_prompt_tokens == len(prompt)
    (plain,) = supervised_examples([{"prompt": "hi", "answer": "yo"}], tokenizer(bos=True), PLAIN, source=SOURCE)
    assert plain.token_ids.tolist() == [BOS_ID, *text_ids("hiyo"), EOS_ID]
    assert plain.num_prompt_tokens == 3
    assert plain.token_ids.dtype == np.int32


def test_examples_that_do_not_fit_are_left_out() -> None:
    data = dataclasses.replace(PLAIN, max_prompt_tokens=3)
    given = [{"prompt": prompt, "answer": answer} for prompt, answer in (("abc", "d"), ("abcd", "e"), ("a", "bcdef"))]
    assert [len(one.token_ids) for one in supervised_examples(given, tokenizer(), data, source=SOURCE)] == [5, 7]
    fitting = supervised_examples(given, tokenizer(), data, source=SOURCE, max_tokens=5)
    assert [len(one.token_ids) for one in fitting] == [5]
    with pytest.raises(ConfigError, match=r"^sft\.data_path='rows\.jsonl': .* leave none of its 3 examples"):
        supervised_examples(given, tokenizer(), data, source=SOURCE, max_tokens=4)


def test_a_pair_is_two_conversations_as_the_reward_model_reads_them() -> None:
    row = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    (pair,) = preference_pairs([row], tokenizer(bos=True), DataConfig(), chat_template=None, source=SOURCE)
    assert pair.chosen_ids.tolist() == [BOS_ID, *text_ids("<user>q<assistant>yes"), EOS_ID]
    assert pair.rejected_ids.tolist() == [BOS_ID, *text_ids("<user>q<assistant>no"), EOS_ID]
    (plain,) = preference_pairs([row], tokenizer(None), PLAIN, chat_template=None, source=SOURCE)
    assert plain.chosen_ids.tolist() == [*text_ids("qyes"), EOS_ID]
    assert plain.chosen_ids.dtype == plain.rejected_ids.dtype == np.int32
    longer = {"prompt": "q", "chosen": "yes", "rejected": "nonono"}
    kept = preference_pairs([longer, row], tokenizer(None), PLAIN, chat_template=None, source=SOURCE, max_tokens=5)
    assert [len(one.rejected_ids) for one in kept] == [4]
    with pytest.raises(ConfigError, match="all 1 pairs are longer"):
        preference_pairs([row], tokenizer(None), PLAIN, chat_template=None, source=SOURCE, max_tokens=3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "row 1 has no text under 'rejected'; it has prompt, chosen"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "row 1 has no text under 'chosen'; it holds ''"),
        ({"prompt": "q", "chosen": 1, "rejected": "b"}, "it holds 1"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "row 1 has the same text under 'chosen' and 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "data.prompt_key='prompt': row 1 has no such key"),
    ],
)
def test_a_row_that_makes_no_pair_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preference_pairs([row], tokenizer(), DataConfig(), chat_template=None, source=SOURCE)
    assert message in str(caught.value)


def test_a_template_that_refuses_a_pair_names_its_row() -> None:
    given = [{"prompt": [{"role": role, "content": "q"} for role in roles], "chosen": "a", "rejected": "b"}
             for roles in (["user"], ["system", "user"])]  # fmt: skip
    with pytest.raises(ConfigError, match=r"^sft\.data_path='rows\.jsonl': .* refuses row 2: no system role"):
        preference_pairs(given, tokenizer(STRICT), DataConfig(), chat_template=None, source=SOURCE)


def test_columns_are_checked_without_a_tokenizer() -> None:
    good = {"prompt": "q", "answer": "a"}
    check_columns([good], DataConfig(), ("answer",), source=SOURCE)
    with pytest.raises(ConfigError, match=r"^sft\.data_path='rows\.jsonl': row 2 has no text under 'answer'"):
        check_columns([good, {"prompt": "q"}], DataConfig(), ("answer",), source=SOURCE)
    with pytest.raises(ConfigError, match="row 2 is empty"):
        check_columns([good, {"prompt": "", "answer": "a"}], DataConfig(), ("answer",), source=SOURCE)


TURNS = ({"role": "user", "content": "q"},)


@pytest.mark.parametrize(
    ("template", "chat_template", "closed", "expected"),
    [
        (TEMPLATE, None, True, [BOS_ID, *text_ids("<user>q<assistant>r"), EOS_ID]),
        (TEMPLATE, True, False, [BOS_ID, *text_ids("<user>q<assistant>r")]),
        (TEMPLATE, False, True, [BOS_ID, *text_ids("qr"), EOS_ID]),
        (None, None, True, [BOS_ID, *text_ids("qr"), EOS_ID]),
        (None, None, False, [BOS_ID, *text_ids("qr")]),
    ],
)
@pytest.mark.parametrize("eos", [False, True])
def test_a_conversation_has_one_bos_and_one_end(
    template: str | None, chat_template: bool | None, closed: bool, expected: list[int], eos: bool
) -> None:
    made = tokenizer(template, bos=True, eos=eos)
    assert render_conversation(made, TURNS, "r", chat_template, closed=closed) == expected


# Text -----------------------------------------------------------------------------------------------------------------


def ptx(folder: Path, given: Sequence[Any], **changes: Any) -> PTXConfig:
    path = write(folder / "text.jsonl", "".join(json.dumps(row) + "\n" for row in given))
    return PTXConfig(coef=1.0, path=path, **changes)


@pytest.mark.parametrize("eos", [False, True])
def test_a_text_row_is_its_tokens_and_one_eos_cut_at_the_limit(tmp_path: Path, eos: bool) -> None:
    config = ptx(tmp_path, [{"text": "abc"}, {"text": "abcdef"}, {"text": "abcd"}], max_tokens=6)
    made = ptx_rows(config, tokenizer(bos=True, eos=eos))
    assert [row.tolist() for row in made] == [
        [BOS_ID, *text_ids("abc"), EOS_ID],
        [BOS_ID, *text_ids("abcde")],
        [BOS_ID, *text_ids("abcd"), EOS_ID],
    ]
    assert all(row.dtype == np.int32 for row in made)


def test_text_rows_in_which_nothing_is_predicted_are_left_out(tmp_path: Path) -> None:
    from tokenizers import normalizers

    made = tokenizer()
    made.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    assert [row.tolist() for row in ptx_rows(ptx(tmp_path, [{"text": "xx"}, {"text": "xa"}]), made)] == [
        [*text_ids("a"), EOS_ID]
    ]
    with pytest.raises(ConfigError, match=r"^algorithm\.ptx\.path=.*none of its 1 texts has a token beside EOS"):
        ptx_rows(ptx(tmp_path, [{"text": "x"}]), made)


@pytest.mark.parametrize("row", [{"body": "b"}, {"text": " \n"}, {"text": 3}, {"text": None}])
def test_a_row_without_text_is_named(tmp_path: Path, row: dict[str, Any]) -> None:
    config = ptx(tmp_path, [{"text": "a"}, row])
    with pytest.raises(ConfigError, match=r"^algorithm\.ptx\.text_key='text': row 2 of .*text\.jsonl has no text"):
        ptx_rows(config, tokenizer())
    write(tmp_path / "text.jsonl", "{")
    with pytest.raises(ConfigError, match=r"^algorithm\.ptx\.path=.*line 1 is not JSON"):
        ptx_rows(config, tokenizer())
