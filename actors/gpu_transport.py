"""The wires between GPUs: NCCL, and CUDA IPC where both processes are on one GPU.

Each is one adapter to the pinned vLLM 0.32 or torch 2.13, read in their sources, and not yet run on a GPU. What uses
them (buckets, checksums, meetings over gloo) is what the tests run on CPUs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from actors.weight_transport import GlooGroup, GlooTransport, SharedMemoryTransport

LOOK_S = 0.0005  # how often a transfer on a GPU is looked at
# Among the arguments of torch's rebuild_cuda_tensor: the GPU, by the number that it has for this process; and those
# from there on, which say where the memory is. Those before say what the tensor is, which both sides know.
DEVICE_ARGUMENT, HANDLE = 6, 7


def nccl_transport(
    group: GlooGroup, store: Any, *, rank: int, world_size: int, bucket_bytes: int, device: torch.device
) -> NcclTransport:
    """Join a communicator of vLLM's, apart from any that the engine or DeepSpeed have: one GPU for each rank."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup

    meeting = StatelessProcessGroup(rank=rank, world_size=world_size, store=store)
    before = torch.cuda.current_stream(device)
    communicator = PyNcclCommunicator(meeting, device=device)
    torch.cuda.set_stream(before)  # which vLLM replaces by one of its own
    if not group.agreed(communicator.available):
        raise RuntimeError("NCCL could not be loaded by the learner or by a generator")
    return NcclTransport(group, communicator, bucket_bytes)


class NcclTransport(GlooTransport):
    """Buckets by NCCL on a stream of their own. All meet over gloo before each, so that NCCL waits for nobody."""

    def __init__(self, group: GlooGroup, communicator: Any, bucket_bytes: int) -> None:
        super().__init__(group, bucket_bytes)
        self.device = communicator.device
        self._communicator = communicator
        self._stream = torch.cuda.Stream(self.device)

    def close(self) -> None:
        self._communicator.destroy()
        super().close()

    def _begun(self, message: Tensor) -> Callable[[], Any]:
        """Begin when all are here and this GPU has done what came before."""
        self._group.agreed(True)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._communicator.broadcast(message, src=0, stream=self._stream)
        event = torch.cuda.Event()
        event.record(self._stream)
        return lambda: self._wait(event)

    def _wait(self, event: Any) -> None:
        """Return when a transfer is done. Raises RuntimeError if it is not within the group's timeout."""
        deadline = time.monotonic() + self._group.timeout_s
        while not event.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"a bucket was not transferred by NCCL within {self._group.timeout_s:g} s")
            time.sleep(LOOK_S)


def ipc_transport(group: GlooGroup, *, rank: int, bucket_bytes: int, device: torch.device) -> SharedMemoryTransport:
    """Share memory of the GPU that the learner rank and the generator's process are both on, as vLLM's "ipc" does.

    Raises:
        RuntimeError: they are on different GPUs.
    """
    from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

    own = str(torch.cuda.get_device_properties(device).uuid)
    memory = torch.zeros(2 * bucket_bytes, dtype=torch.uint8, device=device) if rank == 0 else None
    words = None
    if memory is not None:
        words = json.dumps([own, *map(_plain, reduce_tensor(memory)[1][HANDLE:])]).encode()
    theirs, *handle = json.loads(_told(group, words))
    if not group.agreed(theirs == own):
        raise RuntimeError(f"the learner rank is on GPU {theirs} and the generator's process on another, such as {own}")
    if memory is None:
        storage = type(torch.empty(0, dtype=torch.uint8)._typed_storage())
        size = torch.Size([2 * bucket_bytes])
        what = (Tensor, size, (1,), 0, storage, torch.uint8, device.index)
        memory = rebuild_cuda_tensor(*what, *map(_given, handle))
    return SharedMemoryTransport(group, memory)


def _plain(argument: Any) -> Any:
    """Return bytes as something that JSON can hold, anything else as it is."""
    return {"hex": argument.hex()} if isinstance(argument, bytes) else argument


def _given(argument: Any) -> Any:
    return bytes.fromhex(argument["hex"]) if isinstance(argument, dict) else argument


def _told(group: GlooGroup, words: bytes | None) -> bytes:
    """Return what rank 0 has to say, which the others give as None."""
    length = torch.tensor([0 if words is None else len(words)], dtype=torch.int64)
    group.broadcast(length)
    content = torch.empty(int(length), dtype=torch.uint8)
    if words is not None:
        content = torch.frombuffer(bytearray(words), dtype=torch.uint8)
    group.broadcast(content)
    return bytes(content.tolist())
