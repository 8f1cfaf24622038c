"""Reward functions: what they are given, and the answers that are never taken for a score. About a second."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.reward_function import FunctionReward
from actors.reward_source import Fault, SourceError
from conf.schema import ConfigError
from tests.reward_rollouts import rollout

# Functions that a user could name.

ANSWER: Any = None


def canned_reward(prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]]) -> Any:
    if isinstance(ANSWER, Exception):
        raise ANSWER
    return ANSWER


def broken_inside(prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]]) -> Any:
    return [_part_of_it(response) for response in responses]  # not this line


def _part_of_it(response: str) -> float:
    return float(response)  # but this one


def scaled_reward(prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]], *, scale: float) -> Any:
    return [scale * len(response) for response in responses]


def test_a_function_is_given_texts_and_rows_in_order() -> None:
    source = FunctionReward("tests.reward_rollouts:length_reward")
    scores = source.score([rollout("q", "aa", number=1), rollout("q", "a", number=0)])
    assert scores == [102.0, 1.0]
    assert all(type(score) is float for score in scores)
    assert source.score([]) == []


def test_arguments_are_passed_on_by_name() -> None:
    source = FunctionReward("tests.test_reward_function:scaled_reward", key="k", scale=0.5)
    assert source.score([rollout("q", "aaa")]) == [1.5]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([True, False], [1.0, 0.0]),
        ((1, 2.5), [1.0, 2.5]),
        (np.array([0.5, -1], np.float32), [0.5, -1.0]),
        ([np.int64(3), np.bool_(True)], [3.0, 1.0]),
    ],
)
def test_numbers_of_a_function_become_floats(
    answer: Any, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert canned(monkeypatch, answer).score(PAIR) == expected


CANNED = "tests.test_reward_function:canned_reward"


def canned(monkeypatch: pytest.MonkeyPatch, answer: Any) -> FunctionReward:
    monkeypatch.setattr("tests.test_reward_function.ANSWER", answer)
    return FunctionReward(CANNED)


PAIR = [rollout("q", "a", number=3), rollout("q", "b", number=4, sample=1)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "returned 1 scores for 2 responses"),
        ([1.0, 2.0, 3.0], "returned 3 scores for 2 responses"),
        (None, "returned NoneType None; it must return a list"),
        ("12", "returned str '12'; it must return a list"),
        ({0: 1.0, 1: 2.0}, "returned dict"),
        (ValueError("no, thanks"), r"raised ValueError: no, thanks \(.*test_reward_function.py:\d+\)"),
    ],
)
def test_an_answer_that_is_no_list_of_scores_fails_as_a_whole(
    answer: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(PPO details 13)"""
    source = canned(monkeypatch, answer)
    for call in (source.score, source.verify):
        with pytest.raises(SourceError, match=rf"^reward.function {CANNED} {message}"):
            call(PAIR)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, "2"], "returned str '2' at position 1"),
        ([1.0, None], "returned NoneType None at position 1"),
        ([1.0, [2.0]], r"returned list \[2.0\] at position 1"),
        ([1.0, math.nan], r"returned nan at position 1 \(prompt 4, sample 1\)"),
        (np.array([1.0, -np.inf], np.float32), r"returned -inf at position 1 \(prompt 4, sample 1\)"),
        ([1.0, 10**400], "returned int 1000.* at position 1"),
        ([1.0, Fault("the row has no answer")], r": the row has no answer \(prompt 4, sample 1\)"),
    ],
)
def test_one_value_that_is_no_number_is_a_fault_of_its_rollout_and_no_score(
    answer: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(PPO details 13)"""
    source = canned(monkeypatch, answer)
    score, fault = source.score(PAIR)
    assert score == 1.0
    assert isinstance(fault, Fault)
    assert re.match(rf"reward.function {CANNED}:? ?{message}", fault.message), fault.message
    with pytest.raises(ValueError, match=message):
        source.verify(PAIR)


def test_verdicts_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert canned(monkeypatch, [True, 0.5]).verify(PAIR) == [1.0, 0.5]


def test_a_wrong_shape_is_a_fault_of_every_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(isinstance(answer, Fault) for answer in canned(monkeypatch, np.ones((2, 1))).score(PAIR))


def test_the_line_of_the_function_that_raised_is_named() -> None:
    source = FunctionReward("tests.test_reward_function:broken_inside")
    line = next(number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "but this" in text)
    with pytest.raises(SourceError, match=rf"raised ValueError: could not convert .* \({__file__}:{line}\)$"):
        source.score(PAIR)


def test_a_function_that_cannot_be_called_so_is_named() -> None:
    source = FunctionReward("tests.test_reward_function:scaled_reward")
    with pytest.raises(SourceError, match=r"raised TypeError: .*missing 1 required keyword-only argument: 'scale'$"):
        source.score(PAIR)


def test_a_wrong_setting_that_a_function_finds_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^k=1: other$"):
        canned(monkeypatch, ConfigError("k", 1, "other")).score(PAIR)


def test_an_unknown_function_is_refused() -> None:
    for spec in ("tests.test_reward_function:nothing", "tests.no_such_module:f"):
        with pytest.raises(ConfigError, match=r"reward\.function"):
            FunctionReward(spec)


@pytest.mark.parametrize("key", ["reward.sources[1].function", "evaluation.verifier"])
def test_a_function_that_raises_is_named_with_its_setting(key: str) -> None:
    source = FunctionReward("tests.faulty:raises", key=key)
    message = f"{key} tests.faulty:raises raised ValueError: no score for this one"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        source.verify([rollout("q", "a")])
