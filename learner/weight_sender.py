"""The learner's end of a weight update: rank 0 packs the tensors into buckets and sends each to all generators."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from actors.weight_transport import HOST, Transport, join, open_store
from actors.weights import Bucket, Manifest, WeightMeta, buckets_of, bytes_of, checksum, checksum_kind


@dataclass
class SendTimes:
    """Where the time of one update went on the sender, in seconds."""

    gather_s: float = 0.0  # until the groups were there
    pack_s: float = 0.0  # checksums, and copies into the buckets
    wait_s: float = 0.0  # for the wire and for receivers that had not yet done with a bucket

    @contextmanager
    def adding(self, name: str) -> Iterator[None]:
        """Add the time of the block to the field of this name."""
        since = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - since)


class WeightSender:
    """Sends the tensors of a manifest to `num_receivers` processes.

    The order of one connection: make the sender; hand `receiver_info(rank)` to every generator, which blocks joining;
    call `connect()` meanwhile. Then for each update every generator calls `update_weights`, which blocks receiving,
    while `send` runs here. A sender whose `send` has failed is closed for good: make another.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        num_receivers: int,
        bucket_bytes: int,
        device: str = "cpu",
        wire: str = HOST,
        host: str = "127.0.0.1",
        timeout: float = 300.0,
    ) -> None:
        """Opens the rendezvous on a free port of `host`, which the receivers must be able to reach.

        `device` is where the tensors will be: it decides on the checksum. `wire` is as `weight_transport.join` has it.
        """
        self._manifest = manifest
        self._bucket_bytes = bucket_bytes
        self._buckets = {
            index: list(buckets) for index, buckets in groupby(buckets_of(manifest, bucket_bytes), lambda b: b.group)
        }
        self._device, self._wire = torch.device(device), wire
        self._checksum = checksum_kind(self._device)
        self._world_size = 1 + num_receivers
        self._timeout = timeout
        self._store = open_store(host, None, timeout=timeout)
        self._transport: Transport | None = None

    def receiver_info(self, rank: int) -> dict[str, Any]:
        """What one process of a generator needs to join as `rank`.

        Receivers have the ranks 1 to `num_receivers`. Plain data: it may travel between processes.
        """
        assert 1 <= rank < self._world_size, f"rank {rank} of {self._world_size}"
        return {
            "host": self._store.host,
            "port": self._store.port,
            "rank": rank,
            "world_size": self._world_size,
            "timeout": self._timeout,
            "bucket_bytes": self._bucket_bytes,
            "wire": self._wire,
            "checksum": self._checksum,
            "manifest": self._manifest.to_plain(),
        }

    def connect(self) -> None:
        """Returns once every receiver has joined. Raises RuntimeError when one has not within the timeout."""
        assert self._transport is None, "connected already"
        try:
            self._transport = join(
                self._store,
                rank=0,
                world_size=self._world_size,
                timeout=self._timeout,
                bucket_bytes=self._bucket_bytes,
                wire=self._wire,
                device=self._device,
            )
        except RuntimeError as error:
            who = f"{self._world_size - 1} receivers did not all join the weight sync within {self._timeout:g} s"
            raise RuntimeError(f"{who}: {error}") from error

    def send(self, groups: Iterable[Sequence[tuple[str, Tensor]]], *, version: int) -> SendTimes:
        """Send `groups`, which must follow the manifest in names, dtypes and shapes, then checksums and version.

        `groups` may gather each group as it is asked for; one is held at a time, while the last bucket of the one
        before may still be on its way. On any error the connection is closed, so that no receiver waits for the rest,
        and the error names the group.
        """
        if self._transport is None:
            raise RuntimeError("the weight sender is not connected, or an earlier update failed and closed it")
        transport, given, times = self._transport, iter(groups), SendTimes()
        checksums: list[int] = []
        stage = on_its_way = "the start"
        try:
            for index, metas in enumerate(self._manifest.groups):
                stage = f"group {index} ({metas[0].name} to {metas[-1].name})"
                with times.adding("gather_s"):
                    tensors = _checked(metas, next(given, ()))
                for bucket in self._buckets[index]:
                    with times.adding("pack_s"):
                        checksums += self._pack(bucket, tensors, transport.slot())
                    with times.adding("wait_s"):
                        stage, on_its_way = on_its_way, stage
                        transport.settle()
                        stage = on_its_way
                        transport.send(bucket.num_bytes)
            if next(given, None) is not None:
                stage = "the checksums"
                raise ValueError(f"the manifest has {len(self._manifest.groups)} groups, and more were given")
            with times.adding("wait_s"):
                transport.settle()
                stage = "the checksums"
                trailer = torch.tensor([*checksums, version], dtype=torch.int64)
                transport.broadcast(trailer)
        except Exception as error:
            self.close()
            raise RuntimeError(f"weight update {version} failed at {stage}: {error}") from error
        return times

    def _pack(self, bucket: Bucket, tensors: Mapping[str, Tensor], slot: Tensor) -> list[int]:
        """Write what `bucket` carries into `slot`; the checksums of the tensors that begin in it."""
        sums = []
        for part in bucket.parts:
            tensor = tensors[part.meta.name]
            if part.start == 0:
                sums.append(checksum(tensor, self._checksum))
            part.within(slot).copy_(bytes_of(tensor)[part.start : part.stop])
        return sums

    def close(self) -> None:
        """Drop the connections. Receivers that wait for a message get an error."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None


def _checked(metas: Sequence[WeightMeta], group: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a group by name. Raises ValueError unless they are as the manifest says, in order."""
    expected = [(meta.name, meta.torch_dtype, meta.shape) for meta in metas]
    given = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in group]
    if given != expected:
        odd = next((pair for pair in zip(expected, given, strict=False) if pair[0] != pair[1]), None)
        what = f"expected {odd[0]}, got {odd[1]}" if odd else f"expected {len(expected)} tensors, got {len(given)}"
        raise ValueError(f"the tensors differ from the manifest: {what}")
    return dict(group)
