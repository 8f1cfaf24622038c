"""What the sections of a Config ask of each other and of the files they name, as far as no model has to be opened.

Raises ConfigError within milliseconds; actors.preflight opens the files. Standard library only.
"""

from __future__ import annotations

import re
from pathlib import Path

from conf.schema import Config, ConfigError

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
RESULTS = ("metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints", "export")


def check(config: Config) -> None:
    """Raises ConfigError for the first setting that contradicts another or names a path that is not there."""
    _check_stages(config)
    _check_data(config)
    _check_reward(config)
    _check_paths(config)
    if config.run.dir is not None:
        _check_run_dir(Path(config.run.dir))


def starting_model(config: Config) -> tuple[str, str]:
    """The key and the path of the checkpoint, or of the folder for random weights, that the policy starts from."""
    if "sft" in config.stages and config.sft.model_path is not None:
        return "sft.model_path", config.sft.model_path
    if config.model.path is not None:
        return "model.path", config.model.path
    if config.model.init_config is not None:
        return "model.init_config", config.model.init_config
    remedy = "set it to a Hugging Face checkpoint, a folder or a name on the hub, for the policy to start from"
    if "sft" in config.stages:
        remedy += ", or set model.init_config to start from random weights"
    raise ConfigError("model.path", None, f"{remedy}; python launch.py experiment=quickstart needs neither")


def is_hub_name(path: str) -> bool:
    """Whether `path`, which is not there, can be meant as a name on the Hugging Face hub."""
    return HUB_NAME.fullmatch(path) is not None and not ("/" in path and Path(path).parent.exists())


def _check_stages(config: Config) -> None:
    model = config.model
    if model.init_config is not None:
        if model.path is not None:
            remedy = f"set either this or model.path={model.path!r}; the other to null"
            raise ConfigError("model.init_config", model.init_config, remedy)
        if "sft" not in config.stages:
            remedy = "random weights are for the sft stage; set this to null and model.path to a trained checkpoint"
            raise ConfigError("model.init_config", model.init_config, remedy)
        if config.sft.model_path is not None:
            remedy = f"has no effect with sft.model_path={config.sft.model_path!r}; set one of them to null"
            raise ConfigError("model.init_config", model.init_config, remedy)
    if "sft" in config.stages and model.path is not None and config.sft.model_path is not None:
        remedy = f"has no effect with sft.model_path={config.sft.model_path!r}; set one of them to null"
        raise ConfigError("model.path", model.path, remedy)
    starting_model(config)


def _check_data(config: Config) -> None:
    data, task = config.data, config.data.task.name
    if "ppo" in config.stages and data.path is None and task is None:
        remedy = (
            "set it to a jsonl or parquet file or a Hugging Face dataset, or data.task.name to a reasoning-gym task"
        )
        raise ConfigError("data.path", None, f"the ppo stage needs prompts; {remedy}")
    for stage, key, supervised in (("sft", "sft", config.sft), ("reward", "reward_training", config.reward_training)):
        if stage in config.stages and supervised.data_path is None and task is None:
            remedy = "set it to a jsonl or parquet file or a Hugging Face dataset, or set data.task.name"
            raise ConfigError(f"{key}.data_path", None, f"the {stage} stage needs rows to learn from; {remedy}")
        if supervised.stop_accuracy is not None and supervised.eval_path is None and task is None:
            remedy = f"has no effect without held-out rows; set {key}.eval_path"
            raise ConfigError(f"{key}.stop_accuracy", supervised.stop_accuracy, remedy)
    if data.path is not None and task is not None:
        raise ConfigError("data.path", data.path, f"set either this or data.task.name={task!r}, the other to null")
    if config.evaluation.verifier is not None and data.eval_path is None and task is None:
        remedy = "has no held-out prompts to judge; set data.eval_path"
        raise ConfigError("evaluation.verifier", config.evaluation.verifier, remedy)


def _check_reward(config: Config) -> None:
    if "ppo" not in config.stages:
        return
    reward, trained = config.reward, "reward" in config.stages
    if trained:
        for key, value in (("reward.path", reward.path), ("reward.function", reward.function)):
            if value is not None:
                remedy = f"the reward stage trains the reward model of the ppo stage; set {key}=null or leave it out"
                raise ConfigError(key, value, f"{remedy}, or take reward out of stages")
    elif reward.path is None and reward.function is None:
        remedy = "set it to a reward model, or set reward.function=module:function, or add reward to stages"
        raise ConfigError("reward.path", None, f"the ppo stage needs scores; {remedy}")
    if reward.function is not None and config.learner.critic_init == "reward":
        remedy = "a reward function has no weights for the critic to start from; set learner.critic_init=policy"
        raise ConfigError("learner.critic_init", "reward", remedy)


def _check_paths(config: Config) -> None:
    """Raises ConfigError for a path that is neither there nor, possibly, a name on the hub."""
    model, data = config.model, config.data
    named = {
        "model.path": model.path,
        "model.tokenizer": model.tokenizer,
        "model.reference": model.reference,
        "reward.path": config.reward.path,
        "sft.model_path": config.sft.model_path,
        "reward_training.model_path": config.reward_training.model_path,
        "data.path": data.path,
        "data.eval_path": data.eval_path,
    }
    for key, supervised in (("sft", config.sft), ("reward_training", config.reward_training)):
        named |= {f"{key}.data_path": supervised.data_path, f"{key}.eval_path": supervised.eval_path}
    if config.learner.critic_init not in ("reward", "policy"):
        named["learner.critic_init"] = config.learner.critic_init
    for key, path in named.items():
        is_file = path is not None and Path(path).suffix in (".json", ".jsonl", ".parquet")
        if path is not None and not Path(path).exists() and (is_file or not is_hub_name(path)):
            raise ConfigError(key, path, f"there is no such file or folder (looked in {Path.cwd()})")
    if model.init_config is not None and not (Path(model.init_config) / "config.json").is_file():
        remedy = f"is no folder with a config.json and a tokenizer (looked in {Path.cwd()})"
        raise ConfigError("model.init_config", model.init_config, remedy)


def _check_run_dir(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError("run.dir", str(folder), "is a file; name a folder")
    for name in RESULTS:
        if (folder / name).exists():
            remedy = f"holds the {name} of another run, which would be overwritten; name another folder"
            raise ConfigError("run.dir", str(folder), remedy)
