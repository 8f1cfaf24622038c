"""What the sections of a Config ask of each other and of the files they name, as far as no model has to be opened.

Raises ConfigError within milliseconds; actors.preflight opens the files. Standard library only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from conf.schema import Config, ConfigError
from conf.schema.rules import without_effect

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
SHARED = "learner.sequence_parallel_size"
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # which Ray sets for what `ray job submit` starts
CHECKPOINTS = "checkpoints"  # in a run folder
RESULTS = ("metrics.jsonl", "samples.jsonl", "summary.json", CHECKPOINTS, "export")


def check(config: Config) -> None:
    """Raises ConfigError for the first setting that contradicts another or names a path that is not there."""
    _check_stages(config)
    _check_data(config)
    _check_reward(config)
    _check_algorithm(config)
    _check_cluster(config)
    _check_evaluation(config)
    _check_paths(config)
    _check_resume(config)
    _check_run_dir(config)


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
    if "ppo" in config.stages and data.path is None and not data.sources and task is None:
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
    if data.sources and task is not None:
        paths = [source.path for source in data.sources]
        raise ConfigError("data.sources", paths, f"set either this or data.task.name={task!r}, the other to null")


def _check_evaluation(config: Config) -> None:
    evaluation, held_out = config.evaluation, config.data.eval_path is not None or config.data.task.name is not None
    if "eval" in config.stages and not held_out:
        raise ConfigError("data.eval_path", None, "the eval stage needs held-out prompts; set it")
    for name in ("verifier", "best_metric"):
        if getattr(evaluation, name) is not None and not held_out:
            remedy = "has no held-out prompts to judge; set data.eval_path"
            raise ConfigError(f"evaluation.{name}", getattr(evaluation, name), remedy)
    if evaluation.best_metric is not None:
        if "ppo" not in config.stages:
            raise ConfigError("evaluation.best_metric", evaluation.best_metric, "has no effect without the stage ppo")
        known = held_out_metrics(config)
        if evaluation.best_metric not in known:
            raise ConfigError("evaluation.best_metric", evaluation.best_metric, f"choose one of {', '.join(known)}")


def held_out_metrics(config: Config) -> list[str]:
    """The names of the held-out metrics that these settings lead to."""
    evaluation = config.evaluation
    names = ["score_mean", "score_std", "kl", "response_length_mean", "response_length_max", "truncated_fraction"]
    names += ["eos_rate", "repetition", "length_correlation"]
    names += ["accuracy", *(f"pass_at_{k}" for k in evaluation.pass_at)] if evaluation.verifier is not None else []
    names += ["win_rate"] if evaluation.win_rate else []
    labels = [source.label for source in config.reward.sources] or ["model"]
    return [f"eval/{name}" for name in [*names, *(f"{label}_mean" for label in labels)]]


def _check_reward(config: Config) -> None:
    if not {"ppo", "eval"} & set(config.stages):
        return
    sources, trained = config.reward.sources, "reward" in config.stages
    without_path = [i for i, source in enumerate(sources) if source.type == "model" and source.path is None]
    if trained and sources and len(without_path) != 1:
        remedy = "the reward stage trains a reward model; give one source of type model no path, for it, or none at all"
        raise ConfigError("reward.sources", [source.label for source in sources], remedy)
    if not trained and without_path:
        remedy = "set it to a reward model, or add reward to stages, which trains one"
        raise ConfigError(f"reward.sources[{without_path[0]}].path", None, remedy)
    if not trained and not sources:
        remedy = "name a source, for example '[{type: model, path: ...}]', or add reward to stages, which trains one"
        raise ConfigError("reward.sources", [], f"rollouts need a score; {remedy}")
    algorithm, learner = config.algorithm, config.learner
    if "ppo" not in config.stages or not algorithm.has_critic or learner.critic_network == "shared":
        return
    if learner.critic_init == "reward" and not trained and all(source.type != "model" for source in sources):
        remedy = "there is no reward model for the critic to start from; set learner.critic_init=policy"
        raise ConfigError("learner.critic_init", "reward", remedy)


def _check_algorithm(config: Config) -> None:
    """What the algorithm asks of the other sections."""
    algorithm, learner, shaping = config.algorithm, config.learner, config.reward.shaping
    if learner.critic_network == "shared":
        if not algorithm.has_critic:
            remedy = f"has no effect with algorithm.estimator={algorithm.estimator}, which has no critic"
            raise ConfigError("learner.critic_network", "shared", remedy)
        if algorithm.critic_warmup_steps:
            remedy = "a critic on the policy's own network cannot learn alone; set learner.critic_network=separate"
            raise ConfigError("algorithm.critic_warmup_steps", algorithm.critic_warmup_steps, remedy)
    else:
        without_effect(algorithm, "algorithm", ("value_coef",), "with learner.critic_network=separate")
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(learner, name) == "nvme" and config.checkpoint.every:
            remedy = "a checkpoint copies what is in memory; set it to cpu, or set checkpoint.every=0 and do without"
            raise ConfigError(f"learner.{name}", "nvme", remedy)
    if learner.reference_dtype is not None:
        if config.model.lora.rank is not None:
            remedy = "with model.lora the reference is the policy without its adapters; set this to null"
            raise ConfigError("learner.reference_dtype", learner.reference_dtype, remedy)
        if config.cluster.placement == "colocated":
            remedy = "it would stay on the GPU while the generators sample; set this to null, or the placement"
            raise ConfigError("learner.reference_dtype", learner.reference_dtype, remedy)
    if learner.ema_decay is not None and learner.offload_parameters == "nvme":
        remedy = "the average reads weights that are in memory; set learner.offload_parameters=cpu or none"
        raise ConfigError("learner.ema_decay", learner.ema_decay, remedy)
    if shaping.whiten_rewards and algorithm.estimator not in ("gae", "reinforce_pp"):
        remedy = f"algorithm.estimator={algorithm.estimator} compares whole scores with each other; set it to false"
        raise ConfigError("reward.shaping.whiten_rewards", True, remedy)
    if shaping.overlong_tokens > config.generator.max_new_tokens:
        remedy = f"is more than generator.max_new_tokens={config.generator.max_new_tokens}"
        raise ConfigError("reward.shaping.overlong_tokens", shaping.overlong_tokens, remedy)


def _check_cluster(config: Config) -> None:
    """What sharing tokens and sharing GPUs ask of the other sections."""
    cluster, shared_by = config.cluster, config.learner.sequence_parallel_size
    if cluster.num_learners % shared_by:
        remedy = f"cluster.num_learners={cluster.num_learners} ranks do not divide by it; set it to a divisor"
        raise ConfigError(SHARED, shared_by, remedy)
    if shared_by > 1 and config.model.attn_implementation != "packed":
        remedy = f"tokens are shared with model.attn_implementation=packed alone; set this to packed, or {SHARED} to 1"
        raise ConfigError("model.attn_implementation", config.model.attn_implementation, remedy)
    if cluster.placement != "colocated" or "ppo" not in config.stages:
        return
    check_even(cluster.num_generators, config.generator.tensor_parallel_size, cluster.num_learners)
    if config.algorithm.max_staleness:
        remedy = "generators and learner take turns on their GPUs with cluster.placement=colocated; set it to 0"
        raise ConfigError("algorithm.max_staleness", config.algorithm.max_staleness, remedy)


def check_even(num_generators: int, tensor_parallel_size: int, num_learners: int) -> None:
    """Raise ConfigError unless every GPU that is shared has a learner rank and a part of a generator."""
    if num_generators * tensor_parallel_size == num_learners:
        return
    even = num_learners // tensor_parallel_size
    remedy = (
        f"with cluster.placement=colocated each GPU has a learner rank and a part of a generator: num_generators x "
        f"generator.tensor_parallel_size={tensor_parallel_size} must equal cluster.num_learners={num_learners}; "
    )
    if even and num_learners % tensor_parallel_size == 0:
        remedy += f"set cluster.num_generators={even}"
    else:
        remedy += f"set cluster.num_learners={num_generators * tensor_parallel_size}"
    raise ConfigError("cluster.num_generators", num_generators, remedy)


def named_paths(config: Config) -> dict[str, str | None]:
    """Every setting that names a model or data, by its key: a file, a folder, a name on the hub, or None."""
    model, data = config.model, config.data
    named = {
        "model.path": model.path,
        "model.init_config": model.init_config,
        "model.tokenizer": model.tokenizer,
        "model.reference": model.reference,
        "algorithm.ptx.path": config.algorithm.ptx.path,
        "sft.model_path": config.sft.model_path,
        "reward_training.model_path": config.reward_training.model_path,
        "data.path": data.path,
        "data.eval_path": data.eval_path,
    }
    named |= {f"reward.sources[{number}].path": source.path for number, source in enumerate(config.reward.sources)}
    named |= {f"data.sources[{number}].path": source.path for number, source in enumerate(data.sources)}
    for key, supervised in (("sft", config.sft), ("reward_training", config.reward_training)):
        named |= {f"{key}.data_path": supervised.data_path, f"{key}.eval_path": supervised.eval_path}
    if config.learner.critic_init not in ("reward", "policy"):
        named["learner.critic_init"] = config.learner.critic_init
    return named


def _check_paths(config: Config) -> None:
    """Raises ConfigError for a path that is neither there nor, possibly, a name on the hub."""
    init_config = config.model.init_config
    for key, path in named_paths(config).items():
        if path is None or key == "model.init_config":
            continue
        is_file = Path(path).suffix in (".json", ".jsonl", ".parquet")
        if not Path(path).exists() and (is_file or not is_hub_name(path)):
            raise ConfigError(key, path, f"there is no such file or folder (looked in {Path.cwd()})")
    if init_config is not None and not (Path(init_config) / "config.json").is_file():
        remedy = f"is no folder with a config.json and a tokenizer (looked in {Path.cwd()})"
        raise ConfigError("model.init_config", init_config, remedy)


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that `checkpoint`, the path of a checkpoint or of a run folder, belongs to; None: to no run."""
    if (checkpoint / CHECKPOINTS).is_dir():
        return checkpoint
    parent = checkpoint.absolute().parent
    return parent.parent if parent.name == CHECKPOINTS else None


def _check_resume(config: Config) -> None:
    """Raises ConfigError if resume=PATH names nothing to go on from, or no folder to go on in."""
    if config.resume in ("never", "auto"):
        return
    path = Path(config.resume)
    if not path.is_dir():
        remedy = f"there is no such folder (looked in {Path.cwd()}); write never, auto, or the path of a checkpoint"
        raise ConfigError("resume", config.resume, remedy)
    owner = run_of(path)
    if owner is None and not (path / "manifest.json").is_file():
        remedy = f"is neither a checkpoint (no manifest.json) nor a run folder (no {CHECKPOINTS})"
        raise ConfigError("resume", config.resume, remedy)
    if owner is None and config.run.dir is None:
        raise ConfigError("run.dir", None, f"the checkpoint {path} lies in no run folder; name one to go on in")


def _check_run_dir(config: Config) -> None:
    """Raises ConfigError for a folder that is a file, or holds a run that this one does not resume."""
    if JOB in os.environ and (config.run.dir is None or not Path(config.run.dir).is_absolute()):
        remedy = (
            "a job runs in a copy of the project that Ray deletes; name a whole path, on a disk that all nodes share"
        )
        raise ConfigError("run.dir", config.run.dir, remedy)
    if config.run.dir is None:
        return
    folder = Path(config.run.dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError("run.dir", str(folder), "is a file; name a folder")
    if config.resume == "auto" or (config.resume != "never" and is_same_run(Path(config.resume), folder)):
        return
    for name in RESULTS:
        if _holds_something(folder / name):
            remedy = f"holds the {name} of another run, which would be overwritten; name another folder"
            raise ConfigError("run.dir", str(folder), f"{remedy}, or set resume=auto to go on with that run")


def check_nothing_recorded(folder: Path) -> None:
    """Raises ConfigError if the run folder, in which there is no checkpoint, holds results that would be lost."""
    for name in RESULTS:
        if _holds_something(folder / name):
            remedy = f"holds {name}, but no checkpoint to go on from; name another folder, or move it away"
            raise ConfigError("run.dir", str(folder), remedy)


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0


def is_same_run(checkpoint: Path, folder: Path) -> bool:
    """Whether the checkpoint belongs to the run in `folder`."""
    owner = run_of(checkpoint)
    return owner is not None and owner.resolve() == folder.resolve()
