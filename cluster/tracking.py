"""What a run records: metrics, checked and sent to every sink that is asked for, and samples of its rollouts.

cluster/sinks.py says what the sinks are and what their files hold.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence, Set
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.sinks import METRICS_FILE, SAMPLES_FILE, JsonLines, Sink, TensorBoard, Wandb, to_json
from conf.schema import TrackingConfig

__all__ = ["METRICS_FILE", "SAMPLES_FILE", "Tracker", "to_json"]
_KEY = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)+")
_STAGE = re.compile(r"[a-z0-9_]+")
_log = logging.getLogger(__name__)


class Tracker:
    """Sends the metrics of a run to every sink that its configuration names; metrics.jsonl is always one.

    Opened when made, and closed by leaving its `with` block. Raises ConfigError if the folder already holds a run or
    W&B cannot start.

        with Tracker(run_dir, config.tracking, name=name, resolved_config=tree) as tracker:
            tracker.log("ppo", step, {"policy/loss": 0.1})
            tracker.samples("ppo", step, [{"prompt": "1+1=", "response": "2", "score": 0.7}])

    A run that goes on from a checkpoint goes on from the position that the tracker had then: `resume_at` in a new
    process and in the same run folder, `rewind` in the same process. What was recorded after it is taken back.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        *,
        name: str,
        resolved_config: Mapping[str, Any],
        resume_at: Mapping[str, Any] | None = None,
    ) -> None:
        """`resume_at`: an earlier `position()`. ConfigError if a file is shorter than it was then, or is gone."""
        self._samples_per_step = config.samples_per_step
        self._warned: set[tuple[str, str]] = set()
        self._step: dict[str, int] = {}  # by stage: the last step
        self._keys: dict[str, set[str]] = {}  # by stage: the keys that this step already has
        self._wandb: Wandb | None = None
        self._files = JsonLines(run_dir, None if resume_at is None else resume_at["files"])
        self._sinks: list[Sink] = [self._files]
        steps = None if resume_at is None else resume_at["steps"]
        self._go_on_from(steps or {})
        try:
            if config.wandb != "off":
                run_id = None if resume_at is None else resume_at["wandb"]
                self._wandb = Wandb(run_dir, config, name, resolved_config, run_id)
                self._sinks.append(self._wandb)
            if config.tensorboard:
                self._sinks.append(TensorBoard(run_dir, resolved_config, steps))
        except BaseException:
            self.close(failed=True)
            raise

    def position(self) -> dict[str, Any]:
        """Where the record stands, as JSON; what was recorded until now is on the disk.

        The bytes of each file, the last step of each stage, and the id of the W&B run.
        """
        return {
            "files": self._files.sizes(),
            "steps": dict(self._step),
            "wandb": None if self._wandb is None else self._wandb.id,
        }

    def rewind(self, position: Mapping[str, Any]) -> None:
        """Take back what was recorded after an earlier `position()`; ConfigError if a file is shorter than that."""
        self._files.cut(position["files"])
        for sink in self._sinks:
            sink.rewind(position["steps"])
        self._go_on_from(position["steps"])

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record the figures of one step of one stage, the same numbers in every sink.

        A step may be logged in several parts. Raises ValueError for a malformed name, a step that goes back, or a key
        that the step already has, and TypeError for a figure that is not a number. A figure that is not finite is
        recorded as it is, with a warning the first time.
        """
        self._check(stage, step, metrics.keys())
        numbers = {key: _number(key, value) for key, value in metrics.items()}
        self._step[stage] = step
        self._keys[stage] |= numbers.keys()
        for key, value in numbers.items():
            if not math.isfinite(value) and (stage, key) not in self._warned:
                self._warned.add((stage, key))
                _log.warning("%s is %s at step %d of stage %s", key, value, step, stage)
        for sink in self._sinks:
            sink.log(stage, step, numbers)

    def samples(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the first `tracking.samples_per_step` of these rows to samples.jsonl."""
        self._files.samples(stage, step, rows[: self._samples_per_step])

    def close(self, *, failed: bool) -> None:
        """Close every sink, the last opened first; does nothing the second time."""
        while self._sinks:
            self._sinks.pop().close(failed=failed)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _go_on_from(self, steps: Mapping[str, int]) -> None:
        self._step = dict(steps)
        self._keys = {stage: set() for stage in steps}

    def _check(self, stage: str, step: int, keys: Set[str]) -> None:
        if not _STAGE.fullmatch(stage):
            raise ValueError(f"stage {stage!r}: write lower-case letters, digits and underscores")
        for key in keys:
            if not _KEY.fullmatch(key):
                raise ValueError(f"metric {key!r}: write it as group/name in lower case")
        last = self._step.get(stage)
        if last is not None and step < last:
            raise ValueError(f"step {step} of stage {stage} after step {last}: steps of a stage only grow")
        if step != last:
            self._keys[stage] = set()
        if twice := self._keys[stage] & keys:
            raise ValueError(f"{', '.join(sorted(twice))} logged twice at step {step} of stage {stage}")


def _number(key: str, value: object) -> float:
    """The figure as a plain int or float, of Python's or numpy's number types."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"metric {key}: {value!r} of type {type(value).__name__} is not a number")
