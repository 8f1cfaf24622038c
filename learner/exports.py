"""Partitioned models as ordinary Hugging Face checkpoints: safetensors in shards, written as they are gathered."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.schema import ModelConfig
from learner import zero

SHARD_BYTES = 4 << 30  # of one file, and so the most that its writer holds of a model


def export(model: Any, folder: Path, *, dtype: str, settings: ModelConfig, keep: bool) -> None:
    """Write a Hugging Face model as a checkpoint to `folder`, adapters merged, on the rank that keeps it.

    A collective: a layer group is gathered at a time, and the rank that keeps them holds SHARD_BYTES of them at most.
    `settings` name the tokenizer that goes with it.
    """
    manifest = zero.manifest(model, dtype)
    writer = ShardWriter(folder, _in_checkpoint(model, _meta_tensors(manifest))) if keep else None
    for group in zero.gathered_groups(model, manifest):
        if writer is not None:
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in group}
            writer.add(_in_checkpoint(model, tensors))
    if writer is not None:
        writer.close()
        _write_settings(model, folder, dtype=dtype, settings=settings)


class ShardWriter:
    """Writes tensors to the files that the Hugging Face hub's library would put them in, each when it is whole."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` are all that will come, in that order, on the meta device."""
        from huggingface_hub import split_torch_state_dict_into_shards

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD_BYTES)
        self._missing = {file: set(names) for file, names in self._split.filename_to_tensors.items()}
        self._held: dict[str, dict[str, Tensor]] = {file: {} for file in self._missing}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors on the CPU; files that are whole with them are written."""
        from safetensors.torch import save_file

        for name, tensor in tensors.items():
            file = self._split.tensor_to_filename[name]
            self._held[file][name] = tensor.contiguous()
            self._missing[file].remove(name)
            if not self._missing[file]:
                save_file(self._held.pop(file), self.folder / file, metadata={"format": "pt"})

    def close(self) -> None:
        """Write the index, if there are several files."""
        assert not self._held, f"not all tensors have come: {self._missing}"
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True)
            (self.folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _meta_tensors(manifest: Any) -> dict[str, Tensor]:
    return {meta.name: torch.empty(meta.shape, dtype=meta.torch_dtype, device="meta") for meta in manifest}


def _in_checkpoint(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a model under the names, and in the form, that its checkpoints have them."""
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return converted


def _write_settings(model: Any, folder: Path, *, dtype: str, settings: ModelConfig) -> None:
    """Write what a checkpoint has beside its weights: config, generation config, code of its own, tokenizer."""
    from transformers import AutoTokenizer
    from transformers.dynamic_module_utils import custom_object_save

    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], dtype
    if model._auto_class is not None:
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    assert settings.tokenizer is not None
    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer, trust_remote_code=settings.trust_remote_code)
    tokenizer.save_pretrained(folder)
