"""Where a run's metrics go: metrics.jsonl and samples.jsonl, W&B, TensorBoard; and how each goes on after a resume.

The formats of the two files are defined here and read in cluster/report.py. Both are strict JSON, one object a line,
written out line by line, so that a run that is killed keeps what it had. JSON has no NaN and no infinity: they are
written as the strings "nan", "inf" and "-inf", which `float()` turns back.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol, TextIO

from conf.schema import ConfigError, TrackingConfig

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
WANDB_UPLOAD_S = 30.0  # how long the end of a run waits for what is still to be uploaded
WANDB_END_S = 15.0  # beyond that, until W&B's service process is taken to hang
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

    def rewind(self, steps: Mapping[str, int]) -> None:
        """Take back the steps after the last one of each stage in `steps`, and every other stage, where possible."""

    def close(self, *, failed: bool) -> None: ...


class JsonLines:
    """metrics.jsonl and samples.jsonl in the run folder.

    `sizes`: of an earlier `sizes()`, to go on from there; None: the folder must not hold a run yet.
    """

    def __init__(self, run_dir: Path, sizes: Mapping[str, int] | None) -> None:
        self._folder = run_dir
        self._files: dict[str, TextIO] = {}
        run_dir.mkdir(parents=True, exist_ok=True)
        metrics = run_dir / METRICS_FILE
        if sizes is None and metrics.exists() and metrics.stat().st_size:
            remedy = f"already holds the {METRICS_FILE} of a run; choose a new folder"
            raise ConfigError("run.dir", str(run_dir), remedy)
        self.cut(sizes or {METRICS_FILE: 0, SAMPLES_FILE: 0})
        for name in (METRICS_FILE, SAMPLES_FILE):
            # Line buffering hands each line to the operating system, which keeps it when this process is killed.
            self._files[name] = (run_dir / name).open("a", encoding="utf-8", buffering=1)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        line = {"stage": stage, "step": step, **metrics}
        self._files[METRICS_FILE].write(json.dumps(to_json(line), allow_nan=False) + "\n")

    def samples(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            assert not row.keys() & {"stage", "step"}, row.keys()
            line = {"stage": stage, "step": step, **row}
            self._files[SAMPLES_FILE].write(json.dumps(to_json(line), allow_nan=False, ensure_ascii=False) + "\n")

    def sizes(self) -> dict[str, int]:
        """How many bytes each file has; these are on the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Cut both files to earlier sizes; raises ConfigError, with both as they were, if one is shorter already."""
        paths = {name: self._folder / name for name in (METRICS_FILE, SAMPLES_FILE)}
        for name, path in paths.items():
            there = path.stat().st_size if path.exists() else 0
            if there < sizes[name]:
                remedy = (
                    f"its {name} has {there} bytes, {sizes[name]} when the checkpoint was written; put the file back "
                    "as it was, or set run.dir to a new folder and resume to the path of the checkpoint"
                )
                raise ConfigError("run.dir", str(self._folder), remedy)
        for name, path in paths.items():
            with path.open("a") as file:
                file.truncate(sizes[name])

    def rewind(self, steps: Mapping[str, int]) -> None:
        """Nothing to do: `cut` takes back by the byte what steps cannot tell."""

    def close(self, *, failed: bool) -> None:
        for file in self._files.values():
            file.close()


class Wandb:
    """One W&B run. Keys are `<stage>/<key>`, and each stage has its own horizontal axis, `<stage>/step`.

    W&B wants one step that only grows for a whole run; the stages each count from their own beginning. It cannot take
    back what it was sent: a step that is run again after a resume or a rollback is there twice.

    Must never stop a run or hold it up. Without a network the library goes on trying to upload, and so does `finish`,
    which therefore has a time limit. With its service process gone, every call of the library raises an error; with
    that suspended, a call waits for ever, and so would the end of this process. Hence one thread for all calls, and a
    kill for a service that does not answer. What was not uploaded lies in `<run folder>/wandb`.
    """

    def __init__(
        self, run_dir: Path, config: TrackingConfig, name: str, resolved_config: Mapping[str, Any], run_id: str | None
    ) -> None:
        import wandb

        children = _children()
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                name=name,
                dir=str(run_dir),
                id=run_id,
                resume=None if run_id is None else "allow",
                mode="offline" if config.wandb == "offline" else "online",
                config=dict(resolved_config),
                # Its capture of the terminal would disturb the progress bars.
                settings=wandb.Settings(console="off", finish_timeout=WANDB_UPLOAD_S),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                "tracking.wandb",
                config.wandb,
                f"W&B could not start ({str(error).splitlines()[0]}); log in with `wandb login` and see that the "
                "network reaches its server, or set tracking.wandb=offline and upload later with `wandb sync`",
            ) from error
        self.id: str = self._run.id
        self._service = _children() - children
        self._teardown = wandb.teardown
        self._stages: set[str] = set()
        self._rows: queue.SimpleQueue[tuple[str, int, Mapping[str, float]] | bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self._rows.put((stage, step, metrics))

    def rewind(self, steps: Mapping[str, int]) -> None:
        """Nothing can be taken back."""

    def close(self, *, failed: bool) -> None:
        self._rows.put(failed)
        self._thread.join(WANDB_UPLOAD_S + WANDB_END_S)
        if self._thread.is_alive():
            _log.warning("W&B does not answer and is ended; what it was sent so far can be uploaded with `wandb sync`")
        for pid in self._service & _children():  # suspended, or ended without having been waited for
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._thread.join(WANDB_END_S)

    def _work(self) -> None:
        """Send what is logged until the run is closed, or until the library fails."""
        try:
            while not isinstance(row := self._rows.get(), bool):
                self._send(*row)
            self._run.finish(exit_code=int(row))
            self._teardown()  # W&B's service process would otherwise stay until this one ends
        except Exception as error:  # an optional record: whatever it is, the run goes on without it
            _log.warning("W&B failed and records no more of this run (%s: %s)", type(error).__name__, error)
            with suppress(Exception):  # it fails as the rest did, but lets go of the service first
                self._teardown()

    def _send(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **{f"{stage}/{key}": value for key, value in metrics.items()}})


class TensorBoard:
    """TensorBoard event files, one folder `<run folder>/tensorboard/<stage>` a stage, with tags `<stage>/<key>`.

    Event files cannot be cut. A new one that begins with the first step that is to be run again makes TensorBoard drop
    that step and all after it from the files before, in the same folder: hence a folder for each stage.
    """

    def __init__(self, run_dir: Path, resolved_config: Mapping[str, Any], steps: Mapping[str, int] | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._open = run_dir / "tensorboard", SummaryWriter
        self._writers: dict[str, Any] = {}
        text = json.dumps(to_json(resolved_config), indent=2)
        with SummaryWriter(str(self._folder)) as writer:
            writer.add_text("config", "\n".join("    " + line for line in text.splitlines()))  # Markdown: as code
        if steps is not None:
            self.rewind(steps)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in self._writers:
            self._writers[stage] = self._open(str(self._folder / stage))
        for key, value in metrics.items():
            self._writers[stage].add_scalar(f"{stage}/{key}", value, step)
        self._writers[stage].flush()

    def rewind(self, steps: Mapping[str, int]) -> None:
        self.close(failed=False)
        time.sleep(1)  # the files are read in the order of their names, which tell the second in which each was begun
        for folder in sorted(self._folder.iterdir()):
            if folder.is_dir():
                again = steps.get(folder.name, -1) + 1
                self._writers[folder.name] = self._open(str(folder), purge_step=again)

    def close(self, *, failed: bool) -> None:
        while self._writers:
            self._writers.popitem()[1].close()


def _children() -> set[int]:
    """Process ids of the direct children of this process."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= {int(word) for word in (task / "children").read_text().split()}
    return found
