"""The run that all faults are compared with: the same settings, and nothing happens to it."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from tests.runs import launched

# Everything that has a state of its own: adaptive KL, running scores, an average of the weights, the best policy.
SETTINGS = (
    "stages=[sft,ppo]",
    "reward.sources=[{type: function, function: examples.functions:brevity}]",
    "reward.shaping.normalise=true",
    "algorithm=ppo_adaptive_kl",
    "algorithm.num_steps=7",
    "algorithm.ppo_epochs=2",
    "algorithm.prompts_per_step=8",
    "algorithm.samples_per_prompt=2",
    "algorithm.mini_batch_size=8",
    "learner.critic_init=policy",
    "learner.ema_decay=0.9",
    "evaluation.best_metric=eval/score_mean",
    "checkpoint.every=2",
    "data.task.num_train=12",  # an epoch and a half are a step: the position is in the middle of one
)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers: the first one that comes makes it, and the others wait
    run_dir = shared / "undisturbed"
    with (shared / "undisturbed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (run_dir / "summary.json").exists():
            shutil.rmtree(run_dir, ignore_errors=True)  # of one that failed
            with launched(run_dir, *SETTINGS) as run:
                run.succeed()
    return run_dir
