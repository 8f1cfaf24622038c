"""Every setting of Manta: its type, its default and the rules it must keep.

The one place where a default is written. YAML files beside this module say only what differs from it. Each
component is handed its own frozen slice of the tree, so nothing after launch.py sees Hydra's own types.
Imports the standard library alone, so that a wrong setting is answered in about a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

STAGES = ("sft", "reward", "ppo")
DTYPES = ("float32", "bfloat16")
KL_ESTIMATORS = ("k1", "k2", "k3")
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
WANDB_MODES = ("online", "offline", "off")
DEVICES = ("auto", "cpu", "cuda")


class ConfigError(ValueError):
    """A setting that cannot be used: names the key, the value and the remedy."""

    def __init__(self, key: str, value: object, remedy: str) -> None:
        self.key, self.value, self.remedy = key, value, remedy
        super().__init__(f"{key}={value!r}: {remedy}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str]]:
        return ConfigError, (self.key, self.value, self.remedy)  # an exception is rebuilt in another process


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(key, value, f"choose one of {', '.join(allowed)}")


def _at_least(key: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ConfigError(key, value, f"must be at least {least:g}")


def _above(key: str, value: float, bound: float) -> None:
    if not bound < value < math.inf:
        raise ConfigError(key, value, f"must be greater than {bound:g}")


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(key, value, f"must lie between {low:g} and {high:g}")


@dataclass(frozen=True)
class RunConfig:
    dir: str | None = None  # None: runs/<experiment>/<time>


@dataclass(frozen=True)
class ModelConfig:
    path: str | None = None  # Hugging Face checkpoint of the policy: a folder or a hub name
    init_config: str | None = None  # a folder with config.json and a tokenizer: random weights, for the sft stage
    tokenizer: str | None = None  # None: the one at `path`
    reference: str | None = None  # None: a frozen copy of the policy as the ppo stage starts
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class AlgorithmConfig:
    """PPO: Schulman et al. 2017, arXiv 1707.06347; for language models Ziegler et al. 2019, arXiv 1909.08593."""

    num_steps: int = 100  # iterations of generate, score, update, sync
    prompts_per_step: int = 128
    samples_per_prompt: int = 1
    mini_batch_size: int = 128  # rollouts over all ranks in one optimizer step
    ppo_epochs: int = 1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_eps: float = 0.2
    value_clip_eps: float = 0.2
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    kl_target: float | None = None  # None: the coefficient stays fixed
    kl_horizon: int = 10_000  # rollouts; used with kl_target
    score_clip: float | None = None  # scores are clamped to +- this before KL is added
    whiten_advantages: bool = True

    @property
    def train_batch_size(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def num_mini_batches(self) -> int:
        return self.train_batch_size // self.mini_batch_size

    def __post_init__(self) -> None:
        for name in ("num_steps", "prompts_per_step", "samples_per_prompt", "mini_batch_size", "ppo_epochs"):
            _at_least(f"algorithm.{name}", getattr(self, name), 1)
        for name in ("gamma", "gae_lambda"):
            _within(f"algorithm.{name}", getattr(self, name), 0, 1)
        for name in ("clip_eps", "value_clip_eps"):
            _above(f"algorithm.{name}", getattr(self, name), 0)
        _at_least("algorithm.kl_coef", self.kl_coef, 0)
        _one_of("algorithm.kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if self.kl_target is not None:
            _above("algorithm.kl_target", self.kl_target, 0)
            if self.kl_coef == 0:
                raise ConfigError("algorithm.kl_target", self.kl_target, "has no effect with algorithm.kl_coef=0")
        if self.score_clip is not None:
            _above("algorithm.score_clip", self.score_clip, 0)
        if self.train_batch_size % self.mini_batch_size:
            fits = [n for n in range(1, self.train_batch_size + 1) if self.train_batch_size % n == 0]
            nearest = min(fits, key=lambda n: abs(n - self.mini_batch_size))
            raise ConfigError(
                "algorithm.mini_batch_size",
                self.mini_batch_size,
                f"must divide the train batch of prompts_per_step x samples_per_prompt = {self.prompts_per_step} x "
                f"{self.samples_per_prompt} = {self.train_batch_size} rollouts; the nearest that does is {nearest}",
            )


@dataclass(frozen=True)
class RewardConfig:
    """Exactly one of `path` and `function` scores the rollouts."""

    path: str | None = None  # Hugging Face sequence-classification checkpoint with one label
    function: str | None = None  # module:function, called as actors.reward.RewardFunction says
    chat_template: bool | None = None  # None: render with the reward model's template if it has one
    batch_size: int = 64  # rollouts that are handed to a reward actor together
    max_batch_tokens: int = 16_384  # padded tokens in one forward pass
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.path is not None and self.function is not None:
            remedy = f"set either this or reward.path={self.path!r}, not both"
            raise ConfigError("reward.function", self.function, remedy)
        if self.function is not None and self.function.count(":") != 1:
            raise ConfigError("reward.function", self.function, "write it as module:function")
        _at_least("reward.batch_size", self.batch_size, 1)
        _at_least("reward.max_batch_tokens", self.max_batch_tokens, 1)
        _one_of("reward.dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class GeneratorConfig:
    temperature: float = 1.0
    max_new_tokens: int = 512
    max_model_len: int | None = None  # None: the model's own context length
    max_num_seqs: int = 256
    dtype: str = "float32"
    tensor_parallel_size: int = 1
    kv_cache_mib: int | None = None  # None on a GPU: what gpu_memory_utilization leaves; on CPU: 256
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        _above("generator.temperature", self.temperature, 0)
        if self.temperature > 2:
            raise ConfigError("generator.temperature", self.temperature, "vLLM samples at 2 at most")
        for name in ("max_new_tokens", "max_num_seqs", "tensor_parallel_size"):
            _at_least(f"generator.{name}", getattr(self, name), 1)
        _one_of("generator.dtype", self.dtype, DTYPES)
        _within("generator.gpu_memory_utilization", self.gpu_memory_utilization, 0.05, 1)
        if self.kv_cache_mib is not None:
            _at_least("generator.kv_cache_mib", self.kv_cache_mib, 1)
        if self.max_model_len is not None and self.max_model_len <= self.max_new_tokens:
            raise ConfigError(
                "generator.max_model_len",
                self.max_model_len,
                f"must be larger than generator.max_new_tokens={self.max_new_tokens}, or no prompt fits",
            )


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    scheduler: str = "constant"
    warmup_steps: int = 0
    scheduler_kwargs: dict[str, Any] = field(default_factory=dict)  # passed to transformers.get_scheduler

    def check(self, key: str) -> None:
        """Raises ConfigError for a value that breaks a rule; `key` is where the owner, who calls this, holds it."""
        _above(f"{key}.lr", self.lr, 0)
        for name, beta in zip(("betas[0]", "betas[1]"), self.betas, strict=True):
            if not 0 <= beta < 1:
                raise ConfigError(f"{key}.{name}", beta, "must be at least 0 and less than 1")
        _above(f"{key}.eps", self.eps, 0)
        _at_least(f"{key}.weight_decay", self.weight_decay, 0)
        _above(f"{key}.max_grad_norm", self.max_grad_norm, 0)
        _one_of(f"{key}.scheduler", self.scheduler, SCHEDULERS)
        _at_least(f"{key}.warmup_steps", self.warmup_steps, 0)
        if self.warmup_steps and self.scheduler == "constant":
            remedy = f"has no effect with {key}.scheduler=constant; use constant_with_warmup"
            raise ConfigError(f"{key}.warmup_steps", self.warmup_steps, remedy)


@dataclass(frozen=True)
class LearnerConfig:
    policy: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    critic_init: str = "reward"  # reward | policy | a checkpoint path
    dtype: str = "bfloat16"  # of the forward and backward pass; optimizer states are float32
    zero_stage: int = 3
    micro_batch_tokens: int = 16_384  # padded tokens in one forward and backward pass
    gradient_checkpointing: bool = False
    offload_optimizer: str = "none"  # none | cpu | nvme
    offload_parameters: str = "none"
    nvme_path: str | None = None
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged into DeepSpeed's own config last

    def __post_init__(self) -> None:
        self.policy.check("learner.policy")
        self.critic.check("learner.critic")
        _one_of("learner.dtype", self.dtype, DTYPES)
        if self.zero_stage != 3:
            raise ConfigError("learner.zero_stage", self.zero_stage, "only stage 3 is supported")
        _at_least("learner.micro_batch_tokens", self.micro_batch_tokens, 1)
        for name in ("offload_optimizer", "offload_parameters"):
            _one_of(f"learner.{name}", getattr(self, name), ("none", "cpu", "nvme"))
            if getattr(self, name) == "nvme" and self.nvme_path is None:
                raise ConfigError(f"learner.{name}", "nvme", "set learner.nvme_path to a folder on the NVMe disk")


@dataclass(frozen=True)
class ClusterConfig:
    address: str | None = None  # None: RAY_ADDRESS if it is set, else a cluster of its own on this machine
    device: str = "auto"  # auto: cuda where torch finds it, else cpu
    num_generators: int = 1
    num_rewards: int = 1
    num_learners: int = 1
    threads: int = 1  # OpenMP threads of each CPU process
    start_timeout_s: float = 600.0  # until every actor has to be up
    call_timeout_s: float = 1800.0  # longest that one remote call may take
    sync_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        _one_of("cluster.device", self.device, DEVICES)
        for name in ("num_generators", "num_rewards", "num_learners", "threads"):
            _at_least(f"cluster.{name}", getattr(self, name), 1)
        for name in ("start_timeout_s", "call_timeout_s", "sync_timeout_s"):
            _above(f"cluster.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class TaskConfig:
    """A reasoning-gym task, from which the files of all three stages are made when data.path is not given."""

    name: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    num_train: int = 4096  # different questions, each asked once an epoch
    num_eval: int = 512  # held-out questions
    wrong_answers: int = 4  # to each question, each making one pair for the reward stage
    lowercase: bool = False  # leave out questions whose answer has a capital letter
    sft_wrong_share: float = 0.0  # of the answers that the sft stage learns from: demonstrations are seldom all right

    def __post_init__(self) -> None:
        for name in ("num_train", "num_eval", "wrong_answers"):
            _at_least(f"data.task.{name}", getattr(self, name), 1)
        _within("data.task.sft_wrong_share", self.sft_wrong_share, 0, 1)


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None  # prompts: jsonl, parquet, or the name of a Hugging Face dataset
    split: str = "train"
    eval_path: str | None = None
    eval_split: str = "test"
    prompt_key: str = "prompt"  # a string, or a list of chat messages
    chat_template: bool = True
    system_prompt: str | None = None
    max_prompt_tokens: int = 1024  # longer prompts are dropped and counted
    task: TaskConfig = field(default_factory=TaskConfig)

    def __post_init__(self) -> None:
        _at_least("data.max_prompt_tokens", self.max_prompt_tokens, 1)
        if self.system_prompt is not None and not self.chat_template:
            raise ConfigError("data.system_prompt", self.system_prompt, "has no effect with data.chat_template=false")


@dataclass(frozen=True)
class SupervisedConfig:
    """One supervised stage; its rows hold `prompt` and `answer` (sft) or `prompt`, `chosen` and `rejected` (reward)."""

    data_path: str | None = None  # None: made from data.task
    eval_path: str | None = None
    model_path: str | None = None  # what it starts from; None: the stage before, or model.path
    num_steps: int = 1000
    batch_size: int = 64
    eval_every: int = 100
    stop_accuracy: float | None = None  # ends the stage once the held-out accuracy (of tokens, of pairs) is this high
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))

    def check(self, key: str) -> None:
        """Raises ConfigError for a value that breaks a rule; `key` is where the owner, who calls this, holds it."""
        for name in ("num_steps", "batch_size", "eval_every"):
            _at_least(f"{key}.{name}", getattr(self, name), 1)
        if self.stop_accuracy is not None:
            _within(f"{key}.stop_accuracy", self.stop_accuracy, 0, 1)
        self.optimizer.check(f"{key}.optimizer")


@dataclass(frozen=True)
class RewardTrainingConfig(SupervisedConfig):
    center_coef: float = 0.0  # of (chosen + rejected)^2, which holds the scores around zero whatever the prompt

    def check(self, key: str) -> None:
        super().check(key)
        _at_least(f"{key}.center_coef", self.center_coef, 0)


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 10  # steps; 0: only before the first and after the last
    num_prompts: int = 512
    temperature: float = 1.0
    verifier: str | None = None  # module:function, one score a response; right is a score of at least `threshold`
    threshold: float = 0.99

    def __post_init__(self) -> None:
        _at_least("evaluation.every", self.every, 0)
        _at_least("evaluation.num_prompts", self.num_prompts, 1)
        _above("evaluation.temperature", self.temperature, 0)
        if self.verifier is not None and self.verifier.count(":") != 1:
            raise ConfigError("evaluation.verifier", self.verifier, "write it as module:function")


@dataclass(frozen=True)
class TrackingConfig:
    wandb: str = "off"  # online | offline | off
    wandb_project: str = "manta"
    tensorboard: bool = False
    samples_per_step: int = 8  # rollouts a step that are written to samples.jsonl
    export_every: int = 0  # steps; 0: only at the end

    def __post_init__(self) -> None:
        _one_of("tracking.wandb", self.wandb, WANDB_MODES)
        _at_least("tracking.samples_per_step", self.samples_per_step, 0)
        _at_least("tracking.export_every", self.export_every, 0)


@dataclass(frozen=True)
class Config:
    experiment: str = "default"
    stages: tuple[str, ...] = ("ppo",)
    seed: int = 0
    resume: str = "never"  # the only choice so far
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SupervisedConfig = field(default_factory=SupervisedConfig)
    reward_training: RewardTrainingConfig = field(default_factory=RewardTrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not self.stages or list(self.stages) != [stage for stage in STAGES if stage in self.stages]:
            remedy = f"name one or more of {', '.join(STAGES)}, in this order, each once"
            raise ConfigError("stages", list(self.stages), remedy)
        _at_least("seed", self.seed, 0)
        if self.resume != "never":
            raise ConfigError("resume", self.resume, "resuming a run is not implemented yet; only never is allowed")
        self.sft.check("sft")
        self.reward_training.check("reward_training")
