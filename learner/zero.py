"""DeepSpeed ZeRO-3: from settings to its dictionary, engines, and gathering the partitioned parameters.

One gather brings together one layer group (a decoder layer, or the embeddings, or the head), so that no rank holds the
whole model at once. A model with LoRA adapters is gathered with them merged in, under the names of the plain model.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.importing import uncollected
from actors.weights import Manifest
from conf.schema import LearnerConfig, OptimizerConfig
from learner import lora, sequence_groups
from learner.ranks import Ranks

CPU_ELEMENTS_AT_ONCE = 2**22


def import_engine(device: str) -> None:
    """Import DeepSpeed and transformers, which takes seconds, so that a rank that is made later starts at once."""
    os.environ["DS_ACCELERATOR"] = device  # read by DeepSpeed when it is imported
    with uncollected():
        import deepspeed
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401

    deepspeed.logger.setLevel("WARNING")


def join(ranks: Ranks, *, device: str, timeout_s: float) -> None:
    """Enter the process group of the learner ranks: gloo on CPU, NCCL on GPUs. A process can be in one only.

    A collective that waits longer than `timeout_s` raises in every rank that waits.
    """
    import_engine(device)
    # LOCAL_RANK is 0 because each process sees its own device alone.
    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK="0",
        MASTER_ADDR=ranks.address,
        MASTER_PORT=str(ranks.port),
    )
    import deepspeed
    import deepspeed.ops
    import transformers

    transformers.utils.logging.set_verbosity_error()  # progress bars of every rank, and reports on the new heads
    transformers.utils.logging.disable_progress_bar()
    # DeepSpeed calls collectives under names that torch has begun to replace, thousands of times a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Built with a compiler on first use, for inference alone; it takes a minute and a half and serves nothing here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="gloo" if device == "cpu" else "nccl",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )
    sequence_groups.form(ranks, timeout_s=timeout_s)


def deepspeed_config(
    learner: LearnerConfig, optimizer: OptimizerConfig | None, *, device: str, num_ranks: int
) -> dict[str, Any]:
    """Return DeepSpeed's configuration; `optimizer` None is for a frozen model.

    `managed_gradient_accumulation` is off: every backward adds to the gradient and step() is the boundary, so the
    micro-batches of a mini-batch may differ in number and size and still add up exactly.
    """
    zero: dict[str, Any] = {
        "stage": learner.zero_stage,
        "stage3_gather_16bit_weights_on_model_save": False,
        "memory_efficient_linear": False,  # a linear layer of its own, in Python, for models that are frozen in part
    }
    if device == "cpu":
        # Copies of gradients and the optimizer's of so many at a time: memory that is used again costs no page faults.
        zero |= {"reduce_bucket_size": CPU_ELEMENTS_AT_ONCE, "sub_group_size": CPU_ELEMENTS_AT_ONCE}
    if num_ranks == 1 and learner.offload_parameters == "none":
        zero["stage3_param_persistence_threshold"] = 2**40  # there is nowhere to let go of parameters to
    if optimizer is not None:
        zero |= offload("offload_optimizer", learner.offload_optimizer, learner.nvme_path)
    zero |= offload("offload_param", learner.offload_parameters, learner.nvme_path)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        "bf16": {"enabled": learner.dtype == "bfloat16"},
        "steps_per_print": 2**31,
    }
    if optimizer is not None:
        config["gradient_clipping"] = optimizer.max_grad_norm
        config["optimizer"] = {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                # DeepSpeed's own kernels are compiled at first use; states on a disk need its CPU kernel all the same.
                "torch_adam": learner.offload_optimizer != "nvme",
            },
        }
    config = merged(config, learner.deepspeed)
    if optimizer is not None and config["optimizer"]["params"]["torch_adam"]:
        config["optimizer"]["params"].setdefault("fused", True)
    return config


def offload(key: str, place: str, nvme_path: str | None) -> dict[str, Any]:
    """Return the entry of DeepSpeed's zero_optimization that moves states to `place`, empty for "none"."""
    if place == "none":
        return {}
    entry: dict[str, Any] = {"device": place, "pin_memory": torch.cuda.is_available()}
    return {key: entry | ({"nvme_path": nvme_path} if place == "nvme" else {})}


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `extra` laid over it, dictionaries merged key by key."""
    result = dict(base)
    for key, value in extra.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


@contextmanager
def partitioned_loading(learner: LearnerConfig, network: str, *, device: str) -> Iterator[None]:
    """Let transformers load a network inside the block so that each rank has its shards alone. A collective.

    A module is partitioned as soon as it is made; rank 0 reads the weights, of one module at a time, and the others are
    sent them. Models come in the dtype of `learner.dtype`, which is what an engine makes of them anyway. Parameters on
    a disk are in a folder named after the network: DeepSpeed empties a folder that it begins to use.
    """
    from transformers.integrations import HfDeepSpeedConfig

    # transformers looks at the newest of these that is alive.
    own = learner if learner.nvme_path is None else replace(learner, nvme_path=f"{learner.nvme_path}/{network}")
    config = HfDeepSpeedConfig(deepspeed_config(own, None, device=device, num_ranks=dist.get_world_size()))
    try:
        yield
    finally:
        del config


def trained_engine(
    model: nn.Module, learner: LearnerConfig, optimizer: OptimizerConfig, *, device: str, num_updates: int
) -> Any:
    """Return a DeepSpeed engine that trains `model` with AdamW and the named scheduler over `num_updates` steps."""
    import deepspeed
    from transformers import get_scheduler

    def scheduler(inner: torch.optim.Optimizer) -> Any:
        return get_scheduler(
            optimizer.scheduler,
            inner,
            num_warmup_steps=optimizer.warmup_steps,
            num_training_steps=num_updates,
            scheduler_specific_kwargs=optimizer.scheduler_kwargs or None,
        )

    if learner.gradient_checkpointing:
        hugging_face: Any = model.model
        hugging_face.gradient_checkpointing_enable({"use_reentrant": False})
    _cast_the_rest(model, learner)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=deepspeed_config(learner, optimizer, device=device, num_ranks=dist.get_world_size()),
        lr_scheduler=scheduler,
        dist_init_required=False,
    )
    engine.train()
    return engine


def frozen_engine(model: nn.Module, learner: LearnerConfig, *, device: str) -> Any:
    """Return a DeepSpeed engine that only evaluates `model`, its parameters partitioned over the ranks."""
    import deepspeed

    model.requires_grad_(False)
    _cast_the_rest(model, learner)
    engine, *_ = deepspeed.initialize(
        model=model,
        config=deepspeed_config(learner, None, device=device, num_ranks=dist.get_world_size()),
        dist_init_required=False,
    )
    engine.eval()
    return engine


def _cast_the_rest(model: nn.Module, learner: LearnerConfig) -> None:
    """Bring what was added to a partitioned model, such as a value head, to its dtype, as DeepSpeed asks for."""
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(getattr(torch, learner.dtype))


def finite_grad_norm(engine: Any, name: str) -> float:
    """Return the norm of the gradient that the last step took, over all ranks and before clipping.

    Raises:
        FloatingPointError: it is not finite. ZeRO-3 has not taken the step: the weights are those of before.
    """
    norm = float(engine.get_global_grad_norm())
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient of the {name} has norm {norm}; no step was taken with it")
    return norm


def release(model: nn.Module) -> None:
    """Leave each rank with its own shards alone, of a trained engine's `model`.

    Forward passes leave parameters whole that DeepSpeed expects to need again, and others on their way, which its own
    gathering trips over. Every rank must be at the same place.
    """
    optimizers = (getattr(parameter, "_z3_optimizer", None) for parameter in model.parameters())
    trained = next((optimizer for optimizer in optimizers if optimizer is not None), None)
    if trained is not None:
        trained.empty_partition_cache()


def manifest(model: nn.Module, dtype: str) -> Manifest:
    """Return what `gathered_groups` yields of a Hugging Face model in `dtype`, with adapters or without."""
    return lora.merged_manifest(model, dtype)


def gathered_groups(model: nn.Module, manifest: Manifest) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield the whole parameters of a partitioned model, one group of the manifest at a time, on every rank.

    A collective: every rank must run it to the end. Tied parameters come once, under their first name, and adapters
    merged into the weights that they are at. The tensors are in the dtype of the manifest and valid until the next
    group is asked for: where nothing has to be computed, they are the gathered parameters themselves.
    """
    import deepspeed

    release(model)
    sources = lora.merged_sources(model)
    for group in manifest.groups:
        members = [(meta, sources[meta.name]) for meta in group]
        parameters = [parameter for _, source in members for parameter in source.parameters]
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
            yield [(meta.name, source.merged(meta.torch_dtype)) for meta, source in members]


def full_state(model: nn.Module, *, dtype: str, keep: bool = True) -> dict[str, Tensor]:
    """Return the whole state dict on the CPU, tied parameters once, merged; empty on a rank that does not keep it.

    A collective: every rank must call it.
    """
    state: dict[str, Tensor] = {}
    for group in gathered_groups(model, manifest(model, dtype)):
        if keep:
            state |= {name: tensor.to("cpu", copy=True) for name, tensor in group}
    return state


def trained_state(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Return the trained parameters whole on the CPU under their own names: with adapters, these alone and not merged.

    Empty on a rank that does not keep it. A collective: every rank must call it.
    """
    import deepspeed

    release(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values()), modifier_rank=None):
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items() if keep}
