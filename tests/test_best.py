"""The best policy so far: which one it is, and that its folder is whole at any time. About a second."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cluster.best import BestPolicy, taken_over
from conf.schema import EvaluationConfig


class Policy:
    """What is exported: a file with the number of the export, in two halves."""

    def __init__(self) -> None:
        self.exports = 0
        self.fails = False

    def export(self, folder: Path) -> None:
        assert not folder.exists(), "an export is not laid over another one"
        (folder / "policy").mkdir(parents=True)
        (folder / "policy" / "first").write_text(str(self.exports))
        if self.fails:
            raise OSError("the disk is full")
        (folder / "policy" / "second").write_text(str(self.exports))
        self.exports += 1


def make(folder: Path, **settings: str) -> tuple[BestPolicy, Policy]:
    policy = Policy()
    config = EvaluationConfig(**({"best_metric": "eval/score_mean"} | settings))  # type: ignore[arg-type]
    return BestPolicy(config, folder / "best", policy.export), policy


def kept(folder: Path) -> dict[str, object]:
    halves = {(folder / "best" / "policy" / half).read_text() for half in ("first", "second")}
    assert len(halves) == 1
    found: dict[str, object] = json.loads((folder / "best" / "best.json").read_text())
    return found | {"export": int(halves.pop())}


@pytest.mark.parametrize(
    ("which", "values", "logged", "best_steps"),
    [
        ("highest", [1.0, 3.0, 2.0, 3.0, 4.0], [1.0, 3.0, 3.0, 3.0, 4.0], [0, 1, 1, 1, 4]),
        ("lowest", [1.0, 3.0, 0.5, -2.0, -2.0], [1.0, 1.0, 0.5, -2.0, -2.0], [0, 0, 2, 3, 3]),
    ],
)
def test_the_best_is_kept_and_of_equals_the_first(
    tmp_path: Path, which: str, values: list[float], logged: list[float], best_steps: list[int]
) -> None:
    best, policy = make(tmp_path, best_is=which)
    for step, (value, expected, best_step) in enumerate(zip(values, logged, best_steps, strict=True)):
        assert best.offer(step, {"eval/score_mean": value, "eval/kl": 9.0}) == {"eval/best": expected}
        found = kept(tmp_path)
        assert (found["step"], found["metric"], found["value"]) == (best_step, "eval/score_mean", expected)
        assert found["export"] == policy.exports - 1
    assert policy.exports == len(set(best_steps))
    assert [path.name for path in tmp_path.iterdir()] == ["best"], "nothing half-written is left"


@pytest.mark.parametrize("which", ["highest", "lowest"])
def test_what_is_not_a_number_is_never_the_best(tmp_path: Path, which: str) -> None:
    best, policy = make(tmp_path, best_is=which)
    for value in (math.nan, math.inf, -math.inf):
        assert best.offer(0, {"eval/score_mean": value}) == {}
    assert policy.exports == 0
    assert best.offer(1, {"eval/score_mean": 2.0}) == {"eval/best": 2.0}
    assert best.offer(2, {"eval/score_mean": math.nan}) == {"eval/best": 2.0}
    assert kept(tmp_path)["step"] == 1


def test_a_metric_that_could_not_be_measured_this_time_is_not_the_best(tmp_path: Path) -> None:
    best, policy = make(tmp_path, best_metric="eval/win_rate")
    assert best.offer(0, {"eval/kl": 1.0}) == {}
    assert policy.exports == 0
    assert best.offer(1, {"eval/win_rate": 0.5}) == {"eval/best": 0.5}
    assert best.offer(2, {"eval/kl": 1.0}) == {"eval/best": 0.5}
    assert policy.exports == 1


def test_without_a_metric_nothing_is_exported(tmp_path: Path) -> None:
    policy = Policy()
    assert BestPolicy(EvaluationConfig(), tmp_path / "best", policy.export).offer(3, {"eval/kl": 1.0}) == {}
    assert policy.exports == 0
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    best, policy = make(tmp_path)
    best.offer(0, {"eval/score_mean": 1.0})
    policy.fails = True
    with pytest.raises(OSError, match="the disk is full"):
        best.offer(1, {"eval/score_mean": 2.0})
    assert kept(tmp_path)["step"] == 0
    policy.fails = False
    assert best.offer(2, {"eval/score_mean": 1.5}) == {"eval/best": 1.5}, "the one that failed is not the best"
    assert kept(tmp_path)["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_there_is_a_whole_checkpoint_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the run is killed as one takes the place of the other, and the next one dies while it exports."""
    best, policy = make(tmp_path)
    best.offer(0, {"eval/score_mean": 1.0})
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if target.name == "best":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            best.offer(1, {"eval/score_mean": 2.0})
    assert (tmp_path / ".best.old" / "best.json").is_file()
    policy.fails = True
    with pytest.raises(OSError, match="the disk is full"):
        best.offer(2, {"eval/score_mean": 3.0})
    assert (tmp_path / ".best.old" / "best.json").is_file()
    policy.fails = False
    best.offer(3, {"eval/score_mean": 4.0})
    assert kept(tmp_path)["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_what_a_run_that_was_killed_has_left_is_no_hindrance(tmp_path: Path) -> None:
    best, _ = make(tmp_path)
    best.offer(0, {"eval/score_mean": 1.0})
    for rest in (".best.old", ".best.new"):
        (tmp_path / rest / "policy").mkdir(parents=True)
    best.offer(1, {"eval/score_mean": 2.0})
    assert kept(tmp_path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_the_best_policy_of_another_run_is_taken_over_with_its_checkpoint(tmp_path: Path) -> None:
    theirs, _ = make(tmp_path / "theirs")
    theirs.offer(0, {"eval/score_mean": 1.0})
    theirs.offer(1, {"eval/score_mean": 3.0})
    (tmp_path / "ours").mkdir()
    state = taken_over(theirs.state(), tmp_path / "theirs" / "best", tmp_path / "ours" / "best")
    assert kept(tmp_path / "ours") == kept(tmp_path / "theirs")
    ours, _ = make(tmp_path / "ours")
    ours.load_state(state)
    assert ours.offer(2, {"eval/score_mean": 2.0}) == {"eval/best": 3.0}


def test_a_best_policy_that_has_given_way_to_a_later_one_is_not_taken_over(tmp_path: Path) -> None:
    theirs, _ = make(tmp_path / "theirs")
    theirs.offer(1, {"eval/score_mean": 3.0})
    before = theirs.state()
    theirs.offer(2, {"eval/score_mean": 4.0})
    state = taken_over(before, tmp_path / "theirs" / "best", tmp_path / "ours" / "best")
    ours, _ = make(tmp_path / "ours")
    ours.load_state(state)
    assert ours.offer(3, {"eval/score_mean": 2.0}) == {"eval/best": 2.0}, "the best of those that there are"
