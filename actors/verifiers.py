"""Functions that judge responses, in the one form that reward functions and verifiers share, and how they are found.

A function is named module:function and called with prompts, responses and rows, equally long; it returns a number each,
or a Fault where it cannot judge.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from actors.math_judge import MathJudge
from actors.reward_source import Fault, finite_number
from conf.schema import ConfigError


def load_function(spec: str, *, key: str) -> Callable[..., Any]:
    """The function that `spec` names as module:function; `key` is the setting that holds it, for the ConfigError."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ConfigError(key, spec, "write it as module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        remedy = f"there is no module {error.name}; run from the folder that holds it, or put that on PYTHONPATH"
        raise ConfigError(key, spec, remedy) from error
    except Exception as error:  # the user's own module runs here and may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        remedy = f"importing {module_name} raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        raise ConfigError(key, spec, remedy) from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        remedy = f"{module_name} has no function {name}; it has {', '.join(sorted(own)) or 'none'}"
        raise ConfigError(key, spec, remedy)
    return cast(Callable[..., Any], function)


def reasoning_gym(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The score from 0 to 1 that reasoning-gym's own verifier gives each response; 1 is right.

    `rows` hold `question`, `answer` and `metadata` as reasoning-gym made them. The response is judged without the white
    space around it. Raises ValueError for a row that reasoning-gym did not make.
    """
    return [_score(response.strip(), row) for response, row in zip(responses, rows, strict=True)]


def _score(response: str, row: Mapping[str, Any]) -> float:
    try:
        name = row["metadata"]["source_dataset"]
        entry = {"question": row["question"], "answer": row["answer"], "metadata": row["metadata"]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the row has no question, answer and metadata of reasoning-gym; it has {', '.join(row)}"
        ) from error
    return float(_judge(name)(response, entry))


@cache
def _judge(name: str) -> Callable[[str, Mapping[str, Any]], float]:
    from reasoning_gym.factory import get_score_answer_fn

    judge: Callable[[str, Mapping[str, Any]], float] = get_score_answer_fn(name)
    return judge


def math_verify(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]], *, answer_key: str = "answer"
) -> list[float | Fault]:
    """1.0 for each response whose answer equals the row's as mathematics, 0.0 for one whose does not or that has none.

    The package math-verify finds the answer of a response (the last one in a box, or else in LaTeX, or else a number)
    and compares it. `answer_key` is the column of the right answer: LaTeX, with or without `$` or a box around it, or a
    number. A row without an answer that can be read, and a comparison that takes too long, are faults, never a score.
    """
    return [_math_verdict(response, row, answer_key) for response, row in zip(responses, rows, strict=True)]


def _math_verdict(response: str, row: Mapping[str, Any], answer_key: str) -> float | Fault:
    answer: Any = row.get(answer_key)
    if isinstance(answer, bool) or not (isinstance(answer, str) or finite_number(answer) is not None):
        found = (
            f"holds {answer!r:.100} there" if answer_key in row else f"has {', '.join(map(str, row)) or 'no columns'}"
        )
        return Fault(f"the row has no right answer under {answer_key!r}; it {found}", lasting=True)
    return _math_judge().verdict(answer, response)


@cache
def _math_judge() -> MathJudge:
    return MathJudge()
