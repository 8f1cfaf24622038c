"""Low-rank adapters (LoRA) by PEFT on a Hugging Face model, and what the model is with them merged in.

Hu et al. 2021, arXiv 2106.09685: a frozen weight W [out, in] becomes W + alpha / rank * B A, and B [out, rank] and
A [rank, in] are trained. The adapters are put into the model itself, which stays the Hugging Face model that it was:
`base_model`, `get_output_embeddings`, `score`, `config` and `save_pretrained` work as before, and nothing is wrapped
around it. Only the names of its parameters change, and only here is that known: the callers use

    model = lora.adapted(model, settings, seed=..., task=lora.CAUSAL_LM)    before the engine is made
    with lora.switched_off(model): ...                                      forward passes of the reference
    zero.manifest(model, dtype), zero.gathered_groups(model, manifest), zero.full_state(model, dtype=...)
    exports.export(model, folder, ...)                                      an ordinary checkpoint, merged
    lora.save_adapter(model, folder, keep=...)                              the adapter alone, in PEFT's format

The functions of `zero` serve models with and without adapters, and see the merged model under its plain names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.weights import Manifest, manifest_of
from conf.schema import ConfigError, LoraConfig

CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"  # PEFT's names of the tasks
ADAPTER = "default"  # PEFT's name of the one adapter


@dataclass(frozen=True, eq=False)
class Source:
    """What one parameter of the merged model is computed from: `base`, and an adapter's factors where it has one."""

    base: nn.Parameter
    down: nn.Parameter | None = None  # A [rank, in]
    up: nn.Parameter | None = None  # B [out, rank]
    scale: float = 0.0  # alpha / rank
    transposed: bool = False  # `base` is stored [in, out], as by GPT-2's Conv1D

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in (self.base, self.down, self.up) if parameter is not None]

    @torch.no_grad()
    def merged(self, dtype: torch.dtype) -> Tensor:
        """Return W + scale * B A, computed in float32; the parameters have to be whole.

        Without an adapter it is the parameter itself if that has the dtype, else a new tensor.
        """
        if self.down is None or self.up is None:
            return self.base.detach().to(dtype)
        change = self.scale * (self.up.float() @ self.down.float())
        return (self.base.float() + (change.t() if self.transposed else change)).to(dtype)


def adapted(model: Any, lora: LoraConfig, *, seed: int, task: str) -> Any:
    """Return the Hugging Face `model` itself, frozen, with trainable float32 adapters at its linear layers.

    B is zero, so nothing has changed yet; A is drawn from `seed`, the same on every rank. With `task` SEQ_CLS the head
    `score` is trained too, as a whole.

    Raises:
        ConfigError: a name of `target_modules` fits no layer, or one that cannot have an adapter.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    assert lora.rank is not None, "without a rank there are no adapters"
    _check_targets(model, lora.target_modules)
    settings: dict[str, Any] = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.target_modules) or "all-linear",
        "modules_to_save": ["score"] if task == SEQ_CLS else None,
        "task_type": task,
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),
        "base_model_name_or_path": model.name_or_path,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), model, adapter_name=ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _check_targets(model: Any, names: tuple[str, ...]) -> None:
    from transformers.pytorch_utils import Conv1D

    weights = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    for name in names:
        found = [module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")]
        if not found:
            raise ConfigError("lora.target_modules", name, "name layers of the model, such as q_proj")
        if not all(isinstance(module, nn.Linear | Conv1D) for module in found):
            raise ConfigError("lora.target_modules", name, "only linear layers can have an adapter")
        if any(weights.count(id(module.weight)) > 1 for module in found):
            remedy = "its weight is tied to another layer's, so it cannot have an adapter of its own"
            raise ConfigError("lora.target_modules", name, remedy)


def is_adapted(model: nn.Module) -> bool:
    """Return whether `adapted` has been at the model."""
    return hasattr(model, "peft_config")


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes as without its adapters; it is for forward passes without a gradient.

    The adapters run and count for nothing. Leaving them out would change the order of the modules in which ZeRO-3
    foresees what to gather next, and it would foresee nothing any more.
    """
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers, "a model without adapters"
    scales = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[ADAPTER] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale


def merged_name(name: str) -> str | None:
    """Return the merged model's name of a parameter; None for an adapter's or a replaced one."""
    if ".lora_" in name or ".original_module." in name:
        return None
    return name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")


def merged_manifest(model: nn.Module, dtype: str) -> Manifest:
    """Return the manifest of the merged model: what `manifest_of` said of the model before it was adapted."""
    if not is_adapted(model):
        return manifest_of(model, dtype)
    groups = []
    for group in manifest_of(model, dtype).groups:
        named = [(merged_name(meta.name), meta) for meta in group]
        groups.append(tuple(replace(meta, name=name) for name, meta in named if name is not None))
    return Manifest(tuple(groups))


def merged_sources(model: nn.Module) -> dict[str, Source]:
    """Return what each parameter of the merged model is computed from, by its name there; ties come once."""
    if not is_adapted(model):
        return {name: Source(parameter) for name, parameter in model.named_parameters()}
    from peft.tuners.lora import LoraLayer

    sources = {
        merged: Source(parameter)
        for name, parameter in model.named_parameters()
        if (merged := merged_name(name)) is not None
    }
    layers: dict[str, Any] = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for path, layer in layers.items():
        sources[f"{path}.weight"] = Source(
            layer.get_base_layer().weight,
            down=layer.lora_A[ADAPTER].weight,
            up=layer.lora_B[ADAPTER].weight,
            scale=layer.scaling[ADAPTER],
            transposed=layer.fan_in_fan_out,
        )
    return sources


def save_adapter(model: Any, folder: Path, *, keep: bool = True) -> None:
    """Write the adapter alone to `folder`, as PEFT reads it onto the base checkpoint.

    A collective: every rank must call it, and one of them keep it.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from learner import zero  # which knows this module

    state = zero.trained_state(model, keep=keep)
    if not keep:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, state, adapter_name=ADAPTER, save_embedding_layers=False)
    whole = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(folder)
