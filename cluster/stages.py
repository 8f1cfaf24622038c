"""A run from its first stage to its report."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import replace
from pathlib import Path

from actors.tasks import write_task_files
from cluster.console import Console
from cluster.eval_stage import run_eval
from cluster.frontier import frontier_points, frontier_table, write_frontier
from cluster.ppo_stage import run_ppo
from cluster.processes import ProcessError
from cluster.report import draw_curves, read_metrics, write_summary
from cluster.rollouts import NothingToLearnError
from cluster.run import Handover, Run
from cluster.session import Stopped, ray_session, stop_signals
from cluster.supervised_stage import run_reward, run_sft
from cluster.tracking import Tracker
from conf.schema import Config

STAGES = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo, "eval": run_eval}


def run(config: Config, run_dir: Path) -> int:
    """Run the stages of `config` and return the exit code; whatever happens, no process is left behind."""
    console = Console()
    config = with_data(config, run_dir / "data")
    handover = Handover.at_start(config)
    seconds: dict[str, float] = {}
    try:
        with (
            stop_signals(),
            Tracker(
                run_dir,
                config.tracking,
                name=f"{config.experiment}-{run_dir.name}",
                resolved_config=dataclasses.asdict(config),
            ) as tracker,
            ray_session(config.cluster, config.generator) as session,
        ):
            for stage in config.stages:
                start = time.perf_counter()
                handover = STAGES[stage](Run(config, run_dir, session, tracker, console), handover)
                seconds[stage] = time.perf_counter() - start
    except Stopped as stopped:
        console.note(f"stopped by {stopped}; what there is so far is in {run_dir}")
        return stopped.exit_code
    except (ProcessError, NothingToLearnError) as error:
        console.note(f"the run failed: {error}\nwhat there is so far is in {run_dir}")
        return 1
    summary = handover.summary | {
        "experiment": config.experiment,
        "seed": config.seed,
        "stages": list(config.stages),
        **{f"timing/{stage}_s": round(value, 2) for stage, value in seconds.items()},
    }
    if config.stages != ("eval",):  # which is one point of each curve
        draw_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")
    made = [name for name in ("export", "checkpoints", "metrics.jsonl", "curves.png") if (run_dir / name).exists()]
    summary["paths"] = {name: run_dir / name for name in made}
    write_summary(run_dir / "summary.json", summary)
    points = frontier_points(read_metrics(run_dir / "metrics.jsonl"))
    if len(points) > 1:
        write_frontier(points, run_dir)
        console.table(frontier_table(points))
    console.report(summary, handover.examples, run_dir)
    return 0


def with_data(config: Config, folder: Path) -> Config:
    """Return the settings with the files of `data.task` made and filled in wherever no path is given."""
    if config.data.task.name is None:
        return config
    files = write_task_files(config.data.task, folder, config.seed)
    return replace(
        config,
        data=replace(config.data, path=str(files.prompts), eval_path=config.data.eval_path or str(files.eval)),
        sft=replace(
            config.sft,
            data_path=config.sft.data_path or str(files.sft),
            eval_path=config.sft.eval_path or str(files.eval),
        ),
        reward_training=replace(
            config.reward_training,
            data_path=config.reward_training.data_path or str(files.pairs),
            eval_path=config.reward_training.eval_path or str(files.pairs_eval),
        ),
    )
