"""A run from its first stage to its report."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import partial
from pathlib import Path

from actors.tasks import write_task_files
from cluster.carrying import adopted_state, asked_steps, saved_state
from cluster.checkpoints import Checkpoint, CheckpointError, Checkpoints
from cluster.console import Console
from cluster.eval_stage import run_eval
from cluster.faults import ProcessError
from cluster.frontier import frontier_points, frontier_table, write_frontier
from cluster.ppo_stage import run_ppo
from cluster.recoveries import Recoveries
from cluster.report import draw_curves, read_metrics, write_summary
from cluster.rollouts import NothingToLearnError
from cluster.run import Handover, Run, moved
from cluster.saving import Saver
from cluster.session import ray_session
from cluster.signals import StopRequest
from cluster.supervised_stage import run_reward, run_sft
from cluster.tracking import Tracker
from conf.schema import Config

SUMMARY = "summary.json"
STAGES = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo, "eval": run_eval}


def run(config: Config, run_dir: Path, *, checkpoints: Checkpoints, resume: Checkpoint | None) -> int:
    """Run the stages of `config` and return the exit code; whatever happens, no process is left behind.

    `resume` is where it goes on, in the run's own folder or from another run's; None to begin at the beginning.
    """
    console = Console()
    if resume is not None and is_finished(config, run_dir, resume, checkpoints):
        console.note(f"the run in {run_dir} is finished; give it more steps, or another folder, to train on")
        return 0
    (run_dir / SUMMARY).unlink(missing_ok=True)  # it is there when a run is done, and this one goes on
    stop = StopRequest(grace_s=config.cluster.grace_s, note=console.note)
    saver = Saver(checkpoints, note=console.note)
    config = with_data(config, run_dir / "data")
    again = f"go on with the same command, run.dir={run_dir} and resume="
    where = "auto" if resume is None or checkpoints.owns(resume) else config.resume
    try:
        with (
            stop.listening(),
            Tracker(
                run_dir,
                config.tracking,
                name=f"{config.experiment}-{run_dir.name}",
                resolved_config=dataclasses.asdict(config),
                resume_at=resume.state["tracker"] if resume is not None and checkpoints.owns(resume) else None,
            ) as tracker,
        ):
            handover = Handover.at_start(config)
            if resume is not None:
                handover = Handover.from_plain(moved(resume))
                if not checkpoints.owns(resume):  # first of all: whatever comes, from here on it is this run's
                    resume = checkpoints.adopt(resume, adopted_state(run_dir, tracker, resume, handover))
                    where = "auto"
                saver.went_back_to(resume)
            with ray_session(config.cluster, config.generator, reward_models=config.reward.holds_model) as session:
                recoveries = Recoveries(limit=config.cluster.max_recoveries, note=console.note)
                run = Run(config, run_dir, session, tracker, console, saver, recoveries, stop)
                for stage in config.stages if resume is None else config.stages[config.stages.index(resume.stage) :]:
                    taken_up = resume if resume is not None and resume.stage == stage else None
                    if taken_up is None:
                        saver.save(stage, None, partial(saved_state, run, stage, handover, None))
                    handover = STAGES[stage](run, handover, taken_up)
    except (KeyboardInterrupt, SystemError):  # what `Stopped` becomes in the midst of others' code
        if stop.stopped is None:
            raise
        saved = "everything up to here is saved" if saver.is_current else "what came after the last checkpoint is lost"
        console.note(f"stopped by {stop.stopped}; {saved}; {again}{where}")
        return stop.stopped.exit_code(saved=saver.is_current)
    except (ProcessError, NothingToLearnError, CheckpointError, OSError) as error:
        console.note(
            f"the run failed: {error}\nwhat there is so far is in {run_dir}; once the cause is mended, {again}{where}"
        )
        return 1
    report(config, run_dir, handover, console)
    return 0


def is_finished(config: Config, run_dir: Path, resume: Checkpoint, checkpoints: Checkpoints) -> bool:
    """Return whether the run has made its report and has no more steps to take."""
    if not checkpoints.owns(resume) or not (run_dir / SUMMARY).exists() or resume.stage != config.stages[-1]:
        return False
    return bool(resume.state["asked_steps"] >= asked_steps(config, resume.stage))


def report(config: Config, run_dir: Path, handover: Handover, console: Console) -> None:
    """Write what a finished run is judged by, and show it."""
    summary = handover.summary | {
        "experiment": config.experiment,
        "seed": config.seed,
        "stages": list(config.stages),
        **{f"timing/{stage}_s": round(value, 2) for stage, value in handover.seconds.items()},
    }
    if config.stages != ("eval",):  # which is one point of each curve
        draw_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")
    made = [name for name in ("export", "checkpoints", "metrics.jsonl", "curves.png") if (run_dir / name).exists()]
    summary["paths"] = {name: run_dir / name for name in made}
    write_summary(run_dir / SUMMARY, summary)
    points = frontier_points(read_metrics(run_dir / "metrics.jsonl"))
    if len(points) > 1:
        write_frontier(points, run_dir)
        console.table(frontier_table(points))
    console.report(summary, handover.examples, run_dir)


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
