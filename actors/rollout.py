"""What the actors produce and the learner consumes: prompts and rollouts, as frozen plain data.

Ragged numpy arrays without padding, cheap to pickle and to share through an object store. Knows nothing of torch,
vLLM or Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One tokenised prompt and the row of the dataset that it came from.

    `id` numbers the prompts of a run in the order in which they are drawn, so (id, sample) names a rollout and seeds
    its sampling. `text` is what was tokenised, the chat template rendered; `messages` is the conversation itself,
    which a reward model with another template renders again.
    """

    id: int
    token_ids: IntArray  # [P]
    text: str
    messages: tuple[Mapping[str, str], ...]
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled response with what the engine knew while sampling it.

    `rollout_logprobs` are natural logarithms, of the distribution that was sampled from (temperature applied).
    `response_mask` is True where the policy wrote the token. `finish_reason` is "stop" when the policy ended the
    response itself and "length" when it was cut. `text` leaves out the special tokens.
    """

    prompt: Prompt
    sample: int
    response_ids: IntArray  # [T]
    rollout_logprobs: FloatArray  # [T]
    response_mask: BoolArray  # [T]
    policy_versions: IntArray  # [T]
    finish_reason: str
    text: str

    def __post_init__(self) -> None:
        length = self.response_ids.shape
        assert len(length) == 1, "one sequence"
        assert length[0] > 0, "a response has at least one token"
        assert self.rollout_logprobs.shape == self.response_mask.shape == self.policy_versions.shape == length
        assert self.finish_reason in ("stop", "length"), self.finish_reason

    @property
    def key(self) -> tuple[int, int]:
        return self.prompt.id, self.sample

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt.token_ids) + len(self.response_ids)


@dataclass(frozen=True, eq=False)
class ScoredRollout:
    """A rollout with the score that is trained on, and what its prompt's greedy response scored, where that was asked.

    `baseline` is 0.0 for every estimator but ReMax.
    """

    rollout: Rollout
    score: float
    baseline: float = 0.0
