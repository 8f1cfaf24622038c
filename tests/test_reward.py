"""The composition of reward sources: weights, retries, and what becomes of rollouts without a score. About a second."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from actors.reward import FunctionReward, Judged, Rewards, SourceError, make_source, source_configs
from actors.reward_http import HTTPReward
from actors.reward_source import Fault
from conf.schema import ConfigError, RewardConfig, RewardSourceConfig
from tests.reward_rollouts import rollout

# Functions for the sources to name. SCRIPTS says what each call of `first` and `second` returns or raises.

SCRIPTS: dict[str, list[Any]] = {}
ASKED: list[tuple[str, list[str]]] = []


def _called(name: str, responses: list[str]) -> Any:
    ASKED.append((name, responses))
    answer = SCRIPTS[name].pop(0)
    if isinstance(answer, Exception):
        raise answer
    return answer


def first(prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]]) -> Any:
    return _called("first", responses)


def second(prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]]) -> Any:
    return _called("second", responses)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    SCRIPTS.clear()
    ASKED.clear()
    yield
    assert not any(SCRIPTS.values()), "a source was asked less often than the script says"


def function(name: str, weight: float = 1.0) -> RewardSourceConfig:
    return RewardSourceConfig(type="function", name=name, weight=weight, function=f"tests.test_reward:{name}")


class Composed:
    """Two scripted functions, and how long each wait between two tries was."""

    def __init__(self, *, weights: tuple[float, float] = (1.0, 1.0), **settings: Any) -> None:
        self.waits: list[float] = []
        sources = (function("first", weights[0]), function("second", weights[1]))
        config = RewardConfig(sources=sources, **settings)
        self.rewards = Rewards(config, trained=None, device="cpu", sleep=self.waits.append)

    def score(self, **scripts: Sequence[Any]) -> list[Judged]:
        SCRIPTS.update({name: list(answers) for name, answers in scripts.items()})
        return self.rewards.score(THREE)


THREE = [rollout("q", letter, number=5, sample=number) for number, letter in enumerate("abc")]


def test_a_score_is_the_weighted_sum_of_the_parts() -> None:
    judged = Composed(weights=(0.5, -2.0)).score(first=[[1.0, 2.0, True]], second=[[10, 0.25, 0.0]])
    # 0.5 * 1 - 2 * 10, 0.5 * 2 - 2 * 0.25, 0.5 * 1 - 2 * 0
    assert [one.score for one in judged] == [-19.5, 0.5, 0.5]
    assert [one.parts for one in judged] == [
        {"first": 1.0, "second": 10.0},
        {"first": 2.0, "second": 0.25},
        {"first": 1.0, "second": 0.0},
    ]
    assert [one.fault for one in judged] == [None] * 3


def test_no_rollouts_have_no_scores() -> None:
    assert Composed().rewards.score([]) == []


def test_a_call_that_fails_is_made_again_after_doubling_waits() -> None:
    composed = Composed(retries=3, backoff_s=0.5)
    errors = [OSError("busy")] * 3
    judged = composed.score(first=[*errors, [1.0, 2.0, 3.0]], second=[[0.0, 0.0, 0.0]])
    assert [one.score for one in judged] == [1.0, 2.0, 3.0]
    assert composed.waits == [0.5, 1.0, 2.0]
    assert composed.rewards.num_retries == 3
    assert [asked for asked in ASKED if asked[0] == "first"] == [("first", ["a", "b", "c"])] * 4


def test_only_the_rollouts_without_a_score_are_asked_for_again() -> None:
    composed = Composed()
    judged = composed.score(first=[[1.0, math.nan, None], [math.nan, 3.0], [2.0]], second=[[0.0, 0.0, 0.0]])
    assert [one.score for one in judged] == [1.0, 2.0, 3.0]
    assert ASKED[:3] == [("first", ["a", "b", "c"]), ("first", ["b", "c"]), ("first", ["b"])]
    assert composed.waits == [1.0, 2.0]
    assert composed.rewards.num_retries == 2


def test_what_another_try_would_not_change_is_not_asked_for_again() -> None:
    composed = Composed(on_failure="drop")
    judged = composed.score(first=[[1.0, Fault("no gold", lasting=True), 3.0]], second=[[0.0, 0.0]])
    assert [one.score for one in judged] == [1.0, None, 3.0]
    assert composed.waits == []
    assert composed.rewards.num_retries == 0


@pytest.mark.parametrize("failing", [[1.0, math.nan, 3.0], [1.0, None, 3.0], [1.0, "0", 3.0]])
def test_a_rollout_that_one_source_cannot_score_is_dropped_and_has_no_score_of_zero(failing: list[Any]) -> None:
    """(PPO details 13)"""
    composed = Composed(on_failure="drop", retries=1)
    judged = composed.score(first=[failing, [failing[1]]], second=[[10.0, 30.0]])
    assert [one.score for one in judged] == [11.0, None, 33.0]
    assert ASKED[-1] == ("second", ["a", "c"]), "a dropped rollout is not scored any further"
    assert judged[1].parts == {}
    assert judged[1].fault is not None
    assert judged[1].fault.startswith("reward.sources[0] (first) gave prompt 5, sample 1 no score after 2 tries: ")


def test_a_source_that_fails_as_a_whole_drops_its_rollouts_and_keeps_the_other_parts() -> None:
    """(PPO details 13)"""
    judged = Composed(on_failure="drop", retries=2).score(first=[[1.0, 2.0, 3.0]], second=[OSError("gone")] * 3)
    assert [one.score for one in judged] == [None] * 3
    assert [one.parts for one in judged] == [{"first": 1.0}, {"first": 2.0}, {"first": 3.0}]
    assert all("reward.sources[1] (second)" in str(one.fault) and "OSError: gone" in str(one.fault) for one in judged)


@pytest.mark.parametrize("answer", [OSError("gone"), [1.0, 2.0], [math.nan, math.nan, math.nan]])
def test_a_failure_stops_the_run_with_source_rollout_and_cause(answer: Any) -> None:
    """(PPO details 13)"""
    composed = Composed(on_failure="stop", retries=2)
    with pytest.raises(SourceError) as caught:
        composed.score(first=[[0.0, 0.0, 0.0]], second=[answer] * 3)
    start = "reward.sources[1] (second) gave prompt 5, sample 0 no score after 3 tries: "
    assert str(caught.value).startswith(f"{start}reward.sources[1].function tests.test_reward:second r")
    assert composed.rewards.num_retries == 2


def test_without_retries_a_failure_is_final() -> None:
    composed = Composed(retries=0)
    with pytest.raises(SourceError, match=r"after 1 try: .* raised OSError: gone"):
        composed.score(first=[OSError("gone")])
    assert composed.waits == []


def test_a_wrong_setting_is_not_tried_again_and_never_dropped() -> None:
    with pytest.raises(ConfigError, match="other"):
        Composed(on_failure="drop").score(first=[ConfigError("k", 1, "other")])


def model(path: str | None = None, **settings: Any) -> RewardSourceConfig:
    return RewardSourceConfig(path=path, **settings)


def test_a_trained_model_takes_the_open_place() -> None:
    trained = "runs/rm"
    assert source_configs(RewardConfig(), trained) == (model(trained),)
    given = RewardConfig(sources=(function("first"), model(weight=2.0), model("other", name="other")))
    expected = (function("first"), model(trained, weight=2.0), model("other", name="other"))
    assert source_configs(given, trained) == expected
    closed = RewardConfig(sources=(model("a"), function("first")))
    assert source_configs(closed, None) == closed.sources


@pytest.mark.parametrize(
    ("sources", "trained", "message"),
    [
        ((), None, "^reward.sources=.*nothing scores the rollouts"),
        ((function("first"), model()), None, r"^reward.sources\[1\].path=None: name a reward model, or train one"),
        ((model(), model(name="b")), "rm", r"^reward.sources\[1\].path=None: reward.sources\[0\] has none either"),
        ((function("first"), model("a")), "rm", "^reward.sources=.*none is the model that the stage reward trains"),
    ],
)
def test_sources_that_leave_something_open_are_refused(
    sources: tuple[RewardSourceConfig, ...], trained: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        source_configs(RewardConfig(sources=sources), trained)


def test_each_type_makes_its_source() -> None:
    made = make_source(function("first"), key="reward.sources[3]", device="cpu")
    assert isinstance(made, FunctionReward)
    assert made.name == "reward.sources[3].function tests.test_reward:first"
    verifier = RewardSourceConfig(type="verifier", verifier="math_verify", answer_key="gold")
    made = make_source(verifier, key="reward.sources[0]", device="cpu")
    assert isinstance(made, FunctionReward)
    assert made.name == "reward.sources[0].verifier actors.verifiers:math_verify"
    assert made.arguments == {"answer_key": "gold"}
    gym = make_source(RewardSourceConfig(type="verifier", verifier="reasoning_gym"), key="k", device="cpu")
    assert isinstance(gym, FunctionReward)
    assert gym.arguments == {}
    http = RewardSourceConfig(type="http", url="http://127.0.0.1:9")
    assert isinstance(make_source(http, key="k", device="cpu"), HTTPReward)
    with pytest.raises(ConfigError, match=r"^reward.sources\[0\].function='tests.test_reward:nothing'"):
        Rewards(RewardConfig(sources=(function("nothing"),)), trained=None, device="cpu")
