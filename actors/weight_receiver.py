"""The generator's end of a weight update, on vLLM's weight-transfer interface.

`WeightReceiver` runs in every vLLM worker process. The interface and its life cycle are those of vLLM 0.32:
`vllm.distributed.weight_transfer.base.WeightTransferEngine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from actors.generator import WEIGHT_TRANSFER_BACKEND
from actors.weight_audit import WeightAudit
from actors.weights import (
    GlooTransport,
    Manifest,
    Transport,
    WeightMeta,
    WeightMismatchError,
    checksum,
    message_layout,
    open_store,
    unpack,
)


@dataclass
class ReceiverInitInfo(WeightTransferInitInfo):
    """What `WeightSender.receiver_info` gives. `rank` is that of this generator's first worker."""

    host: str
    port: int
    rank: int
    world_size: int
    timeout: float
    manifest: Sequence[Sequence[Sequence[Any]]]


@dataclass
class ReceiverUpdateInfo(WeightTransferUpdateInfo):
    """The version that the sender is about to send."""

    version: int


class WeightReceiver(WeightTransferEngine[ReceiverInitInfo, ReceiverUpdateInfo]):
    """Receives every group of the manifest, loads it, and verifies what the model holds in the end.

    A failure leaves the model in an unknown state, which vLLM cannot undo: the receiver then refuses every further
    update, and its generator must be replaced.
    """

    init_info_cls = ReceiverInitInfo
    update_info_cls = ReceiverUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._transport: Transport | None = None
        self._manifest: Manifest | None = None
        self._audit: WeightAudit | None = None
        self._received: list[str] = []
        self._failed = False

    def init_transfer_engine(self, init_info: ReceiverInitInfo) -> None:
        """Check the manifest against the model, then join the sender; a transport from before is dropped."""
        manifest = Manifest.from_plain(init_info.manifest)
        audit = WeightAudit(self.model, self.model_config.dtype)
        audit.check_manifest(manifest)
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank + parallel.data_parallel_index * parallel.world_size + parallel.rank
        store = open_store(init_info.host, init_info.port, timeout=init_info.timeout)
        self._transport = GlooTransport(store, rank=rank, world_size=init_info.world_size, timeout=init_info.timeout)
        self._manifest, self._audit = manifest, audit

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with self._failing_for_good():
            self._received.clear()
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ReceiverUpdateInfo) -> None:
        """Receive one whole update: a message for each group, then the checksums and the version.

        Raises WeightMismatchError for the first tensor that did not arrive as it was sent, and RuntimeError that names
        the group when the sender is lost, or has sent nothing for as long as the transport's timeout.
        """
        with self._failing_for_good():
            transport, manifest, audit = self._connected()
            audit.begin(seed=update_info.version)
            received: list[int] = []
            for index, group in enumerate(manifest.groups):
                # vLLM keeps views of what it is given until a layer is whole: a message is never written into again.
                message = torch.empty(message_layout(group)[1], dtype=torch.uint8, device=transport.device)
                stage = f"group {index} ({group[0].name} to {group[-1].name})"
                self._await(transport, message, version=update_info.version, stage=stage)
                received += self._take_in(audit, group, message)
            trailer = torch.zeros(len(manifest) + 1, dtype=torch.int64, device=transport.device)
            self._await(transport, trailer, version=update_info.version, stage="the checksums")
            *sent, version = trailer.tolist()
            if version != update_info.version:
                raise RuntimeError(f"the sender sent version {version}, this update is version {update_info.version}")
            for meta, ours, theirs in zip(manifest, received, sent, strict=True):
                if ours != theirs:
                    raise WeightMismatchError(meta.name, "wire", f"checksum {ours} arrived, {theirs} was sent")

    @staticmethod
    def _await(transport: Transport, message: Tensor, *, version: int, stage: str) -> None:
        try:
            transport.broadcast(message)
        except RuntimeError as error:
            raise RuntimeError(f"weight update {version} failed at {stage}: {error}") from error

    def _take_in(self, audit: WeightAudit, group: Sequence[WeightMeta], message: Tensor) -> list[int]:
        """The checksums of the tensors of `group` as they arrived; loads them into the model."""
        tensors = unpack(group, message.to(self.device))
        checksums = [checksum(tensor) for tensor in tensors]
        for meta, tensor in zip(group, tensors, strict=True):
            audit.note(meta.name, meta.as_linear(tensor))
        self._load([(meta.name, tensor) for meta, tensor in zip(group, tensors, strict=True)])
        return checksums

    def _load(self, weights: list[tuple[str, Tensor]]) -> None:
        self.model.load_weights(weights)
        self._received += [name for name, _ in weights]

    def finish_weight_update(self) -> None:
        """Process the last layers and verify the model. Raises WeightMismatchError naming what it holds wrongly."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with self._failing_for_good():
            _, manifest, audit = self._connected()
            arrived = set(self._received)
            missing = next((meta.name for meta in manifest if meta.name not in arrived), None)
            if missing is not None:
                raise WeightMismatchError(missing, "wire", "it has not been received in this update")
            finalize_layerwise_reload(self.model, self.model_config)
            self._refresh_heads()
            audit.verify()

    def _refresh_heads(self) -> None:
        """Repack embeddings and output heads: vLLM repacks a tied weight for one of its two holders only."""
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding):
                module.quant_method.process_weights_after_loading(module)

    def _connected(self) -> tuple[Transport, Manifest, WeightAudit]:
        if self._transport is None or self._manifest is None or self._audit is None:
            raise RuntimeError("the weight transfer has not been initialised")
        return self._transport, self._manifest, self._audit

    @contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        if self._failed:
            raise RuntimeError("an earlier weight update failed: this generator must be replaced")
        try:
            yield
        except Exception:
            self._failed = True
            self.shutdown()
            raise

    def shutdown(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None


def register_receiver() -> None:
    """Make vLLM know `WeightReceiver` in this process. May be called again."""
    if WEIGHT_TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(WEIGHT_TRANSFER_BACKEND, WeightReceiver)


class WorkerExtension:
    """Named in vLLM's `worker_extension_cls`, so that a worker process imports this module, which registers."""


register_receiver()
