"""The models and the processes: policy, generators, learner ranks, cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conf.schema.rules import ConfigError, above, at_least, one_of, sampling_temperature, within, without_effect

DTYPES = ("float32", "bfloat16")
NF4 = "nf4"  # four bits a weight, for networks that are never trained
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
DEVICES = ("auto", "cpu", "cuda")
CRITICS = ("separate", "shared")
PLACEMENTS = ("disaggregated", "colocated")
# What vLLM can do and a run must not: settings that are asked for, and why there are none.
_NOT_COMPUTED = "the learner cannot compute the log-probabilities of what vLLM would sample then; leave it out"
REFUSED = {
    f"generator.{name}": _NOT_COMPUTED
    for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "logit_bias")
}


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters by PEFT: Hu et al. 2021, arXiv 2106.09685. The rest of the model is frozen."""

    rank: int | None = None  # None: no adapters, all weights are trained
    alpha: float = 32.0  # the product of the adapters is multiplied by alpha / rank
    target_modules: tuple[str, ...] = ()  # names of linear layers; empty: all but the output head
    dropout: float = 0.0  # of the adapters' input, in the supervised stages alone

    def check(self, key: str) -> None:
        """Raises ConfigError for a value that breaks a rule; `key` is where the owner, who calls this, holds it."""
        if self.rank is None:
            without_effect(self, key, ("alpha", "target_modules", "dropout"), f"without {key}.rank")
            return
        at_least(f"{key}.rank", self.rank, 1)
        above(f"{key}.alpha", self.alpha, 0)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{key}.dropout", self.dropout, "must be at least 0 and less than 1")


@dataclass(frozen=True)
class ModelConfig:
    path: str | None = None  # Hugging Face checkpoint of the policy: a folder or a hub name
    init_config: str | None = None  # a folder with config.json and a tokenizer: random weights, for the sft stage
    tokenizer: str | None = None  # None: the one at `path`
    reference: str | None = None  # None: a frozen copy of the policy as the ppo stage starts
    lora: LoraConfig = field(default_factory=LoraConfig)  # of the policy in the ppo stage
    attn_implementation: str = "packed"  # no padding; or a name that transformers knows, such as sdpa: padded batches
    trust_remote_code: bool = False
    shape: dict[str, Any] = field(default_factory=dict)  # what config.json says, for mode=plan without the checkpoint

    def __post_init__(self) -> None:
        self.lora.check("model.lora")
        if self.lora.dropout:
            remedy = "dropout would train another distribution than the one that was sampled; set it to 0"
            raise ConfigError("model.lora.dropout", self.lora.dropout, remedy)
        if self.lora.rank is not None and self.reference is not None:
            remedy = "with model.lora the reference is the policy without its adapters; set this to null"
            raise ConfigError("model.reference", self.reference, remedy)


@dataclass(frozen=True)
class GeneratorConfig:
    temperature: float = 1.0
    top_k: int = 0  # 0: the whole vocabulary. The learner takes log-probabilities of the same truncated distribution
    top_p: float = 1.0
    max_new_tokens: int = 512
    max_model_len: int | None = None  # None: the model's own context length
    max_num_seqs: int = 256
    dtype: str = "float32"
    tensor_parallel_size: int = 1
    kv_cache_mib: int | None = None  # None on a GPU: what gpu_memory_utilization leaves; on CPU: 256
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        sampling_temperature("generator.temperature", self.temperature)
        at_least("generator.top_k", self.top_k, 0)
        above("generator.top_p", self.top_p, 0)
        within("generator.top_p", self.top_p, 0, 1)
        for name in ("max_new_tokens", "max_num_seqs", "tensor_parallel_size"):
            at_least(f"generator.{name}", getattr(self, name), 1)
        one_of("generator.dtype", self.dtype, DTYPES)
        within("generator.gpu_memory_utilization", self.gpu_memory_utilization, 0.05, 1)
        if self.kv_cache_mib is not None:
            at_least("generator.kv_cache_mib", self.kv_cache_mib, 1)
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
        above(f"{key}.lr", self.lr, 0)
        for name, beta in zip(("betas[0]", "betas[1]"), self.betas, strict=True):
            if not 0 <= beta < 1:
                raise ConfigError(f"{key}.{name}", beta, "must be at least 0 and less than 1")
        above(f"{key}.eps", self.eps, 0)
        at_least(f"{key}.weight_decay", self.weight_decay, 0)
        above(f"{key}.max_grad_norm", self.max_grad_norm, 0)
        one_of(f"{key}.scheduler", self.scheduler, SCHEDULERS)
        at_least(f"{key}.warmup_steps", self.warmup_steps, 0)
        if self.warmup_steps and self.scheduler == "constant":
            remedy = f"has no effect with {key}.scheduler=constant; use constant_with_warmup"
            raise ConfigError(f"{key}.warmup_steps", self.warmup_steps, remedy)


@dataclass(frozen=True)
class LearnerConfig:
    policy: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    critic_network: str = "separate"  # | shared: a value head on the policy's own network, trained with it
    critic_init: str = "reward"  # of a separate critic: reward | policy | a checkpoint path
    ema_decay: float | None = None  # set: an average of the policy's weights is kept and exported too
    dtype: str = "bfloat16"  # of the forward and backward pass; optimizer states are float32
    reference_dtype: str | None = None  # None: dtype, in shards; nf4: four bits a weight (QLoRA's), whole on every rank
    zero_stage: int = 3
    micro_batch_tokens: int = 16_384  # tokens in one forward and backward pass
    sequence_parallel_size: int = 1  # neighbouring ranks that share the tokens of each micro-batch, for long contexts
    gradient_checkpointing: bool = False
    offload_optimizer: str = "none"  # none | cpu | nvme
    offload_parameters: str = "none"
    nvme_path: str | None = None
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged into DeepSpeed's own config last

    def __post_init__(self) -> None:
        self.policy.check("learner.policy")
        self.critic.check("learner.critic")
        one_of("learner.dtype", self.dtype, DTYPES)
        if self.reference_dtype is not None:
            one_of("learner.reference_dtype", self.reference_dtype, (NF4,))
        one_of("learner.critic_network", self.critic_network, CRITICS)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError("learner.ema_decay", self.ema_decay, "must lie between 0 and 1, both excluded")
        if self.zero_stage != 3:
            raise ConfigError("learner.zero_stage", self.zero_stage, "only stage 3 is supported")
        at_least("learner.micro_batch_tokens", self.micro_batch_tokens, 1)
        at_least("learner.sequence_parallel_size", self.sequence_parallel_size, 1)
        for name in ("offload_optimizer", "offload_parameters"):
            one_of(f"learner.{name}", getattr(self, name), ("none", "cpu", "nvme"))
            if getattr(self, name) == "nvme" and self.nvme_path is None:
                raise ConfigError(f"learner.{name}", "nvme", "set learner.nvme_path to a folder on the NVMe disk")
        if "nvme" not in (self.offload_optimizer, self.offload_parameters):
            without_effect(self, "learner", ("nvme_path",), "unless something is offloaded to nvme")


@dataclass(frozen=True)
class ClusterConfig:
    address: str | None = None  # None: RAY_ADDRESS if it is set, else a cluster of its own on this machine
    device: str = "auto"  # auto: cuda where torch finds it, else cpu
    placement: str = "disaggregated"  # | colocated: generators and learner ranks take turns on the same GPUs
    num_generators: int = 1
    num_rewards: int = 1
    num_learners: int = 1
    num_nodes: int = 1  # this and the next four: what mode=plan counts with; a run asks Ray what there is
    node_cpus: int | None = None
    node_gpus: int | None = None
    gpu_memory_gib: float | None = None
    node_memory_gib: float | None = None
    threads: int = 1  # OpenMP threads of each CPU process
    learner_threads: int | None = None  # of each learner rank, None: threads
    start_timeout_s: float = 600.0  # until every actor has to be up
    call_timeout_s: float = 1800.0  # longest that one remote call may take
    sync_timeout_s: float = 300.0
    sync_bucket_mib: int = 64  # the most that one message of the weight sync carries; each side holds two
    heartbeat_s: float = 60.0  # a process that has not answered for so long is lost
    replace_timeout_s: float = 600.0  # how long a process that is lost may wait for a place, if its node is gone
    max_recoveries: int = 3  # of one kind without the run getting any further; one more ends it
    grace_s: float = 30.0  # from SIGTERM to the end of the run; Kubernetes gives 30 unless told otherwise

    def __post_init__(self) -> None:
        one_of("cluster.device", self.device, DEVICES)
        one_of("cluster.placement", self.placement, PLACEMENTS)
        for name in ("num_generators", "num_rewards", "num_learners", "num_nodes", "threads", "sync_bucket_mib"):
            at_least(f"cluster.{name}", getattr(self, name), 1)
        for name in ("learner_threads", "node_cpus", "node_gpus"):
            if getattr(self, name) is not None:
                at_least(f"cluster.{name}", getattr(self, name), 1)
        for name in ("gpu_memory_gib", "node_memory_gib"):
            if getattr(self, name) is not None:
                above(f"cluster.{name}", getattr(self, name), 0)
        for name in ("start_timeout_s", "call_timeout_s", "sync_timeout_s", "replace_timeout_s", "grace_s"):
            above(f"cluster.{name}", getattr(self, name), 0)
        if self.sync_timeout_s >= self.call_timeout_s:
            remedy = (
                f"must be less than cluster.call_timeout_s={self.call_timeout_s:g}: ranks wait for it in a collective"
            )
            raise ConfigError("cluster.sync_timeout_s", self.sync_timeout_s, remedy)
        at_least("cluster.heartbeat_s", self.heartbeat_s, 5)
        at_least("cluster.max_recoveries", self.max_recoveries, 0)
