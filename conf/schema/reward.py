"""Where scores come from, and what is made of them before they are trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from conf.schema.engines import DTYPES, NF4
from conf.schema.rules import ConfigError, above, at_least, finite, module_function, one_of, without_effect

FAILURES = ("stop", "drop")
HTTP_FORMATS = ("llamafactory", "openrlhf")
REWARD_ENGINES = ("transformers", "vllm")
VERIFIERS = ("reasoning_gym", "math_verify")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TAKEN = ("score", "shaped", "running", "penalty", "response_length")  # reward/<name>_mean or eval/<name>_mean is there
# The settings of a source that belong to one type alone.
_SETTINGS = {
    "model": ("path", "engine", "chat_template", "dtype", "max_batch_tokens", "shape"),
    "function": ("function",),
    "verifier": ("verifier",),
    "http": ("url", "format", "model", "timeout_s", "concurrency"),
}
SOURCE_TYPES = tuple(_SETTINGS)


@dataclass(frozen=True)
class RewardSourceConfig:
    """One source of scores. The score of a rollout is the sum of its sources' scores times their weights."""

    type: str = "model"  # model | function | verifier | http
    name: str | None = None  # in its metrics, reward/<name>_mean; None: its type
    weight: float = 1.0
    # model
    path: str | None = None  # sequence-classification checkpoint with one label; None: what the reward stage trains
    engine: str = "transformers"  # | vllm, which scores with its pooling runner
    chat_template: bool | None = None  # None: render with the reward model's template if it has one
    dtype: str = "float32"  # | bfloat16 | nf4: four bits a weight (QLoRA's), computed in bfloat16, on CPU in float32
    max_batch_tokens: int = 16_384  # padded tokens in one forward pass
    shape: dict[str, Any] = field(default_factory=dict)  # as model.shape
    # function
    function: str | None = None  # module:function, called as actors.reward_function.RewardFunction says
    # verifier
    verifier: str | None = None
    answer_key: str = "answer"  # the column that math_verify compares with, and that OpenRLHF's format sends as label
    # http
    url: str | None = None
    format: str = "llamafactory"
    model: str = "reward-model"  # what the request calls the model, in LLaMA-Factory's format
    timeout_s: float = 60.0
    concurrency: int = 4  # requests of one reward actor at a time

    @property
    def label(self) -> str:
        return self.name or self.type

    def check(self, key: str) -> None:
        """Raises ConfigError for a value that breaks a rule; `key` is where the source stands."""
        one_of(f"{key}.type", self.type, SOURCE_TYPES)
        if not _NAME.fullmatch(self.label):
            raise ConfigError(f"{key}.name", self.name, "write it in lower-case letters, digits and underscores")
        if self.label in _TAKEN:
            raise ConfigError(f"{key}.name", self.name, "is the name of another metric; choose another")
        finite(f"{key}.weight", self.weight)
        if self.weight == 0:
            raise ConfigError(f"{key}.weight", self.weight, "has no effect; leave the source out")
        for kind, names in _SETTINGS.items():
            if kind != self.type:
                without_effect(self, key, names, f"with type={self.type}; it is of type {kind}")
        if self.verifier != "math_verify" and self.format != "openrlhf":
            without_effect(self, key, ("answer_key",), "but with verifier=math_verify and with format=openrlhf")
        if self.format != "llamafactory":
            without_effect(self, key, ("model",), f"with format={self.format}")
        self._check_values(key)

    def _check_values(self, key: str) -> None:
        needed = {"function": self.function, "verifier": self.verifier, "http": self.url}
        if self.type in needed and needed[self.type] is None:
            name = "url" if self.type == "http" else self.type
            raise ConfigError(f"{key}.{name}", None, f"a source of type {self.type} needs it")
        module_function(f"{key}.function", self.function)
        if self.verifier is not None:
            one_of(f"{key}.verifier", self.verifier, VERIFIERS)
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"{key}.url", self.url, "must begin with http:// or https://")
        one_of(f"{key}.engine", self.engine, REWARD_ENGINES)
        one_of(f"{key}.dtype", self.dtype, (*DTYPES, NF4))
        if self.dtype == NF4 and self.engine == "vllm":
            raise ConfigError(f"{key}.dtype", NF4, "is for engine=transformers; set it to bfloat16, or the engine")
        one_of(f"{key}.format", self.format, HTTP_FORMATS)
        at_least(f"{key}.max_batch_tokens", self.max_batch_tokens, 1)
        above(f"{key}.timeout_s", self.timeout_s, 0)
        at_least(f"{key}.concurrency", self.concurrency, 1)


@dataclass(frozen=True)
class ShapingConfig:
    """From the score of the sources to the score that is trained on, in this order. Metrics show both."""

    normalise: bool = False  # minus the running mean, over the running standard deviation, of all scores so far
    clip: float | None = None  # to +- this
    missing_eos_penalty: float = 0.0  # taken off the score of a response that was cut
    overlong_tokens: int = 0  # the last so many tokens before generator.max_new_tokens are penalised, rising
    overlong_penalty: float = 1.0  # taken off at generator.max_new_tokens
    whiten_rewards: bool = False  # token rewards over their standard deviation, the mean kept

    def __post_init__(self) -> None:
        if self.clip is not None:
            above("reward.shaping.clip", self.clip, 0)
        for name in ("missing_eos_penalty", "overlong_tokens", "overlong_penalty"):
            at_least(f"reward.shaping.{name}", getattr(self, name), 0)
        if self.overlong_tokens == 0:
            without_effect(self, "reward.shaping", ("overlong_penalty",), "with reward.shaping.overlong_tokens=0")


@dataclass(frozen=True)
class RewardConfig:
    """What scores the rollouts. A reward stage makes the source of type model that has no path, or the only one."""

    sources: tuple[RewardSourceConfig, ...] = ()
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    batch_size: int = 16  # rollouts that go to a reward actor and to the learner together, as soon as all are there
    on_failure: str = "stop"  # when a source gives no score after all retries: stop the run, or drop the rollouts
    retries: int = 2
    backoff_s: float = 1.0  # before the first retry; doubled before each further one

    def __post_init__(self) -> None:
        at_least("reward.batch_size", self.batch_size, 1)
        one_of("reward.on_failure", self.on_failure, FAILURES)
        at_least("reward.retries", self.retries, 0)
        at_least("reward.backoff_s", self.backoff_s, 0)
        if self.retries == 0:
            without_effect(self, "reward", ("backoff_s",), "with reward.retries=0")
        for number, source in enumerate(self.sources):
            source.check(f"reward.sources[{number}]")
        labels = [source.label for source in self.sources]
        for number, label in enumerate(labels):
            if label in labels[:number]:
                raise ConfigError(f"reward.sources[{number}].name", label, "another source has it; name them apart")

    @property
    def holds_model(self) -> bool:
        """Whether a reward actor holds a network, if only the one that a reward stage makes."""
        return not self.sources or any(source.type == "model" for source in self.sources)
