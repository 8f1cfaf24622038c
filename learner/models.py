"""The networks that the learner trains: a policy and a critic around Hugging Face models.

Each wrapper's forward does all the work on a batch, so that it can stand inside a DeepSpeed engine, whose hooks gather
partitioned parameters as each submodule runs. Only the states in which a response token is chosen go through the
vocabulary projection.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learner.experience import Batch
from learner.ppo import token_entropy, token_logprobs

UNSUPPORTED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class PolicyModel(nn.Module):
    """A causal language model that answers with log-probabilities of the response tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, *, temperature: float, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
        """Return (logprobs, entropy), both [B, T] float32 and zero where the mask is False.

        Log-probabilities are of softmax(logits / temperature), the distribution that was sampled from. The entropy is
        zeros unless asked for; it carries no gradient.
        """
        hidden = self.model.base_model(input_ids=batch.token_ids, use_cache=False).last_hidden_state  # [B, L, H]
        states = select_states(hidden, batch.state_index)[batch.mask]  # [N, H]
        logits = self.model.get_output_embeddings()(states)  # [N, V]
        logprobs = token_logprobs(logits, batch.response_ids[batch.mask], temperature=temperature)
        blank = torch.zeros(batch.mask.shape, dtype=torch.float32, device=logprobs.device)
        entropy = blank
        if with_entropy:
            with torch.no_grad():
                entropy = blank.masked_scatter(batch.mask, token_entropy(logits, temperature=temperature))
        return blank.masked_scatter(batch.mask, logprobs), entropy


class CriticModel(nn.Module):
    """A one-label classification model that answers with a value for every response token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Return values [B, T] float32: of the state in which token t is chosen; zero where the mask is False."""
        hidden = self.model.base_model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
        states = select_states(hidden, batch.state_index)[batch.mask]  # [N, H]
        values = self.model.score(states).squeeze(-1).float()  # [N]
        return torch.zeros(batch.mask.shape, dtype=torch.float32, device=values.device).masked_scatter(
            batch.mask, values
        )


def select_states(hidden: Tensor, index: Tensor) -> Tensor:
    """Return hidden[b, index[b, t]]: [B, L, H] and [B, T] -> [B, T, H]."""
    return hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def without_dropout(config: Any) -> Any:
    """Return the Hugging Face config with every dropout probability set to zero.

    A network with dropout samples from one distribution and is scored under another: PPO's ratio would not be 1 before
    the first update.
    """
    for name, value in config.to_dict().items():
        if isinstance(value, float) and any(part in name for part in ("dropout", "pdrop", "drop_rate")):
            setattr(config, name, 0.0)
    return config


def load_causal_lm(path: str, *, attn_implementation: str, trust_remote_code: bool = False) -> Any:
    """Return the checkpoint's causal language model in float32, without dropout.

    Raises:
        ValueError: the architecture changes its logits after the vocabulary projection, in a way that `PolicyModel`
            and vLLM would not share.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = without_dropout(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code))
    for name in UNSUPPORTED_LOGITS:
        if getattr(config, name, None) not in (None, 1.0):
            raise ValueError(f"model.path={path!r}: {name}={getattr(config, name)} is not supported")
    return AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )


def load_scalar_model(path: str, *, attn_implementation: str, trust_remote_code: bool = False) -> Any:
    """Return the checkpoint as a sequence-classification model with one label, in float32, without dropout.

    A checkpoint without a classification head (a language model) gets a new one, drawn as the architecture draws its
    linear layers: seed torch first.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = without_dropout(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code))
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )


def initial_causal_lm(folder: str, *, seed: int, attn_implementation: str) -> Any:
    """Return a randomly initialised causal language model of the folder's config.json, in float32, without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = without_dropout(AutoConfig.from_pretrained(folder))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)


def save_pretrained(model: Any, state: dict[str, Tensor], folder: Path, *, tokenizer: str) -> None:
    """Write a Hugging Face checkpoint (safetensors, config, tokenizer) of the gathered `state` to `folder`."""
    from transformers import AutoTokenizer

    model.save_pretrained(folder, state_dict=state)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
