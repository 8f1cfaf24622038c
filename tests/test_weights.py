"""Messages, checksums and the wire of a weight update, without any engine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors import weight_transport
from actors.weight_transport import GlooTransport, SharedMemoryTransport, Transport, join, open_store
from actors.weights import (
    ALIGNMENT,
    Manifest,
    WeightMeta,
    WeightMismatchError,
    buckets_of,
    bytes_of,
    checksum,
    manifest_of,
)
from learner.ranks import Ranks
from learner.weight_sender import WeightSender
from tests.learner_ranks import IMPORTED, on_ranks
from tests.test_learner import make_setup
from tests.tiny_models import FAMILIES, tiny_checkpoint, tiny_config

MASK = (1 << 64) - 1
KINDS = ("xxh3", "splitmix64")
BUCKET = 2 * ALIGNMENT  # small enough for the tensors below to be cut
GROUPS = (
    (WeightMeta("embed", "float32", (3, 5)), WeightMeta("layers.0.bias", "bfloat16", (7,))),
    (WeightMeta("scale", "float32", ()),),
)


def slow_checksum(data: bytes) -> int:
    """SplitMix64 of each little-endian word plus its position times the golden step, summed, in Python integers."""
    total = 0
    data += bytes(-len(data) % 8)
    for index in range(len(data) // 8):
        word = int.from_bytes(data[8 * index : 8 * index + 8], "little")
        word = (word + (index + 1) * 0x9E3779B97F4A7C15) & MASK
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
        total += word ^ (word >> 31)
    total &= MASK
    return total - (1 << 64) if total >> 63 else total


def some_tensors(seed: int = 0) -> list[list[tuple[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [(meta.name, torch.randn(meta.shape, generator=generator).to(meta.torch_dtype)) for meta in group]
        for group in GROUPS
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [1, 7, 8, 33])
def test_splitmix64_equals_a_slow_loop(dtype: torch.dtype, size: int) -> None:
    tensor = (torch.randn(size, generator=torch.Generator().manual_seed(size)) * 50).to(dtype)
    assert checksum(tensor, "splitmix64") == slow_checksum(bytes(tensor.view(torch.uint8).tolist()))


def test_splitmix64_does_not_depend_on_the_chunks_it_is_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(101, generator=torch.Generator().manual_seed(0))
    whole = checksum(tensor, "splitmix64")
    monkeypatch.setattr("actors.weights.CHECKSUM_CHUNK", {"cpu": 3})
    assert checksum(tensor, "splitmix64") == whole


def test_xxh3_is_that_of_its_specification() -> None:
    """The test vectors of xxHash for no input and for one byte of zero, seed 0."""
    assert checksum(torch.empty(0), "xxh3") & MASK == 0x2D06800538D394C2
    assert checksum(torch.zeros(1, dtype=torch.uint8), "xxh3") & MASK == 0xC44BDFF4074EECDB


@pytest.mark.parametrize("kind", KINDS)
def test_checksum_sees_every_single_bit(kind: str) -> None:
    data = torch.randint(0, 256, (29,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    seen = {checksum(data, kind)}
    for byte in range(29):
        for bit in range(8):
            flipped = data.clone()
            flipped[byte] ^= 1 << bit
            seen.add(checksum(flipped, kind))
    assert len(seen) == 1 + 29 * 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [[1.0, 2.0, -2.0, 4.0, 4.5, -4.0, 0.0, -0.0], list(range(8))])
def test_checksum_sees_every_swap_of_words_and_of_elements(values: list[float], kind: str) -> None:
    tensor = torch.tensor(values)
    before = checksum(tensor, kind)
    for width in (1, 2):  # an element, and a 64-bit word of two
        units = tensor.view(-1, width)
        for i in range(len(units)):
            for j in range(i):
                swapped = units.clone()
                swapped[[i, j]] = units[[j, i]]
                assert (checksum(swapped, kind) == before) == bool(
                    (units[i].view(torch.int32) == units[j].view(torch.int32)).all()
                )


@pytest.mark.parametrize("kind", KINDS)
def test_checksum_sees_a_swap_of_words_that_differ_in_their_highest_bit_only(kind: str) -> None:
    words = torch.tensor([[1.0, 2.0], [1.0, -2.0]])
    assert checksum(words, kind) != checksum(words.flip(0), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_checksum_reads_a_view_in_row_major_order(kind: str) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    assert checksum(matrix.t(), kind) == checksum(matrix.t().contiguous(), kind) != checksum(matrix, kind)


def test_a_mismatch_survives_pickling_and_being_quoted() -> None:
    error = WeightMismatchError("model.layers.3.mlp.up_proj.weight", "held", "max difference 0.25")
    quoted = WeightMismatchError.parse(f"Worker failed with error '{error}', please check the stack trace above")
    for copy in (pickle.loads(pickle.dumps(error)), quoted):
        assert isinstance(copy, WeightMismatchError)
        assert str(copy) == str(error) == "model.layers.3.mlp.up_proj.weight: held check failed: max difference 0.25"
        assert (copy.name, copy.check, copy.detail) == (error.name, error.check, error.detail)
    assert WeightMismatchError.parse("connection closed by peer") is None


@pytest.mark.parametrize("limit", [64, 128, 192, 1024])
def test_buckets_carry_every_byte_once_in_order_and_keep_to_their_limit(limit: int) -> None:
    sizes = [(3, 64, 1, 16), (40,), (200, 1), (0, 5, 100)]
    manifest = Manifest(
        tuple(
            tuple(WeightMeta(f"{i}.{j}", "float32", (n,)) for j, n in enumerate(group)) for i, group in enumerate(sizes)
        )
    )
    buckets = buckets_of(manifest, limit)
    parts = [part for bucket in buckets for part in bucket.parts]
    for meta in manifest:
        of_meta = [part for part in parts if part.meta is meta]
        assert [part.start for part in of_meta] == [0, *(part.stop for part in of_meta[:-1])]
        assert of_meta[-1].stop == meta.num_bytes
        assert len(of_meta) == max(1, -(-meta.num_bytes // limit)), "what fits is not cut"
    assert [part.meta.name for part in parts if part.start == 0] == [meta.name for meta in manifest]
    for bucket in buckets:
        assert bucket.num_bytes <= limit
        assert {part.meta.name.split(".")[0] for part in bucket.parts} == {str(bucket.group)}
        ends = [0, *(part.at + part.stop - part.start for part in bucket.parts)]
        assert all(part.at % ALIGNMENT == 0 and part.at >= end for part, end in zip(bucket.parts, ends, strict=False))


def test_manifest_survives_the_way_between_processes() -> None:
    manifest = Manifest(GROUPS)
    assert Manifest.from_plain(manifest.to_plain()) == manifest
    assert [meta.name for meta in manifest] == ["embed", "layers.0.bias", "scale"]


def test_manifest_refuses_a_parameter_sent_twice() -> None:
    with pytest.raises(AssertionError, match="once"):
        Manifest((GROUPS[0], GROUPS[0]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_manifest_of_a_model_groups_by_layer(family: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(family, tied=tied))
    manifest = manifest_of(model, "bfloat16")
    parameters = dict(model.named_parameters())
    assert [meta.name for meta in manifest] == list(parameters)
    assert all(meta.shape == tuple(parameters[meta.name].shape) for meta in manifest)
    assert len(manifest.groups) == 4  # embeddings, two layers, the rest
    assert [("lm_head.weight" in [m.name for m in group]) for group in manifest.groups] == [False] * 3 + [not tied]
    transposed = {meta.name.split(".")[-2] for meta in manifest if meta.transposed}
    assert transposed == ({"c_attn", "c_proj", "c_fc"} if family == "gpt2" else set())


def test_manifest_reads_the_shape_that_zero3_keeps_beside_an_empty_parameter() -> None:
    model = torch.nn.Linear(3, 2, bias=False)
    model.weight.data = torch.empty(0)
    setattr(model.weight, "ds_shape", torch.Size([2, 3]))  # noqa: B010
    assert next(iter(manifest_of(model, "float32"))).shape == (2, 3)


# Where buckets are; for IPC written as a GPU is, with its number.
DEVICES = {"nccl": torch.device("cpu"), "ipc": torch.device("cpu", 0)}


def joined(info: dict[str, Any]) -> Transport:
    store = open_store(info["host"], info["port"], timeout=info["timeout"])
    names = ("rank", "world_size", "timeout", "bucket_bytes", "wire")
    return join(store, **{name: info[name] for name in names}, device=DEVICES.get(info["wire"]))


class Receiver(threading.Thread):
    """Joins, receives one whole update, keeps it or the error it met."""

    def __init__(self, info: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.info = info
        self.update: dict[str, Tensor] = {}
        self.trailer: list[int] = []
        self.error: Exception | None = None
        self.wire: Transport | None = None

    def run(self) -> None:
        try:
            self.wire = joined(self.info)
            manifest = Manifest.from_plain(self.info["manifest"])
            self.update = {meta.name: torch.empty(meta.shape, dtype=meta.torch_dtype) for meta in manifest}
            for bucket in buckets_of(manifest, self.info["bucket_bytes"]):
                message = self.wire.receive(bucket.num_bytes)
                for part in bucket.parts:
                    bytes_of(self.update[part.meta.name])[part.start : part.stop] = part.within(message)
            trailer = torch.empty(len(manifest) + 1, dtype=torch.int64)
            self.wire.broadcast(trailer)
            self.trailer = trailer.tolist()
        except RuntimeError as error:
            self.error = error


@pytest.fixture(params=[True, False], ids=["shared-memory", "gloo"])
def shared(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there is a place for shared memory."""
    if not request.param:
        monkeypatch.setattr(weight_transport, "SHARED_MEMORY", tmp_path / "missing")
    return bool(request.param)


@pytest.fixture
def connected(shared: bool) -> Iterator[Callable[[int], tuple[WeightSender, list[Receiver]]]]:
    senders = []

    def connect(num_receivers: int) -> tuple[WeightSender, list[Receiver]]:
        sender = WeightSender(Manifest(GROUPS), num_receivers=num_receivers, bucket_bytes=BUCKET, timeout=20)
        senders.append(sender)
        receivers = [Receiver(sender.receiver_info(1 + rank)) for rank in range(num_receivers)]
        for receiver in receivers:
            receiver.start()
        sender.connect()
        return sender, receivers

    yield connect
    for sender in senders:
        sender.close()


def files_of_ours() -> list[Path]:
    return list(Path("/dev/shm").glob(f"{weight_transport.PREFIX}*"))


@pytest.mark.ranks
def test_an_update_reaches_every_receiver(
    connected: Callable[[int], tuple[WeightSender, list[Receiver]]], shared: bool
) -> None:
    sender, receivers = connected(2)
    assert files_of_ours() == [], "nothing could be left behind from here on"
    groups = some_tensors()
    sender.send(iter(groups), version=7)
    sent = {name: tensor for group in groups for name, tensor in group}
    for receiver in receivers:
        receiver.join(timeout=20)
        assert receiver.error is None
        assert isinstance(receiver.wire, SharedMemoryTransport if shared else GlooTransport)
        assert all(torch.equal(sent[name], tensor) for name, tensor in receiver.update.items())
        assert receiver.trailer == [*(checksum(tensor, "xxh3") for tensor in sent.values()), 7]


@pytest.mark.ranks
@pytest.mark.parametrize("why", ["no such file", "another content", "no room"])
def test_without_memory_that_all_can_map_buckets_go_by_gloo(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One receiver of two is on another host, or finds a file of that name which is not the sender's."""
    found = weight_transport._found

    def sometimes(path: Path, token: Tensor, num_bytes: int) -> Tensor | None:
        if threading.current_thread() is not receivers[0]:
            return found(path, token, num_bytes)
        if why == "no such file":
            return found(path.with_name("elsewhere"), token, num_bytes)
        return found(path, torch.zeros_like(token), num_bytes)

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    if why == "no room":
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        monkeypatch.setattr(weight_transport, "_found", sometimes)
    sender = WeightSender(Manifest(GROUPS), num_receivers=2, bucket_bytes=BUCKET, timeout=20)
    receivers = [Receiver(sender.receiver_info(1 + rank)) for rank in range(2)]
    for receiver in receivers:
        receiver.start()
    sender.connect()
    assert files_of_ours() == []
    groups = some_tensors()
    sender.send(groups, version=1)
    for receiver in receivers:
        receiver.join(timeout=20)
        assert isinstance(receiver.wire, GlooTransport)
        assert all(torch.equal(receiver.update[name], tensor) for group in groups for name, tensor in group)
    sender.close()


def receive_one(info: dict[str, Any], told: Any) -> None:
    wire = joined(info)
    wire.receive(BUCKET)
    told.send(type(wire).__name__)
    time.sleep(60)


@pytest.mark.ranks
def test_a_receiver_that_is_killed_is_an_error_at_once_and_leaves_nothing_behind() -> None:
    meta = WeightMeta("embed", "float32", (BUCKET,))  # four buckets
    sender = WeightSender(Manifest(((meta,),)), num_receivers=1, bucket_bytes=BUCKET, timeout=60)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    ours, theirs = context.Pipe()
    process = context.Process(target=receive_one, args=(sender.receiver_info(1), theirs), daemon=True)
    process.start()
    sender.connect()

    def kill() -> None:
        ours.recv()
        process.kill()

    threading.Thread(target=kill, daemon=True).start()
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"weight update 3 failed at group 0 .embed to embed.: "):
        sender.send([[("embed", torch.zeros(meta.shape))]], version=3)
    assert time.monotonic() - begun < 30, "half of the timeout"
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    assert files_of_ours() == []


@pytest.mark.ranks
def test_an_error_while_gathering_names_the_group_and_frees_the_receiver(
    connected: Callable[[int], tuple[WeightSender, list[Receiver]]],
) -> None:
    sender, (receiver,) = connected(1)

    def gather() -> Iterator[list[tuple[str, Tensor]]]:
        yield some_tensors()[0]
        raise OSError("a rank died")

    with pytest.raises(RuntimeError, match=r"weight update 3 failed at group 1 .scale to scale.: a rank died"):
        sender.send(gather(), version=3)
    receiver.join(timeout=10)
    assert receiver.error is not None
    with pytest.raises(RuntimeError, match="not connected"):
        sender.send(some_tensors(), version=4)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda groups: groups[:1], "expected 1 tensors, got 0"),
        (lambda groups: [*groups, groups[1]], "the manifest has 2 groups, and more were given"),
        (lambda groups: [groups[0][:1], groups[1]], "expected 2 tensors, got 1"),
        (lambda groups: [groups[0][::-1], groups[1]], "expected .*embed.*got .*layers.0.bias"),
        (lambda groups: [groups[0], [("scale", groups[1][0][1].double())]], "expected .*float32.*got .*float64"),
    ],
)
def test_tensors_that_differ_from_the_manifest_are_not_sent(
    connected: Callable[[int], tuple[WeightSender, list[Receiver]]], spoil: Callable[[Any], Any], message: str
) -> None:
    sender, (receiver,) = connected(1)
    with pytest.raises(RuntimeError, match=message):
        sender.send(spoil(some_tensors()), version=1)
    receiver.join(timeout=10)
    assert receiver.error is not None


@pytest.mark.ranks
def test_a_receiver_that_never_joins_is_an_error_within_the_timeout() -> None:
    sender = WeightSender(Manifest(GROUPS), num_receivers=1, bucket_bytes=BUCKET, timeout=1)
    with pytest.raises(RuntimeError):
        sender.connect()


@pytest.mark.ranks
def test_a_receiver_that_stands_still_is_an_error_after_the_timeout_for_all_others(shared: bool) -> None:
    """The sender is told at which group; a receiver that has been keeping up does not wait for longer either."""
    timeout = 4.0
    manifest = Manifest(tuple((WeightMeta(f"layers.{index}", "float32", (1 << 22,)),) for index in range(2)))
    sender = WeightSender(manifest, num_receivers=2, bucket_bytes=1 << 24, timeout=timeout)
    over, waited = threading.Event(), [0.0]

    def stand_still() -> None:
        wire = joined(sender.receiver_info(1))
        over.wait(60)
        wire.close()

    def keep_up() -> None:
        wire = joined(sender.receiver_info(2))
        begun = time.monotonic()
        try:
            for bucket in buckets_of(manifest, 1 << 24):
                wire.receive(bucket.num_bytes)
        except RuntimeError:
            waited[0] = time.monotonic() - begun

    threads = [threading.Thread(target=receiver, daemon=True) for receiver in (stand_still, keep_up)]
    for thread in threads:
        thread.start()
    sender.connect()
    begun = time.monotonic()
    groups = [[(meta.name, torch.zeros(meta.shape)) for meta in group] for group in manifest.groups]
    with pytest.raises(
        RuntimeError, match=r"weight update 7 failed at group (\d) .layers.\1 to layers.\1.: .*imed out"
    ):
        sender.send(groups, version=7)
    assert 0.75 * timeout < time.monotonic() - begun < 2 * timeout
    threads[1].join(2 * timeout)
    assert 0.75 * timeout < waited[0] < 2 * timeout
    over.set()


def send_to_nobody(ranks: Ranks, path: str) -> tuple[str | None, dict[str, Any]]:
    """Send weights to a receiver that has joined and gone; return what was said of it, and what a gather then sees."""
    from learner import zero
    from learner.worker import LearnerWorker

    setup = make_setup("grpo, clip-higher, mask", {"policy": path, "reference": path, "critic": path})
    worker = LearnerWorker(setup, ranks)
    only_rank_0 = int(ranks.rank == 0)
    infos = worker.open_sync(
        dtype="float32", num_receivers=only_rank_0, bucket_bytes=1 << 20, host="127.0.0.1", timeout_s=10.0
    )
    leaving = [threading.Thread(target=lambda info=info: joined(info).close()) for info in infos]
    for thread in leaving:
        thread.start()
    worker.connect_sync()
    for thread in leaving:
        thread.join()
    said = None
    try:
        worker.send_weights(7)
    except RuntimeError as error:
        said = str(error)
    state = zero.full_state(worker.policy.module.model, dtype="float32")
    return said, {name: tensor.numpy() for name, tensor in state.items()}


@pytest.mark.ranks
def test_when_sending_fails_the_ranks_still_gather_to_the_end(tmp_path: Path) -> None:
    """The rank that sends raises, and the others are not left waiting for it."""
    (said, state), (nothing, other) = on_ranks(send_to_nobody, 2, str(tiny_checkpoint(tmp_path)))
    assert said is not None
    assert said.startswith("weight update 7 failed at group 0 (model.embed_tokens.weight to")
    assert nothing is None
    assert len(state) > 1
    assert state.keys() == other.keys()
    assert all((state[name] == other[name]).all() for name in state)
