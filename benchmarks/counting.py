"""A model that counts down, so that the length of every response is set by its prompt, whoever samples it.

Every token but the special ones has a count, 1 to MAX_LENGTH, and is one of VARIANTS tokens with that count. After a
token of count c the model gives nearly all probability, in equal parts, to those of count c - 1, and after count 1 to
EOS: a prompt that ends with count c has a response of c tokens, EOS among them. The layers between are as large as in
any model, and are computed in full; only what they add to the counts is small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCABULARY = 256, 768, 6, 4, 2048
DESCRIPTION = f"Llama, hidden {HIDDEN}, {LAYERS} layers, intermediate {INTERMEDIATE}, vocabulary {VOCABULARY}, float32"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
MAX_LENGTH = HIDDEN  # a dimension of the hidden state for each count
VARIANTS = 7
SHARPNESS = 1.5  # logit of a right token: this times sqrt(HIDDEN); that of a wrong one is near 0
SMALL = 0.002  # standard deviation of the weights that write into the residual stream
PROMPT_LENGTH = 32
LOGNORMAL_MEAN, LOGNORMAL_SIGMA = 64, 1.0


def token_of(count: int, variant: int) -> int:
    """Return the id of a token."""
    return len(SPECIAL_TOKENS) + (count - 1) * VARIANTS + variant


def lengths(workload: str, num_prompts: int) -> list[int]:
    """Return the response lengths of a workload: a number, for all; or `lognormal`, its quantiles, cut to MAX_LENGTH.

    The quantiles stand for draws without their luck; the location is such that their mean after the cut is
    LOGNORMAL_MEAN, up to rounding.
    """
    if workload != "lognormal":
        length = int(workload)
        assert 1 <= length <= MAX_LENGTH, length
        return [length] * num_prompts
    normal = [NormalDist().inv_cdf((place + 0.5) / num_prompts) for place in range(num_prompts)]

    def at(location: float) -> list[int]:
        return [min(max(round(math.exp(location + LOGNORMAL_SIGMA * z)), 1), MAX_LENGTH) for z in normal]

    low, high = 0.0, math.log(MAX_LENGTH)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if float(np.mean(at(middle))) < LOGNORMAL_MEAN else (low, middle)
    return at(high)


def prompts(response_lengths: Sequence[int], *, seed: int) -> list[list[int]]:
    """Return a prompt of PROMPT_LENGTH random tokens for each response length, which its last token counts."""
    rng = np.random.default_rng(seed)
    return [
        [
            *(
                token_of(int(rng.integers(1, MAX_LENGTH + 1)), int(rng.integers(VARIANTS)))
                for _ in range(PROMPT_LENGTH - 1)
            ),
            token_of(length, int(rng.integers(VARIANTS))),
        ]
        for length in response_lengths
    ]


@dataclass(frozen=True)
class Paths:
    """What the contestants start from: two checkpoints with their tokenizers, and prompts as text."""

    policy: Path
    reward: Path
    prompts: Path


def make(folder: Path, token_ids: Sequence[Sequence[int]], *, seed: int) -> Paths:
    """Write the policy, a reward model of the same size and the prompts into a folder."""
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    paths = Paths(folder / "policy", folder / "reward", folder / "prompts.jsonl")
    torch.manual_seed(seed)
    policy = LlamaForCausalLM(config())
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.normal_(0, SMALL)
        embedding, head = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
        embedding.zero_()
        head.zero_()
        for count in range(1, MAX_LENGTH + 1):
            for variant in range(VARIANTS):
                embedding[token_of(count, variant), count - 1] = 1
                if count < MAX_LENGTH:
                    head[token_of(count, variant), count] = SHARPNESS
        head[EOS_ID, 0] = SHARPNESS
    policy.save_pretrained(paths.policy)
    LlamaForSequenceClassification(config(num_labels=1)).save_pretrained(paths.reward)
    for checkpoint in (paths.policy, paths.reward):
        tokenizer().save_pretrained(checkpoint)
    paths.prompts.write_text(
        "".join(json.dumps({"prompt": " ".join(f"t{token}" for token in ids)}) + "\n" for ids in token_ids)
    )
    return paths


def config(**more: Any) -> Any:
    """Return the config of the models."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        **more,
    )


def tokenizer() -> Any:
    """Return a tokenizer whose tokens are words: t4 is token 4."""
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(SPECIAL_TOKENS)}
    words |= {f"t{number}": number for number in range(len(SPECIAL_TOKENS), VOCABULARY)}
    core = Tokenizer(WordLevel(words, unk_token=SPECIAL_TOKENS[UNK_ID]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"t\d+"), "removed", invert=True)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **names)


def forward_operations(num_tokens: int, num_logits: int, *, start: int = 0) -> float:
    """Return the floating-point operations of a forward pass of a sequence, two for each multiplication.

    Matrix products and causal attention alone, at the positions from `start` to `num_tokens`, of which `num_logits` go
    through the vocabulary projection.
    """
    of_token = 2 * LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    seen = (num_tokens * (num_tokens + 1) - start * (start + 1)) / 2  # keys that the positions look at, in all
    return of_token * (num_tokens - start) + 4 * LAYERS * HIDDEN * seen + 2 * HIDDEN * VOCABULARY * num_logits


def iteration_operations(response_lengths: Sequence[int]) -> float:
    """Return the operations that one iteration of PPO of one epoch cannot do without.

    A forward pass for generation (every response token but the last goes in), the score, the reference, the old
    log-probabilities and the values; forward and backward, three forward passes' worth, of policy and critic.
    """
    total = 0.0
    for length in response_lengths:
        whole = PROMPT_LENGTH + length
        with_logits, without = forward_operations(whole, length), forward_operations(whole, 0)
        generation = forward_operations(whole - 1, length)
        total += generation + without + with_logits + with_logits + without + 3 * (with_logits + without)
    return total
