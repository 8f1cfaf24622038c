"""Reward functions: what they are given, and the answers that are never taken for a score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from actors.reward import FunctionReward
from conf.schema import ConfigError
from tests.test_reward import rollout

# Functions that a user could name.


def length_reward(prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]]) -> list[float]:
    assert all(prompt.startswith("policy template: ") for prompt in prompts)
    return [len(response) + 100 * int(row["number"]) for response, row in zip(responses, rows, strict=True)]


ANSWER: Any = None


def canned_reward(prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]]) -> Any:
    return ANSWER


def test_a_function_is_given_texts_and_rows_in_order() -> None:
    source = FunctionReward("tests.test_reward_function:length_reward")
    scores = source.score([rollout("q", "aa", number=1), rollout("q", "a", number=0)])
    assert scores == [102.0, 1.0]
    assert all(type(score) is float for score in scores)
    assert source.score([]) == []


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
    monkeypatch.setattr("tests.test_reward_function.ANSWER", answer)
    assert (
        FunctionReward("tests.test_reward_function:canned_reward").score([rollout("q", "a"), rollout("q", "b")])
        == expected
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "returned 1 scores for 2 responses"),
        ([1.0, 2.0, 3.0], "returned 3 scores for 2 responses"),
        (None, "returned NoneType None; it must return a list"),
        ("12", "returned str '12'; it must return a list"),
        ({0: 1.0, 1: 2.0}, "returned dict"),
        ([1.0, "2"], "returned str '2' at position 1"),
        ([None, 1.0], "returned NoneType None at position 0"),
        ([1.0, [2.0]], r"returned list \[2.0\] at position 1"),
        (np.ones((2, 1)), r"returned ndarray .* at position 0"),
        ([0.0, math.nan], r"returned nan at position 1 \(prompt 4, sample 0\)"),
        ([-math.inf, 0.0], r"returned -inf at position 0 \(prompt 3, sample 0\)"),
    ],
)
def test_a_wrong_answer_of_a_function_is_never_a_score(
    answer: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.test_reward_function.ANSWER", answer)
    source = FunctionReward("tests.test_reward_function:canned_reward")
    with pytest.raises(ValueError, match=rf"^reward.function tests.test_reward_function:canned_reward {message}"):
        source.score([rollout("q", "a", number=3), rollout("q", "b", number=4)])


def test_an_unknown_function_is_refused() -> None:
    for spec in ("tests.test_reward_function:nothing", "tests.no_such_module:f"):
        with pytest.raises(ConfigError, match=r"reward\.function"):
            FunctionReward(spec)


@pytest.mark.parametrize("key", ["reward.function", "evaluation.verifier"])
def test_a_function_that_raises_is_named_with_its_setting(key: str) -> None:
    source = FunctionReward("tests.faulty:raises", key=key)
    with pytest.raises(RuntimeError, match=rf"^{key} tests.faulty:raises raised ValueError: no score for this one"):
        source.score([rollout("q", "a")])
