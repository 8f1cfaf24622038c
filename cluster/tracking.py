"""What a run records: metrics to metrics.jsonl and, if asked for, to W&B and TensorBoard; rollouts to samples.jsonl.

The formats are defined here and read in cluster/report.py. Both files are strict JSON, one object a line, written out
line by line, so that a run that is killed keeps what it had. JSON has no NaN and no infinity: they are written as the
strings "nan", "inf" and "-inf", which `float()` turns back.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence, Set
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from conf.schema import ConfigError, TrackingConfig

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
_KEY = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)+")
_STAGE = re.compile(r"[a-z0-9_]+")
_log = logging.getLogger(__name__)


def to_json(value: Any) -> Any:
    """The value in types that strict JSON can hold; numbers that are not finite become "nan", "inf" or "-inf".

    Takes None, strings, numbers of Python and numpy, paths, and mappings and sequences of these; anything else is a
    TypeError, because a guess at how to write it would be a guess at how to read it.
    """
    match value:
        case None | str() | bool():
            return value
        case Integral():
            return int(value)
        case Real():
            number = float(value)
            return number if math.isfinite(number) else str(number)
        case Path():
            return str(value)
        case Mapping():
            return {str(key): to_json(item) for key, item in value.items()}
        case Sequence():
            return [to_json(item) for item in value]
    raise TypeError(f"cannot be written as JSON: {value!r} of type {type(value).__name__}")


class Sink(Protocol):
    """One place that the metrics go to."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class JsonLines:
    """metrics.jsonl and samples.jsonl in the run folder."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        if path.exists() and path.stat().st_size:
            raise ConfigError(
                "run.dir", str(run_dir), f"already holds the {METRICS_FILE} of a run; choose a new folder"
            )
        # Line buffering hands each line to the operating system, which keeps it when this process is killed.
        self._metrics = path.open("w", encoding="utf-8", buffering=1)
        self._samples = (run_dir / SAMPLES_FILE).open("w", encoding="utf-8", buffering=1)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        line = {"stage": stage, "step": step, **metrics}
        self._metrics.write(json.dumps(to_json(line), allow_nan=False) + "\n")

    def samples(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            assert not row.keys() & {"stage", "step"}, row.keys()
            line = {"stage": stage, "step": step, **row}
            self._samples.write(json.dumps(to_json(line), allow_nan=False, ensure_ascii=False) + "\n")

    def close(self, *, failed: bool) -> None:
        self._metrics.close()
        self._samples.close()


class Wandb:
    """One W&B run. Keys are `<stage>/<key>`, and each stage has its own horizontal axis, `<stage>/step`.

    W&B wants one step that only grows for a whole run; the stages each count from their own beginning.
    """

    def __init__(self, run_dir: Path, config: TrackingConfig, name: str, resolved_config: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=config.wandb_project,
                name=name,
                dir=str(run_dir),
                mode="offline" if config.wandb == "offline" else "online",
                config=dict(resolved_config),
                settings=wandb.Settings(console="off"),  # its capture of the terminal disturbs the progress bars
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                "tracking.wandb",
                config.wandb,
                f"W&B could not start ({str(error).splitlines()[0]}); log in with `wandb login` and see that the "
                "network reaches its server, or set tracking.wandb=offline and upload later with `wandb sync`",
            ) from error
        self._teardown = wandb.teardown
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **{f"{stage}/{key}": value for key, value in metrics.items()}})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        self._teardown()  # W&B's service process would otherwise stay until this one ends


class TensorBoard:
    """TensorBoard event files in `<run folder>/tensorboard`, with tags `<stage>/<key>`."""

    def __init__(self, run_dir: Path, resolved_config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))
        text = json.dumps(to_json(resolved_config), indent=2)
        self._writer.add_text("config", "\n".join("    " + line for line in text.splitlines()))  # Markdown: as code

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(f"{stage}/{key}", value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class Tracker:
    """Sends the metrics of a run to every sink that its configuration names; metrics.jsonl is always one.

    Opened when made, and closed by leaving its `with` block. Raises ConfigError if the folder already holds a run or
    W&B cannot start.

        with Tracker(run_dir, config.tracking, name=name, resolved_config=tree) as tracker:
            tracker.log("ppo", step, {"policy/loss": 0.1})
            tracker.samples("ppo", step, [{"prompt": "1+1=", "response": "2", "score": 0.7}])
    """

    def __init__(self, run_dir: Path, config: TrackingConfig, *, name: str, resolved_config: Mapping[str, Any]) -> None:
        self._samples_per_step = config.samples_per_step
        self._step: dict[str, int] = {}  # by stage: the last step
        self._keys: dict[str, set[str]] = {}  # by stage: the keys that this step already has
        self._warned: set[tuple[str, str]] = set()
        self._files = JsonLines(run_dir)
        self._sinks: list[Sink] = [self._files]
        try:
            if config.wandb != "off":
                self._sinks.append(Wandb(run_dir, config, name, resolved_config))
            if config.tensorboard:
                self._sinks.append(TensorBoard(run_dir, resolved_config))
        except BaseException:
            self.close(failed=True)
            raise

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
