"""The wire under a weight update: buckets from a learner rank to every process of its generators at once.

`join` makes a gloo group of all of them, over which they meet. Which way the buckets go is `wire`:

- HOST, between processes on CPUs: two slots of a file that all have mapped, if they can, which is tried; else gloo.
- NCCL, between GPUs; IPC, between two processes on one GPU: `actors/gpu_transport.py`.

On any of them a peer that is lost or late is an error for all who wait for it. Rank 0 is the learner.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    AllreduceOptions,
    BroadcastOptions,
    PrefixStore,
    ProcessGroupGloo,
    ReduceOp,
    Store,
    TCPStore,
)

HOST, NCCL, IPC = "host", "nccl", "ipc"
SHARED_MEMORY = Path("/dev/shm")
PREFIX = "manta-weights-"
TOKEN_BYTES = 16


def open_store(host: str, port: int | None, *, timeout: float) -> TCPStore:
    """The rendezvous of a transport: served here on a free port where `port` is None, else joined. Seconds."""
    limit = timedelta(seconds=timeout)
    return TCPStore(host, port or 0, is_master=port is None, wait_for_workers=False, timeout=limit)


class Transport(Protocol):
    """Two slots of one bucket each, used in turn. Every method raises RuntimeError when a peer is lost or late."""

    device: torch.device  # where slots are

    def slot(self) -> Tensor:
        """Rank 0: where the next bucket is to be written, uint8, while the last one is still on its way."""
        ...

    def settle(self) -> None:
        """Rank 0: return when the last bucket needs no more of this process."""
        ...

    def send(self, num_bytes: int) -> None:
        """Rank 0: give every rank the first bytes of the slot."""
        ...

    def receive(self, num_bytes: int) -> Tensor:
        """The next bucket, uint8; valid until this transport is used again."""
        ...

    def broadcast(self, tensor: Tensor) -> None:
        """Give every rank rank 0's `tensor`, of the CPU, in place, once all have done with the buckets before."""
        ...

    def close(self) -> None:
        """Drop the connections, so that a waiting peer gets an error and not a silence."""
        ...


def join(
    store: Store,
    *,
    rank: int,
    world_size: int,
    timeout: float,
    bucket_bytes: int,
    wire: str = HOST,
    device: torch.device | None = None,
) -> Transport:
    """Returns when all `world_size` ranks have joined over `store`; `timeout` in seconds holds for every step.

    On the wire HOST memory is shared if every rank can map the same file, which is found by trying. The others need the
    `device` where this rank's buckets are to be.
    """
    group = GlooGroup(store, rank=rank, world_size=world_size, timeout=timeout)
    if wire != HOST:
        from actors import gpu_transport

        assert device is not None, wire
        if wire == IPC:
            return gpu_transport.ipc_transport(group, rank=rank, bucket_bytes=bucket_bytes, device=device)
        return gpu_transport.nccl_transport(
            group,
            PrefixStore("nccl", store),
            rank=rank,
            world_size=world_size,
            bucket_bytes=bucket_bytes,
            device=device,
        )
    memory = _shared_memory(group, rank=rank, num_bytes=2 * bucket_bytes)
    if memory is None:
        return GlooTransport(group, bucket_bytes)
    return SharedMemoryTransport(group, memory)


class GlooGroup:
    """A gloo process group of its own, independent of torch's default group."""

    def __init__(self, store: Store, *, rank: int, world_size: int, timeout: float) -> None:
        self.timeout_s, self._timeout = timeout, timedelta(seconds=timeout)
        store.set_timeout(self._timeout)
        self._group: Any = ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, self._timeout)

    def begin_broadcast(self, tensor: Tensor) -> Callable[[], Any]:
        """Begin to give every rank rank 0's `tensor`; return what waits until it needs no more of this process."""
        options = BroadcastOptions()
        options.rootRank = 0
        options.timeout = self._timeout
        wait: Callable[[], Any] = self._joined().broadcast([tensor], options).wait
        return wait

    def broadcast(self, tensor: Tensor) -> None:
        self.begin_broadcast(tensor)()

    def agreed(self, yes: bool) -> bool:
        """Whether all ranks say yes; returns when all have come here."""
        said, options = torch.tensor([int(yes)]), AllreduceOptions()
        options.reduceOp = ReduceOp(ReduceOp.MIN)
        options.timeout = self._timeout
        self._joined().allreduce([said], options).wait()
        return bool(said)

    def _joined(self) -> Any:
        if self._group is None:
            raise RuntimeError("the weight transport is closed")
        return self._group

    def close(self) -> None:
        self._group = None


class GlooTransport:
    """Buckets by gloo. Rank 0 packs one while the last one is on its way."""

    device = torch.device("cpu")

    def __init__(self, group: GlooGroup, bucket_bytes: int) -> None:
        self._group, self._bucket_bytes = group, bucket_bytes
        self._slots: list[Tensor] = []
        self._turn = 0
        self._sending: Callable[[], Any] | None = None

    def slot(self) -> Tensor:
        if len(self._slots) <= self._turn:
            self._slots.append(torch.empty(self._bucket_bytes, dtype=torch.uint8, device=self.device))
        return self._slots[self._turn]

    def settle(self) -> None:
        if self._sending is not None:
            self._sending()
            self._sending = None

    def send(self, num_bytes: int) -> None:
        self.settle()
        self._sending = self._begun(self.slot()[:num_bytes])
        self._turn = 1 - self._turn

    def receive(self, num_bytes: int) -> Tensor:
        message = self.slot()[:num_bytes]  # one slot: vLLM has taken the last bucket in
        self._begun(message)()
        return message

    def _begun(self, message: Tensor) -> Callable[[], Any]:
        """Begin to give every rank rank 0's message; return what waits until it needs no more of this process."""
        return self._group.begin_broadcast(message)

    def broadcast(self, tensor: Tensor) -> None:
        self.settle()
        self._group.broadcast(tensor)

    def close(self) -> None:
        self._sending = None
        self._group.close()


class SharedMemoryTransport:
    """Buckets through memory that all ranks have mapped: of the host, or of the GPU that they are on.

    One meeting of all for each bucket says two things: rank 0 has written it, and the others have done with the one
    before. So rank 0 writes the next one while the others read this one.
    """

    def __init__(self, group: GlooGroup, memory: Tensor) -> None:
        self.device = memory.device
        self._group, self._slots = group, memory.view(2, -1)
        self._turn = 0

    def slot(self) -> Tensor:
        return self._slots[self._turn]

    def settle(self) -> None:
        pass

    def send(self, num_bytes: int) -> None:
        self._meet()
        self._turn = 1 - self._turn

    def receive(self, num_bytes: int) -> Tensor:
        self._meet()
        message = self._slots[self._turn][:num_bytes]
        self._turn = 1 - self._turn
        return message

    def broadcast(self, tensor: Tensor) -> None:
        self._meet()
        self._group.broadcast(tensor)

    def _meet(self) -> None:
        """Return when all are here, with what each of them has asked of its GPU done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._group.agreed(True)

    def close(self) -> None:
        self._group.close()


def _shared_memory(group: GlooGroup, *, rank: int, num_bytes: int) -> Tensor | None:
    """Memory that all ranks have mapped, uint8 and zero, or None if one of them cannot.

    Rank 0 makes a file and says its name and what is in it, so that a file of the same name on another host does not
    count. The file is gone when this returns; the memory lives as long as someone has it mapped.
    """
    token = torch.zeros(2 * TOKEN_BYTES, dtype=torch.uint8)  # of the name, of the content
    path, memory = None, None
    try:
        if rank == 0:
            token = torch.frombuffer(bytearray(secrets.token_bytes(2 * TOKEN_BYTES)), dtype=torch.uint8)
            path = _path(token)
            memory = _made(path, token, num_bytes)
        group.broadcast(token)
        if rank != 0:
            memory = _found(_path(token), token, num_bytes)
        shared = group.agreed(memory is not None)
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
    if memory is None or not shared:
        return None
    if rank == 0:
        memory[:TOKEN_BYTES] = 0
    return memory


def _path(token: Tensor) -> Path:
    return SHARED_MEMORY / f"{PREFIX}{bytes(token[:TOKEN_BYTES].tolist()).hex()}"


def _made(path: Path, token: Tensor, num_bytes: int) -> Tensor | None:
    """A new file with the token's second half in it, mapped; None if there is no room or no such place."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)  # a lack of room is an error here, and not a signal later
            memory = _mapped(descriptor, num_bytes)
        finally:
            os.close(descriptor)
        memory[:TOKEN_BYTES] = token[TOKEN_BYTES:]
        return memory
    return None


def _found(path: Path, token: Tensor, num_bytes: int) -> Tensor | None:
    with suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            memory = _mapped(descriptor, num_bytes)
        finally:
            os.close(descriptor)
        if torch.equal(memory[:TOKEN_BYTES], token[TOKEN_BYTES:]):
            return memory
    return None


def _mapped(descriptor: int, num_bytes: int) -> Tensor:
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes, flags=flags), dtype=torch.uint8)
