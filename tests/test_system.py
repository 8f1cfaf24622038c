"""The whole system as a user starts it: all three stages over real Ray, vLLM and DeepSpeed, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.functions import brevity
from examples.reward_server import RewardServer
from tests.test_metrics_page import conditional_keys, documented_keys, logged_keys
from tests.test_reward_http import serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

PROJECT = Path(__file__).resolve().parent.parent
VARYING = ("timing/", "throughput/", "memory/")
SMALL = [
    "experiment=quickstart",
    "cluster.num_generators=2",
    "cluster.num_learners=2",
    "sft.num_steps=3",
    "sft.batch_size=8",
    "reward_training.num_steps=3",
    "reward_training.batch_size=8",
    "algorithm.num_steps=3",
    "algorithm.prompts_per_step=8",
    "algorithm.samples_per_prompt=2",
    "algorithm.mini_batch_size=8",
    "evaluation.every=2",
    "evaluation.num_prompts=16",
    "data.task.num_train=200",
    "data.task.num_eval=32",
    "reward.batch_size=4",
]


def launch(run_dir: Path, *overrides: str, mark: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch.py", *SMALL, f"run.dir={run_dir}", *overrides],
        cwd=PROJECT,
        env=os.environ | {"MANTA_TEST_MARK": mark or uuid.uuid4().hex},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def reproducible(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(VARYING)} for row in rows]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    process = launch(run_dir, "tracking.export_every=2", "tracking.tensorboard=true", "tracking.wandb=offline")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return run_dir, output


def test_a_run_leaves_everything_that_it_promises(finished_run: tuple[Path, str]) -> None:
    run_dir, output = finished_run
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "curves.png"):
        assert (run_dir / name).stat().st_size > 0, name
    for name in (
        "export/policy",
        "export/critic",
        "checkpoints/sft",
        "checkpoints/reward",
        "checkpoints/step_000002/policy",
    ):
        assert (run_dir / name / "config.json").exists(), name
        assert (run_dir / name / "model.safetensors").exists(), name
    summary = json.loads((run_dir / "summary.json").read_text())
    for key in ("eval/accuracy_before", "eval/accuracy_after", "reward/score_before", "reward/score_after"):
        assert isinstance(summary[key], float), key
    assert str(run_dir) in output
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_every_step_is_recorded(finished_run: tuple[Path, str]) -> None:
    rows = metrics_of(finished_run[0])
    assert [(row["stage"], row["step"]) for row in rows] == [
        *(("sft", step) for step in (1, 2, 3)),
        *(("reward", step) for step in (1, 2, 3)),
        *(("ppo", step) for step in (0, 1, 2, 3)),
    ]
    for row in rows[-3:]:
        for key in (
            "reward/score_mean",
            "policy/approx_kl",
            "policy/clipfrac",
            "objective/kl",
            "sync/logprob_gap_max",
            "sync/logprob_gap_mean",
        ):
            assert isinstance(row[key], float), key
        assert row["sync/logprob_gap_max"] < 1e-4, "the generators sampled from what the learner trains"
    assert "eval/accuracy" in rows[-1]
    assert [row["sync/version"] for row in rows[-4:]] == [0, 1, 2, 3]


def test_the_page_explains_the_metrics_that_there_are(finished_run: tuple[Path, str]) -> None:
    page = PROJECT / "docs" / "metrics.md"
    logged = logged_keys(finished_run[0] / "metrics.jsonl")
    assert logged <= documented_keys(page)
    assert documented_keys(page) - conditional_keys(page) <= logged


def test_samples_show_their_own_score(finished_run: tuple[Path, str]) -> None:
    rows = [json.loads(line) for line in (finished_run[0] / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 8
    assert {"stage", "step", "prompt", "response", "score", "finish_reason"} <= rows[0].keys()
    by_text: dict[tuple[str, str, str], set[float]] = {}
    for row in rows:
        by_text.setdefault((row["prompt"], row["response"], row["finish_reason"]), set()).add(round(row["score"], 4))
    assert all(len(scores) == 1 for scores in by_text.values()), "the reward model gives one text one score"


def test_the_export_is_a_working_checkpoint(finished_run: tuple[Path, str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    export = finished_run[0] / "export"
    policy, information = AutoModelForCausalLM.from_pretrained(export / "policy", output_loading_info=True)
    assert not information["missing_keys"]
    before = AutoModelForCausalLM.from_pretrained(finished_run[0] / "checkpoints" / "sft")
    moved = [not torch.equal(a, b) for a, b in zip(policy.parameters(), before.parameters(), strict=True)]
    assert all(moved), "every parameter was trained"
    _, information = AutoModelForSequenceClassification.from_pretrained(export / "critic", output_loading_info=True)
    assert not information["missing_keys"]
    assert AutoTokenizer.from_pretrained(export / "policy").eos_token is not None


def test_an_equal_run_gives_equal_numbers(finished_run: tuple[Path, str], tmp_path: Path) -> None:
    process = launch(tmp_path / "second")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert reproducible(metrics_of(tmp_path / "second")) == reproducible(metrics_of(finished_run[0]))


@pytest.fixture(scope="module")
def variant_run(finished_run: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a critic, with adapters, several sources of scores, filtered groups and an eval stage."""
    run_dir = tmp_path_factory.mktemp("runs") / "variant"
    policy = finished_run[0] / "checkpoints" / "sft"
    reward_model = finished_run[0] / "checkpoints" / "reward"
    with serving(RewardServer(brevity)) as server:
        process = launch(
            run_dir,
            "stages=[ppo,eval]",
            "model.init_config=null",
            f"model.path={policy}",
            "model.lora.rank=4",
            "algorithm=grpo",
            "algorithm.num_steps=2",
            "algorithm.prompts_per_step=4",
            "algorithm.samples_per_prompt=4",
            "algorithm.filter_groups=true",
            "algorithm.kl_loss_coef=0.01",
            "algorithm.entropy_coef=0.001",
            "algorithm.correction=token",
            f"reward.sources=[{{type: model, path: '{reward_model}'}}, "
            f"{{type: http, url: '{server.url}', weight: 0.1}}, "
            "{type: verifier, verifier: reasoning_gym, weight: 2}]",
            "reward.shaping.normalise=true",
            "reward.shaping.overlong_tokens=4",
            "learner.ema_decay=0.9",
            "cluster.num_learners=1",
            "cluster.num_generators=1",
            "evaluation.samples_per_prompt=2",
            "evaluation.pass_at=[1,2]",
            "evaluation.best_metric=eval/score_mean",
        )
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return run_dir


def test_a_run_of_another_estimator_starts_no_critic_and_exports_none(variant_run: Path) -> None:
    rows = [row for row in metrics_of(variant_run) if row["stage"] == "ppo"]
    assert not any(key.startswith("critic/") for row in rows for key in row)
    assert not (variant_run / "export" / "critic").exists()


def test_adapters_are_merged_in_what_is_sampled_and_exported(variant_run: Path) -> None:
    rows = [row for row in metrics_of(variant_run) if row["stage"] == "ppo" and row["step"] > 0]
    assert all(row["sync/logprob_gap_max"] < 1e-4 for row in rows), "the generators hold the merged weights"
    assert (variant_run / "export" / "policy" / "model.safetensors").is_file()
    assert (variant_run / "export" / "policy_ema" / "model.safetensors").is_file()
    assert (variant_run / "export" / "adapter" / "adapter_config.json").is_file()


def test_each_source_is_recorded_and_the_score_is_their_weighted_sum(variant_run: Path) -> None:
    row = [row for row in metrics_of(variant_run) if row["stage"] == "ppo"][-1]
    parts = row["reward/model_mean"] + 0.1 * row["reward/http_mean"] + 2 * row["reward/verifier_mean"]
    assert row["reward/score_mean"] == pytest.approx(parts, abs=1e-6)
    assert row["rollout/num_dropped"] == 0


def test_the_best_policy_is_kept_and_an_eval_stage_judges_the_last(variant_run: Path) -> None:
    best = json.loads((variant_run / "checkpoints" / "best" / "best.json").read_text())
    rows = metrics_of(variant_run)
    scores = {row["step"]: row["eval/score_mean"] for row in rows if row["stage"] == "ppo" and "eval/score_mean" in row}
    assert best["value"] == max(scores.values())
    assert scores[best["step"]] == best["value"]
    (judged,) = [row for row in rows if row["stage"] == "eval"]
    assert judged["eval/score_mean"] == pytest.approx(scores[max(scores)], abs=1e-4), "the export is the last policy"
    assert 0 <= judged["eval/pass_at_1"] <= judged["eval/pass_at_2"] <= 1


def test_the_frontier_is_drawn(variant_run: Path) -> None:
    assert (variant_run / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert len((variant_run / "frontier.csv").read_text().splitlines()) >= 3


def test_an_eval_stage_by_itself_judges_a_checkpoint_beside_its_reference(
    finished_run: tuple[Path, str], tmp_path: Path
) -> None:
    first = finished_run[0]
    process = launch(
        tmp_path / "judged",
        "stages=[eval]",
        "model.init_config=null",
        f"model.path={first / 'export' / 'policy'}",
        f"model.reference={first / 'checkpoints' / 'sft'}",
        f"reward.sources=[{{type: model, path: '{first / 'checkpoints' / 'reward'}'}}]",
        "cluster.num_learners=1",
        "cluster.num_generators=1",
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    (judged,) = metrics_of(tmp_path / "judged")
    (last,) = [row for row in metrics_of(first) if row["stage"] == "ppo" and row["step"] == 3]
    for key in ("eval/score_mean", "eval/kl", "eval/accuracy", "eval/response_length_mean"):
        assert judged[key] == pytest.approx(last[key], abs=1e-4), key
    summary = json.loads((tmp_path / "judged" / "summary.json").read_text())
    assert summary["eval/kl"] == judged["eval/kl"]


def test_the_page_explains_what_a_variant_records(variant_run: Path) -> None:
    assert logged_keys(variant_run / "metrics.jsonl") <= documented_keys(PROJECT / "docs" / "metrics.md")


def marked_processes(mark: str) -> dict[int, str]:
    """Return the processes that inherited the mark in their environment: Ray's, vLLM's, the learner's, the driver."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if f"MANTA_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while it was looked at
    return {pid: command for pid, command in found.items() if command}


def wait_for(condition: Any, *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


@pytest.fixture
def mark() -> Iterator[str]:
    value = uuid.uuid4().hex
    yield value
    for pid in marked_processes(value):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def ppo_alone(finished_run: tuple[Path, str]) -> list[str]:
    """Settings for the ppo stage by itself, on a policy that another run has fine-tuned, a process of each kind."""
    return [
        "stages=[ppo]",
        "model.init_config=null",
        f"model.path={finished_run[0] / 'checkpoints' / 'sft'}",
        "learner.critic_init=policy",
        "cluster.num_generators=1",
        "cluster.num_learners=1",
    ]


@pytest.fixture
def running(ppo_alone: list[str], mark: str, tmp_path: Path) -> tuple[subprocess.Popen[str], Path]:
    """A run that has taken a step of PPO and has very many to go."""
    run_dir = tmp_path / "run"
    function = "reward.sources=[{type: function, function: examples.functions:brevity}]"
    process = launch(run_dir, *ppo_alone, function, "algorithm.num_steps=10000", mark=mark)

    def has_stepped() -> bool:
        return any(row["stage"] == "ppo" and row["step"] > 1 for row in metrics_of(run_dir))

    assert wait_for(lambda: process.poll() is not None or has_stepped(), seconds=300)
    assert process.poll() is None, process.communicate()[0]
    assert any("raylet" in command for command in marked_processes(mark).values()), "the mark reaches Ray's processes"
    return process, run_dir


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_stopped_run_leaves_no_process(
    signum: signal.Signals, mark: str, running: tuple[subprocess.Popen[str], Path]
) -> None:
    process, run_dir = running
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, output
    assert "Traceback" not in output
    assert str(run_dir) in output
    assert wait_for(lambda: not marked_processes(mark), seconds=20), marked_processes(mark)


@pytest.mark.parametrize("role", ["GeneratorProcess", "RankProcess", "RewardProcess"])
def test_a_killed_process_ends_the_run_with_the_cause(
    role: str, mark: str, running: tuple[subprocess.Popen[str], Path]
) -> None:
    process, _ = running
    victim = next(pid for pid, command in marked_processes(mark).items() if command.startswith(f"ray::{role}"))
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1, output
    assert "the run failed" in output
    assert "died" in output
    assert wait_for(lambda: not marked_processes(mark), seconds=20), marked_processes(mark)


def test_a_reward_function_that_raises_ends_the_run_with_its_name(
    ppo_alone: list[str], tmp_path: Path, mark: str
) -> None:
    process = launch(
        tmp_path / "run", *ppo_alone, "reward.sources=[{type: function, function: tests.faulty:raises}]", mark=mark
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert "tests.faulty" in output
    assert "no score for this one" in output
    assert wait_for(lambda: not marked_processes(mark), seconds=20), marked_processes(mark)
