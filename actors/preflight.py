"""Whether the functions, checkpoints and data that a Config names can be used as it says, before anything starts.

Reads config.json, tokenizers and rows; loads no weights. transformers is imported by the functions that need it.
"""

from __future__ import annotations

from typing import Any

from actors.prompts import PromptSource, check_columns
from actors.rows import read_rows
from actors.verifiers import load_function
from conf.check import starting_model
from conf.schema import Config, ConfigError

COLUMNS = {"sft": ("answer",), "reward_training": ("chosen", "rejected")}


def preflight(config: Config) -> None:
    """Raises ConfigError for the first function, checkpoint, tokenizer or row that cannot be used."""
    for key, spec in (("reward.function", config.reward.function), ("evaluation.verifier", config.evaluation.verifier)):
        if spec is not None:
            load_function(spec, key=key)
    key, path = starting_model(config)
    model = _model_config(key, path, config)
    tokenizer = _policy_tokenizer(config)
    _check_vocabulary(config, tokenizer, model.vocab_size)
    if "ppo" in config.stages:
        _check_context(config, getattr(model, "max_position_embeddings", None))
        _check_reference(config, tokenizer, model.vocab_size)
        _check_reward_model(config)
        _check_critic(config, tokenizer)
    _check_data(config, tokenizer)


def _policy_tokenizer(config: Config) -> Any:
    key, path = _tokenizer_source(config)
    tokenizer = _tokenizer(key, path, config)
    if tokenizer.eos_token_id is None:
        remedy = "set eos_token in its tokenizer_config.json, or model.tokenizer to another tokenizer"
        raise ConfigError(key, path, f"its tokenizer has no EOS token, without which no response ends; {remedy}")
    if config.data.chat_template and tokenizer.chat_template is None:
        remedy = f"the tokenizer of {path} has no chat template; set data.chat_template=false"
        raise ConfigError("data.chat_template", True, remedy)
    return tokenizer


def _tokenizer_source(config: Config) -> tuple[str, str]:
    if config.model.tokenizer is not None:
        return "model.tokenizer", config.model.tokenizer
    return starting_model(config)


def _check_vocabulary(config: Config, tokenizer: Any, vocab_size: int) -> None:
    if len(tokenizer) > vocab_size:
        remedy = "take the tokenizer that the checkpoint was trained with, or resize the model's embedding"
        sizes = f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary only {vocab_size}"
        raise ConfigError(*_tokenizer_source(config), f"{sizes}; {remedy}")


def _check_context(config: Config, context: int | None) -> None:
    """Prompt and response have to fit in what the generator is given, and that in what the model can take."""
    limit, longest, response = (
        config.generator.max_model_len,
        config.data.max_prompt_tokens,
        config.generator.max_new_tokens,
    )
    if limit is not None and context is not None and limit > context:
        raise ConfigError(
            "generator.max_model_len", limit, f"the model's context has {context} tokens; lower it to that"
        )
    name = "generator.max_model_len" if limit is not None else "the model's context"
    limit = context if limit is None else limit
    if limit is not None and longest + response > limit:
        lower = f"lower it to {limit - response} or less" if limit > response else "lower both"
        remedy = f"with generator.max_new_tokens={response} it does not fit in {name} of {limit} tokens; {lower}"
        raise ConfigError("data.max_prompt_tokens", longest, remedy)


def _check_reference(config: Config, tokenizer: Any, vocab_size: int) -> None:
    path = config.model.reference
    if path is None:
        return
    size = _model_config("model.reference", path, config).vocab_size
    if size != vocab_size:
        remedy = "name a reference that the policy descends from"
        raise ConfigError(
            "model.reference", path, f"has a vocabulary of {size}, the policy one of {vocab_size}; {remedy}"
        )
    if _tokenizer("model.reference", path, config).get_vocab() != tokenizer.get_vocab():
        remedy = "numbers its tokens differently from the policy; name a reference that the policy descends from"
        raise ConfigError("model.reference", path, remedy)


def _check_reward_model(config: Config) -> None:
    path = config.reward.path
    if path is not None and (labels := _model_config("reward.path", path, config, text_part=False).num_labels) != 1:
        remedy = f"is no reward model: its classification head has {labels} labels"
        raise ConfigError("reward.path", path, f"{remedy}; name a sequence-classification checkpoint with one")


def _check_critic(config: Config, tokenizer: Any) -> None:
    """The critic reads the policy's tokens, so what it starts from has to number them alike."""
    key, start = "learner.critic_init", config.learner.critic_init
    trained = "reward" in config.stages
    paths = {"policy": None, "reward": config.reward_training.model_path if trained else config.reward.path}
    path = paths.get(start, start)
    if path is None:
        return
    _model_config(key, path, config)
    if _tokenizer(key, path, config).get_vocab() != tokenizer.get_vocab():
        remedy = f"{path} numbers its tokens differently from the policy; set learner.critic_init=policy"
        raise ConfigError(key, start, remedy)


def _check_data(config: Config, tokenizer: Any) -> None:
    """Reads every row that a later stage would stumble over."""
    data = config.data
    if "ppo" in config.stages:
        for key, path, split in (
            ("data.path", data.path, data.split),
            ("data.eval_path", data.eval_path, data.eval_split),
        ):
            if path is not None:
                PromptSource(read_rows(path, split, key=key), tokenizer, data, seed=config.seed)
    for stage, section, supervised in (
        ("sft", "sft", config.sft),
        ("reward", "reward_training", config.reward_training),
    ):
        sources = (
            ("data_path", supervised.data_path, data.split),
            ("eval_path", supervised.eval_path, data.eval_split),
        )
        for name, path, split in sources:
            if stage in config.stages and path is not None:
                source = (f"{section}.{name}", path)
                check_columns(read_rows(path, split, key=source[0]), data, COLUMNS[section], source=source)


def _tokenizer(key: str, path: str, config: Config) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:  # nothing there, or files that make no tokenizer
        raise ConfigError(key, path, f"no tokenizer can be loaded from {path}: {_one_line(error)}") from error


def _model_config(key: str, path: str, config: Config, *, text_part: bool = True) -> Any:
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:  # nothing there, or an architecture that transformers does not know
        raise ConfigError(key, path, f"no Hugging Face checkpoint can be read there: {_one_line(error)}") from error
    return whole.get_text_config() if text_part else whole


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
