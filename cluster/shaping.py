"""From the scores of the reward sources to the scores that are trained on, with the statistics of all scores so far.

The order is that of `reward.shaping`: normalise, clip, penalties. A greedy response's score, the baseline of ReMax,
goes the same way as the scores that it is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.driver import Metrics, ScoredHandle, ShapedHandle, TrainBatch
from conf.schema import ShapingConfig


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and summed squared deviation of all values so far."""

    count: float = 0.0
    mean: float = 0.0
    deviation: float = 0.0

    def with_values(self, values: Sequence[float]) -> RunningMoments:
        """Return the moments with more values taken in: Chan, Golub and LeVeque 1979, the parallel algorithm.

        The mean of the new values is taken from the first of them on, so that it is exact where all are equal: a
        deviation that is rounding alone would become scores of any size.
        """
        added = np.asarray(values, dtype=np.float64)
        mean = float(added[0] + (added - added[0]).mean())
        count = self.count + added.size
        share = added.size / count
        distance = mean - self.mean
        deviation = float(np.square(added - mean).sum())
        return RunningMoments(
            count, self.mean + distance * share, self.deviation + deviation + distance**2 * self.count * share
        )

    @property
    def std(self) -> float:
        """The standard deviation with Bessel's correction; 1.0 for fewer than two values, or equal ones."""
        if self.count < 2 or self.deviation == 0:
            return 1.0
        return float(np.sqrt(self.deviation / (self.count - 1)))


class ScoreShaping:
    """Shapes scores batch by batch. `state` is what a resumed run needs."""

    def __init__(self, config: ShapingConfig, *, max_new_tokens: int) -> None:
        self.config, self.max_new_tokens = config, max_new_tokens
        self.running = RunningMoments()

    def __call__(self, batch: TrainBatch) -> tuple[list[ShapedHandle], Metrics]:
        """Return the batch as it is trained on, and figures of what was done to its scores.

        The running statistics take in the batch before it is normalised by them, as in TRL's and LLaMA-Factory's PPO.
        """
        self.running = self.running.with_values([handle.score for handle in batch.handles])
        shaped = [
            ShapedHandle(handle, self._shaped(handle), self._baseline(handle, batch.greedy)) for handle in batch.handles
        ]
        scores = np.array([item.score for item in shaped])
        penalties = np.array([self._penalty(handle) for handle in batch.handles])
        return shaped, {
            "reward/shaped_mean": float(scores.mean()),
            "reward/shaped_std": float(scores.std()),
            "reward/running_mean": self.running.mean,
            "reward/running_std": self.running.std,
            "reward/penalty_mean": float(penalties.mean()),
        }

    def state(self) -> dict[str, float]:
        return {"count": self.running.count, "mean": self.running.mean, "deviation": self.running.deviation}

    def load_state(self, state: Mapping[str, float]) -> None:
        self.running = RunningMoments(**state)

    def _baseline(self, handle: ScoredHandle, greedy: Mapping[int, ScoredHandle]) -> float:
        return self._shaped(greedy[handle.info.prompt_id]) if greedy else 0.0

    def _shaped(self, handle: ScoredHandle) -> float:
        score, config = handle.score, self.config
        if config.normalise:
            score = (score - self.running.mean) / self.running.std
        if config.clip is not None:
            score = min(max(score, -config.clip), config.clip)
        return score - self._penalty(handle)

    def _penalty(self, handle: ScoredHandle) -> float:
        missing = self.config.missing_eos_penalty if handle.info.truncated else 0.0
        return missing + overlong_penalty(
            handle.info.num_response_tokens,
            limit=self.max_new_tokens,
            buffer=self.config.overlong_tokens,
            most=self.config.overlong_penalty,
        )


def overlong_penalty(length: int, *, limit: int, buffer: int, most: float) -> float:
    """Return 0 up to limit - buffer tokens, rising evenly to `most` at `limit`.

    The soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476), equation 13, where `most` is 1.
    """
    if buffer == 0:
        return 0.0
    return most * min(max(length - (limit - buffer), 0) / buffer, 1.0)
