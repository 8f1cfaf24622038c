"""How much memory a generator and a reward actor need, in bytes: arithmetic, before anything is started.

A generator's device is vLLM's: it takes `generator.gpu_memory_utilization` of a GPU, and what its weights and its
passes leave of that is the cache of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from actors.generator import CPU_KV_CACHE_MIB
from conf.schema import NF4, ConfigError, GeneratorConfig, RewardConfig

BYTES = {"float32": 4, "bfloat16": 2, NF4: 2}  # of an element in a pass
PREFILL_TOKENS = 8192  # of one pass of vLLM 0.32 with chunked prefill on a GPU, at most, unless told otherwise


class Shape(Protocol):
    """What has to be known of a network."""

    @property
    def parameters(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def key_width(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    def in_four_bits(self, width: int) -> int: ...


def weights(network: Shape, config: GeneratorConfig) -> int:
    """Return the weights on one of a generator's devices; embeddings are split as the rest."""
    return BYTES[config.dtype] * -(-network.parameters // config.tensor_parallel_size)


def token_cache(network: Shape, config: GeneratorConfig) -> int:
    """Return the keys and values of one token on one device; heads are split, but never one of them."""
    return 2 * network.layers * BYTES[config.dtype] * -(-network.key_width // config.tensor_parallel_size)


def passes(network: Shape, config: GeneratorConfig) -> int:
    """Return what a pass takes: its activations, and the logits of every sequence in float32."""
    activations = PREFILL_TOKENS * (2 * network.hidden + 2 * network.intermediate) * BYTES[config.dtype]
    return activations + 2 * 4 * config.max_num_seqs * network.vocabulary


def generator_memory(network: Shape, config: GeneratorConfig, *, gpu_bytes: int | None, device: str) -> dict[str, int]:
    """Return what one of a generator's devices holds while it samples; `gpu_bytes` is of the whole device."""
    own, passing = weights(network, config), passes(network, config)
    parts = {"weights": own, "passes": passing}
    if config.kv_cache_mib is not None or device == "cpu":
        cache = (config.kv_cache_mib or CPU_KV_CACHE_MIB) << 20
    elif gpu_bytes is None:
        return parts
    else:
        cache = max(int(config.gpu_memory_utilization * gpu_bytes) - own - passing, 0)
    if device == "cpu":  # vLLM multiplies by packed copies, and keeps the embedding beside that of a tied head
        parts["passes"] = passing // 8
    return parts | {"KV cache": cache}


def cache_problems(network: Shape, config: GeneratorConfig, *, limit: int, needed: int) -> Iterable[ConfigError]:
    """Return what is wrong if a GPU of `limit` bytes has no room for the cache of one sequence of `needed` tokens."""
    room = generator_memory(network, config, gpu_bytes=limit, device="cuda")["KV cache"]
    if room < needed * token_cache(network, config):
        width = config.tensor_parallel_size
        why = (
            f"its weights and passes leave {room / (1 << 30):.1f} GiB of a GPU for the cache, and one sequence of "
            f"{needed:,} tokens needs {needed * token_cache(network, config) / (1 << 30):.1f}; set it to {2 * width}"
        )
        yield ConfigError("generator.tensor_parallel_size", width, why)


def reward_memory(networks: Sequence[Shape], config: RewardConfig) -> dict[str, int]:
    """Return what a reward actor with these models holds on its device."""
    models = [source for source in config.sources if source.type == "model"]
    dtypes = [source.dtype for source in models] or ["float32"]
    widths = [BYTES[dtype] for dtype in dtypes]
    held = sum(
        network.in_four_bits(BYTES[NF4]) if dtype == NF4 else BYTES[dtype] * network.parameters
        for dtype, network in zip(dtypes, networks, strict=True)
    )
    tokens = max((source.max_batch_tokens for source in models), default=16_384)
    passing = max(
        width * tokens * (4 * network.hidden + 3 * network.intermediate)
        for width, network in zip(widths, networks, strict=True)
    )
    return {"weights": held, "passes": passing}
