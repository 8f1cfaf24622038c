"""The reward actors: the reward sources as Ray processes behind one typed facade."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ray

from actors.reward_http import Secret
from actors.rollout import Rollout
from cluster.driver import Chunk, Metrics, ScoredHandle, Scoring
from cluster.faults import ProcessLostError
from cluster.members import Members
from cluster.processes import Placement, Process, answer, spanned
from cluster.reactor import Reactor
from cluster.recoveries import Recoveries
from conf.schema import ClusterConfig, RewardConfig

AT_ONCE = 256  # calls that are waited for together


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
        super().__init__()
        self.rewards: Any = None
        self.verifier: Any = None

    def prepare(self, device: str, *, reward_models: bool) -> None:
        if reward_models:
            from actors.reward_model import import_networks

            import_networks()

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

    @spanned
    def score(self, rollouts: Sequence[Rollout]) -> tuple[list[Any], int]:
        """Return what each rollout is worth (actors.reward.Judged), and how often a source was asked again for them."""
        before = self.rewards.num_retries
        judged: list[Any] = self.rewards.score(rollouts)
        return judged, self.rewards.num_retries - before

    @spanned
    def verify(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the verifier's verdict on each rollout, None where it has none."""
        verdicts: list[float | None] = self.verifier.verify(rollouts)
        return verdicts


class RewardGroup:
    """The reward actors; each chunk goes to the one with the fewest to answer, as it comes.

    One that is lost is replaced, and what it had not answered is asked again.
    """

    def __init__(
        self,
        placement: Placement,
        setup: RewardSetup,
        *,
        limits: ClusterConfig,
        recoveries: Recoveries,
        reactor: Reactor,
    ) -> None:
        self.limits = limits
        self.members = Members(
            placement,
            RewardProcess,
            "reward",
            begin=lambda handle: handle.start.remote(setup),
            limits=limits,
            recoveries=recoveries,
            reactor=reactor,
        )

    def open(self) -> ScoringRound:
        """Return a round of scoring, to which chunks are added as they come."""
        return ScoringRound(Questions(self.members, "score", self.limits, what="scoring"))

    def score(self, chunks: Iterable[Chunk]) -> Scoring:
        """Score chunks as they come."""
        scoring = self.open()
        for chunk in chunks:
            scoring.add(chunk)
        return scoring.result()

    def verify(self, handles: Sequence[ScoredHandle]) -> list[float | None]:
        questions = Questions(self.members, "verify", self.limits, what="verifying")
        chunks = list({id(handle.chunk): handle.chunk for handle in handles}.values())
        for chunk in chunks:
            questions.ask(chunk)
        by_chunk = {id(chunk): verdicts for chunk, verdicts in zip(chunks, questions.answers(), strict=True)}
        return [by_chunk[id(handle.chunk)][handle.row] for handle in handles]

    def memory(self) -> Metrics:
        return self.members.memory()


class ScoringRound:
    """Chunks on their way to their scores."""

    def __init__(self, questions: Questions) -> None:
        self._questions = questions

    def add(self, chunk: Chunk) -> None:
        """Have a chunk scored; returns at once."""
        self._questions.ask(chunk)

    def result(self) -> Scoring:
        """Return the scores of all chunks, when all are there."""
        answers = self._questions.answers()
        judged, retries = [of_chunk for of_chunk, _ in answers], [count for _, count in answers]
        return Scoring.of(self._questions.chunks, judged, num_retries=sum(retries))


@dataclass(frozen=True)
class Question:
    """A call about a chunk, and who was asked: the process too, since another may stand in its place by now."""

    number: int
    who: int
    handle: Any


class Questions:
    """The same question about several chunks."""

    def __init__(self, members: Members, method: str, limits: ClusterConfig, *, what: str) -> None:
        self.members, self.method, self.limits, self.what = members, method, limits, what
        self.chunks: list[Chunk] = []
        self._calls: dict[Any, Question] = {}
        self._open: dict[Any, int] = {}  # calls that were not answered when last looked at, and who was asked

    def ask(self, chunk: Chunk) -> None:
        """Ask about a chunk; returns at once."""
        self.chunks.append(chunk)
        self._ask(len(self.chunks) - 1)

    def answers(self) -> list[Any]:
        """Return the answers in the order of the chunks, when all are there.

        Raises ProcessError, RolloutsLostError or ConfigError as `answer` and `Members.replace` do.
        """
        answers: dict[int, Any] = {}
        while self._calls:
            oldest = islice(self._calls.items(), AT_ONCE)  # who looks at all of them looks too often at each
            done, lost = self.members.wait_or_lose(
                {ref: question.who for ref, question in oldest}, timeout_s=self.limits.call_timeout_s
            )
            for ref in done:
                asked = self._calls[ref]
                try:
                    answers[asked.number] = answer(
                        ref, who=f"reward {asked.who}", what=self.what, timeout_s=self.limits.call_timeout_s
                    )
                    del self._calls[ref]
                except ProcessLostError as error:
                    if asked.handle is self.members.handles[asked.who]:
                        lost[asked.who] = error.why
            if lost:
                self.members.replace(lost, what=self.what)
            gone = [ref for ref, one in self._calls.items() if one.handle is not self.members.handles[one.who]]
            for question in [self._calls.pop(ref) for ref in gone]:
                self._ask(question.number)
        return [answers[number] for number in range(len(self.chunks))]

    def _ask(self, number: int) -> None:
        who = self._least_asked(number)
        handle = self.members.handles[who]
        ref = getattr(handle, self.method).remote(self.chunks[number].payload)
        self._calls[ref] = Question(number, who, handle)
        self._open[ref] = who

    def _least_asked(self, number: int) -> int:
        """Return who has the fewest to answer; of several, each in turn."""
        count, calls = len(self.members), list(self._open)
        for ref in ray.wait(calls, num_returns=len(calls), timeout=0)[0] if calls else ():
            del self._open[ref]
        load = Counter(self._open.values())
        return min(range(count), key=lambda who: (load[who], (who - number) % count))
