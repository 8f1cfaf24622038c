"""Scores of a Python function: the user's own, or a verifier.

Knows nothing of models, and of the function only that it is called as RewardFunction says.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from actors.reward_source import Fault, SourceError, finite_number, sample_name
from actors.rollout import Rollout
from actors.verifiers import load_function
from conf.schema import ConfigError


class RewardFunction(Protocol):
    """What a setting names as module:function. Its three arguments are passed by position and are equally long.

    `prompts` are the prompts as the policy read them, the chat template rendered; `responses` leave out the special
    tokens; `rows` are the rows of the dataset. It returns one finite number (or bool) for each. Anything else in its
    place, such as None or a Fault that says why, leaves that response without a score.
    """

    def __call__(
        self, prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]], /
    ) -> Sequence[float | Fault | None]: ...


class FunctionReward:
    """Scores of the function that `spec` names as module:function; `arguments` are passed on by name at each call."""

    def __init__(self, spec: str, *, key: str = "reward.function", **arguments: Any) -> None:
        """Imports the function. Raises ConfigError naming `key`, the setting that holds `spec`."""
        self.name = f"{key} {spec}"
        self.function = load_function(spec, key=key)  # a RewardFunction
        self.arguments = arguments

    def score(self, rollouts: Sequence[Rollout]) -> list[float | Fault]:
        """A score or a fault for each rollout.

        Raises SourceError naming the function if it raised, with the line of it that did, or did not return a list of
        as many values as it was given responses. A ConfigError of the function is passed on.
        """
        if not rollouts:
            return []
        values = self._call(rollouts)
        if not isinstance(values, list | tuple | np.ndarray):
            kind = type(values).__name__
            raise SourceError(f"{self.name} returned {kind} {values!r:.100}; it must return a list of numbers")
        if len(values) != len(rollouts):
            raise SourceError(f"{self.name} returned {len(values)} scores for {len(rollouts)} responses")
        return [
            self._judged(value, position, rollout)
            for position, (value, rollout) in enumerate(zip(values, rollouts, strict=True))
        ]

    def verify(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """A verdict for each rollout, None for one that the function itself says it cannot judge (a lasting fault).

        Raises ValueError with the message of the first other fault, which is a mistake in the function, and if it can
        judge none of several, which is one in the rows.
        """
        verdicts = self.score(rollouts)
        faults = [verdict for verdict in verdicts if isinstance(verdict, Fault)]
        mistakes = [fault.message for fault in faults if not fault.lasting or 1 < len(rollouts) == len(faults)]
        if mistakes:
            raise ValueError(mistakes[0])
        return [None if isinstance(verdict, Fault) else verdict for verdict in verdicts]

    def _call(self, rollouts: Sequence[Rollout]) -> object:
        prompts, responses = [rollout.prompt.text for rollout in rollouts], [rollout.text for rollout in rollouts]
        try:
            return self.function(prompts, responses, [rollout.prompt.row for rollout in rollouts], **self.arguments)
        except ConfigError:
            raise
        except Exception as error:  # of any kind, being a user's: it is passed on under the function's name
            raise SourceError(f"{self.name} raised {type(error).__name__}: {error}{_place(error)}") from error

    def _judged(self, value: object, position: int, rollout: Rollout) -> float | Fault:
        if isinstance(value, Fault):
            return Fault(f"{self.name}: {value.message} ({sample_name(rollout)})", lasting=value.lasting)
        number = finite_number(value)
        if number is not None:
            return number
        shown = f"{value}" if isinstance(value, float | np.floating) else f"{type(value).__name__} {value!r:.100}"
        where = f"at position {position} ({sample_name(rollout)})"
        return Fault(f"{self.name} returned {shown} {where}; it must be a finite number")


def _place(error: Exception) -> str:
    """Where in the file of the called function it raised; nothing if it could not even be called."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the call of it
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
