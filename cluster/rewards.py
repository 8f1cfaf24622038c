"""The reward actors: the reward sources as Ray processes behind one typed facade."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.reward_http import Secret
from actors.rollout import Rollout
from cluster.driver import Chunk, Metrics, ScoredHandle, Scoring
from cluster.faults import ProcessLostError
from cluster.members import Members
from cluster.processes import Placement, Process, answer
from cluster.recoveries import Recoveries
from conf.schema import ClusterConfig, RewardConfig


@dataclass(frozen=True)
class RewardSetup:
    """What every reward actor is built from."""

    config: RewardConfig
    trained: str | None  # the checkpoint that a reward stage made
    verifier: str | None
    device: str
    trust_remote_code: bool
    token: Secret  # of reward servers


class RewardProcess(Process):
    """The reward sources, and the verifier of the evaluation, in a process of their own."""

    def __init__(self) -> None:
        self.rewards: Any = None
        self.verifier: Any = None

    def start(self, setup: RewardSetup) -> None:
        from actors.reward import FunctionReward, Rewards

        self.rewards = Rewards(
            setup.config,
            trained=setup.trained,
            device=setup.device,
            trust_remote_code=setup.trust_remote_code,
            token=setup.token,
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


class RewardGroup:
    """The reward actors; chunks go to them in turn, as they come.

    One that is lost is replaced, and what it had not answered is asked again.
    """

    def __init__(
        self, placement: Placement, setup: RewardSetup, *, limits: ClusterConfig, recoveries: Recoveries
    ) -> None:
        self.limits = limits
        self.members = Members(
            placement,
            RewardProcess,
            "reward",
            begin=lambda handle: handle.start.remote(setup),
            limits=limits,
            recoveries=recoveries,
        )

    def score(self, chunks: Iterable[Chunk]) -> Scoring:
        taken, answers = self._each("score", chunks, what="scoring")
        judged, retries = [of_chunk for of_chunk, _ in answers], [count for _, count in answers]
        return Scoring.of(taken, judged, num_retries=sum(retries))

    def verify(self, handles: Sequence[ScoredHandle]) -> list[float | None]:
        chunks = {id(handle.chunk): handle.chunk for handle in handles}
        taken, verdicts = self._each("verify", chunks.values(), what="verifying")
        by_chunk = {id(chunk): of_chunk for chunk, of_chunk in zip(taken, verdicts, strict=True)}
        return [by_chunk[id(handle.chunk)][handle.row] for handle in handles]

    def _each(self, method: str, chunks: Iterable[Chunk], *, what: str) -> tuple[list[Chunk], list[Any]]:
        """Return the chunks and what a reward actor says of each."""
        taken: list[Chunk] = []
        calls: dict[Any, tuple[int, int]] = {}  # each: the chunk that it is about, and who is asked
        for number, chunk in enumerate(chunks):
            taken.append(chunk)
            calls |= self._asked(method, taken, number)
        answers: dict[int, Any] = {}
        while calls:
            done, lost = self.members.wait_or_lose(
                {ref: who for ref, (_, who) in calls.items()}, timeout_s=self.limits.call_timeout_s
            )
            for ref in done:
                number, who = calls[ref]
                try:
                    answers[number] = answer(ref, who=f"reward {who}", what=what, timeout_s=self.limits.call_timeout_s)
                    del calls[ref]
                except ProcessLostError as error:
                    lost[who] = error.why
            if lost:
                self.members.replace(lost, what=what)
                again = [ref for ref, (_, who) in calls.items() if who in lost]
                for number, _ in [calls.pop(ref) for ref in again]:
                    calls |= self._asked(method, taken, number)
        return taken, [answers[number] for number in range(len(taken))]

    def _asked(self, method: str, chunks: Sequence[Chunk], number: int) -> dict[Any, tuple[int, int]]:
        who = number % len(self.members)
        ref = getattr(self.members.handles[who], method).remote(chunks[number].payload)
        return {ref: (number, who)}

    def memory(self) -> Metrics:
        return self.members.memory()
