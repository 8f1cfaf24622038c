"""What the stages of a run share: where it is, what it records, and what one stage leaves for the next."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.console import Console
from cluster.session import Session
from cluster.tracking import Tracker
from conf.check import starting_model
from conf.schema import Config, ModelConfig


@dataclass(frozen=True)
class Run:
    """What every stage is given."""

    config: Config
    dir: Path
    session: Session
    tracker: Tracker
    console: Console


@dataclass(frozen=True)
class Handover:
    """What the stages so far leave for the next one and for the summary."""

    model: ModelConfig  # the policy as it stands: `tokenizer` is set, and `path` or `init_config`
    reward_path: str | None = None  # the reward model that the reward stage has made
    critic_start: str | None = None  # the reward model that a critic may start from
    summary: dict[str, Any] = field(default_factory=dict)
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


def context_length(model: ModelConfig) -> int | None:
    """Return how many tokens the model can take, None where its config does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.path or model.init_config, trust_remote_code=model.trust_remote_code)
    length: int | None = getattr(config, "max_position_embeddings", None)
    return length


def load_tokenizer(path: str, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
