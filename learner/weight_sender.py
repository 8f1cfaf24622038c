"""The learner's end of a weight update: rank 0 packs each group of tensors and broadcasts it to all generators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from actors.weights import GlooTransport, Manifest, Transport, WeightMeta, checksum, open_store, pack


class WeightSender:
    """Sends the tensors of a manifest to `num_receivers` processes.

    The order of one connection: make the sender; hand `receiver_info(rank)` to every generator, which blocks joining;
    call `connect()` meanwhile. Then for each update every generator calls `update_weights`, which blocks receiving,
    while `send` runs here. A sender whose `send` has failed is closed for good: make another.
    """

    def __init__(
        self, manifest: Manifest, *, num_receivers: int, host: str = "127.0.0.1", timeout: float = 300.0
    ) -> None:
        """Opens the rendezvous on a free port of `host`, which the receivers must be able to reach."""
        self._manifest = manifest
        self._world_size = 1 + num_receivers
        self._timeout = timeout
        self._store = open_store(host, None, timeout=timeout)
        self._transport: Transport | None = None

    def receiver_info(self, rank: int) -> dict[str, Any]:
        """What a generator needs to join; its first process takes `rank`, the rest of its tensor-parallel ones follow.

        Receivers have the ranks 1 to `num_receivers`. Plain data: it may travel between processes.
        """
        assert 1 <= rank < self._world_size, f"rank {rank} of {self._world_size}"
        return {
            "host": self._store.host,
            "port": self._store.port,
            "rank": rank,
            "world_size": self._world_size,
            "timeout": self._timeout,
            "manifest": self._manifest.to_plain(),
        }

    def connect(self) -> None:
        """Returns once every receiver has joined. Raises RuntimeError when one has not within the timeout."""
        assert self._transport is None, "connected already"
        try:
            self._transport = GlooTransport(self._store, rank=0, world_size=self._world_size, timeout=self._timeout)
        except RuntimeError as error:
            who = f"{self._world_size - 1} receivers did not all join the weight sync within {self._timeout:g} s"
            raise RuntimeError(f"{who}: {error}") from error

    def send(self, groups: Iterable[Sequence[tuple[str, Tensor]]], *, version: int) -> None:
        """Broadcast `groups`, which must follow the manifest in names, dtypes and shapes, then checksums and version.

        `groups` may gather each group as it is asked for; one is held at a time. On any error the connection is
        closed, so that no receiver waits for the rest, and the error names the group.
        """
        if self._transport is None:
            raise RuntimeError("the weight sender is not connected, or an earlier update failed and closed it")
        given = iter(groups)
        checksums: list[int] = []
        stage = "the start"
        try:
            for index, metas in enumerate(self._manifest.groups):
                stage = f"group {index} ({metas[0].name} to {metas[-1].name})"
                checksums += self._send_group(self._transport, metas, next(given, ()))
            stage = "the checksums"
            if next(given, None) is not None:
                raise ValueError(f"the manifest has {len(self._manifest.groups)} groups, and more were given")
            trailer = torch.tensor([*checksums, version], dtype=torch.int64, device=self._transport.device)
            self._transport.broadcast(trailer)
        except Exception as error:
            self.close()
            raise RuntimeError(f"weight update {version} failed at {stage}: {error}") from error

    @staticmethod
    def _send_group(
        transport: Transport, metas: Sequence[WeightMeta], group: Sequence[tuple[str, Tensor]]
    ) -> list[int]:
        expected = [(meta.name, meta.torch_dtype, meta.shape) for meta in metas]
        given = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in group]
        if given != expected:
            odd = next((pair for pair in zip(expected, given, strict=False) if pair[0] != pair[1]), None)
            what = f"expected {odd[0]}, got {odd[1]}" if odd else f"expected {len(expected)} tensors, got {len(given)}"
            raise ValueError(f"the tensors differ from the manifest: {what}")
        tensors = [tensor for _, tensor in group]
        sums = [checksum(tensor) for tensor in tensors]
        transport.broadcast(pack(metas, tensors).to(transport.device))
        return sums

    def close(self) -> None:
        """Drop the connections. Receivers that wait for a message get an error."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None
