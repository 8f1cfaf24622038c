"""Scores of a Hugging Face sequence-classification model with one label, computed with transformers.

Also the reading of such a checkpoint and of the conversations that it scores, which other engines share. Knows
transformers and peft, imported when a model is made, and nothing of Ray or of the learner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from actors.four_bits import four_bits
from actors.importing import uncollected
from actors.rendering import render_conversation
from actors.reward_source import Fault, finite_number, sample_name
from actors.rollout import Rollout
from actors.weight_files import check_weight_files
from conf.schema import NF4, ConfigError, RewardSourceConfig

if TYPE_CHECKING:
    import torch


ENOUGH_TOKENS = 1024  # in one pass, padding included: fewer would leave a device idle


def import_networks() -> None:
    """Import torch and transformers, which takes seconds, so that a model that is loaded later starts at once."""
    with uncollected():
        import torch  # noqa: F401
        from transformers import AutoModelForSequenceClassification  # noqa: F401


class Conversations:
    """Rollouts as the token ids that a reward model reads, which has a tokenizer and a chat template of its own.

    Each conversation is rendered again from its text, since both may differ from the policy's. A response that was cut
    (finish_reason "length") is left open: the model reads no end of turn that the policy did not write.
    """

    def __init__(self, source: RewardSourceConfig, *, key: str, trust_remote_code: bool) -> None:
        """Loads config and tokenizer of `source.path`, found at `key`. Raises ConfigError if they cannot score."""
        from transformers import AutoTokenizer

        assert source.path is not None, "a source of type model is made with its path"
        self.source, self.key = source, key
        self.adapter = adapter_base(source.path, key=key)
        checkpoint = source.path if self.adapter is None else self.adapter
        labels = {} if self.adapter is None else {"num_labels": 1}  # the head is the adapter's
        self.model_config = _model_config(checkpoint, key=key, trust_remote_code=trust_remote_code, **labels)
        if self.model_config.num_labels != 1:
            raise self.refuse(
                f"is no reward model: its classification head has {self.model_config.num_labels} labels, not one"
            )
        text_config = self.model_config.get_text_config()
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)
        self.vocab_size: int = text_config.vocab_size
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source.path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            if self.adapter is None:
                raise self.refuse(f"no tokenizer can be loaded from it: {error}") from error
            self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        self._check_template()

    def refuse(self, remedy: str) -> ConfigError:
        return ConfigError(f"{self.key}.path", self.source.path, remedy)

    def _check_template(self) -> None:
        has_template, wanted = self.tokenizer.chat_template is not None, self.source.chat_template
        if wanted and not has_template:
            remedy = f"the tokenizer of {self.source.path} has no chat template"
            raise ConfigError(f"{self.key}.chat_template", True, remedy)
        uses_template = has_template if wanted is None else wanted
        if not uses_template and self.tokenizer.eos_token_id is None:
            raise self.refuse("its tokenizer has neither a chat template nor an EOS token to end a response with")

    def render(self, rollout: Rollout) -> list[int] | Fault:
        """The token ids of the conversation; a fault if the template refuses it, or if it exceeds the model's context.

        Raises ConfigError for one that alone exceeds max_batch_tokens and for a token that the model does not have.
        """
        from jinja2 import TemplateError

        closed = rollout.finish_reason == "stop"
        try:
            ids: list[int] = render_conversation(
                self.tokenizer, rollout.prompt.messages, rollout.text, self.source.chat_template, closed=closed
            )
        except TemplateError as error:
            name = f"{self.key}: the chat template of {self.source.path} refuses the conversation of"
            return Fault(f"{name} {sample_name(rollout)}: {error}", lasting=True)
        name = f"the conversation of {sample_name(rollout)}, has {len(ids)} tokens"
        if self.context is not None and len(ids) > self.context:
            return Fault(
                f"{self.key}: {name} for the reward model {self.source.path}, whose context is {self.context}; lower "
                "data.max_prompt_tokens or generator.max_new_tokens",
                lasting=True,
            )
        if len(ids) > self.source.max_batch_tokens:
            remedy = f"{name}; raise it to that"
            raise ConfigError(f"{self.key}.max_batch_tokens", self.source.max_batch_tokens, remedy)
        # Not len(tokenizer): a tokenizer may hold tokens, such as an added pad, that no conversation has.
        if max(ids) >= self.vocab_size:
            raise self.refuse(f"its tokenizer gives token {max(ids)}, its embedding has {self.vocab_size} rows")
        return ids

    def answers(
        self, rollouts: Sequence[Rollout], read: Sequence[list[int] | Fault], scores: Sequence[float]
    ) -> list[float | Fault]:
        """For each rollout its fault of `read`, or else the next of `scores`, which is a fault if it is not finite."""
        given = iter(scores)
        answers: list[float | Fault] = []
        for rollout, ids in zip(rollouts, read, strict=True):
            score = ids if isinstance(ids, Fault) else next(given)
            if not isinstance(score, Fault) and finite_number(score) is None:
                name = f"{self.key}: the reward model {self.source.path}"
                score = Fault(f"{name} returned {score} for {sample_name(rollout)}", lasting=True)
            answers.append(score)
        return answers


class RewardModel:
    """Scores of a model that transformers runs: a whole checkpoint or a LoRA adapter on its base, in 4 bits or not.

    The score is the output of the classification head at the last token by position, so a pad token that equals EOS
    does no harm; the head works in float32 whatever `source.dtype` is. It does not depend on the other conversations
    beyond rounding.
    """

    def __init__(self, source: RewardSourceConfig, *, key: str, device: str, trust_remote_code: bool = False) -> None:
        """Loads the model of `source` in eval mode.

        Raises ConfigError naming `key`, where the source stands, for a checkpoint that cannot score.
        """
        self.conversations = Conversations(source, key=key, trust_remote_code=trust_remote_code)
        self.source, self.device = source, device
        self.model = _load_model(self.conversations, device, trust_remote_code=trust_remote_code)
        self.model.score.float()
        self.model.to(device).eval().requires_grad_(False)

    def score(self, rollouts: Sequence[Rollout]) -> list[float | Fault]:
        """A score for each rollout; a fault for a conversation that is too long and for a score that is not finite.

        Raises ConfigError as `Conversations.render` does.
        """
        read = [self.conversations.render(rollout) for rollout in rollouts]
        conversations = [ids for ids in read if not isinstance(ids, Fault)]
        scores = [0.0] * len(conversations)  # each is overwritten
        for batch in token_batches([len(ids) for ids in conversations], self.source.max_batch_tokens):
            for position, score in zip(batch, self._forward([conversations[i] for i in batch]), strict=True):
                scores[position] = score
        return self.conversations.answers(rollouts, read, scores)

    def _forward(self, conversations: Sequence[Sequence[int]]) -> list[float]:
        """Scores of one right-padded batch."""
        import torch

        lengths = torch.tensor([len(ids) for ids in conversations])
        inputs = torch.zeros(len(conversations), int(lengths.max()), dtype=torch.long)
        for row, ids in zip(inputs, conversations, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        mask = torch.arange(inputs.shape[1]) < lengths[:, None]
        with torch.inference_mode():
            hidden: torch.Tensor = self.model.base_model(
                input_ids=inputs.to(self.device), attention_mask=mask.long().to(self.device), use_cache=False
            ).last_hidden_state
            last = hidden[torch.arange(len(conversations)), lengths - 1]  # [B, hidden]
            return cast(list[float], self.model.score(last.float())[:, 0].tolist())


def token_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Positions of `lengths`, longest first, cut so that a batch padded to its longest keeps to `max_tokens`.

    One of ENOUGH_TOKENS takes no more where an eighth of it would be padding.
    """
    batch: list[int] = []
    tokens = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        assert lengths[position] <= max_tokens, "a conversation longer than the budget is refused before"
        longest = lengths[batch[0] if batch else position]
        padded, more = longest * len(batch), longest * (len(batch) + 1)
        wasteful = padded >= ENOUGH_TOKENS and more - tokens - lengths[position] > more / 8
        if batch and (more > max_tokens or wasteful):
            yield batch
            batch, tokens = [], 0
        batch.append(position)
        tokens += lengths[position]
    if batch:
        yield batch


def adapter_base(path: str, *, key: str) -> str | None:
    """The base model of the adapter at `path`; None if a whole checkpoint is there.

    Raises ConfigError for an adapter of another task than sequence classification.
    """
    from transformers.utils import find_adapter_config_file

    try:
        file = find_adapter_config_file(path)
    except (OSError, ValueError):  # no such folder, no such repository: what loads the checkpoint says so
        return None
    if file is None:
        return None
    from peft import PeftConfig

    adapter = PeftConfig.from_pretrained(path)
    if str(getattr(adapter.task_type, "value", adapter.task_type)) != "SEQ_CLS":
        remedy = f"is an adapter for {adapter.task_type}; a reward model's is for SEQ_CLS and holds its score head"
        raise ConfigError(f"{key}.path", path, remedy)
    if not adapter.base_model_name_or_path:
        raise ConfigError(f"{key}.path", path, "its adapter_config.json names no base_model_name_or_path")
    return str(adapter.base_model_name_or_path)


def _model_config(path: str, *, key: str, trust_remote_code: bool, **changes: Any) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **changes)
    except (OSError, ValueError) as error:  # nothing there; an architecture that transformers does not know
        raise ConfigError(f"{key}.path", path, f"is not a Hugging Face checkpoint: {error}") from error


def _load_model(conversations: Conversations, device: str, *, trust_remote_code: bool) -> Any:
    """The model on the CPU, an adapter merged into its base; or in 4 bits on `device`, under the adapter.

    Raises ConfigError for one without a trained head.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    source, adapter = conversations.source, conversations.adapter
    check_weight_files(f"{conversations.key}.path", source.path or "")
    in_four_bits = source.dtype == NF4
    loaded: dict[str, Any] = {"dtype": torch.float32}  # under an adapter: a sum is rounded once, after merging
    if in_four_bits:
        loaded = four_bits("float32" if device == "cpu" else "bfloat16", device=device)
    elif adapter is None:
        loaded = {"dtype": getattr(torch, source.dtype)}
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        source.path if adapter is None else adapter,
        config=conversations.model_config,
        **loaded,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=adapter is not None,  # the head of the base, which the adapter replaces
    )
    if not hasattr(model, "score"):
        kind = type(model).__name__
        raise conversations.refuse(
            f"{kind} has no `score` head over the last token; use a causal sequence-classification model"
        )
    missing = set(loading["missing_keys"]) | {name for name, *_ in loading["mismatched_keys"]}
    if adapter is not None:
        adapted, missing = _adapted(model, conversations), missing - {"score.weight"}
        model = (
            adapted.get_base_model() if in_four_bits else adapted.merge_and_unload().to(getattr(torch, source.dtype))
        )
    if missing:
        raise conversations.refuse(f"lacks the weights {', '.join(sorted(missing))}, which would be random")
    return model


def _adapted(model: Any, conversations: Conversations) -> Any:
    """`model` under the adapter, which has a head in place of its own."""
    from peft import PeftModel
    from peft.utils import load_peft_weights

    path = cast(str, conversations.source.path)
    heads = {name: tensor for name, tensor in load_peft_weights(path, device="cpu").items() if "score" in name}
    shapes = {tuple(tensor.shape) for name, tensor in heads.items() if name.endswith("score.weight")}
    if shapes != {tuple(model.score.weight.shape)}:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in heads.items()) or "none"
        raise conversations.refuse(
            f"holds no score head of shape {tuple(model.score.weight.shape)}, which would be random; found {found}"
        )
    return PeftModel.from_pretrained(model, path, autocast_adapter_dtype=False)
