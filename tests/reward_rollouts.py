"""Rollouts for tests of reward sources, and functions for the sources of such tests to name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from actors.rollout import Prompt, Rollout


def rollout(
    question: str,
    answer: str,
    *,
    finish: str = "stop",
    number: int = 0,
    sample: int = 0,
    row: Mapping[str, Any] | None = None,
) -> Rollout:
    """A rollout whose token ids are those of no tokenizer: a reward source must read the text."""
    length = 3
    return Rollout(
        prompt=Prompt(
            id=number,
            token_ids=np.full(2, 999, np.int32),
            text=f"policy template: {question}",
            messages=({"role": "user", "content": question},),
            row={"number": number} if row is None else row,
        ),
        sample=sample,
        response_ids=np.full(length, 999, np.int32),
        rollout_logprobs=np.zeros(length, np.float32),
        response_mask=np.ones(length, np.bool_),
        policy_versions=np.zeros(length, np.int32),
        finish_reason=finish,
        text=answer,
    )


def length_reward(prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]]) -> list[float]:
    """The length of each response, and a hundred for each prompt before it."""
    assert all(prompt.startswith("policy template: ") for prompt in prompts)
    return [len(response) + 100 * int(row["number"]) for response, row in zip(responses, rows, strict=True)]
