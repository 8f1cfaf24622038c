"""The score of a rollout: what its sources give it, weighted and added, and what happens where one of them fails.

Knows the sources by their protocol and nothing of Ray or of the learner. No score is ever invented: a rollout that a
source cannot score has none, and the settings say whether that stops the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from actors.reward_function import FunctionReward, RewardFunction
from actors.reward_http import HTTPReward, Secret
from actors.reward_model import RewardModel
from actors.reward_source import Fault, RewardSource, SourceError, sample_name
from actors.reward_vllm import VLLMRewardModel
from actors.rollout import Rollout
from conf.schema import ConfigError, RewardConfig, RewardSourceConfig

__all__ = [
    "Fault",
    "FunctionReward",
    "Judged",
    "RewardFunction",
    "RewardSource",
    "Rewards",
    "SourceError",
    "make_source",
    "source_configs",
]


@dataclass(frozen=True)
class Judged:
    """What the sources make of one rollout."""

    score: float | None  # the sum of weight times part; None if a source gave none
    parts: Mapping[str, float] = field(default_factory=dict)  # by the label of the source, before its weight
    fault: str | None = None  # why there is no score


class Rewards:
    """All sources of scores together.

    What a source does not score is asked for again, up to `config.retries` times, after `config.backoff_s` seconds and
    twice as long before each further try: the whole call if it failed, else the faulty rollouts alone. What another
    try would not change (Fault.lasting) is not asked for again.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        trained: str | None,
        device: str,
        trust_remote_code: bool = False,
        token: Secret | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Makes every source. `trained` is the checkpoint of a reward stage that ran before, if one did.

        `token` is what reward servers are sent, by default what the environment says.

        Raises ConfigError for a source that cannot be made, and as `source_configs` does.
        """
        self.config, self._sleep = config, sleep
        self._sources = []
        for number, item in enumerate(source_configs(config, trained)):
            source = make_source(
                item, key=_key(number), device=device, trust_remote_code=trust_remote_code, token=token
            )
            self._sources.append(_Named(item.label, item.weight, _key(number), source))
        self.num_retries = 0  # calls of a source, since the start, that asked for something again

    def score(self, rollouts: Sequence[Rollout]) -> list[Judged]:
        """What each rollout is worth, in their order.

        With reward.on_failure=drop a rollout that a source did not score has no score, and later sources are not asked
        for it. With "stop" it raises SourceError naming the source, its key, the rollout and the cause. Raises
        ConfigError for a wrong setting that shows only now.
        """
        parts: list[dict[str, float]] = [{} for _ in rollouts]
        totals = [0.0] * len(rollouts)
        faults: list[str | None] = [None] * len(rollouts)
        for source in self._sources:
            asked = [position for position, fault in enumerate(faults) if fault is None]
            answers = self._ask(source, [rollouts[position] for position in asked])
            for position, answer in zip(asked, answers, strict=True):
                if isinstance(answer, Fault):
                    faults[position] = self._failed(source, rollouts[position], answer)
                else:
                    parts[position][source.label] = answer
                    totals[position] += source.weight * answer
        return [
            Judged(total if fault is None else None, of_one, fault)
            for total, of_one, fault in zip(totals, parts, faults, strict=True)
        ]

    def _ask(self, source: _Named, rollouts: Sequence[Rollout]) -> list[float | Fault]:
        """The last answer for each rollout, after as many tries as are allowed."""
        answers = _tried(source, rollouts)
        for number in range(self.config.retries):
            again = [i for i, answer in enumerate(answers) if isinstance(answer, Fault) and not answer.lasting]
            if not again:
                break
            self._sleep(self.config.backoff_s * 2**number)
            self.num_retries += 1
            for i, answer in zip(again, _tried(source, [rollouts[i] for i in again]), strict=True):
                answers[i] = answer
        return answers

    def _failed(self, source: _Named, rollout: Rollout, fault: Fault) -> str:
        count = 1 + self.config.retries
        tries = "" if fault.lasting else f" after {count} tries" if count > 1 else " after 1 try"
        message = f"{source.key} ({source.label}) gave {sample_name(rollout)} no score{tries}: {fault.message}"
        if self.config.on_failure == "stop":
            raise SourceError(message)
        return message


@dataclass(frozen=True)
class _Named:
    label: str
    weight: float
    key: str
    source: RewardSource


def _tried(source: _Named, rollouts: Sequence[Rollout]) -> list[float | Fault]:
    """One call of `source`; one that fails as a whole is a fault of every rollout."""
    if not rollouts:
        return []
    try:
        answers = source.source.score(rollouts)
    except SourceError as error:
        return [Fault(str(error))] * len(rollouts)
    assert len(answers) == len(rollouts), source.key
    return answers


def source_configs(config: RewardConfig, trained: str | None) -> tuple[RewardSourceConfig, ...]:
    """The sources with nothing left open: `trained`, a checkpoint, is the model without a path, or the only source.

    Raises ConfigError if nothing would score, or if it is unclear what `trained` is for.
    """
    if not config.sources:
        if trained is None:
            remedy = "nothing scores the rollouts; name a source, or train a reward model with the stage reward"
            raise ConfigError("reward.sources", [], remedy)
        return (RewardSourceConfig(path=trained),)
    open_ones = [i for i, item in enumerate(config.sources) if item.type == "model" and item.path is None]
    if trained is None and open_ones:
        remedy = "name a reward model, or train one with the stage reward"
        raise ConfigError(f"{_key(open_ones[0])}.path", None, remedy)
    if len(open_ones) > 1:
        remedy = f"{_key(open_ones[0])} has none either, and the stage reward trains one model; name the others"
        raise ConfigError(f"{_key(open_ones[1])}.path", None, remedy)
    if trained is not None and not open_ones:
        remedy = "none is the model that the stage reward trains; leave the path out of one of type model, or the stage"
        raise ConfigError("reward.sources", [item.label for item in config.sources], remedy)
    return tuple(
        replace(item, path=trained) if number in open_ones else item for number, item in enumerate(config.sources)
    )


def make_source(
    source: RewardSourceConfig,
    *,
    key: str,
    device: str,
    trust_remote_code: bool = False,
    token: Secret | None = None,
) -> RewardSource:
    """The source that `source` names, which stands at `key`. A model is loaded to `device`, "cpu" or "cuda".

    Raises ConfigError for a checkpoint that cannot score, a function that is not there, and the like.
    """
    if source.type == "function":
        assert source.function is not None, "checked with the settings"
        return FunctionReward(source.function, key=f"{key}.function")
    if source.type == "verifier":
        arguments = {"answer_key": source.answer_key} if source.verifier == "math_verify" else {}
        return FunctionReward(f"actors.verifiers:{source.verifier}", key=f"{key}.verifier", **arguments)
    if source.type == "http":
        return HTTPReward(source, key=key, token=token)
    made = VLLMRewardModel if source.engine == "vllm" else RewardModel
    return made(source, key=key, device=device, trust_remote_code=trust_remote_code)


def _key(number: int) -> str:
    return f"reward.sources[{number}]"
