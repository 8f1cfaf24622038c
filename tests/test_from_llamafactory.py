"""LLaMA-Factory's YAML as overrides: the printed command is loaded, checked and compared with what the YAML asked for.

About fifteen seconds of one core, most of them for composing settings and for starting Python.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from actors.mixing import MixedPromptSource, prompt_source
from conf.check import check
from conf.load import load_config
from conf.schema import Config, ConfigError, DataSourceConfig
from examples.from_llamafactory import convert, in_hydra
from examples.llamafactory_keys import REASON_OF
from tests.tiny_models import tiny_tokenizer

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "llamafactory_ppo.yaml"
PATHS = ("policy", "reward", "reference")
LEAST = {"stage": "ppo", "model_name_or_path": "policy", "reward_model": "reward", "dataset": "questions"}
INFO = {
    "questions": {"file_name": "questions.json"},
    "identity": {"file_name": "identity.json"},
    "alpaca_en_demo": {
        "file_name": "alpaca.jsonl",
        "columns": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    },
    "talk": {
        "file_name": "talk.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "system": "system"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "plain": {"file_name": "plain.jsonl", "columns": {"prompt": "question"}},
    "hub": {"hf_hub_url": "someone/prompts", "split": "validation", "subset": "en"},
    "pairs": {"file_name": "questions.json", "ranking": True},
    "csv": {"file_name": "rows.csv"},
    "renamed": {"file_name": "questions.json", "columns": {"prompt": "instruction", "query": "context"}},
    "pictures": {"file_name": "questions.json", "columns": {"prompt": "instruction", "images": "images"}},
    "odd": {"file_name": "talk.json", "formatting": "sharegpt", "tags": {"user_tag": "narrator"}},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that LLaMA-Factory was run in, with data/ and the checkpoints that are named."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for name in PATHS:
        (tmp_path / name).mkdir()
    rows = {
        "questions.json": [{"instruction": f"q{n}", "input": "", "output": "a"} for n in range(100)],
        "identity.json": [{"instruction": f"i{n}", "input": "you", "output": "a"} for n in range(20)],
        "talk.json": [{"messages": [{"role": "user", "content": f"t{n}"}]} for n in range(40)],
    }
    for name, values in rows.items():
        (data / name).write_text(json.dumps(values, indent=1), encoding="utf-8")
    lines: dict[str, list[dict[str, Any]]] = {
        "alpaca.jsonl": [{"instruction": f"a{n}", "history": []} for n in range(60)],
        "plain.jsonl": [{"question": "p"}],
    }
    for name, values in lines.items():
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")
    (data / "rows.csv").touch()
    (data / "dataset_info.json").write_text(json.dumps(INFO), encoding="utf-8")
    return tmp_path


def converted(*, processes: int | None = 1, **changes: Any) -> tuple[Config, list[str]]:
    """The checked Config of the least YAML with `changes`, and the notes; a key set to None is left out."""
    values = {key: value for key, value in (LEAST | changes).items() if value is not None}
    Path("ppo.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)), encoding="utf-8")
    overrides, notes = convert(Path("ppo.yaml"), processes=processes)
    config = load_config(overrides)
    check(config)
    return config, notes


def refused(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        converted(**changes)
    return str(caught.value)


def test_the_example_means_what_it_says(folder: Path) -> None:
    """Every value by hand: 2 x 8 = 16 prompts an optimizer step, 4 x 16 a step, 80 rows, 3 epochs of one whole step."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "from_llamafactory.py"), str(EXAMPLE)],
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(done.stdout.replace("\\\n", " "))
    assert words[:2] == ["python", str(ROOT / "launch.py")]
    (folder / "saves" / "llama3-8b" / "full" / "reward").mkdir(parents=True)
    config = load_config(words[2:])
    check(config)
    assert config.model.path == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert config.model.attn_implementation == "flash_attention_2"
    lora = config.model.lora
    assert (lora.rank, lora.alpha, lora.target_modules, lora.dropout) == (16, 32.0, ("q_proj", "v_proj"), 0.0)
    (source,) = config.reward.sources
    assert (source.type, source.path, source.dtype) == ("model", "saves/llama3-8b/full/reward", "bfloat16")
    assert config.reward.shaping.normalise
    assert not config.reward.shaping.whiten_rewards
    algorithm = config.algorithm
    assert (algorithm.prompts_per_step, algorithm.mini_batch_size, algorithm.ppo_epochs) == (64, 16, 4)
    assert algorithm.num_steps == 3
    assert (algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon) == (0.2, 6.0, 10_000)
    assert config.data.sources == (
        DataSourceConfig(path="data/identity.json", weight=20.0, format="alpaca"),
        DataSourceConfig(path="data/alpaca.jsonl", weight=60.0, format="alpaca"),
    )
    assert config.data.max_prompt_tokens == 1024
    generator = config.generator
    assert (generator.temperature, generator.top_p, generator.top_k, generator.max_new_tokens) == (0.95, 0.9, 0, 512)
    assert generator.dtype == config.learner.dtype == "bfloat16"
    policy = config.learner.policy
    assert (policy.lr, policy.betas, policy.scheduler) == (1e-5, (0.9, 0.999), "cosine")
    assert policy.warmup_steps == 16, "one of three steps, each of 4 epochs over 4 mini-batches"
    assert config.learner.critic_network == "shared"
    assert config.learner.gradient_checkpointing
    assert (config.seed, config.run.dir, config.tracking.export_every) == (42, "saves/llama3-8b/lora/ppo", 100)
    assert config.tracking.tensorboard
    assert config.tracking.wandb == "off"
    named = [line.split(":")[0] for line in done.stderr.splitlines()]
    assert set(named) == {
        "quantization_bit", "lora_dropout", "template", "max_samples", "cutoff_len", "overwrite_cache",
        "preprocessing_num_workers", "logging_steps", "plot_loss", "overwrite_output_dir", "ddp_timeout",
        "per_device_train_batch_size",
    }  # fmt: skip
    assert len(named) == len(set(named))


def test_the_defaults_are_those_of_llamafactory_and_trl() -> None:
    """FinetuningArguments, GeneratingArguments, TrainingArguments of transformers and PPOConfig of TRL 0.9."""
    config, notes = converted()
    algorithm, policy = config.algorithm, config.learner.policy
    assert (algorithm.prompts_per_step, algorithm.mini_batch_size, algorithm.ppo_epochs) == (8, 8, 4)
    assert algorithm.num_steps == 36, "3 epochs of 100 // 8 whole batches"
    assert (algorithm.kl_coef, algorithm.kl_target, algorithm.kl_horizon, algorithm.kl_estimator) == (
        0.2,
        6,
        10_000,
        "k1",
    )
    assert (algorithm.gamma, algorithm.gae_lambda, algorithm.clip_eps, algorithm.value_clip_eps) == (1, 0.95, 0.2, 0.2)
    assert (algorithm.value_coef, algorithm.max_mean_ratio, algorithm.early_stop_kl) == (0.1, 10.0, None)
    assert algorithm.estimator == "gae"
    assert (policy.lr, policy.betas, policy.eps, policy.weight_decay) == (5e-5, (0.9, 0.999), 1e-8, 0.0)
    assert (policy.max_grad_norm, policy.scheduler, policy.warmup_steps) == (1.0, "linear", 0)
    generator = config.generator
    assert (generator.temperature, generator.top_p, generator.top_k, generator.max_new_tokens) == (0.95, 0.7, 50, 1024)
    lora = config.model.lora
    assert (lora.rank, lora.alpha, lora.target_modules) == (8, 16.0, ()), "alpha is twice the rank, all linear layers"
    assert (config.data.path, config.data.format, config.data.max_prompt_tokens) == (
        "data/questions.json",
        "alpaca",
        2048,
    )
    assert (config.learner.dtype, config.generator.dtype) == ("float32", "float32")
    assert (config.seed, config.tracking.export_every, config.run.dir) == (42, 500, None)
    assert notes == ["cutoff_len: longer prompts are left out, not cut"]


def test_batches_are_multiplied_by_the_processes() -> None:
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "ppo_buffer_size": 2}
    algorithm = converted(processes=4, **sizes, num_train_epochs=2)[0].algorithm
    assert (algorithm.mini_batch_size, algorithm.prompts_per_step, algorithm.num_steps) == (12, 24, 8)
    config, notes = converted(processes=None, **sizes, max_steps=5, num_train_epochs=2)
    assert (config.algorithm.prompts_per_step, config.algorithm.num_steps) == (6, 5)
    assert any(note.startswith("per_device_train_batch_size: is multiplied by one process") for note in notes)


@pytest.mark.parametrize(
    ("changes", "optimizer_steps"),
    [
        ({"warmup_steps": 3}, 3 * 4 * 2),
        ({"warmup_ratio": 0.1}, math.ceil(0.1 * 18) * 4 * 2),
        ({"warmup_steps": 0.5}, 9 * 4 * 2),
        ({"warmup_steps": 2, "warmup_ratio": 0.9, "ppo_epochs": 1}, 2 * 1 * 2),
        ({"warmup_ratio": 0.1, "dataset_dir": "elsewhere"}, 10 * 4 * 2),
    ],
)
def test_the_warm_up_is_counted_in_optimizer_steps(changes: dict[str, Any], optimizer_steps: int) -> None:
    """18 steps of 2 mini-batches of 8: 3 epochs of 100 // 16; or 100, the default, where the rows are not known."""
    given = LEAST | {"ppo_buffer_size": 2, "lr_scheduler_type": "cosine"} | changes
    Path("ppo.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(given)), encoding="utf-8")
    assert f"learner.policy.warmup_steps={optimizer_steps}" in convert(Path("ppo.yaml"), processes=1)[0]


def test_the_three_types_of_reward_model() -> None:
    (source,) = converted(reward_model_type="full")[0].reward.sources
    assert (source.type, source.path, source.dtype) == ("model", "reward", "float32")
    assert converted()[0].reward.sources == (source,), "a LoRA adapter is a path too"
    url = "http://localhost:8000/v1/score?a=b,c"
    (source,) = converted(reward_model_type="api", reward_model=url, bf16=True)[0].reward.sources
    assert (source.type, source.url, source.format, source.model) == ("http", url, "llamafactory", "model")
    Path("reward/value_head.safetensors").touch()
    assert any(note.startswith("reward_model: its head is in value_head.*") for note in converted()[1])


def test_full_tuning_has_a_reference_and_lora_has_none() -> None:
    config, notes = converted(finetuning_type="full", ref_model="reference", lora_rank=8)
    assert config.model.lora.rank is None
    assert config.model.reference == "reference"
    assert "lora_rank: has an effect with finetuning_type=lora alone" in notes
    config, notes = converted(ref_model="reference", lora_rank=16, use_rslora=True)
    assert config.model.reference is None
    assert config.model.lora.alpha == 32 * 4, "scaled by 1 / sqrt(16) in place of 1 / 16"
    assert "ref_model: with LoRA the reference is the policy without its adapters" in notes


def test_scores_and_schedules_and_trackers() -> None:
    config, notes = converted(
        ppo_score_norm=True, ppo_whiten_rewards=True, report_to=["wandb", "swanlab"], default_system="be brief",
        fp16=True, disable_gradient_checkpointing=True, flash_attn="disabled", lr_scheduler_type="constant",
        warmup_ratio=0.1, save_steps=7, adam_beta2=0.95, weight_decay=0.1, learning_rate=5e-6, seed=1,
    )  # fmt: skip
    assert config.reward.shaping.normalise
    assert config.reward.shaping.whiten_rewards
    assert (config.tracking.wandb, config.tracking.tensorboard, config.tracking.export_every) == ("online", False, 7)
    assert config.data.system_prompt == "be brief"
    assert config.learner.dtype == "bfloat16"
    assert not config.learner.gradient_checkpointing
    assert config.model.attn_implementation == "eager"
    policy = config.learner.policy
    assert (policy.scheduler, policy.warmup_steps) == ("constant", 0)
    assert (policy.lr, policy.betas, policy.weight_decay) == (5e-6, (0.9, 0.95), 0.1)
    assert config.seed == 1
    for expected in (
        "report_to: swanlab is none of",
        "fp16: bfloat16 is used instead",
        "warmup_steps: has no effect with a constant",
    ):
        assert any(note.startswith(expected) for note in notes), expected


def test_numbers_are_read_as_llamafactory_reads_them() -> None:
    """YAML 1.1 takes 5e-6 for text; OmegaConf, which LLaMA-Factory reads with, does not."""
    lines = "".join(f"{key}: {value}\n" for key, value in LEAST.items())
    Path("ppo.yaml").write_text(f"{lines}learning_rate: 5e-6\nseed:\n", encoding="utf-8")
    overrides, _ = convert(Path("ppo.yaml"))
    assert "learner.policy.lr=5e-06" in overrides
    assert "seed=42" in overrides, "a key without a value has its default"


def test_the_sets_of_dataset_info() -> None:
    data = converted(dataset="talk")[0].data
    assert (data.path, data.format) == ("data/talk.json", "sharegpt")
    data = converted(dataset="plain", per_device_train_batch_size=1)[0].data
    assert (data.path, data.format, data.prompt_key) == ("data/plain.jsonl", "prompt", "question")
    config, notes = converted(dataset="hub")
    assert (config.data.path, config.data.split) == ("someone/prompts", "validation")
    assert "dataset: hub has subset=en in dataset_info.json, for which there is no setting" in notes
    assert any(
        note.startswith("num_train_epochs: the rows cannot be counted; set algorithm.num_steps") for note in notes
    )
    assert config.algorithm.num_steps == 100
    assert converted(dataset="someone/prompts", dataset_dir="ONLINE")[0].data.path == "someone/prompts"


def test_several_sets_are_mixed_as_llamafactory_does() -> None:
    config, notes = converted(dataset="questions, talk", max_samples=50)
    assert [source.weight for source in config.data.sources] == [50, 40]
    assert config.algorithm.num_steps == 33, "3 epochs of 90 // 8"
    assert any(note.startswith("max_samples: ") for note in notes)
    made = prompt_source(config.data, tiny_tokenizer(), seed=0)
    assert isinstance(made, MixedPromptSource)
    assert sum(prompt.text.startswith("<user>q") for prompt in made.next_batch(90)) == 50
    config, notes = converted(dataset=["questions", "talk"], mix_strategy="interleave_over", interleave_probs="0.7,0.3")
    assert [source.weight for source in config.data.sources] == [0.7, 0.3]
    assert any(note.startswith("mix_strategy: ") for note in notes)
    config, notes = converted(dataset="questions,hub")
    assert [source.weight for source in config.data.sources] == [1, 1]
    assert any(note.startswith("mix_strategy: not all rows can be counted") for note in notes)


def test_columns_that_only_manta_reads_are_named(folder: Path) -> None:
    rows = [{"instruction": "a", "system": "s", "history": []}] * 8
    (folder / "data" / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
    notes = converted()[1]
    assert "dataset: questions has a column system that dataset_info.json leaves out; here it is read" in notes
    assert not any("column history" in note for note in notes)


def test_rows_that_cannot_be_read_are_named(folder: Path) -> None:
    (folder / "data" / "questions.json").write_text("[{]", encoding="utf-8")
    config, notes = converted()
    assert config.data.path == "data/questions.json"
    assert any(note.startswith("dataset: questions: its rows cannot be counted: line 1 is not JSON") for note in notes)


def test_without_dataset_info_the_path_is_left_to_set() -> None:
    Path("ppo.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(LEAST | {"dataset_dir": "none"})), encoding="utf-8")
    overrides, notes = convert(Path("ppo.yaml"), processes=1)
    assert not any(override.startswith(("data.path", "data.sources")) for override in overrides)
    assert "dataset_dir: none has no dataset_info.json that describes questions; set data.path" in notes
    check(load_config([*overrides, "data.path=data/questions.json"]))


def test_no_key_is_passed_over_in_silence() -> None:
    unmatched = {key: 1 for key in REASON_OF if not key.startswith(("lora_", "use_rslora"))}
    notes = converted(**unmatched, no_such_key=None, optim="adafactor", ppo_epoch=4)[1]
    named = {note.split(":")[0] for note in notes}
    assert set(unmatched) | {"optim", "ppo_epoch"} <= named
    assert "ppo_epoch: is not known to this converter; nothing was made of it" in notes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "sft"}, "stage='sft': only ppo is converted"),
        ({"stage": "rm"}, "stage='rm': only ppo is converted"),
        ({"stage": None}, "stage=None: "),
        ({"do_train": False}, "do_train=False: "),
        ({"model_name_or_path": None}, "model_name_or_path=None: name the checkpoint"),
        ({"reward_model": None}, "reward_model=None: name the reward model"),
        ({"reward_model_type": "oft"}, "reward_model_type='oft': choose full, lora or api"),
        ({"dataset": None}, "dataset=None: name the set"),
        ({"finetuning_type": "freeze"}, "finetuning_type='freeze': other weights would be trained"),
        ({"adapter_name_or_path": "saves/sft"}, "adapter_name_or_path='saves/sft': the policy would start without it"),
        ({"ppo_epochs": "four"}, "ppo_epochs='four': must be a value such as 4"),
        ({"ppo_epochs": True}, "ppo_epochs=True: must be a value such as 4"),
        ({"learning_rate": "low"}, "learning_rate='low': must be a value such as 5e-05"),
        ({"dataset": "nowhere"}, "dataset='nowhere': data/dataset_info.json does not describe it"),
        ({"dataset": "pairs"}, "dataset='pairs': has ranking in dataset_info.json"),
        ({"dataset": "csv"}, "dataset='csv': data/rows.csv is no json, jsonl or parquet file; convert it"),
        ({"dataset": "renamed"}, "dataset='renamed': has other columns than instruction, input, system, history"),
        ({"dataset": "pictures"}, "dataset='pictures': has images, videos or audios"),
        ({"dataset": "odd"}, "dataset='odd': has formatting=sharegpt"),
        ({"per_device_train_batch_size": 101}, "dataset='data/questions.json': there are 100 rows, fewer than the 101"),
        (
            {"dataset": "questions,talk", "mix_strategy": "interleave_under", "interleave_probs": "1"},
            "interleave_probs=",
        ),
    ],
)
def test_what_would_train_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    assert refused(**changes).startswith(message)


def test_any_text_comes_through_hydra() -> None:
    words = [
        "a b",
        "it's",
        "null",
        "True",
        "1.5",
        "http://a:1/b?c=d,e",
        "[x]",
        "{y}",
        "a\\b",
        "a\\'",
        "..",
        "~/x",
        "-1",
        "a/b-c.d",
    ]
    sources = load_config([f"data.sources={in_hydra([{'path': word} for word in words])}"]).data.sources
    assert [source.path for source in sources] == words
    assert load_config([f"model.path={in_hydra(words[-5])}"]).model.path == words[-5]


def test_run_starts_the_command_and_takes_its_exit_code() -> None:
    Path("ppo.yaml").write_text(
        OmegaConf.to_yaml(OmegaConf.create(LEAST | {"model_name_or_path": "./nowhere"})), encoding="utf-8"
    )
    script = [sys.executable, str(ROOT / "examples" / "from_llamafactory.py")]
    done = subprocess.run([*script, "ppo.yaml", "--run"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("python ")
    assert "launch.py: model.path='./nowhere': there is no such file or folder" in done.stderr
    done = subprocess.run([*script, "none.yaml"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("from_llamafactory.py: yaml='none.yaml': cannot be read")
