"""The generator's end of a weight update, on vLLM's weight-transfer interface.

`WeightReceiver` runs in every vLLM worker process. The interface and its life cycle are those of vLLM 0.32:
`vllm.distributed.weight_transfer.base.WeightTransferEngine`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from actors.generator import WEIGHT_TRANSFER_BACKEND
from actors.weight_audit import WeightAudit
from actors.weight_transport import Transport, join, open_store
from actors.weights import Bucket, Manifest, WeightMismatchError, buckets_of, bytes_of, checksum

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass
class ReceiverInitInfo(WeightTransferInitInfo):
    """What `WeightSender.receiver_info` gives, for each of this generator's workers in their order."""

    workers: Sequence[dict[str, Any]]


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
        self._buckets: list[Bucket] = []
        self._checksum = ""
        self._audit: WeightAudit | None = None
        self._received: list[str] = []
        self._cut: dict[str, Tensor] = {}  # what has come of tensors that are larger than a bucket
        self._failed = False

    def init_transfer_engine(self, init_info: ReceiverInitInfo) -> None:
        """Check the manifest against the model, then join the sender; a transport from before is dropped."""
        parallel = self.parallel_config
        info = init_info.workers[parallel.data_parallel_index * parallel.world_size + parallel.rank]
        manifest = Manifest.from_plain(info["manifest"])
        audit = WeightAudit(self.model, self.model_config.dtype)
        audit.check_manifest(manifest)
        self.shutdown()
        store = open_store(info["host"], info["port"], timeout=info["timeout"])
        self._transport = join(
            store,
            rank=info["rank"],
            world_size=info["world_size"],
            timeout=info["timeout"],
            bucket_bytes=info["bucket_bytes"],
            wire=info["wire"],
            device=self.device,
        )
        if self.device.type == "cpu":
            _keep_freed_memory()
        self._manifest, self._audit = manifest, audit
        self._buckets, self._checksum = buckets_of(manifest, info["bucket_bytes"]), info["checksum"]

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        with self._failing_for_good():
            self._received.clear()
            self._cut.clear()
            # Embeddings are loaded into the memory that they have, and heads packed once, by `_refresh_heads`.
            apart = [get_layerwise_info(module) for module in self._embeddings()]
            for info in apart:
                info.load_numel_total = 0  # taken for one that has been initialised
            initialize_layerwise_reload(self.model)
            for info in apart:
                info.reset()

    def receive_weights(self, update_info: ReceiverUpdateInfo) -> None:
        """Receive one whole update: every bucket, then the checksums and the version.

        Raises WeightMismatchError for the first tensor that did not arrive as it was sent, and RuntimeError that names
        the group when the sender is lost, or has sent nothing for as long as the transport's timeout.
        """
        with self._failing_for_good():
            transport, manifest, audit = self._connected()
            audit.begin(seed=update_info.version)
            received: list[int] = []
            for bucket in self._buckets:
                group = manifest.groups[bucket.group]
                stage = f"group {bucket.group} ({group[0].name} to {group[-1].name})"
                with _naming(update_info.version, stage):
                    message = transport.receive(bucket.num_bytes)
                received += self._take_in(audit, bucket, message)
            trailer = torch.zeros(len(manifest) + 1, dtype=torch.int64)
            with _naming(update_info.version, "the checksums"):
                transport.broadcast(trailer)
            *sent, version = trailer.tolist()
            if version != update_info.version:
                raise RuntimeError(f"the sender sent version {version}, this update is version {update_info.version}")
            for meta, ours, theirs in zip(manifest, received, sent, strict=True):
                if ours != theirs:
                    raise WeightMismatchError(meta.name, "wire", f"checksum {ours} arrived, {theirs} was sent")

    def _take_in(self, audit: WeightAudit, bucket: Bucket, message: Tensor) -> list[int]:
        """Load the tensors that are whole with this bucket; their checksums, as they arrived."""
        weights, checksums = [], []
        for part in bucket.parts:
            meta, content = part.meta, part.within(message)
            if part.whole:
                tensor = content.to(self.device).view(meta.torch_dtype).view(meta.shape)
            else:
                if part.start == 0:
                    self._cut[meta.name] = torch.empty(meta.shape, dtype=meta.torch_dtype, device=self.device)
                bytes_of(self._cut[meta.name])[part.start : part.stop].copy_(content)
                if not part.last:
                    continue
                tensor = self._cut.pop(meta.name)
            checksums.append(checksum(tensor, self._checksum))
            audit.note(meta.name, meta.as_linear(tensor))
            weights.append((meta.name, tensor))
        self._load(weights)
        self._keep(audit, message)
        return checksums

    def _load(self, weights: list[tuple[str, Tensor]]) -> None:
        self.model.load_weights(weights)
        self._received += [name for name, _ in weights]

    @staticmethod
    def _keep(audit: WeightAudit, message: Tensor) -> None:
        """Give vLLM copies of the tensors that it still waits to load: the next bucket is written over this one."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        slot = message.untyped_storage().data_ptr()

        def kept(value: Any) -> Any:
            within = isinstance(value, Tensor) and not value.is_meta and value.untyped_storage().data_ptr() == slot
            return value.clone() if within else value

        for module in audit.modules:
            for _, call in get_layerwise_info(module).loaded_weights:
                call.arguments.update({name: tree_map(kept, value) for name, value in call.arguments.items()})

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
        """Pack the matrices of output heads, once each; vLLM would pack a tied one for one of its two holders only.

        On CPU an embedding that only looks rows up goes without: it would double its memory for nothing.
        """
        head = getattr(self.model, "lm_head", None)
        for module in self._embeddings():
            if type(module) is VocabParallelEmbedding and module is not head and hasattr(module, "cpu_linear"):
                module.cpu_linear = nn.functional.linear
            else:
                module.quant_method.process_weights_after_loading(module)

    def _embeddings(self) -> list[VocabParallelEmbedding]:
        return [module for module in self.model.modules() if isinstance(module, VocabParallelEmbedding)]

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


def _keep_freed_memory() -> None:
    """Have glibc, if it is that, give freed memory out again and not back to the system.

    An update frees and allocates blocks of the same sizes over and over. Fresh pages cost more than all else in it.
    """
    with suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def _naming(version: int, stage: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"weight update {version} failed at {stage}: {error}") from error


def register_receiver() -> None:
    """Make vLLM know `WeightReceiver` in this process. May be called again."""
    if WEIGHT_TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(WEIGHT_TRANSFER_BACKEND, WeightReceiver)


class WorkerExtension:
    """Named in vLLM's `worker_extension_cls`, so that a worker process imports this module, which registers."""


register_receiver()
