"""An hour of training in which something goes wrong every half minute: `python -m tests.soak --minutes 60 --seed 0`.

The quickstart in its real sizes is started as a user starts it, and faults drawn from a seed are done to its processes
and checkpoints. Afterwards the same settings run as far undisturbed, and every figure has to be the same. Exit code 0:
no fault ended the run in a way that it may not, the figures are equal, no process is left, and memory has not grown.
Linux only. The hour needs about another half for the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.runs import LaunchedRun, metrics_of, reproducible
from tests.soak.disturbed import HANG_S, SETTINGS, STOP_S, DisturbedRun
from tests.soak.picture import draw_folder
from tests.soak.report import compared, judged, machine, summary_of, table
from tests.soak.watch import Observed, Watch


def undisturbed(folder: Path, *, stage: str, step: int) -> tuple[Path, float]:
    """Run the same settings as far; return the run folder, and the seconds that it took. AssertionError if it fails."""
    run = LaunchedRun(folder / "undisturbed", *SETTINGS, settings=())
    watch = Watch(run, Observed())
    try:
        while not watch.has_reached(stage, step):
            watch.check()
            assert run.process.poll() is None, f"the undisturbed run ended: {run.log}"
            assert watch.now() - watch.recorded_s < HANG_S, f"the undisturbed run hangs: {run.log}"
            time.sleep(0.5)
        seconds = watch.recorded_s
        run.process.send_signal(signal.SIGTERM)
        assert run.end(seconds=STOP_S) == 0, f"the undisturbed run does not end with 0 after SIGTERM: {run.log}"
        run.assert_nothing_left(seconds=90)
    finally:
        for pid in run.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        watch.stop()
    return run.dir, seconds


def soak(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Carry it out and return its summary."""
    failure, leaked, comparison, seconds = None, [], None, None
    run = DisturbedRun(folder, seed=asked.seed)
    try:
        run.disturb(minutes=asked.minutes, every=asked.every, seed=asked.seed)
        run.finish()
    except AssertionError as error:
        failure = str(error)
    finally:
        leaked = run.end_everything()
    (folder / "observed.json").write_text(json.dumps(asdict(run.observed)))
    rows = metrics_of(run.run.dir)
    if failure is None and not asked.no_compare:
        try:
            other, seconds = undisturbed(folder, stage=rows[-1]["stage"], step=rows[-1]["step"])
            comparison = compared(reproducible(rows), reproducible(metrics_of(other)))
        except AssertionError as error:
            failure = str(error)
    return {
        "minutes": asked.minutes,
        "seed": asked.seed,
        "every_s": asked.every,
        "settings": SETTINGS,
        "failure": failure,
        **summary_of(run.observed, rows, num_legs=len(run.legs), end_s=60 * asked.minutes),
        "compared": None if comparison is None else asdict(comparison),
        "undisturbed_s": seconds,
        "leaked": leaked,
        "machine": machine(),
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="of disturbed training")
    parser.add_argument("--seed", type=int, default=0, help="of the faults; that of the training is the quickstart's")
    parser.add_argument("--every", type=float, default=30, help="seconds from fault to fault")
    parser.add_argument("--dir", type=Path, default=Path("runs/soak"), help="a folder that is not there yet")
    parser.add_argument("--no-compare", action="store_true", help="leave the undisturbed run out")
    asked = parser.parse_args(argv)
    folder = asked.dir.resolve()
    folder.mkdir(parents=True)
    summary = soak(asked, folder)
    summary["wrong"] = judged(summary, comparing=not asked.no_compare)
    (folder / "soak.json").write_text(json.dumps(summary, indent=2) + "\n")
    text = table(summary)
    (folder / "soak.md").write_text(text)
    print(text)
    draw_folder(folder)
    return 1 if summary["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
