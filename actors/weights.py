"""How model weights travel from the learner to a generator: the messages, their checksums and the wire.

Both sides share this module, so that neither knows the other. It imports torch alone: not vLLM, not DeepSpeed, not Ray.
One update is, for every group of the manifest in turn, one packed message, and at the end one int64 message with the
checksum of every tensor, taken by the sender before packing, and the version.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, Store, TCPStore  # type: ignore[attr-defined]

ALIGNMENT = 16  # bytes; a view of any dtype may start at each tensor of a message
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
    """Everything that one update sends, in order; each group is one message."""

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


def message_layout(group: Sequence[WeightMeta]) -> tuple[list[int], int]:
    """The byte at which each tensor of `group` starts in its message, and the length of the message."""
    offsets, end = [], 0
    for meta in group:
        offsets.append(end)
        end += -(-meta.num_bytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def pack(group: Sequence[WeightMeta], tensors: Sequence[Tensor]) -> Tensor:
    """One uint8 message [num_bytes] with `tensors`, on their device. Padding is zero."""
    offsets, length = message_layout(group)
    message = torch.zeros(length, dtype=torch.uint8, device=tensors[0].device)
    for meta, offset, tensor in zip(group, offsets, tensors, strict=True):
        assert (tensor.dtype, tuple(tensor.shape)) == (meta.torch_dtype, meta.shape), meta.name
        message[offset : offset + meta.num_bytes].copy_(_bytes(tensor))
    return message


def unpack(group: Sequence[WeightMeta], message: Tensor) -> list[Tensor]:
    """The tensors of `group` as views into `message`: valid for as long as nothing is written into it."""
    offsets, length = message_layout(group)
    assert (message.dtype, message.numel()) == (torch.uint8, length)
    return [
        message[offset : offset + meta.num_bytes].view(meta.torch_dtype).view(meta.shape)
        for meta, offset in zip(group, offsets, strict=True)
    ]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


# The constants of SplitMix64 (Steele, Lea, Flood 2014), as signed 64-bit integers.
_STEP, _FIRST, _SECOND = (_signed(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(words: Tensor, bits: int) -> Tensor:
    """The logical right shift that torch has no operation for."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def checksum(tensor: Tensor) -> int:
    """A signed 64-bit integer of the bytes of `tensor` in row-major order, equal on every device.

    Each 64-bit word, offset by its position, goes through the bijective finaliser of SplitMix64, and the results are
    summed modulo 2**64. So any change within one word always changes the checksum; any other change, a swap of two
    words among them, leaves it with a probability of 2**-64. It guards against mistakes, not against an adversary.
    """
    data = _bytes(tensor)
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


def open_store(host: str, port: int | None, *, timeout: float) -> TCPStore:
    """The rendezvous of a transport: served here on a free port where `port` is None, else joined. Seconds."""
    limit = timedelta(seconds=timeout)
    return TCPStore(host, port or 0, is_master=port is None, wait_for_workers=False, timeout=limit)


class Transport(Protocol):
    """The wire under an update. Rank 0 is the learner; every other rank is one process of a generator."""

    device: torch.device  # where a tensor must be to be broadcast

    def broadcast(self, tensor: Tensor) -> None:
        """Give every rank rank 0's `tensor`, in place. Raises RuntimeError when a peer is lost or late."""
        ...

    def close(self) -> None:
        """Drop the connections, so that a waiting peer gets an error and not a silence."""
        ...


class GlooTransport:
    """A gloo process group of its own, independent of torch's default group."""

    device = torch.device("cpu")

    def __init__(self, store: Store, *, rank: int, world_size: int, timeout: float) -> None:
        """Returns when all `world_size` ranks have joined over `store`; `timeout` in seconds holds for every step."""
        self._timeout = timedelta(seconds=timeout)
        store.set_timeout(self._timeout)
        self._group: Any = ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, self._timeout)

    def broadcast(self, tensor: Tensor) -> None:
        if self._group is None:
            raise RuntimeError("the weight transport is closed")
        options = BroadcastOptions()
        options.rootRank = 0
        options.timeout = self._timeout
        self._group.broadcast([tensor], options).wait()

    def close(self) -> None:
        self._group = None
