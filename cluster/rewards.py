"""The reward actors: the reward sources as Ray processes behind one typed facade."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.rollout import Rollout
from cluster.driver import Chunk, Metrics, ScoredHandle, Scoring
from cluster.processes import Placement, collect, peak_resident_mib
from conf.schema import ClusterConfig, RewardConfig


@dataclass(frozen=True)
class RewardSetup:
    """What every reward actor is built from."""

    config: RewardConfig
    trained: str | None  # the checkpoint that a reward stage made
    verifier: str | None
    device: str
    trust_remote_code: bool


class RewardProcess:
    """The reward sources, and the verifier of the evaluation, in a process of their own."""

    def __init__(self) -> None:
        self.rewards: Any = None
        self.verifier: Any = None

    def start(self, setup: RewardSetup) -> None:
        from actors.reward import FunctionReward, Rewards

        self.rewards = Rewards(
            setup.config, trained=setup.trained, device=setup.device, trust_remote_code=setup.trust_remote_code
        )
        if setup.verifier is not None:
            self.verifier = FunctionReward(setup.verifier, key="evaluation.verifier")

    def score(self, rollouts: Sequence[Rollout]) -> tuple[list[Any], int]:
        """Return what each rollout is worth (actors.reward.Judged), and how often a source was asked again for them."""
        before = self.rewards.num_retries
        judged: list[Any] = self.rewards.score(rollouts)
        return judged, self.rewards.num_retries - before

    def verify(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the verifier's verdict on each rollout, None where it has none."""
        verdicts: list[float | None] = self.verifier.verify(rollouts)
        return verdicts

    def peak_resident_mib(self) -> float:
        return peak_resident_mib()


class RewardGroup:
    """The reward actors; chunks go to them in turn, as they come."""

    def __init__(self, placement: Placement, setup: RewardSetup, *, limits: ClusterConfig) -> None:
        self.processes = placement.start(RewardProcess, "reward")
        self.limits = limits
        self.starting = [process.start.remote(setup) for process in self.processes]

    def score(self, chunks: Iterable[Chunk]) -> Scoring:
        taken, refs = [], []
        for number, chunk in enumerate(chunks):
            process = self.processes[number % len(self.processes)]
            taken.append(chunk)
            refs.append(process.score.remote(chunk.payload))
        answers = collect(refs, what="scoring", timeout_s=self.limits.call_timeout_s)
        judged, retries = [of_chunk for of_chunk, _ in answers], [count for _, count in answers]
        return Scoring.of(taken, judged, num_retries=sum(retries))

    def verify(self, handles: Sequence[ScoredHandle]) -> list[float | None]:
        chunks = list({id(handle.chunk): handle.chunk for handle in handles}.values())
        refs = [
            self.processes[number % len(self.processes)].verify.remote(chunk.payload)
            for number, chunk in enumerate(chunks)
        ]
        verdicts = collect(refs, what="verifying", timeout_s=self.limits.call_timeout_s)
        by_chunk = {id(chunk): of_chunk for chunk, of_chunk in zip(chunks, verdicts, strict=True)}
        return [by_chunk[id(handle.chunk)][handle.row] for handle in handles]

    def memory(self) -> Metrics:
        sizes = collect(
            [p.peak_resident_mib.remote() for p in self.processes], what="memory", timeout_s=self.limits.call_timeout_s
        )
        return {"memory/reward_peak_mib": max(sizes)}
