"""The whole system as a user starts it: all stages over real Ray, vLLM and DeepSpeed, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.functions import brevity
from examples.reward_server import RewardServer
from tests.runs import PROJECT, launched, metrics_of
from tests.test_metrics_page import conditional_keys, documented_keys, logged_keys
from tests.test_reward_http import serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

TWO_OF_EACH = ("cluster.num_generators=2", "cluster.num_learners=2")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    more = ["tracking.export_every=2", "tracking.tensorboard=true", "tracking.wandb=offline", "checkpoint.every=2"]
    more += ["tracking.trace_steps=[2]"]
    with launched(run_dir, *TWO_OF_EACH, *more) as run:
        run.succeed()
        run.assert_nothing_left()
    return run_dir, run.output


def test_a_run_leaves_everything_that_it_promises(finished_run: tuple[Path, str]) -> None:
    run_dir, output = finished_run
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "curves.png"):
        assert (run_dir / name).stat().st_size > 0, name
    for name in ("export/policy", "export/critic", "export/sft", "export/reward", "export/step_000002/policy"):
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
    before = AutoModelForCausalLM.from_pretrained(finished_run[0] / "export" / "sft")
    moved = [not torch.equal(a, b) for a, b in zip(policy.parameters(), before.parameters(), strict=True)]
    assert all(moved), "every parameter was trained"
    _, information = AutoModelForSequenceClassification.from_pretrained(export / "critic", output_loading_info=True)
    assert not information["missing_keys"]
    assert AutoTokenizer.from_pretrained(export / "policy").eos_token is not None


def test_checkpoints_are_kept_of_the_last_steps(finished_run: tuple[Path, str]) -> None:
    kept = sorted(path.name for path in (finished_run[0] / "checkpoints").iterdir())
    assert kept == ["ppo-000002", "ppo-000003", "ppo-start", "reward-start", "sft-start"]


def test_a_trace_has_a_row_for_each_process_and_what_it_did(finished_run: tuple[Path, str]) -> None:
    (path,) = (finished_run[0] / "trace").iterdir()
    assert path.name == "step_000002.json"
    events = json.loads(path.read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    done: dict[str, set[str]] = {name: set() for name in rows.values()}
    for event in events:
        if event["ph"] == "X":
            done[rows[event["tid"]]].add(event["name"])
    assert done.keys() == {"driver", "reward 0", *(f"{role} {i}" for role in ("generator", "learner") for i in (0, 1))}
    assert {"step", "generate", "learn", "sync"} <= done["driver"]
    assert {"sample", "receive_weights"} <= done["generator 0"] & done["generator 1"]
    assert {"update", "send_weights"} <= done["learner 0"] & done["learner 1"]
    assert "score" in done["reward 0"]
    row = metrics_of(finished_run[0])[-1]
    assert 0 < row["idle/generator_0"] < 1
    assert 0 < row["idle/learner_1"] < 1


@pytest.fixture(scope="module")
def ahead_run(finished_run: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose generators sample ahead of the learner, of which two ranks share the tokens of each rollout."""
    run_dir = tmp_path_factory.mktemp("runs") / "ahead"
    export = finished_run[0] / "export"
    settings = (
        "stages=[ppo]",
        "model.init_config=null",
        f"model.path={export / 'sft'}",
        f"reward.sources=[{{type: model, path: '{export / 'reward'}'}}]",
        "algorithm=ppo_async",
        "algorithm.num_steps=3",
        "cluster.num_learners=2",
        "learner.sequence_parallel_size=2",
        "evaluation.every=2",
    )
    with launched(run_dir, *settings) as run:
        run.succeed()
        run.assert_nothing_left()
    return run_dir


def test_sampling_ahead_trains_on_tokens_of_the_version_before_and_corrects_the_gap(ahead_run: Path) -> None:
    rows = [row for row in metrics_of(ahead_run) if row["stage"] == "ppo"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["rollout/staleness_max"] == 0
    assert any(row["rollout/staleness_mean"] > 0 for row in rows[2:])
    for row in rows[1:]:
        assert row["rollout/staleness_max"] <= 1
        assert row["rollout/staleness_0"] + row["rollout/staleness_1"] == pytest.approx(1)
        assert row["rollout/num_rollouts"] == 16
    assert logged_keys(ahead_run / "metrics.jsonl") <= documented_keys(PROJECT / "docs" / "metrics.md")


@pytest.fixture(scope="module")
def variant_run(finished_run: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a critic, with adapters, several sources of scores and filtered groups."""
    run_dir = tmp_path_factory.mktemp("runs") / "variant"
    policy = finished_run[0] / "export" / "sft"
    reward_model = finished_run[0] / "export" / "reward"
    with serving(RewardServer(brevity)) as server:
        settings = (
            "stages=[ppo]",
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
            "evaluation.samples_per_prompt=2",
            "evaluation.pass_at=[1,2]",
            "evaluation.best_metric=eval/score_mean",
        )
        with launched(run_dir, *settings) as run:
            run.succeed()
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


def test_the_best_policy_is_kept(variant_run: Path) -> None:
    best = json.loads((variant_run / "export" / "best" / "best.json").read_text())
    evaluated = [row for row in metrics_of(variant_run) if "eval/score_mean" in row]
    scores = {row["step"]: row["eval/score_mean"] for row in evaluated}
    assert best["value"] == max(scores.values())
    assert scores[best["step"]] == best["value"]
    assert all(0 <= row["eval/pass_at_1"] <= row["eval/pass_at_2"] <= 1 for row in evaluated)


def test_the_frontier_is_drawn(variant_run: Path) -> None:
    assert (variant_run / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert len((variant_run / "frontier.csv").read_text().splitlines()) >= 3


def test_an_eval_stage_by_itself_judges_a_checkpoint_beside_its_reference(
    finished_run: tuple[Path, str], tmp_path: Path
) -> None:
    first = finished_run[0]
    settings = (
        "stages=[eval]",
        "model.init_config=null",
        f"model.path={first / 'export' / 'policy'}",
        f"model.reference={first / 'export' / 'sft'}",
        f"reward.sources=[{{type: model, path: '{first / 'export' / 'reward'}'}}]",
    )
    with launched(tmp_path / "judged", *settings) as run:
        run.succeed()
    (judged,) = metrics_of(tmp_path / "judged")
    (last,) = [row for row in metrics_of(first) if row["stage"] == "ppo" and row["step"] == 3]
    for key in ("eval/score_mean", "eval/kl", "eval/accuracy", "eval/response_length_mean"):
        assert judged[key] == pytest.approx(last[key], abs=1e-4), key
    summary = json.loads((tmp_path / "judged" / "summary.json").read_text())
    assert summary["eval/kl"] == judged["eval/kl"] > 0


def test_the_page_explains_what_a_variant_records(variant_run: Path) -> None:
    assert logged_keys(variant_run / "metrics.jsonl") <= documented_keys(PROJECT / "docs" / "metrics.md")
