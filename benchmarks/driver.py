"""What an iteration costs the driver, with up to 256 generators and 100,000 rollouts: it holds handles and floats.

The driver, its groups and Ray are real; the generators, reward actors and learner ranks are simulated: many of them
share a few processes, answer at once, and compute nothing. What is measured is the processor time of the driver's
process, Ray's threads in it included, in each iteration.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.reward import Judged
from actors.reward_http import Secret
from actors.rollout import Prompt, Rollout
from benchmarks.report import Result
from cluster.driver import Metrics, PPODriver, RolloutInfo, Sampling
from cluster.generators import GeneratorGroup, GeneratorSetup
from cluster.learners import LearnerGroup, Place
from cluster.placement import Place as Standing
from cluster.placement import Plan
from cluster.processes import SAMPLER, THREADS, Placement, Process, in_group
from cluster.reactor import Reactor
from cluster.recoveries import Recoveries
from cluster.rewards import RewardGroup, RewardSetup
from cluster.rollouts import SampledRollouts
from cluster.sampling import Part
from cluster.shaping import ScoreShaping
from conf.schema import AlgorithmConfig, ClusterConfig, GeneratorConfig, RewardConfig, ShapingConfig
from learner.costs import Costs, PassCost
from learner.experience import RolloutEvaluation
from learner.ranks import Ranks

CHUNK = 16  # rollouts that go together, as by default
PROCESSES = 2  # that stand for all generators; one for the reward actors, one for the learner
TOKENS = 32  # of a prompt and of a response
ITERATIONS = 4  # of each, beside the first


class Simulated(Process):
    """A generator, a reward actor or a learner rank that answers at once."""

    def start(self, *_: Any) -> None:
        pass

    @in_group(SAMPLER)
    def sample(self, parts: Sequence[Part], sampling: Sampling) -> Iterator[Any]:
        for place, part in enumerate(parts):
            chunk = [
                Rollout(
                    prompt,
                    sample,
                    response_ids=np.arange(TOKENS, dtype=np.int32),
                    rollout_logprobs=np.zeros(TOKENS, np.float32),
                    response_mask=np.ones(TOKENS, np.bool_),
                    policy_versions=np.zeros(TOKENS, np.int32),
                    finish_reason="stop",
                    text="",
                )
                for prompt, sample in part
            ]
            yield chunk
            yield place, tuple(map(RolloutInfo.of, chunk))

    def score(self, rollouts: Sequence[Rollout]) -> tuple[list[Judged], int]:
        return [Judged(float(rollout.prompt.id % 7), {"model": 0.0}) for rollout in rollouts], 0

    def endpoint(self) -> tuple[str, int]:
        return "", 0

    def evaluate_rollouts(self, chunk: Sequence[Any]) -> list[Any]:
        nothing = np.zeros(TOKENS, np.float32)
        return [
            RolloutEvaluation(0, nothing, nothing, nothing, (nothing, 0.0))
            for payload in chunk
            for _ in ray.get(payload)
        ]

    def costs(self) -> Costs:
        return Costs(PassCost(body=2**20, head=2**18, attention=2**10), None)

    def update(
        self, places: Sequence[Sequence[Place]], kl: float, seed: int, step: int, num_chunks: int, *given: Any
    ) -> Metrics:
        return {
            "objective/kl": 0.0,
            "timing/early_evaluation_s": 0.0,
            "throughput/learner_flops": 0.0,
            "throughput/learner_flops_limit": 1.0,
        }


class SharedProcesses(Placement):
    """Places of which many are served by one process."""

    def start(self, process: type[Process], place: Standing) -> Any:
        served: dict[tuple[str, int], Any] = self.group
        key = (place.role, place.index % PROCESSES)
        if key not in served:
            served[key] = ray.remote(num_cpus=0, concurrency_groups=THREADS)(Simulated).remote()
        return served[key]


class EndlessPrompts:
    """The same prompt under a new number each time."""

    def __init__(self) -> None:
        self.drawn = 0

    def next_batch(self, count: int) -> list[Prompt]:
        self.drawn += count
        ids = np.arange(TOKENS, dtype=np.int32)
        return [Prompt(number, ids, "", ()) for number in range(self.drawn - count, self.drawn)]

    def state(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state(self, state: Any) -> None:
        self.drawn = state["drawn"]


class NoSync:
    def push(self, version: int) -> Metrics:
        return {}


def no_worker(setup: Any, ranks: Ranks) -> None:
    """What a simulated rank would make."""


def made_driver(num_generators: int, num_rollouts: int, served: dict[tuple[str, int], Any]) -> PPODriver:
    counts = {"generator": num_generators, "reward": 4, "learner": 1}
    planned = Plan.apart((role, 0, 1) for role, count in counts.items() for _ in range(count))
    placement = SharedProcesses(served, planned, {})
    limits, reactor = ClusterConfig(), Reactor()
    recoveries = Recoveries(limit=1, note=print)
    setup = GeneratorSetup("", "", "", GeneratorConfig(max_new_tokens=TOKENS, max_num_seqs=64), "cpu", 0, False)
    generators = GeneratorGroup(
        placement, setup, chunk_size=CHUNK, limits=limits, recoveries=recoveries, reactor=reactor
    )
    rewards = RewardGroup(
        placement,
        RewardSetup(RewardConfig(), None, None, "cpu", False, Secret("")),
        limits=limits,
        recoveries=recoveries,
        reactor=reactor,
    )
    algorithm = AlgorithmConfig(
        prompts_per_step=num_rollouts,
        mini_batch_size=num_rollouts // 4,
        max_staleness=ITERATIONS,  # all rollouts are of version 0
        correction="token",
    )
    looked_at = argparse.Namespace(algorithm=algorithm)  # by the group itself; the simulated rank needs nothing
    learners = LearnerGroup(placement, no_worker, looked_at, limits=limits, recoveries=recoveries, reactor=reactor)
    rollouts = SampledRollouts(
        EndlessPrompts(),
        generators,
        rewards,
        evaluate=learners.evaluate,
        sampling=Sampling(num_samples=1, temperature=1.0, max_new_tokens=TOKENS, seed=0),
        prompts_per_step=num_rollouts,
    )
    return PPODriver(
        algorithm=algorithm,
        rollouts=rollouts,
        shaping=ScoreShaping(ShapingConfig(), max_new_tokens=TOKENS),
        learners=learners,
        sync=NoSync(),
        seed=0,
    )


def resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measured(num_generators: int, num_rollouts: int, served: dict[tuple[str, int], Any]) -> Metrics:
    driver = made_driver(num_generators, num_rollouts, served)
    busy, wall, resident = [], [], []
    for number in range(1 + ITERATIONS):
        start, cpu = time.perf_counter(), time.process_time()
        driver.iterate()
        if number:  # the first one imports and connects
            busy.append(time.process_time() - cpu)
            wall.append(time.perf_counter() - start)
        resident.append(resident_mib())
    return {
        "generators": num_generators,
        "rollouts": num_rollouts,
        "driver_s": statistics.median(busy),
        "driver_ms_per_rollout": 1e3 * statistics.median(busy) / num_rollouts,
        "iteration_s": statistics.median(wall),
        "resident_mib": resident[-1],
        "grown_mib": resident[-1] - resident[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generators", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--rollouts", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--json", type=Path, help="a file for the result")
    options = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    served: dict[tuple[str, int], Any] = {}
    rows = [
        measured(generators, rollouts, served) for rollouts in options.rollouts for generators in options.generators
    ]
    for row in rows:
        alone = next(r for r in rows if r["rollouts"] == row["rollouts"])
        row["ratio_to_first"] = row["driver_s"] / alone["driver_s"]
    ray.shutdown()
    Result("driver", rows, {"chunk": CHUNK, "tokens": TOKENS, "iterations": ITERATIONS}).say(options.json)


if __name__ == "__main__":
    main()
