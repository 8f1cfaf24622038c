"""Weights in 4 bits, for networks that are never trained: the NormalFloat of QLoRA.

Dettmers et al. 2023 (arXiv 2305.14314), by bitsandbytes. Linear layers are stored so and computed in a wider dtype;
embeddings, norms and the head, which transformers finds, stay as they are.
"""

from __future__ import annotations

from typing import Any


def four_bits(compute_dtype: str, *, device: str) -> dict[str, Any]:
    """Return what `from_pretrained` takes to load a model so on `device`; the rest of it comes in `compute_dtype`.

    The scales of the blocks are quantised too (section 3 of the paper).
    """
    import torch
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, compute_dtype)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "dtype": dtype, "device_map": {"": device}}
