"""Task files against reasoning-gym's own verifier, and the functions that judge."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from reasoning_gym.factory import get_score_answer_fn

from actors.tasks import Mistakes, TaskFiles, distinct_entries, write_task_files
from actors.verifiers import load_function, reasoning_gym
from conf.schema import ConfigError, TaskConfig

SPELL = {"min_word_len": 3, "max_word_len": 5}
SUM = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
TASKS = (
    TaskConfig(name="spell_backward", params=SPELL, num_train=200, num_eval=50, wrong_answers=3, sft_wrong_share=0.5),
    TaskConfig(name="chain_sum", params=SUM, num_train=100, num_eval=20, wrong_answers=2),
)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


judge = cache(get_score_answer_fn)


def score(answer: str, row: dict[str, Any]) -> float:
    """The score by reasoning-gym alone."""
    return float(judge(row["metadata"]["source_dataset"])(answer, row))


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: task.name)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskConfig, TaskFiles]:
    return request.param, write_task_files(request.param, tmp_path_factory.mktemp("task"), seed=1)


def test_each_file_has_its_rows_and_its_columns(written: tuple[TaskConfig, TaskFiles]) -> None:
    task, files = written
    expected = {
        files.sft: (task.num_train, {"prompt"}),
        files.pairs: (task.num_train * task.wrong_answers, {"prompt", "chosen", "rejected"}),
        files.pairs_eval: (task.num_eval, {"prompt", "chosen", "rejected"}),
        files.prompts: (task.num_train, {"prompt"}),
        files.eval: (task.num_eval, {"prompt"}),
    }
    for path, (count, columns) in expected.items():
        rows = read(path)
        assert len(rows) == count, path
        assert set(rows[0]) == columns | {"question", "answer", "metadata"}
        assert all(row["prompt"] == row["question"] for row in rows)


def test_held_out_questions_are_never_trained_on(written: tuple[TaskConfig, TaskFiles]) -> None:
    def asked(path: Path) -> set[str]:
        return {row["question"].casefold() for row in read(path)}

    task, files = written
    training, held_out = asked(files.prompts), asked(files.eval)
    assert (len(training), len(held_out)) == (task.num_train, task.num_eval)
    assert asked(files.sft) == asked(files.pairs) == training
    assert asked(files.pairs_eval) == held_out
    assert not training & held_out


def test_the_verifier_takes_every_right_answer_and_no_wrong_one(written: tuple[TaskConfig, TaskFiles]) -> None:
    _, files = written
    for row in read(files.pairs) + read(files.pairs_eval):
        assert row["chosen"] == row["answer"]
        assert score(row["chosen"], row) == 1
        assert score(row["rejected"], row) < 0.99
        assert row["rejected"].strip()
    assert len({(row["prompt"], row["rejected"]) for row in read(files.pairs)}) == len(read(files.pairs))


def test_the_share_of_wrong_demonstrations(written: tuple[TaskConfig, TaskFiles]) -> None:
    task, files = written
    truth = {row["question"]: row for row in read(files.prompts)}
    wrong = [row for row in read(files.sft) if score(row["answer"], truth[row["question"]]) < 0.99]
    assert len(wrong) / task.num_train == pytest.approx(task.sft_wrong_share, abs=0.1 if task.sft_wrong_share else 0)


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    def content(folder: str, seed: int) -> list[str]:
        files = write_task_files(TASKS[0], tmp_path / folder, seed)
        return [path.read_text() for path in (files.sft, files.pairs, files.pairs_eval, files.prompts, files.eval)]

    assert content("a", 5) == content("b", 5)
    assert all(ours != theirs for ours, theirs in zip(content("a", 5), content("c", 6), strict=True))


def test_lowercase_leaves_out_answers_with_capitals() -> None:
    both = distinct_entries(TASKS[0], 0)
    lower = distinct_entries(
        TaskConfig(name="spell_backward", params=SPELL, num_train=200, num_eval=50, lowercase=True), 0
    )
    assert any(entry["answer"] != entry["answer"].lower() for entry in both)
    assert all(entry["answer"] == entry["answer"].lower() for entry in lower)


def test_mistakes_are_of_many_kinds() -> None:
    entries = distinct_entries(
        TaskConfig(name="spell_backward", params=SPELL, num_train=100, num_eval=1, lowercase=True), 0
    )
    entry = next(entry for entry in entries if len(entry["answer"]) == 5)
    right = entry["answer"]
    wrong = Mistakes(entries, random.Random(0)).of(entry, 60)
    assert len(set(wrong)) == 60
    assert any(len(answer) < 5 for answer in wrong)
    assert any(len(answer) == 6 for answer in wrong)
    assert any(sorted(answer) == sorted(right) for answer in wrong), "a swap"
    assert any(len(answer) == 5 and sum(map(str.__ne__, answer, right)) == 1 for answer in wrong), "a substitution"
    others = {other["answer"] for other in entries if other is not entry}
    assert others & set(Mistakes(entries, random.Random(1)).of(entry, 200)), "another prompt's answer"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TaskConfig(name="spell_backwards"), "data.task.name='spell_backwards': reasoning-gym has no task"),
        (
            TaskConfig(name="spell_backward", params={"a": 1}),
            "data.task.params={'a': 1}: the task spell_backward refuses",
        ),
        (TaskConfig(name="spell_backward", params={"min_word_len": 0}), "min_word_len must be positive"),
        (
            TaskConfig(name="spell_backward", params={"min_word_len": 3, "max_word_len": 3}, num_train=900),
            "data.task.num_train=900: the task has only ",
        ),
    ],
)
def test_a_task_that_cannot_be_made_is_named(task: TaskConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        write_task_files(task, tmp_path / "files", 0)
    assert message in str(caught.value)
    assert not (tmp_path / "files").exists()


def test_more_wrong_answers_than_can_be_found() -> None:
    entry = next(entry for entry in distinct_entries(TASKS[1], 0) if len(set(entry["answer"])) == 1)
    with pytest.raises(ConfigError, match=r"^data\.task\.wrong_answers=50: there are not so many wrong answers like"):
        Mistakes([entry], random.Random(0)).of(entry, 50)


def test_the_verifier_judges_each_response_by_its_row() -> None:
    rows = [dict(distinct_entries(task, 0)[0]) for task in TASKS]
    answers = [row["answer"] for row in rows]
    assert reasoning_gym(["", ""], [f" {answers[0]}\n", answers[1]], rows) == [1.0, 1.0]
    assert all(value < 0.99 for value in reasoning_gym(["", ""], answers[::-1], rows))
    assert reasoning_gym([], [], []) == []
    with pytest.raises(ValueError, match="no question, answer and metadata of reasoning-gym; it has prompt"):
        reasoning_gym(["p"], ["r"], [{"prompt": "p"}])


def test_a_function_is_found_by_name() -> None:
    assert load_function("actors.verifiers:reasoning_gym", key="evaluation.verifier") is reasoning_gym
    brevity = load_function("examples.functions:brevity", key="reward.function")
    assert brevity(["a", "b"], ["", "x" * 100], [{}, {}]) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "write it as module:function"),
        (":f", "write it as module:function"),
        ("no_such_module:f", "there is no module no_such_module"),
        ("actors.verifiers:f", "actors.verifiers has no function f; it has "),
        ("actors.verifiers:__name__", "has no function __name__"),
        ("broken_module:f", "importing broken_module raised ZeroDivisionError: division by zero"),
        ("wordy_module:f", "importing wordy_module raised SyntaxError"),
        ("needy_module:f", "there is no module no_such_dependency"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_named(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("f = 1 / 0\n")
    (tmp_path / "wordy_module.py").write_text("def\n")
    (tmp_path / "needy_module.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        load_function(spec, key="reward.function")
    assert str(caught.value).startswith(f"reward.function={spec!r}: ")
    assert message in str(caught.value)
