"""The files of all three stages, made from a task of the reasoning-gym package.

Training and held-out questions are disjoint. Wrong answers are the right ones with random slips, of which none passes
the task's own verifier.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from actors.verifiers import reasoning_gym
from conf.schema import ConfigError, TaskConfig

RIGHT = 0.99  # the least score of a right answer; reasoning-gym gives parts of a point for answers that come close
TRIES_PER_QUESTION = 50  # draws for each new question before the task is taken to have no more

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class TaskFiles:
    """Where the rows of each stage are; every row carries `question`, `answer` and `metadata` for the verifier."""

    sft: Path  # prompt, answer
    pairs: Path  # prompt, chosen, rejected
    pairs_eval: Path  # the same, of held-out questions
    prompts: Path  # prompt
    eval: Path  # prompt, of held-out questions


def write_task_files(task: TaskConfig, folder: Path, seed: int) -> TaskFiles:
    """Writes the files into `folder`, the same for the same `task` and `seed`.

    Raises ConfigError for a task that reasoning-gym does not have, parameters that it does not take, and more questions
    than there are.
    """
    entries = distinct_entries(task, seed)
    held_out, training = entries[: task.num_eval], entries[task.num_eval :]
    rng = random.Random(seed)
    mistakes = Mistakes(entries, rng)
    sloppy = [rng.random() < task.sft_wrong_share for _ in training]
    answers = [
        mistakes.of(entry, 1)[0] if wrong else entry["answer"] for entry, wrong in zip(training, sloppy, strict=True)
    ]
    files = TaskFiles(*(folder / f"{name}.jsonl" for name in ("sft", "pairs", "pairs_eval", "prompts", "eval")))
    folder.mkdir(parents=True, exist_ok=True)
    _write(files.sft, ({**_row(entry), "answer": answer} for entry, answer in zip(training, answers, strict=True)))
    _write(files.pairs, _pairs(training, mistakes, task.wrong_answers))
    _write(files.pairs_eval, _pairs(held_out, mistakes, 1))
    _write(files.prompts, map(_row, training))
    _write(files.eval, map(_row, held_out))
    return files


def distinct_entries(task: TaskConfig, seed: int) -> list[Entry]:
    """num_eval + num_train entries, in random order, of which no two ask the same question (whatever its case)."""
    import reasoning_gym as gym

    wanted = task.num_eval + task.num_train
    assert task.name is not None, "the caller has checked data.task.name"
    try:
        dataset = gym.create_dataset(task.name, size=wanted * TRIES_PER_QUESTION, seed=seed, **task.params)
    except ValueError as error:
        remedy = "reasoning-gym has no task of this name; its gallery lists them"
        raise ConfigError("data.task.name", task.name, f"{remedy} ({error})") from error
    except (TypeError, AssertionError) as error:
        raise ConfigError("data.task.params", task.params, f"the task {task.name} refuses them: {error}") from error
    found: dict[str, Entry] = {}
    for entry in dataset:
        if not isinstance(entry["answer"], str) or not entry["answer"].strip():
            raise ConfigError("data.task.name", task.name, f"its answers are not text, such as {entry['answer']!r}")
        if task.lowercase and entry["answer"] != entry["answer"].lower():
            continue
        found.setdefault(entry["question"].casefold(), entry)
        if len(found) == wanted:
            return list(found.values())
    remedy = f"the task has only {len(found)} different questions; with data.task.num_eval={task.num_eval} lower it to"
    raise ConfigError("data.task.num_train", task.num_train, f"{remedy} {max(len(found) - task.num_eval, 0)} or less")


class Mistakes:
    """Wrong answers: one slip or, less often, several, in the characters that the task's answers are written in."""

    def __init__(self, entries: Sequence[Entry], rng: random.Random) -> None:
        self._answers: list[str] = [entry["answer"] for entry in entries]
        self._alphabet = sorted(set("".join(self._answers)))
        self._rng = rng

    def of(self, entry: Entry, count: int) -> list[str]:
        """`count` different wrong answers to the question of `entry`."""
        right, wrong = entry["answer"], dict.fromkeys([entry["answer"]])
        for _ in range(100 + 20 * count):
            candidate = self._slip(right, entry)
            while self._rng.random() < 0.35:
                candidate = self._slip(candidate, entry)
            if candidate and candidate not in wrong and not _is_right(candidate, entry):
                wrong[candidate] = None
            if len(wrong) > count:
                return list(islice(wrong, 1, None))
        raise ConfigError("data.task.wrong_answers", count, f"there are not so many wrong answers like {right!r}")

    def _slip(self, text: str, entry: Entry) -> str:
        rng, at = self._rng, self._rng.randrange(len(text)) if text else 0
        letter = rng.choice(self._alphabet)
        kind = rng.choices(
            ("substitute", "repeat", "swap", "drop", "double", "insert", "other", "question"),
            weights=(6, 3, 4, 3, 2, 2, 1, 1),
        )[0]
        if kind == "other" or not text:
            return rng.choice(self._answers)
        if kind == "question":
            return str(entry["question"].split()[-1])
        if kind == "substitute":
            return text[:at] + letter + text[at + 1 :]
        if kind == "repeat":  # a character of the answer in a wrong place
            return text[:at] + rng.choice(text) + text[at + 1 :]
        if kind == "drop":
            return text[:at] + text[at + 1 :]
        if kind == "double":
            return text[:at] + text[at] + text[at:]
        if kind == "insert":
            return text[:at] + letter + text[at:]
        characters = list(text)
        other = (at + 1) % len(text) if rng.random() < 0.7 else rng.randrange(len(text))
        characters[at], characters[other] = characters[other], characters[at]
        return "".join(characters)


def _is_right(answer: str, entry: Entry) -> bool:
    return reasoning_gym([entry["question"]], [answer], [entry])[0] >= RIGHT


def _row(entry: Entry) -> dict[str, Any]:
    kept = {name: entry[name] for name in ("question", "answer", "metadata")}
    return {"prompt": entry["question"], **kept}


def _pairs(entries: Sequence[Entry], mistakes: Mistakes, count: int) -> Iterable[dict[str, Any]]:
    for entry in entries:
        for rejected in mistakes.of(entry, count):
            yield {**_row(entry), "chosen": entry["answer"], "rejected": rejected}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
