"""Whether the functions, checkpoints and data that a Config names can be used as it says, before anything starts.

Reads config.json, tokenizers and rows; loads no weights. transformers is imported by the functions that need it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.importing import uncollected
from actors.mixing import held_out_prompts, prompt_source
from actors.rows import read_rows
from actors.supervised_rows import check_columns, ptx_rows
from actors.verifiers import load_function
from actors.vllm_architectures import architectures_of_vllm
from actors.weight_files import check_weight_files
from conf.check import starting_model
from conf.schema import Config, ConfigError

LARGEST_SEED = 2**32 - 1  # numpy's old generator, which vLLM and transformers seed, takes no larger one
COLUMNS = {"sft": ("answer",), "reward_training": ("chosen", "rejected")}


def preflight(config: Config) -> None:
    """Raises ConfigError for the first function, checkpoint, tokenizer or row that cannot be used."""
    with uncollected():
        from transformers import AutoConfig, AutoTokenizer  # noqa: F401

    named = [(f"reward.sources[{i}].function", source.function) for i, source in enumerate(config.reward.sources)]
    for key, spec in (*named, ("evaluation.verifier", config.evaluation.verifier)):
        if spec is not None:
            load_function(spec, key=key)
    if config.seed > LARGEST_SEED:
        raise ConfigError("seed", config.seed, f"must be at most {LARGEST_SEED}")
    key, path = starting_model(config)
    model = _model_config(key, path, config)
    if key != "model.init_config":
        check_weight_files(key, path)
    tokenizer = _policy_tokenizer(config)
    _check_vocabulary(config, tokenizer, model.vocab_size)
    if {"ppo", "eval"} & set(config.stages):
        _check_architecture(key, path, model)
        _check_context(config, getattr(model, "max_position_embeddings", None))
        _check_reference(config, tokenizer, model)
        _check_reward_models(config)
    if "ppo" in config.stages and config.algorithm.has_critic and config.learner.critic_network == "separate":
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


def _check_architecture(key: str, path: str, model: Any) -> None:
    """The generators are vLLM's, which has to know the architecture that the checkpoint names, if it names one."""
    known = architectures_of_vllm()
    for name in getattr(model, "architectures", None) or ():
        if known is not None and name not in known:
            remedy = "choose a causal language model of vLLM's list of supported models"
            raise ConfigError(key, path, f"vLLM, which samples the responses, does not know {name}; {remedy}")


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


def _check_reference(config: Config, tokenizer: Any, policy: Any) -> None:
    path = config.model.reference
    if path is None:
        return
    reference = _model_config("model.reference", path, config)
    check_weight_files("model.reference", path)
    if reference.vocab_size != policy.vocab_size:
        sizes = f"has a vocabulary of {reference.vocab_size}, the policy one of {policy.vocab_size}"
        raise ConfigError("model.reference", path, f"{sizes}; name a reference that the policy descends from")
    if _tokenizer("model.reference", path, config).get_vocab() != tokenizer.get_vocab():
        remedy = "numbers its tokens differently from the policy; name a reference that the policy descends from"
        raise ConfigError("model.reference", path, remedy)
    if "ppo" in config.stages and starts_at_reference(config) and _shape(reference) != _shape(policy):
        remedy = f"the generators, made for the policy, cannot sample from {path}, whose config is another; set it to"
        raise ConfigError("evaluation.win_rate", True, f"{remedy} false")


def starts_at_reference(config: Config) -> bool:
    """Whether the generators of the ppo stage hold a reference of its own first, whose responses are compared with."""
    held_out = config.data.eval_path is not None or config.data.task.name is not None
    return config.model.reference is not None and config.evaluation.win_rate and held_out


def _shape(model: Any) -> dict[str, Any]:
    """What two checkpoints must share for an engine made for one to compute as the other with the other's weights."""
    own = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
    return {name: value for name, value in model.to_dict().items() if name not in own and "drop" not in name}


def _check_reward_models(config: Config) -> None:
    for number, source in enumerate(config.reward.sources):
        if source.type != "model" or source.path is None:
            continue
        key = f"reward.sources[{number}].path"
        check_weight_files(key, source.path)
        if not is_adapter(source.path):
            labels = _model_config(key, source.path, config, text_part=False).num_labels
            if labels != 1:
                remedy = f"is no reward model: its classification head has {labels} labels"
                raise ConfigError(key, source.path, f"{remedy}; name a sequence-classification checkpoint with one")


def is_adapter(path: str) -> bool:
    """Whether `path` is a folder with an adapter of PEFT, which is loaded on the model that it names."""
    return (Path(path) / "adapter_config.json").is_file()


def _check_critic(config: Config, tokenizer: Any) -> None:
    """The critic reads the policy's tokens, so what it starts from has to number them alike."""
    key, start = "learner.critic_init", config.learner.critic_init
    scoring = [source.path for source in config.reward.sources if source.type == "model"]
    trained = "reward" in config.stages
    of_reward = config.reward_training.model_path if trained else next(iter(scoring), None)
    paths = {"policy": None, "reward": of_reward}
    path = paths.get(start, start)
    if path is None:
        return
    if is_adapter(path):
        remedy = f"a critic cannot start from the adapter at {path}; merge it, or set learner.critic_init=policy"
        raise ConfigError(key, start, remedy)
    _model_config(key, path, config)
    check_weight_files(key, path)
    if _tokenizer(key, path, config).get_vocab() != tokenizer.get_vocab():
        remedy = f"{path} numbers its tokens differently from the policy; set learner.critic_init=policy"
        raise ConfigError(key, start, remedy)


def _check_data(config: Config, tokenizer: Any) -> None:
    """Reads every row that a later stage would stumble over."""
    data = config.data
    if "ppo" in config.stages and (data.path is not None or data.sources):
        prompt_source(data, tokenizer, seed=config.seed)
    if {"ppo", "eval"} & set(config.stages):
        held_out_prompts(data, tokenizer, config.evaluation.num_prompts)
    if "ppo" in config.stages and config.algorithm.ptx.path is not None:
        ptx_rows(config.algorithm.ptx, tokenizer)
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
    except Exception as error:  # nothing there, or files that make no tokenizer, of which the library raises anything
        raise ConfigError(key, path, f"no tokenizer can be loaded from {path}: {_one_line(error)}") from error


def _model_config(key: str, path: str, config: Config, *, text_part: bool = True) -> Any:
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # nothing there, an architecture that transformers does not know, or a broken file
        raise ConfigError(key, path, f"no Hugging Face checkpoint can be read there: {_one_line(error)}") from error
    return whole.get_text_config() if text_part else whole


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
