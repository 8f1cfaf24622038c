"""What makes two runs the same, and what is said of two that are not."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.identity import SMALL, differences, fingerprint, identity_of
from conf.load import typed_config
from conf.schema import STAGES, Config


def config_of(**settings: Any) -> Config:
    """The Config of settings by their full key, with a double underscore for each dot."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, last = name.split("__")
        section = values
        for each in sections:
            section = section.setdefault(each, {})
        section[last] = value
    return typed_config(values)


def compared(before: dict[str, Any], now: dict[str, Any], *, stage: str = "ppo") -> list[str]:
    saved = json.loads(json.dumps(identity_of(config_of(**before))))
    return differences(saved, identity_of(config_of(**now)), stage=stage)


SOURCE = {"type": "http", "url": "http://a/score"}


@pytest.mark.parametrize(
    ("before", "now", "lines"),
    [
        ({}, {}, []),
        ({"algorithm__kl_coef": 0.05}, {"algorithm__kl_coef": 0.1}, ["algorithm.kl_coef is 0.1, was 0.05"]),
        ({"stages": ["sft", "ppo"]}, {"stages": ["ppo"]}, ['stages is ["ppo"], was ["sft", "ppo"]']),
        ({}, {"model__path": "org/b"}, ["model.path is org/b, was null"]),
        ({}, {"learner__dtype": "float32", "seed": 1}, ["seed is 1, was 0", "learner.dtype is float32, was bfloat16"]),
        ({"reward__batch_size": 64}, {"reward__batch_size": 32}, ["reward.batch_size is 32, was 64"]),
        ({}, {"learner__policy__lr": 1e-5}, ["learner.policy.lr is 1e-05, was 1e-06"]),
        ({}, {"learner__deepspeed": {"a": {"b": 1}}}, ["learner.deepspeed.a is"]),
        (
            {"reward__sources": [SOURCE]},
            {"reward__sources": [{**SOURCE, "weight": 2.0}]},
            ["reward.sources[0].weight is 2.0, was 1.0"],
        ),
        ({"reward__sources": [SOURCE]}, {"reward__sources": []}, ["reward.sources is [], was [{"]),
    ],
)
def test_each_setting_that_differs_is_a_line(before: dict[str, Any], now: dict[str, Any], lines: list[str]) -> None:
    said = compared(before, now)
    assert len(said) == len(lines), said
    for line, expected in zip(said, lines, strict=True):
        assert line.startswith(expected)
        assert line.endswith("the checkpoint")


@pytest.mark.parametrize(
    "now",
    [
        {
            "run__dir": "elsewhere",
            "resume": "auto",
            "experiment": "other",
            "checkpoint__every": 1,
            "checkpoint__keep": 9,
        },
        {"tracking__wandb": "offline", "tracking__samples_per_step": 0, "monitors__max_kl": 1.0},
        {"cluster__num_generators": 3, "cluster__num_learners": 2, "cluster__call_timeout_s": 900.0},
        {"generator__max_num_seqs": 8, "generator__kv_cache_mib": 64, "generator__gpu_memory_utilization": 0.5},
        {"generator__tensor_parallel_size": 2, "generator__enforce_eager": True},
        {"learner__offload_parameters": "nvme", "learner__nvme_path": "/disk"},
        {"learner__gradient_checkpointing": True, "learner__micro_batch_tokens": 1024},
        {"learner__offload_optimizer": "cpu"},
        {"cluster__num_learners": 2, "learner__sequence_parallel_size": 2},
        {"reward__retries": 9, "reward__backoff_s": 0.1},
    ],
)
def test_where_and_how_a_run_is_carried_out_is_free_to_change(now: dict[str, Any]) -> None:
    assert compared({}, now) == []


def test_limits_and_the_address_of_a_source_are_free_but_not_what_it_is() -> None:
    moved = {**SOURCE, "url": "http://b/score", "timeout_s": 1.0, "concurrency": 1}
    assert compared({"reward__sources": [SOURCE]}, {"reward__sources": [moved]}) == []
    other = {**SOURCE, "format": "openrlhf"}
    assert len(compared({"reward__sources": [SOURCE]}, {"reward__sources": [other]})) == 1


@pytest.mark.parametrize(
    ("settings", "steps", "stage", "is_same"),
    [
        ({}, 200, "ppo", True),
        ({}, 200, "sft", True),
        ({}, 50, "ppo", False),
        ({}, 200, "eval", False),
        ({"learner__policy__scheduler": "inverse_sqrt"}, 200, "ppo", True),
        ({"learner__policy__scheduler": "constant_with_warmup"}, 200, "ppo", True),
        ({"learner__policy__scheduler": "cosine"}, 200, "ppo", False),
        ({"learner__critic__scheduler": "linear"}, 200, "ppo", False),
    ],
)
def test_a_run_may_be_made_longer_where_no_learning_rate_depends_on_it(
    settings: dict[str, Any], steps: int, stage: str, is_same: bool
) -> None:
    said = compared(settings, {**settings, "algorithm__num_steps": steps}, stage=stage)
    assert said == ([] if is_same else [f"algorithm.num_steps is {steps}, was 100 in the checkpoint"])


def test_the_stage_of_a_checkpoint_is_one_of_the_schema() -> None:
    assert [compared({}, {"algorithm__num_steps": 101}, stage=stage) == [] for stage in STAGES] == [True] * 3 + [False]


def test_a_setting_that_is_younger_than_the_checkpoint_was_at_its_default() -> None:
    saved, current = identity_of(Config()), identity_of(Config(seed=0))
    del saved["config"]["learner"]["ema_decay"]
    saved["config"]["learner"]["forgotten"] = 3
    assert differences(saved, current) == ["learner.forgotten was 3 in the checkpoint, and is not there now"]
    current["config"]["learner"]["ema_decay"] = 0.9
    assert differences(saved, current)[0] == "learner.ema_decay is 0.9, was null in the checkpoint"


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    folder = tmp_path / "policy"
    (folder / "data").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "data" / "rows.jsonl").write_text("1\n2\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * (SMALL // 128))
    return folder


def test_a_model_that_was_trained_again_in_its_place_is_noticed(policy: Path) -> None:
    settings = {"model__path": str(policy)}
    saved = identity_of(config_of(**settings))
    assert differences(saved, identity_of(config_of(**settings))) == []
    weights = bytearray((policy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (policy / "model.safetensors").write_bytes(weights)
    assert differences(saved, identity_of(config_of(**settings))) == [
        f"model.path: the files at {policy} are not those that the run began with"
    ]


def test_files_may_move_as_long_as_they_are_the_same(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = identity_of(config_of(model__path=str(policy), data__path=str(policy / "data" / "rows.jsonl")))
    moved = policy.rename(policy.with_name("moved"))
    monkeypatch.chdir(moved.parent)
    current = config_of(model__path="moved", data__path="moved/data/rows.jsonl")
    assert differences(saved, identity_of(current)) == []
    gone = replace(current, model=replace(current.model, path="org/moved"))
    assert differences(saved, identity_of(gone)) == [f"model.path is org/moved, was {policy} in the checkpoint"]


def test_every_setting_that_names_a_model_or_data_is_looked_at(policy: Path) -> None:
    path = str(policy)
    settings: dict[str, Any] = {
        "model": {"path": path, "tokenizer": path, "reference": path},
        "algorithm": {"ptx": {"coef": 1.0, "path": path}},
        "reward": {"sources": [{"path": path}]},
        "data": {"sources": [{"path": path}], "eval_path": path},
        "sft": {"data_path": path, "eval_path": path, "model_path": path},
        "reward_training": {"data_path": path, "eval_path": path, "model_path": path},
        "learner": {"critic_init": path},
    }
    saved = identity_of(typed_config(settings))
    (policy / "config.json").write_text("[]")
    said = differences(saved, identity_of(typed_config(settings)))
    expected = ["model.path", "model.tokenizer", "model.reference", "algorithm.ptx.path", "reward.sources[0].path"]
    expected += ["learner.critic_init", "data.sources[0].path", "data.eval_path"]
    expected += [
        f"{key}.{name}" for key in ("sft", "reward_training") for name in ("data_path", "eval_path", "model_path")
    ]
    assert sorted(line.partition(":")[0] for line in said) == sorted(expected)


def test_names_sizes_and_contents_count_and_what_is_hidden_does_not(policy: Path) -> None:
    begun = fingerprint(policy)
    (policy / ".cache").mkdir()
    (policy / ".cache" / "lock").touch()
    (policy / "README.md").write_text("A model.")
    (policy / "link").symlink_to("nowhere")
    assert fingerprint(policy) == begun
    seen = {begun}
    (policy / "data" / "rows.jsonl").write_text("1\n3\n")
    seen.add(fingerprint(policy))
    (policy / "data" / "rows.jsonl").rename(policy / "rows.jsonl")
    seen.add(fingerprint(policy))
    (policy / "more").touch()
    seen.add(fingerprint(policy))
    with (policy / "model.safetensors").open("ab") as file:
        file.write(b"0")
    seen.add(fingerprint(policy))
    assert len(seen) == 5


def test_a_large_file_is_sampled_from_its_first_byte_to_its_last(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    size = 8 << 30
    with file.open("wb") as content:
        content.truncate(size)  # sparse
    start = time.perf_counter()
    begun = fingerprint(file)
    assert time.perf_counter() - start < 2
    for at in (0, size - 1):
        with file.open("r+b") as content:
            content.seek(at)
            content.write(b"1")
        begun, before = fingerprint(file), begun
        assert begun != before, at
