"""Sampling ahead of the learner (`algorithm.max_staleness`) beside the same run without.

The runs are those of a user: launch.py on the quickstart's task, in turns, each from the same supervised policy and the
same reward model. The number of epochs is what balances the two sides: with it learning takes about as long as
generating. Iterations are timed without evaluation; the first ones, in which everything is warmed up, are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import REPOSITORY, Result

WARMUP = 2  # iterations that are not counted
AHEAD = ("algorithm.correction=token",)


def launched(run_dir: Path, settings: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl of a run with these settings; its output is in a file beside its folder."""
    log = run_dir.with_suffix(".log")
    with log.open("w") as output:
        ended = subprocess.run(
            [sys.executable, "launch.py", "experiment=quickstart", f"run.dir={run_dir}", *settings],
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if ended.returncode:
        raise SystemExit(f"the run failed; its output is in {log}")
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def ppo_run(work: Path, start: Path, seed: int, max_staleness: int, settings: Sequence[str]) -> dict[str, Any]:
    """Return the figures of one run of PPO, in seconds: medians over its iterations, and what it learnt."""
    rows = launched(
        work / f"seed_{seed}_staleness_{max_staleness}",
        (
            "stages=[ppo]",
            "model.init_config=null",
            f"model.path={start / 'export' / 'sft'}",
            f"reward.sources=[{{type: model, path: '{start / 'export' / 'reward'}'}}]",
            f"seed={seed}",
            f"algorithm.max_staleness={max_staleness}",
            *AHEAD,
            *settings,
        ),
    )
    iterations = [row for row in rows if row["stage"] == "ppo" and row["step"] > WARMUP]
    held_out = [row["eval/accuracy"] for row in rows if row["stage"] == "ppo" and "eval/accuracy" in row]
    return {
        "seed": seed,
        "max_staleness": max_staleness,
        "iteration_s": median(iterations, "timing/step_s"),
        "generate_s": median(iterations, "timing/generate_s"),
        "learn_s": median(iterations, "timing/learn_s"),
        "sync_s": median(iterations, "timing/sync_s"),
        "idle_generator": median(iterations, "idle/generator_0"),
        "idle_learner": median(iterations, "idle/learner_0"),
        "staleness_mean": statistics.fmean(row["rollout/staleness_mean"] for row in iterations),
        "accuracy_first": held_out[0],
        "accuracy_mean": statistics.fmean(held_out[1:]),
        "accuracy_last": held_out[-1],
        "accuracies": held_out,
    }


def median(rows: Sequence[dict[str, Any]], key: str) -> float:
    return float(statistics.median(row[key] for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-staleness", type=int, default=1)
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--epochs", type=int, default=1, help="algorithm.ppo_epochs, to balance the two sides")
    parser.add_argument("--settings", nargs="*", default=[], help="further overrides of all runs")
    parser.add_argument("--json", type=Path, help="a file for the result")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    start = options.work / "start"
    if not (start / "export" / "reward" / "config.json").exists():
        launched(start, ("stages=[sft,reward]",))
    settings = (f"algorithm.num_steps={options.steps}", f"algorithm.ppo_epochs={options.epochs}", *options.settings)
    rows = []
    for seed in options.seeds:  # A B A B
        pair = [ppo_run(options.work, start, seed, k, settings) for k in (0, options.max_staleness)]
        waiting, ahead = pair
        ahead["throughput_ratio"] = waiting["iteration_s"] / ahead["iteration_s"]
        ahead["to_longer_alone"] = ahead["iteration_s"] / max(
            waiting["generate_s"], waiting["learn_s"] + waiting["sync_s"]
        )
        # Waiting, ranks evaluate rollouts while others are sampled; that is work of the learner too.
        ahead["to_busy_learner"] = ahead["iteration_s"] / ((1 - waiting["idle_learner"]) * waiting["iteration_s"])
        rows += pair
    shown = [{name: value for name, value in row.items() if name != "accuracies"} for row in rows]
    ratios = statistics.median(row["throughput_ratio"] for row in rows if "throughput_ratio" in row)
    longer = statistics.median(row["to_longer_alone"] for row in rows if "to_longer_alone" in row)
    busy = statistics.median(row["to_busy_learner"] for row in rows if "to_busy_learner" in row)
    Result(
        "overlap",
        shown,
        {"steps": options.steps, "epochs": options.epochs, "settings": options.settings},
        notes=[
            f"throughput beside max_staleness=0: {ratios:.3g} times (median over seeds)",
            f"iteration over the longer of generating and learning alone: {longer:.3g} times (median over seeds)",
            f"iteration over the time in which a learner that waits is busy: {busy:.3g} times (median over seeds)",
            *(
                f"seed {row['seed']}, max_staleness {row['max_staleness']}: held-out accuracy {row['accuracies']}"
                for row in rows
            ),
        ],
    ).say(options.json)


if __name__ == "__main__":
    main()
