"""The wires between GPUs, without one: the real classes of vLLM and torch, of which only what calls CUDA is replaced.

What is replaced are NCCL's C functions (of vLLM's `NCCLLibrary`), torch's streams and events, and the two functions of
torch that export and import memory of a GPU. Everything else is the code that runs on a cluster.
"""

from __future__ import annotations

import ctypes
import inspect
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing.reductions as reductions
from torch import Tensor
from vllm.distributed.device_communicators import pynccl, pynccl_wrapper

from actors.gpu_transport import DEVICE_ARGUMENT, HANDLE, NcclTransport
from actors.weight_transport import IPC, NCCL, SharedMemoryTransport
from actors.weights import Manifest, checksum
from learner.weight_sender import WeightSender
from tests.test_weights import BUCKET, DEVICES, GROUPS, Receiver, some_tensors

pytestmark = pytest.mark.engine

OK = 0  # ncclSuccess
UINT8 = 1  # ncclUint8


class StandInStream:
    """As torch.cuda.Stream: what is asked of it here is done at once."""

    cuda_stream = 0

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        assert isinstance(other, StandInStream)

    def synchronize(self) -> None:
        pass


class StandInEvent:
    def record(self, stream: Any) -> None:
        assert isinstance(stream, StandInStream)

    def query(self) -> bool:
        return not Nccl.stuck


class Nccl:
    """NCCL's C functions for ranks that are threads of this process; each call is remembered."""

    stuck = False

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.source = 0

    def functions(self) -> dict[str, Any]:
        names = [function.name for function in pynccl_wrapper.NCCLLibrary.exported_functions]
        known = {name: getattr(self, name) for name in names if hasattr(self, name)}

        def remembered(name: str) -> Any:
            def call(*arguments: Any) -> int:
                self.calls.append((name, arguments))
                declared = next(f for f in pynccl_wrapper.NCCLLibrary.exported_functions if f.name == name)
                assert len(arguments) == len(declared.argtypes), f"{name} as nccl.h has it"
                result: int = known[name](*arguments)
                return result

            return call

        return {name: remembered(name) for name in known}

    def ncclGetVersion(self, version: Any) -> int:  # noqa: N802, NCCL's own names
        version._obj.value = 22903
        return OK

    def ncclGetUniqueId(self, unique_id: Any) -> int:  # noqa: N802
        unique_id._obj.internal[0] = 7
        return OK

    def ncclCommInitRank(self, comm: Any, world_size: int, unique_id: Any, rank: int) -> int:  # noqa: N802
        assert unique_id.internal[0] == 7, "everybody has rank 0's"
        comm._obj.value = 1 + rank
        self.barrier.wait()
        return OK

    def ncclAllReduce(self, *_: Any) -> int:  # noqa: N802
        self.barrier.wait()
        return OK

    def ncclBroadcast(  # noqa: N802
        self, sent: Any, received: Any, count: int, dtype: int, root: int, comm: Any, stream: Any
    ) -> int:
        assert (dtype, root) == (UINT8, 0)
        rank = comm.value - 1
        if rank == root:
            self.source = sent.value
        self.barrier.wait()
        if rank != root:
            ctypes.memmove(received.value, self.source, count)
        self.barrier.wait()
        return OK

    def ncclCommAbort(self, comm: Any) -> int:  # noqa: N802
        return OK

    def ncclGetErrorString(self, result: int) -> bytes:  # noqa: N802
        return b"an error"


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Nccl:
    library = Nccl(3)

    def opened(self: Any, so_file: str | None = None) -> None:
        self._funcs = library.functions()

    monkeypatch.setattr(pynccl_wrapper.NCCLLibrary, "__init__", opened)
    monkeypatch.setattr(pynccl, "current_stream", StandInStream)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: nullcontext())
    for name, stand_in in (
        ("Stream", StandInStream),
        ("Event", StandInEvent),
        ("current_stream", StandInStream),
        ("set_stream", lambda stream: None),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Nccl, "stuck", False)
    return library


def connected(wire: str, num_receivers: int, timeout: float = 20) -> tuple[WeightSender, list[Receiver]]:
    sender = WeightSender(
        Manifest(GROUPS),
        num_receivers=num_receivers,
        bucket_bytes=BUCKET,
        device=str(DEVICES[wire]),
        wire=wire,
        timeout=timeout,
    )
    receivers = [Receiver(sender.receiver_info(1 + rank)) for rank in range(num_receivers)]
    for receiver in receivers:
        receiver.start()
    sender.connect()
    return sender, receivers


def check_arrived(sender: WeightSender, receivers: list[Receiver], kind: type) -> None:
    groups = some_tensors()
    sender.send(iter(groups), version=7)
    sent = {name: tensor for group in groups for name, tensor in group}
    for receiver in receivers:
        receiver.join(timeout=20)
        assert receiver.error is None
        assert isinstance(receiver.wire, kind)
        assert all(torch.equal(sent[name], tensor) for name, tensor in receiver.update.items())
        assert receiver.trailer == [*(checksum(tensor, "xxh3") for tensor in sent.values()), 7]


def test_buckets_go_to_all_by_nccl_one_message_each(nccl: Nccl) -> None:
    sender, receivers = connected(NCCL, 2)
    check_arrived(sender, receivers, NcclTransport)
    broadcasts = [arguments for name, arguments in nccl.calls if name == "ncclBroadcast"]
    buckets = sum(len(of_group) for of_group in sender._buckets.values())
    assert len(broadcasts) == 3 * buckets, "once a bucket for each rank, whatever the number of parameters"
    assert all(call[2] <= BUCKET for call in broadcasts)
    sender.close()
    assert [name for name, _ in nccl.calls].count("ncclCommAbort") == 1


def test_a_transfer_that_does_not_end_is_an_error_that_names_the_group(
    nccl: Nccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, _ = connected(NCCL, 2, timeout=2)
    monkeypatch.setattr(Nccl, "stuck", True)
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"weight update 1 failed at group 0 .*not transferred by NCCL within 2 s"):
        sender.send(some_tensors(), version=1)
    assert time.monotonic() - begun < 10


def test_a_receiver_without_nccl_is_told_of_at_once(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, so_file: str | None = None) -> None:
        raise OSError("no libnccl.so.2")

    monkeypatch.setattr(pynccl_wrapper.NCCLLibrary, "__init__", fails)
    with pytest.raises(RuntimeError, match="NCCL could not be loaded"):
        connected(NCCL, 2)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let memory be exported and imported within this process, by arguments as torch's own functions have them."""
    exported: dict[str, Tensor] = {}
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    gpu: dict[str, Any] = {"uuids": {}, "imported": 0}

    def reduce_tensor(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
        exported["memory"] = tensor
        return None, tuple(b"\x00memory" if name == "storage_handle" else 0 for name in names)

    def rebuild_cuda_tensor(*arguments: Any) -> Tensor:
        of = dict(zip(names, arguments, strict=True))
        assert of["storage_device"] == DEVICES[IPC].index
        gpu["imported"] += 1
        assert of["storage_handle"] == b"\x00memory"
        assert of["dtype"] == torch.uint8
        assert of["tensor_size"].numel() == exported["memory"].numel()
        return exported["memory"]

    monkeypatch.setattr(reductions, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", rebuild_cuda_tensor)
    uuids = gpu["uuids"]
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(uuid=uuids.get(threading.current_thread().name, "GPU-0")),
    )
    return gpu


def test_torch_takes_the_device_where_it_is_put() -> None:
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert names[DEVICE_ARGUMENT] == "storage_device"
    assert names[HANDLE] == "storage_handle"
    from vllm.distributed.weight_transfer import ipc_engine

    assert f"list_args[{DEVICE_ARGUMENT}] = device_index" in inspect.getsource(ipc_engine), "as vLLM does"


def test_on_one_gpu_buckets_go_through_its_memory(one_gpu: dict[str, Any]) -> None:
    sender, receivers = connected(IPC, 1)
    check_arrived(sender, receivers, SharedMemoryTransport)
    assert one_gpu["imported"] == 1
    sender.close()


def test_two_gpus_that_are_taken_for_one_are_told_apart(one_gpu: dict[str, Any]) -> None:
    one_gpu["uuids"]["MainThread"] = "GPU-1"
    with pytest.raises(RuntimeError, match="the learner rank is on GPU GPU-1"):
        connected(IPC, 1)
