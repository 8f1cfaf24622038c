"""The `python launch.py` command that says what a YAML of LLaMA-Factory's PPO stage says.

    python examples/from_llamafactory.py my_ppo.yaml [--processes N] [--run]

The command goes to standard output, for `--run` it is started too. Every key without an equivalent is named on standard
error with the reason, and so is one that means something slightly different here. Run it where LLaMA-Factory was run:
relative paths are taken from there. What the YAML leaves out has LLaMA-Factory's default (src/llamafactory/hparams and
train/ppo/trainer.py, and PPOConfig of TRL 0.9, which it builds on), written out where ours differs.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, which has its own folder on the path instead

from hydra.core.override_parser.types import Quote, QuotedString  # noqa: E402

from conf.schema import AlgorithmConfig, ConfigError  # noqa: E402
from conf.schema.engines import SCHEDULERS  # noqa: E402
from examples.llamafactory_data import Dataset, data_overrides, read_datasets  # noqa: E402
from examples.llamafactory_keys import REASON_OF, Given, read_yaml  # noqa: E402

Overrides = dict[str, Any]

ATTENTION = {"sdpa": "sdpa", "disabled": "eager", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
ADAMW = (None, "adamw_torch", "adamw_torch_fused", "adamw_hf")


def convert(path: Path, *, processes: int | None = None) -> tuple[list[str], list[str]]:
    """The overrides of launch.py that say the same as the YAML at `path`, and what they do not say, one line each.

    `processes` is on how many GPUs LLaMA-Factory ran; its batch sizes are of one. Raises ConfigError for a YAML that
    is no PPO run, and for what would train something else if it were left out.
    """
    given = Given(path, read_yaml(path))
    stage = given.text("stage", needed="set it to ppo; there is no default")
    if stage != "ppo":
        raise ConfigError(
            "stage", stage, "only ppo is converted; sft.* and reward_training.* are the supervised stages"
        )
    if not given.take("do_train", True):
        raise ConfigError("do_train", False, "nothing would be trained")
    bf16 = _half_precision(given)
    datasets = read_datasets(given)
    overrides = _model(given) | _reward(given, bf16=bf16) | data_overrides(given, datasets)
    overrides |= _algorithm(given, datasets, processes=processes)
    overrides |= _generator(given, bf16=bf16) | _learner(given, overrides, bf16=bf16) | _run(given)
    for key in given.left:
        given.note(key, REASON_OF.get(key, "is not known to this converter; nothing was made of it"))
    return [f"{key}={in_hydra(value)}" for key, value in overrides.items()], given.notes


def _half_precision(given: Given) -> bool:
    bf16, fp16, pure = given.take("bf16", False), given.take("fp16", False), given.take("pure_bf16", False)
    if fp16:
        given.note("fp16", "bfloat16 is used instead")
    if pure:
        given.note("pure_bf16", "forward and backward are bfloat16, master weights and optimizer states float32")
    return bool(bf16 or fp16 or pure)


def _model(given: Given) -> Overrides:
    path = given.text("model_name_or_path", needed="name the checkpoint of the policy")
    overrides: Overrides = {"model.path": path}
    if adapter := given.text("adapter_name_or_path"):
        remedy = "the policy would start without it; merge it into a checkpoint (llamafactory-cli export) and name that"
        raise ConfigError("adapter_name_or_path", adapter, remedy)
    if given.take("trust_remote_code", False):
        overrides["model.trust_remote_code"] = True
    attention = given.text("flash_attn")
    if attention in ATTENTION:
        overrides["model.attn_implementation"] = ATTENTION[attention]
    elif attention not in (None, "auto"):
        given.note("flash_attn", "is no attention of transformers that is known here; sdpa is used")
    tuning, reference = given.text("finetuning_type") or "lora", given.text("ref_model")
    if tuning not in ("lora", "full"):
        raise ConfigError("finetuning_type", tuning, "other weights would be trained; choose lora or full")
    if tuning == "lora":
        overrides |= _lora(given)
        if reference is not None:
            given.note("ref_model", "with LoRA the reference is the policy without its adapters")
    elif reference is not None:
        overrides["model.reference"] = reference
    return overrides


def _lora(given: Given) -> Overrides:
    rank = given.take("lora_rank", 8)
    alpha = float(given.take("lora_alpha", 0) or 2 * rank)
    if given.take("use_rslora", False):  # alpha / sqrt(rank) in place of alpha / rank
        alpha *= math.sqrt(rank)
    if given.take("lora_dropout", 0.0):
        given.note("lora_dropout", "dropout would train another distribution than the one that was sampled")
    targets = [target for target in given.items("lora_target") if target != "all"]
    return {"model.lora.rank": rank, "model.lora.alpha": alpha, "model.lora.target_modules": targets}


def _reward(given: Given, *, bf16: bool) -> Overrides:
    model = given.text("reward_model", needed="name the reward model, or the URL of its server")
    kind = given.text("reward_model_type") or "lora"
    if kind not in ("full", "lora", "api"):
        raise ConfigError("reward_model_type", kind, "choose full, lora or api")
    assert model is not None
    source: Overrides = {"type": "model", "path": model} | ({"dtype": "bfloat16"} if bf16 else {})
    if kind == "api":
        source = {"type": "http", "url": model, "format": "llamafactory", "model": "model"}
    elif any((Path(model) / f"value_head.{suffix}").is_file() for suffix in ("safetensors", "bin")):
        remedy = "its head is in value_head.*, which is not read; save it as a sequence-classification model, one label"
        given.note("reward_model", remedy)
    shaping = {
        "reward.shaping.normalise": given.take("ppo_score_norm", False),
        "reward.shaping.whiten_rewards": given.take("ppo_whiten_rewards", False),
    }
    return {"reward.sources": [source]} | {key: True for key, wanted in shaping.items() if wanted}


def _algorithm(given: Given, datasets: Sequence[Dataset], *, processes: int | None) -> Overrides:
    """TRL takes an optimizer step for each per_device x accumulation prompts, and buffer times as many make a step."""
    if processes is None:
        given.note("per_device_train_batch_size", "is multiplied by one process; say --processes N for N GPUs")
    per_device: int = given.take("per_device_train_batch_size", 8)
    mini_batch: int = per_device * given.take("gradient_accumulation_steps", 1) * (processes or 1)
    overrides: Overrides = {
        "algorithm.prompts_per_step": mini_batch * given.take("ppo_buffer_size", 1),
        "algorithm.mini_batch_size": mini_batch,
        "algorithm.ppo_epochs": given.take("ppo_epochs", 4),
        "algorithm.kl_coef": 0.2,
        "algorithm.kl_target": given.take("ppo_target", 6.0),
    }
    steps = _num_steps(given, datasets, overrides["algorithm.prompts_per_step"])
    return overrides if steps is None else {"algorithm.num_steps": steps} | overrides


def _num_steps(given: Given, datasets: Sequence[Dataset], prompts_per_step: int) -> int | None:
    """max_steps, or as many as whole batches fit into num_train_epochs; None if the rows cannot be counted."""
    most, epochs = given.take("max_steps", -1), given.take("num_train_epochs", 3.0)
    if most > 0:
        return int(most)
    counts = [dataset.count for dataset in datasets]
    total = sum(count or 0 for count in counts)
    if not datasets or None in counts:
        default = AlgorithmConfig().num_steps
        remedy = f"the rows cannot be counted; set algorithm.num_steps to {epochs:g} x rows / {prompts_per_step}"
        given.note("num_train_epochs", f"{remedy}, which is {default} otherwise")
        return None
    if total < prompts_per_step:
        remedy = f"there are {total} rows, fewer than the {prompts_per_step} of one step"
        raise ConfigError("dataset", ",".join(str(dataset.source["path"]) for dataset in datasets), remedy)
    return math.ceil(float(epochs) * (total // prompts_per_step))


def _generator(given: Given, *, bf16: bool) -> Overrides:
    if not given.take("do_sample", True):
        given.note("do_sample", "PPO learns from samples, so responses are sampled")
    return {
        "generator.temperature": given.take("temperature", 0.95),
        "generator.top_p": given.take("top_p", 0.7),
        "generator.top_k": given.take("top_k", 50),
        "generator.max_new_tokens": given.take("max_new_tokens", 1024),
        "generator.dtype": "bfloat16" if bf16 else "float32",
    }


def _learner(given: Given, overrides: Overrides, *, bf16: bool) -> Overrides:
    """Policy and value head are one network with one optimizer, as in LLaMA-Factory."""
    scheduler = given.text("lr_scheduler_type") or "linear"
    if scheduler not in SCHEDULERS:
        given.note("lr_scheduler_type", f"{scheduler} is not among {', '.join(SCHEDULERS)}; constant is used")
        scheduler = "constant"
    if (optimizer := given.text("optim")) not in ADAMW:
        given.note("optim", f"the optimizer is AdamW, not {optimizer}")
    without = given.take("disable_gradient_checkpointing", False)
    made: Overrides = {
        "learner.critic_network": "shared",
        "learner.dtype": "bfloat16" if bf16 else "float32",
        "learner.gradient_checkpointing": given.take("gradient_checkpointing", True) and not without,
        "learner.policy.lr": given.take("learning_rate", 5e-5),
        "learner.policy.betas": [given.take("adam_beta1", 0.9), given.take("adam_beta2", 0.999)],
        "learner.policy.eps": given.take("adam_epsilon", 1e-8),
        "learner.policy.weight_decay": given.take("weight_decay", 0.0),
        "learner.policy.max_grad_norm": given.take("max_grad_norm", 1.0),
        "learner.policy.scheduler": scheduler,
    }
    warmup = _warmup_steps(given, overrides)
    if warmup and scheduler == "constant":
        given.note("warmup_steps", "has no effect with a constant learning rate")
    elif warmup:
        made["learner.policy.warmup_steps"] = warmup
    return made


def _warmup_steps(given: Given, overrides: Overrides) -> int:
    """Optimizer steps; LLaMA-Factory ticks its scheduler once for all optimizer steps of a PPO step."""
    steps, ratio = given.take("warmup_steps", 0.0), given.take("warmup_ratio", 0.0)
    num_steps = overrides.get("algorithm.num_steps", AlgorithmConfig().num_steps)
    if steps < 1:  # newer versions of transformers take a part of all steps here
        steps = math.ceil(num_steps * (steps or ratio))
    mini_batches = overrides["algorithm.prompts_per_step"] // overrides["algorithm.mini_batch_size"]
    return int(steps) * int(overrides["algorithm.ppo_epochs"]) * int(mini_batches)


def _run(given: Given) -> Overrides:
    made: Overrides = {"seed": given.take("seed", 42)}
    if output := given.text("output_dir"):
        made["run.dir"] = output
    every = given.take("save_steps", 500.0)
    if every >= 1:
        made["tracking.export_every"] = int(every)
    else:
        given.note("save_steps", "a part of all steps is not known; the policy is exported at the end")
    for name in given.items("report_to"):
        if name in ("wandb", "tensorboard"):
            made |= {"tracking.wandb": "online"} if name == "wandb" else {"tracking.tensorboard": True}
        elif name != "none":
            given.note("report_to", f"{name} is none of wandb, tensorboard and none")
    return made


def in_hydra(value: Any) -> str:
    """`value` as Hydra's command line reads it."""
    if isinstance(value, list):
        return f"[{','.join(map(in_hydra, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{in_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, str) and (not re.fullmatch(r"[A-Za-z./][\w./-]*", value) or _is_special(value)):
        return QuotedString(text=value, quote=Quote.single).with_quotes()
    return str(value)


def _is_special(word: str) -> bool:
    return word.lower() in ("true", "false", "null", "nan", "inf") or not re.search(r"[A-Za-z]", word)


def main(argv: Sequence[str]) -> int:
    """The exit code: 2 for a YAML that cannot be converted, with --run that of the run, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("yaml", type=Path)
    parser.add_argument("--processes", type=int, metavar="N", help="on how many GPUs LLaMA-Factory ran (1)")
    parser.add_argument("--run", action="store_true", help="start the command too")
    arguments = parser.parse_args(argv)
    if arguments.processes is not None and arguments.processes < 1:
        parser.error("--processes must be at least 1")
    try:
        overrides, notes = convert(arguments.yaml, processes=arguments.processes)
    except ConfigError as error:
        print(f"from_llamafactory.py: {error}", file=sys.stderr)
        return 2
    launch = "launch.py" if Path.cwd() == ROOT else str(ROOT / "launch.py")
    for note in notes:
        print(note, file=sys.stderr)
    print(" \\\n  ".join([f"python {shlex.quote(launch)}", *map(shlex.quote, overrides)]), flush=True)
    if not arguments.run:
        return 0
    return subprocess.run([sys.executable, str(ROOT / "launch.py"), *overrides], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
