"""What the stages of a run share: where it is, what it records, and what one stage leaves for the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.checkpoints import Checkpoint
from cluster.console import Console
from cluster.recoveries import Recoveries
from cluster.roles import processes_of
from cluster.saving import Saver
from cluster.session import Session
from cluster.signals import StopRequest
from cluster.tracking import Tracker
from conf.check import starting_model
from conf.schema import Config, LoraConfig, ModelConfig


@dataclass(frozen=True)
class Run:
    """What every stage is given."""

    config: Config
    dir: Path
    session: Session
    tracker: Tracker
    console: Console
    saver: Saver
    recoveries: Recoveries
    stop: StopRequest

    def start_ahead_after(self, stage: str) -> None:
        """Let the processes of the stage that follows `stage`, a supervised one, start while that trains."""
        place = self.config.stages.index(stage) + 1
        if place < len(self.config.stages):
            self.session.start_ahead(processes_of(self.config.stages[place], self.config))


@dataclass(frozen=True)
class Handover:
    """What the stages so far leave for the next one and for the summary."""

    model: ModelConfig  # the policy as it stands: `tokenizer` is set, and `path` or `init_config`
    reward_path: str | None = None  # the reward model that the reward stage has made
    critic_start: str | None = None  # the reward model that a critic may start from
    summary: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # that each stage took
    examples: tuple[dict[str, Any], ...] = ()  # held-out prompts with the responses before and after PPO

    @staticmethod
    def at_start(config: Config) -> Handover:
        _, start = starting_model(config)
        model = config.model
        if model.init_config is None:
            model = replace(model, path=start)
        scoring = [source.path for source in config.reward.sources if source.type == "model"]
        return Handover(
            replace(model, tokenizer=model.tokenizer or start), critic_start=scoring[0] if scoring else None
        )

    def with_policy(self, path: Path) -> Handover:
        """Return the same after a stage that has trained the policy."""
        return replace(self, model=replace(self.model, path=str(path), init_config=None, tokenizer=str(path)))

    def with_summary(self, **figures: Any) -> Handover:
        return replace(self, summary=self.summary | figures)

    def with_seconds(self, stage: str, seconds: float) -> Handover:
        return replace(self, seconds=self.seconds | {stage: self.seconds.get(stage, 0.0) + seconds})

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Handover:
        """Return what `to_plain` was called on."""
        lora = plain["model"]["lora"]
        lora = LoraConfig(**lora | {"target_modules": tuple(lora["target_modules"])})
        model = ModelConfig(**plain["model"] | {"lora": lora})
        return Handover(**{**plain, "model": model, "examples": tuple(plain["examples"])})


def moved(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the plain handover of a checkpoint with its paths in the run folder as that is called now."""
    before, now = checkpoint.state["run_dir"], str(checkpoint.folder.parent.parent.resolve())

    def renamed(value: Any) -> Any:
        match value:
            case str() if value == before or value.startswith(before + "/"):
                return now + value[len(before) :]
            case dict():
                return {key: renamed(item) for key, item in value.items()}
            case list():
                return [renamed(item) for item in value]
        return value

    handover: dict[str, Any] = renamed(checkpoint.state["handover"])
    return handover


def context_length(model: ModelConfig) -> int | None:
    """Return how many tokens the model can take, None where its config does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.path or model.init_config, trust_remote_code=model.trust_remote_code)
    length: int | None = getattr(config, "max_position_embeddings", None)
    return length


def load_tokenizer(path: str, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
