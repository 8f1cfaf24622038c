"""The networks that the learner trains: a policy and a critic around Hugging Face models.

Each wrapper's forward does all the work on a batch, so that it can stand inside a DeepSpeed engine, whose hooks gather
partitioned parameters as each submodule runs. Only the states in which a response token is chosen go through the
vocabulary projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import ConfigError
from learner.attention import register
from learner.distribution import SampledFrom, logprobs_and_entropy
from learner.experience import Batch
from learner.packing import FlatStates, checked, flat_states, in_chunks, of_states

LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # after the vocabulary projection


@dataclass(frozen=True, eq=False)
class PolicyOutput:
    """What a policy says of a batch; [B, T] is zero where the mask is False."""

    logprobs: Tensor  # [B, T] float32, of the distribution that was sampled from
    entropy: Tensor  # [B, T] float32, of the same; zeros where it was not asked for
    values: Tensor  # [B, T] float32, of the state in which token t is chosen; zeros without a value head
    final_values: Tensor  # [B] float32, of the state after the last response token; zeros without a value head

    @staticmethod
    def of(packed: Tensor) -> PolicyOutput:
        """Return what `PolicyModel.forward` has packed."""
        logprobs, entropy, values = packed
        return PolicyOutput(logprobs[:, :-1], entropy[:, :-1], values[:, :-1], values[:, -1])


class PolicyModel(nn.Module):
    """A causal language model that answers with log-probabilities of the response tokens.

    With a value head it is the critic too: one network, as LLaMA-Factory and TRL before 1.0 have it.
    """

    def __init__(self, model: Any, *, value_head: nn.Linear | None = None) -> None:
        super().__init__()
        self.model = model
        self.value_head = value_head
        in_chunks(model)

    def forward(self, batch: Batch, *, sampled_from: SampledFrom, with_entropy: bool = False) -> Tensor:
        """Return [3, B, T + 1] float32, which `PolicyOutput.of` takes apart.

        One tensor, since ZeRO-3 counts a module's outputs on the way back, and all ranks must count alike: with
        several, a rank that has no use for one of them would be out of step.
        """
        states = flat_states(self.model, batch.token_ids, batch.lengths)
        places = (states.starts.unsqueeze(-1) + batch.state_index)[batch.mask]  # [N]

        def say(of_tokens: Tensor, token_ids: Tensor) -> Tensor:
            return self._of_tokens(of_tokens, token_ids, sampled_from, with_entropy=with_entropy)

        said = states.asked(places, say, batch.response_ids[batch.mask])
        mask = nn.functional.pad(batch.mask, (0, 1))
        blank = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        logprobs, entropy = (blank.masked_scatter(mask, of_tokens) for of_tokens in said.unbind(-1))
        values = blank
        if self.value_head is not None:
            values = head_values(self.value_head, states, batch)
        return torch.stack([logprobs, entropy, values])

    def _of_tokens(self, states: Tensor, token_ids: Tensor, sampled_from: SampledFrom, *, with_entropy: bool) -> Tensor:
        """Return log-probabilities and entropies [N, 2] of states [N, H] and the tokens chosen in them [N]."""

        def say(logits: Tensor, ids: Tensor) -> Tensor:
            return logprobs_and_entropy(logits, ids, sampled_from, with_entropy=with_entropy)

        return of_states(self.model.get_output_embeddings(), states, say, token_ids)


class CriticModel(nn.Module):
    """A one-label classification model that answers with a value for every response token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Return values [B, T + 1] float32, as `head_values` says."""
        return head_values(self.model.score, flat_states(self.model, batch.token_ids, batch.lengths), batch)


def head_values(head: nn.Module, states: FlatStates, batch: Batch) -> Tensor:
    """Return the values that `head`, [H] -> [1], gives the states of a batch: [B, T + 1] float32.

    Place t is of the state in which token t is chosen, zero where the mask is False; the last place is of the state
    after the last response token.
    """
    tokens = (states.starts.unsqueeze(-1) + batch.state_index)[batch.mask]  # [N]
    places = torch.cat([tokens, states.starts + batch.final_index])  # [N + B]
    values = states.asked(places, lambda hidden, _: head(hidden).squeeze(-1).float(), places)
    blank = torch.zeros(batch.mask.shape, dtype=torch.float32, device=values.device)
    of_tokens = blank.masked_scatter(batch.mask, values[: len(tokens)])
    return torch.cat([of_tokens, values[len(tokens) :].unsqueeze(-1)], dim=-1)


def without_dropout(config: Any) -> Any:
    """Return the Hugging Face config with every dropout probability set to zero.

    A network with dropout samples from one distribution and is scored under another: PPO's ratio would not be 1 before
    the first update.
    """
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if isinstance(value, float) and any(
                word in name for word in ("dropout", "pdrop", "drop_rate", "layerdrop")
            ):
                setattr(part, name, 0.0)
    return config


def checked_causal(config: Any, path: str) -> Any:
    """Return the Hugging Face config of a causal language model without dropout.

    Raises:
        ConfigError: the architecture changes its logits after the vocabulary projection, which `PolicyModel` does not.
    """
    text = config.get_text_config()
    for name in LOGIT_CHANGES:
        if getattr(text, name, None) not in (None, 1.0):
            remedy = f"its {name}={getattr(text, name)} is not supported; choose a model without it"
            raise ConfigError("model.path", path, remedy)
    return without_dropout(config)


def load_causal_lm(path: str, *, attn_implementation: str, trust_remote_code: bool = False, **how: Any) -> Any:
    """Return the checkpoint's causal language model, as `checked_causal` has it, in float32 or as `how` has it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    config = checked_causal(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code), path)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        **(how or {"dtype": torch.float32}),
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
    )
    return checked(model, path)


def load_scalar_model(path: str, *, attn_implementation: str, trust_remote_code: bool = False) -> Any:
    """Return the checkpoint as a sequence-classification model with one label, in float32, without dropout.

    A checkpoint without a classification head (a language model) gets a new one, drawn as the architecture draws its
    linear layers: seed torch first.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    register()
    config = without_dropout(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code))
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
    )
    return checked(model, path)


def new_value_head(model: Any) -> nn.Linear:
    """Return a value head for the states of `model`, in float32: all zeros, so that every value begins at zero.

    Drawn at random it would begin at the size of the states, which in a trained model may be large beside any reward,
    and the first advantages would be its noise. Its gradient is not zero: the states are not.
    """
    head = nn.Linear(model.config.get_text_config().hidden_size, 1)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    return head


def initial_causal_lm(folder: str, *, seed: int, attn_implementation: str) -> Any:
    """Return a causal language model of the folder's config.json with random weights, as `checked_causal` has it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    torch.manual_seed(seed)
    config = checked_causal(AutoConfig.from_pretrained(folder), folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
    return checked(model, folder)
