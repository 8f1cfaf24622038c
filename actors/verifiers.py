"""Functions that judge responses, in the one form that reward functions and verifiers share, and how they are found.

A function is named module:function and called with prompts, responses and rows, equally long; it returns a number each.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

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
