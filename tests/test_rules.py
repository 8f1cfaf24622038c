"""The rules that a section keeps by itself: each setting that is refused, by its full key. About a second."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from conf.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    ClusterConfig,
    Config,
    ConfigError,
    DataConfig,
    DataSourceConfig,
    EvaluationConfig,
    GeneratorConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    MonitorConfig,
    OptimizerConfig,
    PTXConfig,
    RewardConfig,
    RewardSourceConfig,
    RewardTrainingConfig,
    RunConfig,
    ShapingConfig,
    SupervisedConfig,
    TaskConfig,
    TrackingConfig,
)
from conf.schema.engines import REFUSED

nan, inf = math.nan, math.inf
MAKERS: dict[str, Callable[..., Any]] = {
    "": Config,
    "model": ModelConfig,
    "model.lora": lambda **settings: ModelConfig(lora=LoraConfig(**settings)),
    "algorithm": AlgorithmConfig,
    "algorithm.ptx": PTXConfig,
    "reward": RewardConfig,
    "reward.shaping": ShapingConfig,
    "reward.sources[0]": lambda **settings: RewardConfig(sources=(RewardSourceConfig(**settings),)),
    "generator": GeneratorConfig,
    "learner": LearnerConfig,
    "learner.policy": lambda **settings: LearnerConfig(policy=OptimizerConfig(**settings)),
    "learner.critic": lambda **settings: LearnerConfig(critic=OptimizerConfig(**settings)),
    "cluster": ClusterConfig,
    "checkpoint": CheckpointConfig,
    "data": DataConfig,
    "data.task": TaskConfig,
    "data.sources[0]": lambda **settings: DataConfig(sources=(DataSourceConfig(**settings),)),
    "sft": lambda **settings: Config(sft=SupervisedConfig(**settings)),
    "sft.optimizer": lambda **settings: Config(sft=SupervisedConfig(optimizer=OptimizerConfig(**settings))),
    "sft.lora": lambda **settings: Config(sft=SupervisedConfig(lora=LoraConfig(**settings))),
    "reward_training": lambda **settings: Config(reward_training=RewardTrainingConfig(**settings)),
    "reward_training.lora": lambda **settings: Config(
        reward_training=RewardTrainingConfig(lora=LoraConfig(**settings))
    ),
    "evaluation": EvaluationConfig,
    "monitors": MonitorConfig,
    "tracking": TrackingConfig,
}

GRPO: dict[str, Any] = {"estimator": "grpo", "samples_per_prompt": 2}
HTTP: dict[str, Any] = {"type": "http", "url": "http://localhost:80/score"}

# section, settings, what is said after the section's key and a dot
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("", {"stages": ()}, "stages=[]: name one or more of sft, reward, ppo, eval, in this order, each once"),
    ("", {"stages": ("ppo", "sft")}, "stages=['ppo', 'sft']"),
    ("", {"stages": ("ppo", "ppo")}, "stages=['ppo', 'ppo']"),
    ("", {"stages": ("dpo",)}, "stages=['dpo']"),
    ("", {"seed": -1}, "seed=-1: must be at least 0"),
    (
        "",
        {"resume": "auto"},
        "resume='auto': name the folder in run.dir; the same command then starts the run and resumes",
    ),
    ("", {"resume": " "}, "resume=' ': write never, auto, or the path of a checkpoint or a run folder"),
    ("checkpoint", {"every": -1}, "every=-1: must be at least 0"),
    ("checkpoint", {"keep": 0}, "keep=0: must be at least 1"),
    # --- model
    ("model.lora", {"rank": 0}, "rank=0: must be at least 1"),
    ("model.lora", {"rank": 4, "alpha": 0.0}, "alpha=0.0: must be greater than 0"),
    ("model.lora", {"rank": 4, "dropout": 0.1}, "dropout=0.1: dropout would train another distribution"),
    ("model.lora", {"alpha": 16.0}, "alpha=16.0: has no effect without model.lora.rank"),
    ("model.lora", {"target_modules": ("q_proj",)}, "target_modules=('q_proj',): has no effect"),
    ("model", {"lora": LoraConfig(rank=4), "reference": "r"}, "reference='r': with model.lora the reference is"),
    # --- algorithm: sizes
    ("algorithm", {"num_steps": 0}, "num_steps=0: must be at least 1"),
    ("algorithm", {"prompts_per_step": 0}, "prompts_per_step=0: must be at least 1"),
    ("algorithm", {"samples_per_prompt": 0}, "samples_per_prompt=0: must be at least 1"),
    ("algorithm", {"mini_batch_size": 0}, "mini_batch_size=0: must be at least 1"),
    ("algorithm", {"ppo_epochs": 0}, "ppo_epochs=0: must be at least 1"),
    (
        "algorithm",
        {"prompts_per_step": 6, "samples_per_prompt": 2, "mini_batch_size": 5},
        "mini_batch_size=5: must divide the train batch of prompts_per_step x samples_per_prompt = 6 x 2 = 12 "
        "rollouts; the nearest that does is 4",
    ),
    # --- algorithm: KL
    ("algorithm", {"kl_coef": nan}, "kl_coef=nan: must be at least 0"),
    ("algorithm", {"kl_estimator": "k4"}, "kl_estimator='k4': choose one of k1, k2, k3"),
    ("algorithm", {"kl_horizon": 0, "kl_target": 1.0}, "kl_horizon=0: must be at least 1"),
    ("algorithm", {"kl_target": 0.0}, "kl_target=0.0: must be greater than 0"),
    ("algorithm", {"kl_loss_coef": -0.1}, "kl_loss_coef=-0.1: must be at least 0"),
    ("algorithm", {"kl_loss_estimator": "k1", "kl_loss_coef": 1.0}, "kl_loss_estimator='k1': its gradient has mean"),
    ("algorithm", {"kl_loss_estimator": "k", "kl_loss_coef": 1.0}, "kl_loss_estimator='k': choose one of k2, k3"),
    # --- algorithm: advantages
    ("algorithm", {"estimator": "dpo"}, "estimator='dpo': choose one of gae, grpo, dr_grpo, rloo"),
    ("algorithm", {"gamma": 1.1}, "gamma=1.1: must lie between 0 and 1"),
    ("algorithm", {"gamma": nan}, "gamma=nan: must lie between 0 and 1"),
    ("algorithm", {"gae_lambda": -0.1}, "gae_lambda=-0.1: must lie between 0 and 1"),
    ("algorithm", {"critic_gae_lambda": 2.0}, "critic_gae_lambda=2.0: must lie between 0 and 1"),
    ("algorithm", {"length_adaptive_alpha": 0.0}, "length_adaptive_alpha=0.0: must be greater than 0"),
    ("algorithm", {"critic_warmup_steps": -1}, "critic_warmup_steps=-1: must be at least 0"),
    ("algorithm", {"critic_warmup_steps": 100}, "critic_warmup_steps=100: leaves no step for the policy"),
    *(
        ("algorithm", {"estimator": name}, f"samples_per_prompt=1: algorithm.estimator={name} compares samples")
        for name in ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
    ),
    ("algorithm", {**GRPO, "gamma": 0.9}, "gamma=0.9: algorithm.estimator=grpo gives each token the same advantage"),
    # --- algorithm: losses
    ("algorithm", {"policy_loss": "ppo"}, "policy_loss='ppo': choose one of clip, gspo, cispo"),
    ("algorithm", {"loss_aggregation": "mean"}, "loss_aggregation='mean': choose one of token, sequence, constant"),
    ("algorithm", {"clip_eps": inf}, "clip_eps=inf: must be greater than 0"),
    ("algorithm", {"clip_eps": 1.5}, "clip_eps=1.5: a ratio is above 0"),
    ("algorithm", {"clip_eps_high": 0.0}, "clip_eps_high=0.0: must be greater than 0"),
    ("algorithm", {"value_clip_eps": 0.0}, "value_clip_eps=0.0: must be greater than 0"),
    ("algorithm", {"dual_clip": 1.0}, "dual_clip=1.0: must be greater than 1"),
    ("algorithm", {"policy_loss": "gspo"}, "loss_aggregation='token': GSPO's ratio is one number for a response"),
    ("algorithm", {"entropy_coef": -1.0}, "entropy_coef=-1.0: must be at least 0"),
    ("algorithm", {"value_coef": -1.0}, "value_coef=-1.0: must be at least 0"),
    ("algorithm.ptx", {"coef": -1.0}, "coef=-1.0: must be at least 0"),
    ("algorithm.ptx", {"coef": 1.0}, "path=None: algorithm.ptx.coef mixes in a loss on text; name its file"),
    ("algorithm.ptx", {"coef": 1.0, "path": "t", "batch_size": 0}, "batch_size=0: must be at least 1"),
    ("algorithm.ptx", {"coef": 1.0, "path": "t", "max_tokens": 1}, "max_tokens=1: must be at least 2"),
    ("algorithm.ptx", {"path": "t"}, "path='t': has no effect with algorithm.ptx.coef=0"),
    ("algorithm.ptx", {"text_key": "body"}, "text_key='body': has no effect with algorithm.ptx.coef=0"),
    # --- algorithm: which rollouts and tokens count, and how safe an update is
    ("algorithm", {"filter_groups": True}, "samples_per_prompt=1: algorithm.filter_groups compares samples"),
    (
        "algorithm",
        {"filter_groups": True, "samples_per_prompt": 2, "estimator": "remax"},
        "filter_groups=True: remax compares a sample with the greedy response",
    ),
    ("algorithm", {**GRPO, "filter_groups": True, "filter_max_rounds": 0}, "filter_max_rounds=0: must be at least 1"),
    ("algorithm", {"old_logprobs": "vllm"}, "old_logprobs='vllm': choose one of learner, engine"),
    ("algorithm", {"correction": "tis"}, "correction='tis': choose one of none, token, sequence, icepop"),
    ("algorithm", {"correction": "token", "old_logprobs": "engine"}, "correction='token': with algorithm.old_logprobs"),
    ("algorithm", {"correction": "token", "correction_cap": 0.0}, "correction_cap=0.0: must be greater than 0"),
    ("algorithm", {"correction": "icepop", "icepop_low": 1.5}, "icepop_low=1.5: must lie between 0 and 1"),
    ("algorithm", {"correction": "icepop", "icepop_high": 0.5}, "icepop_high=0.5: must be at least 1"),
    ("algorithm", {"max_mean_ratio": 1.0}, "max_mean_ratio=1.0: must be greater than 1"),
    ("algorithm", {"early_stop_kl": 0.0}, "early_stop_kl=0.0: must be greater than 0"),
    ("algorithm", {"early_stop_kl": 1.0, "early_stop_factor": 0.0}, "early_stop_factor=0.0: must be greater than 0"),
    ("algorithm", {"max_nonfinite": 0}, "max_nonfinite=0: must be at least 1"),
    # --- algorithm: what another setting switches off
    *(
        (
            "algorithm",
            {**GRPO, name: value},
            f"{name}={value}: has no effect with algorithm.estimator=grpo, which has no",
        )
        for name, value in {
            "gae_lambda": 0.9,
            "critic_gae_lambda": 1.0,
            "length_adaptive_alpha": 0.05,
            "bootstrap_truncated": True,
            "value_clip_eps": 0.5,
            "critic_warmup_steps": 1,
        }.items()
    ),
    ("algorithm", {"kl_coef": 0.0, "kl_target": 6.0}, "kl_target=6.0: has no effect with algorithm.kl_coef=0"),
    ("algorithm", {"kl_coef": 0.0, "kl_estimator": "k3"}, "kl_estimator='k3': has no effect with algorithm.kl_coef=0"),
    ("algorithm", {"kl_horizon": 500}, "kl_horizon=500: has no effect without algorithm.kl_target"),
    ("algorithm", {"kl_loss_estimator": "k2"}, "kl_loss_estimator='k2': has no effect with algorithm.kl_loss_coef=0"),
    (
        "algorithm",
        {"policy_loss": "cispo", "dual_clip": 3.0},
        "dual_clip=3.0: has no effect with algorithm.policy_loss",
    ),
    (
        "algorithm",
        {"mask_truncated": True, "bootstrap_truncated": True},
        "bootstrap_truncated=True: has no effect with algorithm.mask_truncated=true",
    ),
    ("algorithm", {"filter_max_rounds": 3}, "filter_max_rounds=3: has no effect with algorithm.filter_groups=false"),
    ("algorithm", {"icepop_low": 0.9}, "icepop_low=0.9: has no effect with correction=none"),
    ("algorithm", {"correction": "token", "icepop_high": 2.0}, "icepop_high=2.0: has no effect with correction=token"),
    ("algorithm", {"early_stop_factor": 2.0}, "early_stop_factor=2.0: has no effect without algorithm.early_stop_kl"),
    # --- reward
    ("reward", {"batch_size": 0}, "batch_size=0: must be at least 1"),
    ("reward", {"on_failure": "zero"}, "on_failure='zero': choose one of stop, drop"),
    ("reward", {"retries": -1}, "retries=-1: must be at least 0"),
    ("reward", {"backoff_s": -1.0}, "backoff_s=-1.0: must be at least 0"),
    ("reward", {"retries": 0, "backoff_s": 2.0}, "backoff_s=2.0: has no effect with reward.retries=0"),
    (
        "reward",
        {"sources": (RewardSourceConfig(path="a"), RewardSourceConfig(path="b"))},
        "sources[1].name='model': another source has it; name them apart",
    ),
    (
        "reward",
        {"sources": (RewardSourceConfig(path="a"), RewardSourceConfig(path="b", name="b", weight=0.0))},
        "sources[1].weight=0.0: has no effect; leave the source out",
    ),
    ("reward.sources[0]", {"type": "llm"}, "type='llm': choose one of model, function, verifier, http"),
    ("reward.sources[0]", {"name": "My Reward"}, "name='My Reward': write it in lower-case letters"),
    ("reward.sources[0]", {"name": "score"}, "name='score': is the name of another metric"),
    ("reward.sources[0]", {"name": "response_length"}, "name='response_length': is the name of another metric"),
    ("reward.sources[0]", {"weight": nan}, "weight=nan: must be a finite number"),
    ("reward.sources[0]", {"weight": -inf}, "weight=-inf: must be a finite number"),
    ("reward.sources[0]", {"engine": "sglang"}, "engine='sglang': choose one of transformers, vllm"),
    ("reward.sources[0]", {"dtype": "float16"}, "dtype='float16': choose one of float32, bfloat16"),
    ("reward.sources[0]", {"dtype": "nf4", "engine": "vllm"}, "dtype='nf4': is for engine=transformers"),
    ("reward.sources[0]", {"max_batch_tokens": 0}, "max_batch_tokens=0: must be at least 1"),
    ("reward.sources[0]", {"type": "function"}, "function=None: a source of type function needs it"),
    ("reward.sources[0]", {"type": "function", "function": "a.b"}, "function='a.b': write it as module:function"),
    ("reward.sources[0]", {"type": "verifier"}, "verifier=None: a source of type verifier needs it"),
    ("reward.sources[0]", {"type": "verifier", "verifier": "me"}, "verifier='me': choose one of reasoning_gym"),
    (
        "reward.sources[0]",
        {"type": "verifier", "verifier": "reasoning_gym", "answer_key": "gold"},
        "answer_key='gold': has no effect but with verifier=math_verify and with format=openrlhf",
    ),
    ("reward.sources[0]", {"type": "http"}, "url=None: a source of type http needs it"),
    ("reward.sources[0]", {"type": "http", "url": "localhost:80"}, "url='localhost:80': must begin with http://"),
    ("reward.sources[0]", {**HTTP, "format": "trl"}, "format='trl': choose one of llamafactory, openrlhf"),
    ("reward.sources[0]", {**HTTP, "timeout_s": 0.0}, "timeout_s=0.0: must be greater than 0"),
    ("reward.sources[0]", {**HTTP, "concurrency": 0}, "concurrency=0: must be at least 1"),
    (
        "reward.sources[0]",
        {**HTTP, "format": "openrlhf", "model": "mine"},
        "model='mine': has no effect with format=openrlhf",
    ),
    (
        "reward.sources[0]",
        {**HTTP, "path": "p"},
        "path='p': has no effect with type=http; it is of type model",
    ),
    (
        "reward.sources[0]",
        {"path": "p", "url": "http://x"},
        "url='http://x': has no effect with type=model; it is of type http",
    ),
    ("reward.sources[0]", {"path": "p", "function": "a:b"}, "function='a:b': has no effect with type=model"),
    ("reward.sources[0]", {"path": "p", "verifier": "math_verify"}, "verifier='math_verify': has no effect with type"),
    ("reward.shaping", {"clip": 0.0}, "clip=0.0: must be greater than 0"),
    ("reward.shaping", {"missing_eos_penalty": -1.0}, "missing_eos_penalty=-1.0: must be at least 0"),
    ("reward.shaping", {"overlong_tokens": -1}, "overlong_tokens=-1: must be at least 0"),
    (
        "reward.shaping",
        {"overlong_tokens": 5, "overlong_penalty": -1.0},
        "overlong_penalty=-1.0: must be at least 0",
    ),
    ("reward.shaping", {"overlong_penalty": 2.0}, "overlong_penalty=2.0: has no effect with reward.shaping.overlong"),
    # --- generator
    ("generator", {"temperature": 0.0}, "temperature=0.0: must be greater than 0"),
    ("generator", {"temperature": 2.5}, "temperature=2.5: vLLM samples at 2 at most"),
    ("generator", {"top_k": -1}, "top_k=-1: must be at least 0"),
    ("generator", {"top_p": 0.0}, "top_p=0.0: must be greater than 0"),
    ("generator", {"top_p": 1.1}, "top_p=1.1: must lie between 0 and 1"),
    ("generator", {"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
    ("generator", {"max_num_seqs": 0}, "max_num_seqs=0: must be at least 1"),
    ("generator", {"tensor_parallel_size": 0}, "tensor_parallel_size=0: must be at least 1"),
    ("generator", {"dtype": "float16"}, "dtype='float16': choose one of float32, bfloat16"),
    ("generator", {"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5: must lie between 0.05 and 1"),
    ("generator", {"kv_cache_mib": 0}, "kv_cache_mib=0: must be at least 1"),
    ("generator", {"max_model_len": 512}, "max_model_len=512: must be larger than generator.max_new_tokens=512"),
    # --- learner
    ("learner.policy", {"lr": -1.0}, "lr=-1.0: must be greater than 0"),
    ("learner.policy", {"eps": 0.0}, "eps=0.0: must be greater than 0"),
    ("learner.policy", {"weight_decay": -1.0}, "weight_decay=-1.0: must be at least 0"),
    ("learner.policy", {"max_grad_norm": 0.0}, "max_grad_norm=0.0: must be greater than 0"),
    ("learner.critic", {"betas": (0.9, 1.0)}, "betas[1]=1.0: must be at least 0 and less than 1"),
    ("learner.critic", {"scheduler": "cosin"}, "scheduler='cosin': choose one of linear, cosine"),
    ("learner.critic", {"warmup_steps": -1}, "warmup_steps=-1: must be at least 0"),
    ("learner.critic", {"warmup_steps": 3}, "warmup_steps=3: has no effect with learner.critic.scheduler=constant"),
    ("learner", {"dtype": "float16"}, "dtype='float16': choose one of float32, bfloat16"),
    ("learner", {"critic_network": "both"}, "critic_network='both': choose one of separate, shared"),
    ("learner", {"ema_decay": 1.0}, "ema_decay=1.0: must lie between 0 and 1, both excluded"),
    ("learner", {"zero_stage": 2}, "zero_stage=2: only stage 3 is supported"),
    ("learner", {"micro_batch_tokens": 0}, "micro_batch_tokens=0: must be at least 1"),
    ("learner", {"sequence_parallel_size": 0}, "sequence_parallel_size=0: must be at least 1"),
    ("learner", {"reference_dtype": "int8"}, "reference_dtype='int8': choose one of nf4"),
    ("learner", {"offload_optimizer": "disk"}, "offload_optimizer='disk': choose one of none, cpu, nvme"),
    ("learner", {"offload_parameters": "nvme"}, "offload_parameters='nvme': set learner.nvme_path"),
    ("learner", {"nvme_path": "/mnt"}, "nvme_path='/mnt': has no effect unless something is offloaded to nvme"),
    # --- cluster
    ("cluster", {"device": "tpu"}, "device='tpu': choose one of auto, cpu, cuda"),
    ("cluster", {"num_generators": 0}, "num_generators=0: must be at least 1"),
    ("cluster", {"threads": 0}, "threads=0: must be at least 1"),
    ("cluster", {"sync_timeout_s": 0.0}, "sync_timeout_s=0.0: must be greater than 0"),
    # --- data
    ("data", {"max_prompt_tokens": 0}, "max_prompt_tokens=0: must be at least 1"),
    ("data", {"format": "csv"}, "format='csv': choose one of prompt, alpaca, sharegpt"),
    ("data", {"path": "a", "sources": (DataSourceConfig("b"),)}, "path='a': set either this or data.sources, not both"),
    ("data", {"chat_template": False, "system_prompt": "Be brief."}, "system_prompt='Be brief.': has no effect with"),
    ("data", {"format": "alpaca", "prompt_key": "q"}, "prompt_key='q': has no effect with data.format=alpaca"),
    (
        "data",
        {"format": "alpaca", "task": TaskConfig("spell_backward")},
        "format='alpaca': the rows that data.task makes",
    ),
    (
        "data",
        {"chat_template": False, "sources": (DataSourceConfig("a", system_prompt="Be brief."),)},
        "sources[0].system_prompt='Be brief.': has no effect with data.chat_template=false",
    ),
    ("data.sources[0]", {}, "path=None: name its file or dataset"),
    (
        "data.sources[0]",
        {"path": "a", "format": "sharegpt", "prompt_key": "q"},
        "prompt_key='q': has no effect with format=sharegpt",
    ),
    ("data.sources[0]", {"path": "a", "weight": 0.0}, "weight=0.0: must be greater than 0"),
    ("data.sources[0]", {"path": "a", "format": "csv"}, "format='csv': choose one of prompt, alpaca, sharegpt"),
    ("data.task", {"num_train": 0}, "num_train=0: must be at least 1"),
    ("data.task", {"sft_wrong_share": 2.0}, "sft_wrong_share=2.0: must lie between 0 and 1"),
    # --- supervised stages
    ("sft", {"num_steps": 0}, "num_steps=0: must be at least 1"),
    ("sft", {"stop_accuracy": 1.1}, "stop_accuracy=1.1: must lie between 0 and 1"),
    ("sft.optimizer", {"lr": 0.0}, "lr=0.0: must be greater than 0"),
    ("sft.lora", {"rank": 4, "dropout": 1.0}, "dropout=1.0: must be at least 0 and less than 1"),
    ("sft.lora", {"dropout": 0.1}, "dropout=0.1: has no effect without sft.lora.rank"),
    ("reward_training", {"batch_size": 0}, "batch_size=0: must be at least 1"),
    ("reward_training", {"center_coef": -1.0}, "center_coef=-1.0: must be at least 0"),
    ("reward_training.lora", {"rank": 0}, "rank=0: must be at least 1"),
    # --- evaluation, monitors, tracking
    ("evaluation", {"every": -1}, "every=-1: must be at least 0"),
    ("evaluation", {"num_prompts": 0}, "num_prompts=0: must be at least 1"),
    ("evaluation", {"samples_per_prompt": 0}, "samples_per_prompt=0: must be at least 1"),
    ("evaluation", {"pass_at": (2,), "verifier": "a:b"}, "pass_at=[2]: each must lie between 1 and evaluation.samples"),
    ("evaluation", {"pass_at": (0,), "verifier": "a:b"}, "pass_at=[0]: each must lie between 1 and evaluation.samples"),
    ("evaluation", {"pass_at": (1,)}, "pass_at=[1]: needs a verifier"),
    ("evaluation", {"temperature": 0.0}, "temperature=0.0: must be greater than 0"),
    ("evaluation", {"temperature": 2.5}, "temperature=2.5: vLLM samples at 2 at most"),
    ("evaluation", {"best_metric": "reward/score_mean"}, "best_metric='reward/score_mean': name a held-out metric"),
    ("evaluation", {"best_metric": "eval/kl", "best_is": "least"}, "best_is='least': choose one of highest, lowest"),
    ("evaluation", {"best_is": "lowest"}, "best_is='lowest': has no effect without evaluation.best_metric"),
    ("evaluation", {"verifier": "a.b"}, "verifier='a.b': write it as module:function"),
    ("evaluation", {"verifier": "a:b", "threshold": nan}, "threshold=nan: must be a finite number"),
    ("evaluation", {"threshold": 0.5}, "threshold=0.5: has no effect without evaluation.verifier"),
    ("monitors", {"max_length_correlation": 1.5}, "max_length_correlation=1.5: must lie between 0 and 1"),
    ("monitors", {"max_repetition": -0.1}, "max_repetition=-0.1: must lie between 0 and 1"),
    ("monitors", {"min_eos_rate": 2.0}, "min_eos_rate=2.0: must lie between 0 and 1"),
    ("monitors", {"max_score_drift": -1.0}, "max_score_drift=-1.0: must be at least 0"),
    ("monitors", {"max_kl": -1.0}, "max_kl=-1.0: must be at least 0"),
    ("tracking", {"wandb": "yes"}, "wandb='yes': choose one of online, offline, off"),
    ("tracking", {"samples_per_step": -1}, "samples_per_step=-1: must be at least 0"),
    ("tracking", {"export_every": -1}, "export_every=-1: must be at least 0"),
]


@pytest.mark.parametrize(("section", "settings", "message"), BROKEN)
def test_a_rule_that_is_broken_names_the_full_key(section: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MAKERS[section](**settings)
    assert str(caught.value).startswith(f"{section}.{message}" if section else message)


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("", {"stages": ("sft", "reward", "ppo", "eval")}),
        ("", {"resume": "auto", "run": RunConfig(dir="here")}),
        ("", {"resume": "runs/mine"}),
        ("checkpoint", {"every": 0, "keep": 1}),
        ("model.lora", {"rank": 4, "alpha": 16.0, "target_modules": ("q_proj",)}),
        ("algorithm", {"kl_target": 6.0, "kl_horizon": 500, "kl_estimator": "k3"}),
        ("algorithm", {"kl_loss_coef": 0.1, "kl_loss_estimator": "k2", "kl_coef": 0.0}),
        ("algorithm", {"critic_warmup_steps": 99, "bootstrap_truncated": True, "value_clip_eps": None}),
        ("algorithm", {**GRPO, "filter_groups": True, "filter_max_rounds": 1, "mask_truncated": True}),
        ("algorithm", {**GRPO, "policy_loss": "gspo", "loss_aggregation": "sequence", "clip_eps": 3e-4}),
        ("algorithm", {"policy_loss": "cispo", "clip_eps": 1.0, "clip_eps_high": 4.0}),
        ("algorithm", {"correction": "icepop", "icepop_low": 0.9, "icepop_high": 1.0}),
        ("algorithm", {"early_stop_kl": 0.02, "early_stop_factor": 1.0, "max_mean_ratio": None, "dual_clip": 3.0}),
        ("algorithm", {"correction_cap": 5.0}),  # also what offpolicy/above_cap_fraction counts by
        ("algorithm.ptx", {"coef": 27.8, "path": "t", "text_key": "body"}),
        ("reward.sources[0]", {"weight": -0.5, "engine": "vllm", "chat_template": False}),
        ("reward.sources[0]", {"type": "verifier", "verifier": "math_verify", "answer_key": "gold", "name": "right"}),
        ("reward.sources[0]", {"type": "http", "url": "http://a", "format": "openrlhf", "answer_key": "gold"}),
        ("reward.sources[0]", {**HTTP, "model": "mine", "timeout_s": 0.5, "concurrency": 9}),
        ("reward.shaping", {"clip": 5.0, "overlong_tokens": 4, "overlong_penalty": 0.0}),
        ("generator", {"temperature": 2.0, "top_k": 50, "top_p": 0.9}),
        ("learner", {"offload_parameters": "nvme", "nvme_path": "/mnt"}),
        ("sft.lora", {"rank": 4, "dropout": 0.1}),
        ("evaluation", {"verifier": "a:b", "threshold": 0.5, "samples_per_prompt": 4, "pass_at": (1, 4)}),
        ("evaluation", {"best_metric": "eval/kl", "best_is": "lowest"}),
        ("monitors", dict.fromkeys(field.name for field in dataclasses.fields(MonitorConfig))),
    ],
)
def test_a_rule_that_is_kept_is_silent(section: str, settings: dict[str, Any]) -> None:
    MAKERS[section](**settings)


def test_advantages_are_whitened_as_the_paper_of_the_estimator_does_or_as_is_asked() -> None:
    whiten = {"gae": True, "reinforce_pp": True, "reinforce_pp_baseline": True, "grpo": False, "rloo": False}
    for name, expected in (whiten | {"dr_grpo": False, "remax": False}).items():
        of_paper = AlgorithmConfig(estimator=name, samples_per_prompt=2)
        assert of_paper.whitens is expected
        for asked in (True, False):
            assert dataclasses.replace(of_paper, whiten_advantages=asked).whitens is asked


def test_what_a_run_must_not_sample_with_is_no_setting() -> None:
    """Each would sample from another distribution than the learner computes (PPO details 5)."""
    names = {"min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "logit_bias"}
    assert set(REFUSED) == {f"generator.{name}" for name in names}
    assert not names & {field.name for field in dataclasses.fields(GeneratorConfig)}


def test_an_error_survives_the_way_from_another_process() -> None:
    error = ConfigError("algorithm.gamma", 2.0, "must lie between 0 and 1")
    again = pickle.loads(pickle.dumps(error))
    assert (again.key, again.value, again.remedy) == (error.key, error.value, error.remedy)
    assert str(again) == "algorithm.gamma=2.0: must lie between 0 and 1"
