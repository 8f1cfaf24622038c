"""A whole iteration of PPO: Manta, run as its users run it, beside TRL's PPOTrainer.

    python -m benchmarks.iteration --work DIR [--workload 64 256 lognormal] [--rounds 2]

Both train the same policy with the same reward model, value model and reference, all of one size, on the same 64
prompts in every iteration, with responses of the same lengths (benchmarks/counting.py), in float32 on the same cores.
TRL has an environment of its own in DIR, made the first time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import counting
from benchmarks.report import REPOSITORY, Result, in_turns, matrix_rate, median_ratio

NUM_PROMPTS, MINI_BATCHES, EPOCHS, LR, KL_COEF, SEED = 64, 4, 1, 1e-6, 0.05, 0
WARMUP = 1  # iterations of each run that are left out
SAMPLE_EVERY_S = 4.0  # once a second this process took 14 % of a core, which the contestant lacked
WORKLOADS = ("64", "256", "lognormal")
LEARNER_PHASES = ("learner_evaluation_s", "learner_policy_s", "learner_critic_s", "learner_optimizer_s")
PHASES = ("wait_for_generators_s", "generate_s", "early_evaluation_s", "learn_s", *LEARNER_PHASES, "sync_s", "step_s")
TORCH = "torch==2.13.0"
# Threads of OpenMP are as each contestant sets them; what this process has must not reach it.
NOT_PASSED_ON = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONPATH")


@dataclass
class Contestant:
    """Runs iterations in processes of its own; keeps what was seen of it in each round."""

    name: str
    run: Callable[[Path], Round]
    rounds: list[Round] = field(default_factory=list)

    def measure(self, folder: Path) -> float:
        """Return the samples per second of one more round, which may use the folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.rounds.append(self.run(folder))
        return NUM_PROMPTS / self.rounds[-1].median

    def row(self, workload: str, *, operations: float, rate: float) -> dict[str, Any]:
        """Return what the table says of it; `rate` is in floating-point operations per second."""
        seconds = statistics.median(one.median for one in self.rounds)
        return {
            "workload": workload,
            "contestant": self.name,
            "samples_per_s": NUM_PROMPTS / seconds,
            "iteration_s": seconds,
            "share_of_limit": operations / rate / seconds,
            "peak_pss_gib": max(one.peak for one in self.rounds) / 2**30,
            "seconds_of_rounds": [[round(second, 3) for second in one.seconds] for one in self.rounds],
            "phases": {
                name: statistics.median(one.phases[name] for one in self.rounds) for name in self.rounds[0].phases
            },
        }


@dataclass(frozen=True)
class Round:
    """What one run of a contestant gave."""

    seconds: Sequence[float]  # of each iteration, those that are left out among them
    peak: int  # bytes
    phases: Mapping[str, float] = field(default_factory=dict)  # medians over the iterations, in seconds

    @property
    def median(self) -> float:
        return statistics.median(self.seconds[WARMUP:])


def run_manta(folder: Path, paths: counting.Paths, *, longest: int, iterations: int, overrides: Sequence[str]) -> Round:
    """Run Manta by its command line; an iteration lasts from one row of its metrics.jsonl to the next."""
    run_dir = folder / "run"
    command = [
        sys.executable,
        "launch.py",
        f"run.dir={run_dir}",
        f"seed={SEED}",
        f"model.path={paths.policy}",
        f"reward.sources=[{{path: '{paths.reward}'}}]",
        f"data.path={paths.prompts}",
        "data.chat_template=false",
        f"data.max_prompt_tokens={counting.PROMPT_LENGTH}",
        "generator=cpu",
        "learner=cpu",
        "cluster.device=cpu",
        f"algorithm.num_steps={WARMUP + iterations}",
        f"algorithm.prompts_per_step={NUM_PROMPTS}",
        f"algorithm.mini_batch_size={NUM_PROMPTS // MINI_BATCHES}",
        f"algorithm.ppo_epochs={EPOCHS}",
        f"algorithm.kl_coef={KL_COEF}",
        f"generator.max_new_tokens={longest}",
        f"generator.max_model_len={counting.PROMPT_LENGTH + longest}",
        f"learner.policy.lr={LR}",
        f"learner.critic.lr={LR}",
        "checkpoint.every=0",
        "tracking.wandb=off",
        *overrides,
    ]
    metrics = run_dir / "metrics.jsonl"
    written: list[float] = []  # when each row was

    def look() -> None:
        rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        written.extend([time.perf_counter()] * (rows - len(written)))

    peak = run_watched(command, folder / "output.log", look)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(WARMUP + iterations + 1)), (
        "a row for each iteration, and one before"
    )
    assert all(row["rollout/num_rollouts"] == NUM_PROMPTS for row in rows[1:])
    phases = {name: statistics.median(row[f"timing/{name}"] for row in rows[1 + WARMUP :]) for name in PHASES}
    return Round(list(np.diff(written)), peak, phases)


def run_trl(
    folder: Path,
    paths: counting.Paths,
    *,
    python: Path,
    longest: int,
    iterations: int,
    threads: int,
    forward_batch: int,
    accumulation: int,
) -> Round:
    """Run TRL's trainer in its environment."""
    options = {
        "policy": paths.policy,
        "reward": paths.reward,
        "prompts": paths.prompts,
        "output": folder / "run",
        "iterations": WARMUP + iterations,
        "response-length": longest,
        "threads": threads,
        "forward-batch": forward_batch,
        "accumulation": accumulation,
        "mini-batches": MINI_BATCHES,
        "epochs": EPOCHS,
        "lr": LR,
        "kl-coef": KL_COEF,
        "seed": SEED,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    log = folder / "output.log"
    peak = run_watched([str(python), str(REPOSITORY / "benchmarks" / "trl_ppo.py"), *words], log, lambda: None)
    said = json.loads(log.read_text().splitlines()[-1])
    assert said["metrics"]["val/num_eos_tokens"] == NUM_PROMPTS, "every response ends by itself"
    return Round(said["seconds"], peak)


def run_watched(command: Sequence[str], log: Path, look: Callable[[], None]) -> int:
    """Run a command to its end, with its output in a file, calling `look` all the while.

    Returns its peak memory in bytes: the proportional set sizes of its processes, summed, once in SAMPLE_EVERY_S.
    """
    environment = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    ended = threading.Event()
    sums = [0]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT)

        def sample() -> None:
            while not ended.wait(SAMPLE_EVERY_S):
                sums.append(sum(map(proportional_set_size, descendants(process.pid))))

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            while process.poll() is None:
                look()
                time.sleep(0.02)
        finally:
            ended.set()
            sampler.join()
            if process.poll() is None:
                process.terminate()
                process.wait()
    look()
    if process.returncode:
        raise SystemExit(f"{command[:2]} failed; its output is in {log}")
    return max(sums)


def descendants(root: int) -> list[int]:
    """Return a process and all that come from it, as far as their parents live."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents():
        children.setdefault(parent, []).append(pid)
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def parents() -> Iterator[tuple[int, int]]:
    """Yield every process with its parent."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it has ended
                continue
            yield int(entry.name), int(stat.rpartition(")")[2].split()[1])


def proportional_set_size(pid: int) -> int:
    """Return the memory of a process in bytes, what it shares divided by those who share it; 0 if it has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:")), 0)


def trl_python(work: Path) -> Path:
    """Return the Python of TRL's environment, which is made if it is not there yet."""
    folder = work / "trl"
    python, ready = folder / "bin" / "python", folder / ".installed"
    requirements = Path(__file__).with_name("trl_requirements.txt")
    if not ready.exists() or ready.read_text() != requirements.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for packages in ([TORCH], ["-r", str(requirements)]):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        ready.write_text(requirements.read_text())
    return python


def measured(workload: str, asked: argparse.Namespace, work: Path, python: Path) -> list[dict[str, Any]]:
    """Return the rows of one workload."""
    lengths = counting.lengths(workload, NUM_PROMPTS)
    paths = counting.make(work / "models" / workload, counting.prompts(lengths, seed=SEED), seed=SEED)
    common: dict[str, Any] = {"paths": paths, "longest": max(lengths), "iterations": asked.iterations}

    def of_manta(folder: Path) -> Round:
        return run_manta(folder, overrides=asked.manta, **common)

    def of_trl(folder: Path) -> Round:
        return run_trl(
            folder,
            python=python,
            threads=asked.threads,
            forward_batch=asked.trl_forward_batch,
            accumulation=asked.trl_accumulation,
            **common,
        )

    contestants = [Contestant("Manta", of_manta), Contestant("TRL", of_trl)]
    rate = matrix_rate(threads=asked.threads)
    rates = in_turns(
        {one.name: partial(one.measure, work / "runs" / workload / one.name) for one in contestants},
        rounds=asked.rounds,
    )
    rate = max(rate, matrix_rate(threads=asked.threads))
    rows = [one.row(workload, operations=counting.iteration_operations(lengths), rate=rate) for one in contestants]
    rows[0]["ratio_to_trl"] = median_ratio(rates["Manta"], rates["TRL"])
    for row in rows:
        row |= {"tera_operations": counting.iteration_operations(lengths) / 1e12, "giga_operations_per_s": rate / 1e9}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for TRL's environment, models and runs")
    parser.add_argument("--workload", nargs="+", default=list(WORKLOADS), help="a response length, or lognormal")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contestant, in turns")
    parser.add_argument("--iterations", type=int, default=3, help=f"of each run, after {WARMUP} left out")
    parser.add_argument("--threads", type=int, default=2, help="cores: of the matrix product, and threads of TRL")
    parser.add_argument("--manta", nargs="*", default=["cluster.learner_threads=2"], help="settings of launch.py")
    parser.add_argument("--trl-forward-batch", type=int, default=64)
    parser.add_argument("--trl-accumulation", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    work = asked.work.resolve()
    python = trl_python(work)
    rows = [row for workload in asked.workload for row in measured(workload, asked, work, python)]
    Result(
        name="iteration",
        rows=rows,
        configuration={
            "model": counting.DESCRIPTION,
            "prompts": f"{NUM_PROMPTS} of {counting.PROMPT_LENGTH} tokens, the same in every iteration",
            "epochs": EPOCHS,
            "mini_batches": MINI_BATCHES,
            "rounds": asked.rounds,
            "iterations_of_a_round": asked.iterations,
            "manta": asked.manta,
            "trl": {
                "threads": asked.threads,
                "local_rollout_forward_batch_size": asked.trl_forward_batch,
                "gradient_accumulation_steps": asked.trl_accumulation,
                "requirements": [
                    TORCH,
                    *Path(__file__).with_name("trl_requirements.txt").read_text().split("\n")[1:-1],
                ],
            },
        },
        notes=[
            "share_of_limit: floating-point operations that the iteration cannot do without, over the rate of a large "
            "matrix product in this call, as a share of the time of an iteration",
            "peak_pss_gib: proportional set sizes of all processes of the contestant, summed, once in "
            f"{SAMPLE_EVERY_S:g} s",
        ],
    ).say(asked.json)


if __name__ == "__main__":
    main()
