"""How large a network is, and how much memory a learner rank needs for it: arithmetic, before anything is started.

Bytes of one rank on its device, unless it says otherwise. What is counted, and why, stands in docs/cluster.md beside
what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from conf.schema import NF4, LearnerConfig
from learner.packing import LOGIT_BYTES

FLOAT32 = 4
BYTES = {"float32": 4, "bfloat16": 2}
FOUR_BITS = 0.5 + 0.127 / 8  # bytes a weight, with its share of the scales: arXiv 2305.14314, section 3
LOGIT_COPIES = 4  # a chunk's logits, their log-softmax, and a gradient of each
# Of the elements that DeepSpeed 0.19.8 holds for a time, unless it is told otherwise: deepspeed/runtime/zero/config.py.
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
}


@dataclass(frozen=True)
class NetworkSize:
    """What the shape of a transformer says of its memory. Counts are of elements."""

    groups: tuple[int, ...]  # parameters of each layer group, tied ones once
    layers: int
    hidden: int
    intermediate: int
    query_width: int  # heads x width of one
    key_width: int
    vocabulary: int
    adapters: int = 0  # of LoRA; if there are any, they alone are trained

    @property
    def parameters(self) -> int:
        return sum(self.groups)

    @property
    def trained(self) -> int:
        return self.adapters or self.parameters

    @property
    def largest_group(self) -> int:
        return max(self.groups)

    def in_four_bits(self, width: int) -> int:
        """Return the bytes of what `actors.four_bits` loads; an element of embeddings and head has `width`."""
        in_layers = sum(self.groups[1 : 1 + self.layers])
        return ceil(FOUR_BITS * in_layers) + width * (self.parameters - in_layers)

    @property
    def layer_activations(self) -> int:
        """Elements that one layer keeps of a token for the way back: norms, attention, and a gated feed-forward part.

        Two norms keep what they are given, what they divided by and what they gave; attention its queries, keys, values
        and what it gave, twice since it is laid out anew; the feed-forward part four of its width.
        """
        return 6 * self.hidden + 3 * self.query_width + 2 * self.key_width + 4 * self.intermediate

    @staticmethod
    def of(config: Any, *, scalar: bool = False, lora_rank: int | None = None) -> NetworkSize:
        """Return the size of a Hugging Face config's model: a language model, or with `scalar` one with one label.

        The model is built without memory (torch's meta device), so ties and odd architectures count as they are.
        """
        import torch
        from torch import nn
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        from actors.weights import manifest_of

        auto: Any = AutoModelForCausalLM
        if scalar:
            auto, config.num_labels = AutoModelForSequenceClassification, 1
        with torch.device("meta"):
            model = auto.from_config(config)
        text = config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        head = None if scalar else model.get_output_embeddings()
        adapters = 0
        if lora_rank is not None:
            linear = [one for one in model.modules() if isinstance(one, nn.Linear) and one is not head]
            adapters = sum(lora_rank * (one.in_features + one.out_features) for one in linear)
        return NetworkSize(
            groups=tuple(sum(prod(meta.shape) for meta in group) for group in manifest_of(model, "float32").groups),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            query_width=text.num_attention_heads * width,
            key_width=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * width,
            vocabulary=text.vocab_size,
            adapters=adapters,
        )


@dataclass(frozen=True)
class RankMemory:
    """What one network takes of a learner rank, in bytes, on the device and on the host."""

    device: Mapping[str, int]  # what stays
    host: Mapping[str, int]
    passing: Mapping[str, int]  # what is there only while a pass runs, on the device
    stepping: Mapping[str, int]  # and while the optimizer steps


def rank_memory(
    network: NetworkSize, learner: LearnerConfig, *, zero: Mapping[str, Any], num_ranks: int, trained: bool
) -> RankMemory:
    """Return the memory of a network under ZeRO-3: Rajbhandari et al. 2020 (arXiv 1910.02054), section 5.

    Args:
        zero: DeepSpeed's settings, as `learner.zero.deepspeed_config` has them under zero_optimization.
        trained: False for a frozen network, which has neither gradients nor an optimizer.
    """
    width = BYTES[learner.dtype]
    if not trained and learner.reference_dtype == NF4:  # whole on every rank
        return RankMemory({"parameters in 4 bits": network.in_four_bits(width)}, {}, {}, {})
    shard = ceil(network.parameters / num_ranks)
    states = {"parameters": width * shard}
    offloaded: dict[str, int] = {}
    if learner.offload_parameters != "none":
        offloaded |= {"parameters": states.pop("parameters")}
    # Each network's stay after its passes, as far as DeepSpeed expects to need them again, or all of them if it is told
    # to keep tensors as large as these: beside the flat tensor that is this rank's shard.
    live = _setting(zero, "stage3_max_live_parameters") + network.largest_group
    if zero.get("stage3_param_persistence_threshold", 0) >= network.parameters:
        live = network.parameters
    states["gathered parameters"] = width * min(network.parameters, live)
    passing: dict[str, int] = {}
    stepping: dict[str, int] = {}
    if trained:
        trained_shard = ceil(network.trained / num_ranks)
        optimizer = {"gradients": width * trained_shard, "master weights": FLOAT32 * trained_shard}
        optimizer["AdamW's moments"] = 2 * FLOAT32 * trained_shard
        if learner.offload_optimizer == "none":
            states |= optimizer
            stepping["gradients in float32"] = FLOAT32 * min(trained_shard, _setting(zero, "sub_group_size"))
        else:
            offloaded |= optimizer | {"gradients": (width + FLOAT32) * trained_shard}  # added up in float32 there
        bucket = width * min(network.trained, _setting(zero, "reduce_bucket_size"))
        passing["gradient buckets"] = bucket * (2 if num_ranks > 1 else 1)
        passing["largest gradient"] = width * min(network.trained, network.largest_group)
    in_memory = offloaded if "nvme" not in (learner.offload_optimizer, learner.offload_parameters) else {}
    return RankMemory(states, in_memory, passing, stepping)


def activations(network: NetworkSize, learner: LearnerConfig, *, tokens: int, states: int) -> dict[str, int]:
    """Return what a forward pass keeps for the way back, of a micro-batch of so many tokens.

    `states` are those of them that go through the vocabulary projection, 0 without one.
    """
    width = BYTES[learner.dtype]
    layer = tokens * (network.layer_activations * width + 2 * network.hidden * (FLOAT32 - width))  # norms in float32
    if learner.gradient_checkpointing:
        kept = network.layers * tokens * network.hidden * width + layer
    else:
        kept = network.layers * layer
    logits = min(FLOAT32 * states * network.vocabulary, LOGIT_BYTES) * LOGIT_COPIES
    return {"activations": kept} | ({"logits": logits} if logits else {})


def checkpoint_bytes(network: NetworkSize) -> int:
    """Return what a checkpoint holds of a trained network, over all ranks: master weights and AdamW's two moments."""
    return 3 * FLOAT32 * network.trained


def _setting(zero: Mapping[str, Any], name: str) -> int:
    return int(zero.get(name, DEFAULTS[name]))
