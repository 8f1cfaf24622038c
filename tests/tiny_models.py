"""Small random checkpoints of the four architectures that the tests run: Hugging Face folders with a tokenizer.

The tokenizer works on bytes, so it takes and gives back any text, and its ids are dense: 0 pad, 1 bos, 2 eos, 3 unk,
then the 256 bytes. Weights are drawn wide enough that a stale or a permuted tensor moves log-probabilities visibly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
CONTEXT_LENGTH = 256

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer() -> Any:
    """A byte-level Hugging Face tokenizer of VOCAB_SIZE tokens, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(family: str, *, tied: bool = True, vocab_size: int = VOCAB_SIZE) -> Any:
    """The config of a two-layer model with head size 32, the least that vLLM's CPU attention takes."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    if family == "gpt2":
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=CONTEXT_LENGTH, **no_dropout, **common)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT_LENGTH,
    }
    if family == "qwen3":
        shape["head_dim"] = 32
    configs = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    return configs[family](**shape, **common)


def tiny_checkpoint(
    folder: Path | str,
    family: str = "llama",
    *,
    tied: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
) -> Path:
    """`folder`, now holding a causal language model of `family` with random weights in `dtype`, and its tokenizer.

    Norms and biases are random too (a library's own initialisation leaves them at one and zero, where a mistake in
    their transfer would not show). The global random state is left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM

    assert vocab_size >= VOCAB_SIZE, f"the tokenizer alone has {VOCAB_SIZE} tokens"
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, tied=tied, vocab_size=vocab_size))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
