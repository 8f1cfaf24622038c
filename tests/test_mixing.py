"""Several sets of prompts mixed by weight, against counts worked out with fractions. About four seconds."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from actors.mixing import (
    MixedPromptSource,
    held_out_prompts,
    next_turn,
    prompt_source,
    turns_taken,
    whole_shares,
)
from actors.prompts import PromptSource
from actors.rollout import Prompt
from conf.schema import ConfigError, DataConfig, DataSourceConfig
from tests.tiny_models import tiny_tokenizer


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def source(folder: Path, name: str, count: int, **settings: Any) -> DataSourceConfig:
    """A source of `count` prompts, name-0, name-1 and so on."""
    rows = [{"prompt": f"{name}-{number}", "number": number} for number in range(count)]
    return DataSourceConfig(path=write(folder / f"{name}.jsonl", rows), **settings)


def mixed(*sources: DataSourceConfig, seed: int = 3, **settings: Any) -> PromptSource | MixedPromptSource:
    data = DataConfig(sources=sources, chat_template=False, **settings)
    return prompt_source(data, tiny_tokenizer(), seed=seed)


def names(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.text.split("-")[0] for prompt in prompts]


def drawn(prompts: Sequence[Prompt]) -> list[tuple[int, str]]:
    return [(prompt.id, prompt.text) for prompt in prompts]


# Whose turn it is -----------------------------------------------------------------------------------------------------


def test_weights_become_whole_shares_in_lowest_terms() -> None:
    assert whole_shares([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_shares([1.0, 1.0]) == [1, 1]
    assert whole_shares([3.0, 1.5]) == [2, 1]
    assert whole_shares([51760, 9846]) == [25880, 4923]
    assert whole_shares([1e-3, 1]) == [1, 1000]
    assert whole_shares([0.3]) == [1]


def test_the_first_turns_of_seven_to_two_to_one() -> None:
    """By hand: turn c of a member with the part p may lie in [floor(c / p), ceil((c + 1) / p)).

    For 7: [0, 2) [1, 3) [2, 5) [4, 6) [5, 8) [7, 9) [8, 10); for 2: [0, 5) [5, 10); for 1: [0, 10).
    """
    taken = [0, 0, 0]
    order = []
    for _ in range(10):
        order.append(next_turn([7, 2, 1], taken))
        taken[order[-1]] += 1
    assert order == [0, 0, 0, 1, 0, 0, 1, 0, 0, 2]


@pytest.mark.parametrize("number", range(40))
def test_the_share_of_each_is_kept_from_the_first_turn_to_any(number: int) -> None:
    rng = random.Random(number)
    shares = [rng.choice((1, 2, 3, 7, 19, 100)) for _ in range(rng.randint(1, 9))]
    total, taken = sum(shares), [0] * len(shares)
    for count in range(1, 2 * total + 5):
        taken[next_turn(shares, taken)] += 1
        for share, had in zip(shares, taken, strict=True):
            exact = Fraction(count * share, total)
            assert math.floor(exact) <= had <= math.ceil(exact), (shares, count, taken)


@pytest.mark.parametrize("shares", [[1], [7, 2, 1], [1, 1, 1, 5], [10**15, 3 * 10**15 + 1]])
def test_counting_turns_ahead_agrees_with_taking_them(shares: list[int]) -> None:
    taken = [0] * len(shares)
    for count in range(60):
        assert turns_taken(shares, count) == taken
        taken[next_turn(shares, taken)] += 1


def test_turns_far_ahead_cost_one_round_at_most() -> None:
    far = 10**12 + 13
    assert turns_taken([7, 2, 1], far) == [7 * (10**11 + 1) + 3, 2 * (10**11 + 1), 10**11 + 1]


# Prompts --------------------------------------------------------------------------------------------------------------


def test_each_source_has_its_share_and_goes_through_its_own_epochs(tmp_path: Path) -> None:
    made = mixed(source(tmp_path, "a", 10, weight=0.6), source(tmp_path, "b", 4, weight=0.4))
    assert len(made) == 14
    prompts = made.next_batch(100)
    assert [prompt.id for prompt in prompts] == list(range(100))
    for start in range(0, 100, 5):
        assert Counter(names(prompts[start : start + 5])) == {"a": 3, "b": 2}
    for name, size in (("a", 10), ("b", 4)):
        texts = [prompt.text for prompt in prompts if prompt.text.startswith(name)]
        epochs = [texts[start : start + size] for start in range(0, len(texts), size)]
        assert all(sorted(epoch) == sorted(f"{name}-{number}" for number in range(size)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1, "another order in each epoch"


def test_sources_of_one_size_have_orders_of_their_own(tmp_path: Path) -> None:
    prompts = mixed(source(tmp_path, "a", 30), source(tmp_path, "b", 30)).next_batch(60)
    orders = [[prompt.row["number"] for prompt in prompts if prompt.text.startswith(name)] for name in "ab"]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(30))
    assert orders[0] != orders[1]


def test_the_nth_prompt_follows_from_the_seed_and_n(tmp_path: Path) -> None:
    sources = (source(tmp_path, "a", 20, weight=3), source(tmp_path, "b", 7))
    whole = drawn(mixed(*sources).next_batch(60))
    pieces = mixed(*sources)
    assert [one for size in (1, 7, 30, 22) for one in drawn(pieces.next_batch(size))] == whole
    other = mixed(*sources, seed=4).next_batch(60)
    assert drawn(other) != whole
    assert names(other) == [text.split("-")[0] for _, text in whole], "the turns do not depend on the seed"


@pytest.mark.parametrize("position", [0, 1, 9, 10, 11, 57])
def test_a_restored_mixture_goes_on_as_if_never_left(tmp_path: Path, position: int) -> None:
    """(PPO details 9)"""
    sources = (source(tmp_path, "a", 8, weight=0.7), source(tmp_path, "b", 3, weight=0.2), source(tmp_path, "c", 5))
    made = mixed(*sources)
    made.next_batch(position)
    state = json.loads(json.dumps(made.state()))
    assert state == {"position": position}
    restored = mixed(*sources)
    restored.next_batch(4)
    restored.load_state(state)
    assert drawn(restored.next_batch(40)) == drawn(made.next_batch(40))
    assert restored.state() == made.state() == {"position": position + 40}


def test_one_source_is_the_same_as_a_path(tmp_path: Path) -> None:
    only = source(tmp_path, "a", 6, weight=0.3)
    plain = prompt_source(DataConfig(path=only.path, chat_template=False), tiny_tokenizer(), seed=3)
    made = mixed(only)
    assert isinstance(plain, PromptSource)
    assert isinstance(made, MixedPromptSource)
    assert drawn(made.next_batch(20)) == drawn(plain.next_batch(20))
    assert made.state() == plain.state()
    assert (len(made), made.num_dropped, made.dropped) == (len(plain), plain.num_dropped, plain.dropped)


def test_long_prompts_are_counted_over_all_sources_and_for_each(tmp_path: Path) -> None:
    first, second, third = source(tmp_path, "a", 12), source(tmp_path, "b", 11), source(tmp_path, "cc", 3)
    made = mixed(first, second, max_prompt_tokens=3)  # a-10, a-11 and b-10 have four letters
    assert made.num_dropped == 3
    assert made.dropped == [(first.path, 2), (second.path, 1)]
    assert len(made) == 20
    assert {len(prompt.text) for prompt in made.next_batch(50)} == {3}
    with pytest.raises(
        ConfigError, match=r"^data\.max_prompt_tokens=3: all 3 prompts.*\(data\.sources\[2\]\.path=.*cc"
    ):
        mixed(first, second, third, max_prompt_tokens=3)


def test_sources_of_several_formats_keep_their_rows(tmp_path: Path) -> None:
    alpaca = DataSourceConfig(
        path=write(tmp_path / "x.jsonl", [{"instruction": "x-0", "output": "y", "answer": 7}]), format="alpaca"
    )
    made = mixed(alpaca, source(tmp_path, "b", 3, weight=0.5))
    prompts = made.next_batch(6)
    assert Counter(names(prompts)) == {"x": 4, "b": 2}
    for prompt in prompts:
        expected = {"instruction": "x-0", "output": "y", "answer": 7}
        assert prompt.row == (
            expected if prompt.text == "x-0" else {"prompt": prompt.text, "number": int(prompt.text[2:])}
        )


def test_faults_name_the_source(tmp_path: Path) -> None:
    good = source(tmp_path, "a", 2)
    wrong = DataSourceConfig(path=write(tmp_path / "wrong.jsonl", [{"prompt": "q"}, {"text": "b"}]))
    with pytest.raises(
        ConfigError, match=r"^data\.sources\[1\]\.prompt_key='prompt': row 2 has no such key; it has text"
    ):
        mixed(good, wrong)
    with pytest.raises(ConfigError, match=r"^data\.sources\[1\]\.path='nowhere\.jsonl': cannot be read"):
        mixed(good, DataSourceConfig(path="nowhere.jsonl"))


def test_held_out_prompts_come_in_file_order_and_in_the_format_of_the_section(tmp_path: Path) -> None:
    rows = [{"instruction": f"held-{number}"} for number in range(5)]
    data = DataConfig(
        format="alpaca",
        eval_path=write(tmp_path / "eval.jsonl", rows),
        sources=(source(tmp_path, "a", 2, format="prompt"),),
        chat_template=False,
    )
    held_out = held_out_prompts(data, tiny_tokenizer(), 3)
    assert drawn(held_out) == [(0, "held-0"), (1, "held-1"), (2, "held-2")]
    assert len(held_out_prompts(data, tiny_tokenizer(), 99)) == 5
    assert held_out_prompts(DataConfig(path="a"), tiny_tokenizer(), 3) == []
    with pytest.raises(ConfigError, match=r"^data\.eval_path='none\.jsonl': cannot be read"):
        held_out_prompts(DataConfig(eval_path="none.jsonl"), tiny_tokenizer(), 3)
