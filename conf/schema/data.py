"""Rows: what the stages learn from and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conf.schema.engines import LoraConfig, OptimizerConfig
from conf.schema.rules import ConfigError, above, at_least, one_of, within, without_effect

FORMATS = ("prompt", "alpaca", "sharegpt")


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
            at_least(f"data.task.{name}", getattr(self, name), 1)
        within("data.task.sft_wrong_share", self.sft_wrong_share, 0, 1)


@dataclass(frozen=True)
class DataSourceConfig:
    """One of several sets of prompts that are mixed; what is null is as in the section `data`."""

    path: str | None = None
    weight: float = 1.0  # the share of the prompts that are drawn from it is its weight over the sum of all
    split: str | None = None
    format: str | None = None
    prompt_key: str | None = None
    system_prompt: str | None = None

    def check(self, key: str) -> None:
        """Raises ConfigError for a value that breaks a rule; `key` is where the source stands."""
        if self.path is None:
            raise ConfigError(f"{key}.path", None, "name its file or dataset")
        above(f"{key}.weight", self.weight, 0)
        if self.format is not None:
            one_of(f"{key}.format", self.format, FORMATS)
            if self.format != "prompt":
                without_effect(self, key, ("prompt_key",), f"with format={self.format}")


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None  # prompts: jsonl, json, parquet, or the name of a Hugging Face dataset
    sources: tuple[DataSourceConfig, ...] = ()  # several sets instead of `path`
    format: str = "prompt"  # how a row holds its prompt: under prompt_key, or as alpaca or sharegpt have it
    split: str = "train"
    eval_path: str | None = None
    eval_split: str = "test"
    prompt_key: str = "prompt"  # a string, or a list of chat messages
    chat_template: bool = True
    system_prompt: str | None = None
    max_prompt_tokens: int = 1024  # longer prompts are dropped and counted
    task: TaskConfig = field(default_factory=TaskConfig)

    def __post_init__(self) -> None:
        at_least("data.max_prompt_tokens", self.max_prompt_tokens, 1)
        one_of("data.format", self.format, FORMATS)
        for number, source in enumerate(self.sources):
            source.check(f"data.sources[{number}]")
        if self.sources and self.path is not None:
            raise ConfigError("data.path", self.path, "set either this or data.sources, not both")
        if self.format != "prompt":
            if not self.sources:
                without_effect(self, "data", ("prompt_key",), f"with data.format={self.format}")
            if self.task.name is not None:
                raise ConfigError("data.format", self.format, "the rows that data.task makes have the format prompt")
        if not self.chat_template:
            without_effect(self, "data", ("system_prompt",), "with data.chat_template=false")
            for number, source in enumerate(self.sources):
                why = "with data.chat_template=false"
                without_effect(source, f"data.sources[{number}]", ("system_prompt",), why)


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
    lora: LoraConfig = field(default_factory=LoraConfig)  # what is left for the next stage is merged

    def check(self, key: str) -> None:
        """Raises ConfigError for a value that breaks a rule; `key` is where the owner, who calls this, holds it."""
        for name in ("num_steps", "batch_size", "eval_every"):
            at_least(f"{key}.{name}", getattr(self, name), 1)
        if self.stop_accuracy is not None:
            within(f"{key}.stop_accuracy", self.stop_accuracy, 0, 1)
        self.optimizer.check(f"{key}.optimizer")
        self.lora.check(f"{key}.lora")


@dataclass(frozen=True)
class RewardTrainingConfig(SupervisedConfig):
    center_coef: float = 0.0  # of (chosen + rejected)^2, which holds the scores around zero whatever the prompt

    def check(self, key: str) -> None:
        super().check(key)
        at_least(f"{key}.center_coef", self.center_coef, 0)
