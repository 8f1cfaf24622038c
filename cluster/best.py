"""The best policy so far, by a held-out metric, as a checkpoint that is always whole."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.checkpoint_files import link_or_copy
from conf.schema import EvaluationConfig

BEST_EXPORT = Path("export", "best")  # in the run folder
BEST = "best.json"


class BestPolicy:
    """Keeps `folder` at what `export` wrote when the metric was best.

    In it stands best.json with the step, the metric and its value. The one before gives way only once the new one is
    written; after a crash between the two it is found beside it, as .NAME.old.
    """

    def __init__(self, config: EvaluationConfig, folder: Path, export: Callable[[Path], None]) -> None:
        self.metric, self.sign = config.best_metric, 1.0 if config.best_is == "highest" else -1.0
        self.folder, self.export = folder, export
        self.best: float | None = None
        self.best_step: int | None = None

    def offer(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Export if these held-out metrics are the best so far; return what is to be logged.

        That is nothing if no metric was asked for. One that is NaN, or was not measured this time, is not the best.
        """
        if self.metric is None:
            return {}
        value = metrics.get(self.metric, math.nan)
        if math.isfinite(value) and (self.best is None or self.sign * value > self.sign * self.best):
            self._publish(step, value)
            self.best, self.best_step = value, step
        return {} if self.best is None else {"eval/best": self.best}

    def state(self) -> dict[str, float | int | None]:
        return {"best": self.best, "best_step": self.best_step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken. What was exported since then gives way to what is as good again."""
        self.best, self.best_step = state["best"], state["best_step"]

    def _publish(self, step: int, value: float) -> None:
        new, old = self.folder.with_name(f".{self.folder.name}.new"), self.folder.with_name(f".{self.folder.name}.old")
        _remove(new)
        self.export(new)
        (new / BEST).write_text(json.dumps({"step": step, "metric": self.metric, "value": value}) + "\n")
        if self.folder.exists():
            _remove(old)
            self.folder.rename(old)
        new.rename(self.folder)
        _remove(old)


def taken_over(state: Mapping[str, Any], others: Path, folder: Path) -> dict[str, Any]:
    """Return the state of another run's best policy as that of this run, its export linked or copied to `folder`.

    Where that export is no longer there, or a later one is in its place, no policy has been the best so far.
    """
    if state["best_step"] is None:
        return dict(state)
    try:
        exported = json.loads((others / BEST).read_text())
    except FileNotFoundError:
        exported = {}
    if (exported.get("step"), exported.get("value")) != (state["best_step"], state["best"]):
        return dict.fromkeys(state)
    new = folder.with_name(f".{folder.name}.new")
    _remove(new)
    shutil.copytree(others, new, copy_function=lambda source, target: link_or_copy(Path(source), Path(target)))
    _remove(folder)
    new.rename(folder)
    return dict(state)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
