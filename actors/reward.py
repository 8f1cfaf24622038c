"""One score per rollout, from a reward model or from a Python function.

Knows transformers (imported when a reward model is made) and nothing of Ray or of the learner. A source that cannot
score raises: no score is ever invented.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from actors.prompts import render_conversation
from actors.rollout import Rollout
from actors.verifiers import load_function
from conf.schema import ConfigError, RewardConfig

if TYPE_CHECKING:
    import torch


class RewardSource(Protocol):
    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One finite score for each rollout, in their order."""


class RewardFunction(Protocol):
    """What `reward.function=module:function` names. Its three arguments are passed by position and are equally long.

    `prompts` are the prompts as the policy read them, the chat template rendered; `responses` leave out the special
    tokens; `rows` are the rows of the dataset. It returns one finite number (or bool) for each.
    """

    def __call__(
        self, prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]], /
    ) -> Sequence[float]: ...


def make_reward_source(
    config: RewardConfig, *, path: str | None = None, device: str, trust_remote_code: bool = False
) -> RewardSource:
    """The source that `config` names; `path` is the checkpoint of a reward stage that ran before, if one did.

    Raises ConfigError when nothing, or both a model and a function, would score.
    """
    path = path or config.path
    if config.function is not None:
        if path is not None:
            raise ConfigError("reward.function", config.function, f"the reward model {path} scores already; drop one")
        return FunctionReward(config.function)
    if path is None:
        raise ConfigError("reward.path", None, "set it to a reward model, or set reward.function=module:function")
    return RewardModel(path, config, device=device, trust_remote_code=trust_remote_code)


class FunctionReward:
    """Scores of the user's own function, which `spec` names as module:function."""

    def __init__(self, spec: str, *, key: str = "reward.function") -> None:
        self.name = f"{key} {spec}"
        self.function: RewardFunction = load_function(spec, key=key)

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One score for each rollout.

        Raises ValueError naming the function, and the position and the value at fault, unless it returned as many
        finite numbers as it was given responses; RuntimeError naming it if it raised.
        """
        if not rollouts:
            return []
        prompts, responses = [rollout.prompt.text for rollout in rollouts], [rollout.text for rollout in rollouts]
        name = self.name
        try:
            scores = self.function(prompts, responses, [rollout.prompt.row for rollout in rollouts])
        except Exception as error:  # of any kind, being a user's: it is passed on under the function's name
            raise RuntimeError(f"{name} raised {type(error).__name__}: {error}") from error
        if not isinstance(scores, list | tuple | np.ndarray):
            raise ValueError(
                f"{name} returned {type(scores).__name__} {scores!r:.100}; it must return a list of numbers"
            )
        if len(scores) != len(rollouts):
            raise ValueError(f"{name} returned {len(scores)} scores for {len(rollouts)} responses")
        for position, score in enumerate(scores):
            if not isinstance(score, Real | np.bool_):
                kind = type(score).__name__
                raise ValueError(f"{name} returned {kind} {score!r:.100} at position {position}; it must be a number")
        return finite_scores(name, rollouts, [float(score) for score in scores])


class RewardModel:
    """Scores of a Hugging Face sequence-classification model with one label, read at the last token.

    Each conversation is rendered again with the model's own tokenizer and chat template, which may differ from the
    policy's. A response that was cut (finish_reason "length") is left open: the model reads no end of turn that the
    policy did not write. The score is the output of the classification head at the last token by position, so a pad
    token that equals EOS does no harm; the head works in float32 whatever `config.dtype` is.
    """

    def __init__(self, path: str, config: RewardConfig, *, device: str, trust_remote_code: bool = False) -> None:
        """Loads the model in eval mode. Raises ConfigError naming reward.path for a checkpoint that cannot score."""
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        self.path, self.config, self.device = path, config, device
        try:
            model_config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:  # nothing there; an architecture that transformers does not know
            raise ConfigError("reward.path", path, f"is not a Hugging Face checkpoint: {error}") from error
        if model_config.num_labels != 1:
            raise ConfigError(
                "reward.path",
                path,
                f"is no reward model: its classification head has {model_config.num_labels} labels, not one",
            )
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        self.model, loading = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=model_config,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        self._check(set(loading["missing_keys"]))
        self.model.score.float()
        self.model.to(device).eval().requires_grad_(False)
        self.context: int | None = getattr(model_config.get_text_config(), "max_position_embeddings", None)
        self.vocab_size: int = self.model.get_input_embeddings().num_embeddings

    def _check(self, missing_keys: set[str]) -> None:
        def refuse(remedy: str) -> ConfigError:
            return ConfigError("reward.path", self.path, remedy)

        if not hasattr(self.model, "score"):
            kind = type(self.model).__name__
            raise refuse(f"{kind} has no `score` head over the last token; use a causal sequence-classification model")
        if missing_keys:
            raise refuse(f"lacks the weights {', '.join(sorted(missing_keys))}, which would be random")
        has_template = self.tokenizer.chat_template is not None
        if self.config.chat_template and not has_template:
            raise ConfigError("reward.chat_template", True, f"the tokenizer of {self.path} has no chat template")
        uses_template = has_template if self.config.chat_template is None else self.config.chat_template
        if not uses_template and self.tokenizer.eos_token_id is None:
            raise refuse("its tokenizer has neither a chat template nor an EOS token to end a response with")

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One score for each rollout; it does not depend on the others beyond rounding.

        Raises ValueError for a conversation longer than the model's context and for a score that is not finite, and
        ConfigError for one that alone exceeds `reward.max_batch_tokens`.
        """
        conversations = [self.render(rollout) for rollout in rollouts]
        scores = [math.nan] * len(rollouts)
        for batch in token_batches([len(ids) for ids in conversations], self.config.max_batch_tokens):
            for position, score in zip(batch, self._forward([conversations[i] for i in batch]), strict=True):
                scores[position] = score
        return finite_scores(f"reward model {self.path}", rollouts, scores)

    def render(self, rollout: Rollout) -> list[int]:
        """The token ids of the conversation as the reward model reads it. Raises as `score` says."""
        ids: list[int] = render_conversation(
            self.tokenizer,
            rollout.prompt.messages,
            rollout.text,
            self.config.chat_template,
            closed=rollout.finish_reason == "stop",
        )
        name = f"the conversation of prompt {rollout.prompt.id}, sample {rollout.sample}, has {len(ids)} tokens"
        if self.context is not None and len(ids) > self.context:
            raise ValueError(
                f"{name} for the reward model {self.path}, whose context is {self.context}; lower "
                "data.max_prompt_tokens or generator.max_new_tokens"
            )
        if len(ids) > self.config.max_batch_tokens:
            raise ConfigError("reward.max_batch_tokens", self.config.max_batch_tokens, f"{name}; raise it to that")
        # Not len(tokenizer): a tokenizer may hold tokens, such as an added pad, that no conversation has.
        if max(ids) >= self.vocab_size:
            raise ConfigError(
                "reward.path",
                self.path,
                f"its tokenizer gives token {max(ids)}, its embedding has {self.vocab_size} rows",
            )
        return ids

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
    """Positions of `lengths`, longest first, cut so that a batch padded to its longest keeps to `max_tokens`."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max_tokens // lengths[order[0]]
        assert size > 0, "a conversation longer than the budget is refused before"
        yield order[:size]
        order = order[size:]


def finite_scores(name: str, rollouts: Sequence[Rollout], scores: list[float]) -> list[float]:
    """`scores` as they are. Raises ValueError naming the source and the first position whose score is not finite."""
    for position, (rollout, score) in enumerate(zip(rollouts, scores, strict=True)):
        if not math.isfinite(score):
            raise ValueError(
                f"{name} returned {score} at position {position} (prompt {rollout.prompt.id}, sample {rollout.sample})"
            )
    return scores
