"""Of what size the networks of a run are, from their config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.check import starting_model
from conf.schema import Config, ConfigError, RewardSourceConfig
from learner.sizes import NetworkSize


@dataclass(frozen=True)
class Networks:
    """The sizes of what is loaded; None where there is none of its own."""

    policy: NetworkSize
    reference: NetworkSize | None
    critic: NetworkSize | None
    rewards: tuple[NetworkSize, ...]  # of the sources that are models, in their order


def networks_of(config: Config) -> tuple[Networks, list[str]]:
    """Return the sizes of the networks of the ppo stage, and what had to be assumed.

    A model whose config.json is not at hand is of the `shape` that stands beside its path, if one does.

    Raises:
        ConfigError: neither is there.
    """
    notes: list[str] = []
    key, path = starting_model(config)
    of_policy = _config(key, path, config, notes, config.model.shape)
    rank = config.model.lora.rank
    policy = NetworkSize.of(of_policy, lora_rank=rank)
    reference = None if rank is not None else policy
    if config.model.reference is not None and config.model.reference != path:
        reference = NetworkSize.of(
            _config("model.reference", config.model.reference, config, notes, config.model.shape)
        )
    sources = [one for one in config.reward.sources if one.type == "model"]
    rewards = tuple(  # the one that a reward stage trains starts from the policy, or from the model of its settings
        NetworkSize.of(
            of_policy if one.path is None else _config("reward.sources.path", one.path, config, notes, one.shape),
            scalar=True,
        )
        for one in (sources if config.reward.sources else [RewardSourceConfig()])
    )
    critic = None
    if config.algorithm.has_critic and config.learner.critic_network == "separate":
        start = config.learner.critic_init
        if start == "reward":
            critic = rewards[0]
        else:
            begun = of_policy
            if start != "policy":
                begun = _config("learner.critic_init", start, config, notes, config.model.shape)
            critic = NetworkSize.of(begun, scalar=True)
    return Networks(policy, reference, critic, rewards), notes


def _config(key: str, path: str, config: Config, notes: list[str], shape: Mapping[str, Any]) -> Any:
    """Return the Hugging Face config at a path, or one of the shape that the settings give."""
    from transformers import AutoConfig

    if (Path(path) / "config.json").is_file():
        return AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    if shape:
        if "model_type" not in shape:
            raise ConfigError("shape", dict(shape), f"it is of {key}={path}; name its model_type, as config.json does")
        notes.append(f"{key}={path} is taken to be of the shape in the settings: no config.json was read")
        return AutoConfig.for_model(**shape)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        remedy = f"its config.json cannot be read ({why}); download it, or set the shape beside it to what it says"
        raise ConfigError(key, path, remedy) from error
