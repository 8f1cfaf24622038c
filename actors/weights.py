"""What both ends of a weight update share: the manifest, the buckets that it is cut into, and checksums.

Neither end knows the other. Nothing here imports vLLM, DeepSpeed or Ray. One update is the buckets of the manifest, in
order, and at the end one int64 message with the checksum of every tensor, taken by the sender before packing, and the
version. `actors/weight_transport.py` is the wire.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

ALIGNMENT = 64  # bytes; a view of any dtype may start at each tensor of a bucket, and rows start at cache lines
CHECKSUM_CHUNK = {"cpu": 1 << 14, "cuda": 1 << 22}  # 64-bit words in work at once: a processor's cache; few kernels


class WeightMismatchError(RuntimeError):
    """The weights of a generator are not those of the learner.

    `name` is the parameter in Hugging Face's naming; `check` is "wire" for what arrived and "held" for what the engine
    computes with.
    """

    def __init__(self, name: str, check: str, detail: str) -> None:
        super().__init__(name, check, detail)
        self.name, self.check, self.detail = name, check, detail

    def __str__(self) -> str:
        return f"{self.name}: {self.check} check failed: {self.detail}"

    @classmethod
    def parse(cls, text: str) -> WeightMismatchError | None:
        """The error whose message `text` quotes, as one that vLLM brings back from another process does."""
        quoted = re.search(r"([\w.]+): (wire|held) check failed: ([^'\"\n]*)", text)
        return None if quoted is None else cls(*quoted.groups())


@dataclass(frozen=True)
class WeightMeta:
    """One parameter as it is sent: Hugging Face name, dtype without "torch.", shape as stored.

    `transposed` marks GPT-2's Conv1D weights, which are stored [in, out] where a linear layer has [out, in].
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype), self.dtype
        return dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.torch_dtype.itemsize

    def as_linear(self, tensor: Tensor) -> Tensor:
        """A view of `tensor` as [out, in]."""
        return tensor.t() if self.transposed else tensor


@dataclass(frozen=True)
class Manifest:
    """Everything that one update sends, in order, by layer; a bucket never holds parts of two groups."""

    groups: tuple[tuple[WeightMeta, ...], ...]

    def __post_init__(self) -> None:
        names = [meta.name for meta in self]
        assert names, "a manifest names at least one parameter"
        assert all(self.groups), "a group holds at least one parameter"
        assert len(set(names)) == len(names), "a parameter is sent once"

    def __iter__(self) -> Any:
        return (meta for group in self.groups for meta in group)

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def to_plain(self) -> list[list[list[Any]]]:
        """The manifest as lists, strings and numbers, for a call between processes."""
        return [[[m.name, m.dtype, list(m.shape), m.transposed] for m in group] for group in self.groups]

    @classmethod
    def from_plain(cls, plain: Sequence[Sequence[Sequence[Any]]]) -> Manifest:
        return cls(
            tuple(
                tuple(WeightMeta(name, dtype, tuple(shape), transposed) for name, dtype, shape, transposed in group)
                for group in plain
            )
        )


def manifest_of(model: nn.Module, dtype: str) -> Manifest:
    """The manifest of a Hugging Face `model` sent in `dtype`: a group for each decoder layer, before and after.

    Groups are runs of parameters with the same outermost index in their names ("model.layers.3."), in the order of
    `named_parameters()`, so tied weights appear once. Reads DeepSpeed's `ds_shape` where ZeRO-3 has left a parameter
    empty.
    """
    transposed = {
        f"{path}.weight" for path, module in model.named_modules() if type(module).__name__ == "Conv1D"
    }  # transformers.pytorch_utils.Conv1D
    metas = [
        WeightMeta(name, dtype, tuple(getattr(parameter, "ds_shape", parameter.shape)), name in transposed)
        for name, parameter in model.named_parameters()
    ]
    return Manifest(tuple(tuple(group) for _, group in groupby(metas, key=lambda meta: _layer_of(meta.name))))


def _layer_of(name: str) -> str:
    """ "model.layers.3" for "model.layers.3.mlp.up_proj.weight"; "" for a name without an index."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if index is None else ".".join(parts[: index + 1])


@dataclass(frozen=True)
class Part:
    """The bytes `start` to `stop` of parameter `meta`, at byte `at` of their bucket."""

    meta: WeightMeta
    start: int
    stop: int
    at: int

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.meta.num_bytes

    @property
    def last(self) -> bool:
        return self.stop == self.meta.num_bytes

    def within(self, bucket: Tensor) -> Tensor:
        """The bytes of this part as a view of `bucket`, uint8."""
        return bucket[self.at : self.at + self.stop - self.start]


@dataclass(frozen=True)
class Bucket:
    """What one message carries, of the group with this index."""

    group: int
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        last = self.parts[-1]
        return last.at + last.stop - last.start


def buckets_of(manifest: Manifest, bucket_bytes: int) -> list[Bucket]:
    """`manifest` cut into buckets of at most `bucket_bytes`, a multiple of ALIGNMENT.

    A tensor that fits into a bucket is never cut; a larger one begins with a bucket of its own.
    """
    assert bucket_bytes > 0, bucket_bytes
    assert bucket_bytes % ALIGNMENT == 0, bucket_bytes
    buckets = []
    for index, group in enumerate(manifest.groups):
        parts: list[Part] = []
        end = 0
        for meta in group:
            start = 0
            while start < meta.num_bytes or start == 0:
                full = end + meta.num_bytes > bucket_bytes if start == 0 else True
                if parts and full:
                    buckets.append(Bucket(index, tuple(parts)))
                    parts, end = [], 0
                stop = min(meta.num_bytes, start + bucket_bytes)
                parts.append(Part(meta, start, stop, end))
                end += -(-(stop - start) // ALIGNMENT) * ALIGNMENT
                start = max(stop, 1)
        buckets.append(Bucket(index, tuple(parts)))
    return buckets


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of `tensor` in row-major order, uint8; a view where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


# The constants of SplitMix64 (Steele, Lea, Flood 2014), as signed 64-bit integers.
_STEP, _FIRST, _SECOND = (_signed(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(words: Tensor, bits: int) -> Tensor:
    """The logical right shift that torch has no operation for."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def checksum_kind(device: torch.device) -> str:
    """The checksum that is quick for tensors on `device`, as `checksum` takes it."""
    return "xxh3" if device.type == "cpu" else "splitmix64"


def checksum(tensor: Tensor, kind: str) -> int:
    """A signed 64-bit integer of the bytes of `tensor` in row-major order, equal on every device.

    Of two different tensors it is the same with a probability of about 2**-64. It guards against mistakes, not against
    an adversary. "xxh3" is XXH3-64 of the memory, at the speed of reading it; a tensor of another device is copied to
    the CPU for it. "splitmix64" is made of torch operations, and runs where the tensor is.
    """
    data = bytes_of(tensor)
    if kind == "xxh3":
        return _signed(xxhash.xxh3_64_intdigest(data.cpu().numpy().data))
    assert kind == "splitmix64", kind
    return _splitmix64(data)


def _splitmix64(data: Tensor) -> int:
    """The sum modulo 2**64 of SplitMix64's bijective finaliser of each 64-bit word, offset by its position.

    So any change within one word always changes it.
    """
    size = 8 * CHECKSUM_CHUNK[data.device.type]
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, data.numel(), size):
        chunk = data[start : start + size]
        padded = torch.zeros(-(-chunk.numel() // 8) * 8, dtype=torch.uint8, device=data.device)
        padded[: chunk.numel()] = chunk  # a slice of a message need not start at a multiple of eight bytes
        words = padded.view(torch.int64)
        words += torch.arange(1 + start // 8, 1 + start // 8 + words.numel(), device=data.device) * _STEP
        words = (words ^ _shifted(words, 30)) * _FIRST
        words = (words ^ _shifted(words, 27)) * _SECOND
        total += (words ^ _shifted(words, 31)).sum()
    return int(total)
