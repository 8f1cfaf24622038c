"""The state of a DeepSpeed ZeRO-3 engine as named flat tensors of this rank's part, and back.

ZeRO-3 keeps of every trained parameter, on each rank, an equal part of its flattened elements: the float32 master that
the optimizer steps, the optimizer's states of it, and in another dtype what is computed with (`ds_tensor`). Where the
elements do not divide, the last parts end in padding, which is memory that nobody has written. A `Shard` is such a part
without its padding: the shards of all ranks, one after another, are the flat tensor, whatever the number of ranks.

    shards(engine)["exp_avg/model.embed_tokens.weight"].values    live memory, to read and to write
    facts(engine)                                                 everything else, as JSON
    prepare(engine, facts); ...write into shards(engine)...; settle(engine, facts)

With adapters, these alone are trained and have shards. It reads the inside of the pinned DeepSpeed, by the paths of
its own `deepspeed.utils.safe_get_local_optimizer_state` and `_rigid_load_state_dict` in runtime/zero/stage3.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import ConfigError
from learner import steps, zero

STEP = "step"  # AdamW's count of steps
MASTER = "master"  # beside the names that the optimizer gives its states
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # of a DeepSpeed engine


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's part of a flat tensor that is spread over the ranks."""

    values: Tensor  # [N], a view: writing into it changes the state
    start: int  # place of values[0] in the whole
    numel: int  # elements of the whole, over all ranks


def shard_of(parameter: Any, partition: Tensor) -> Shard:
    """Return the shard in `partition`, this rank's padded part of `parameter` or of a state with as many elements."""
    size, numel = int(parameter.ds_tensor.ds_numel), int(parameter.ds_numel)
    assert partition.shape == (size,), "a part of another parameter"
    assert numel <= size * dist.get_world_size(), "the parameter is spread over fewer ranks than there are"
    start = min(size * dist.get_rank(), numel)
    return Shard(partition.detach()[: min(size, numel - start)], start, numel)


def trained_parameters(engine: Any) -> dict[str, Any]:
    """Return the parameters that the engine's optimizer steps, by name."""
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def shards(engine: Any) -> dict[str, Shard]:
    """Return what the optimizer keeps of every trained parameter, by "kind/parameter".

    The kinds are `master` and the optimizer's states, which AdamW has from its first step on.

    Raises:
        ConfigError: some of it is not in this process's memory.
    """
    _check_in_memory(engine)
    found = {}
    for name, parameter in trained_parameters(engine).items():
        for kind in (MASTER, *_kinds(engine)):
            found[f"{kind}/{name}"] = shard_of(parameter, _partition(engine, parameter, kind))
    return found


def numels(engine: Any, facts: Mapping[str, Any]) -> dict[str, int]:
    """Return the elements over all ranks of everything that `shards` gives an engine in the state of `facts`."""
    parameters = trained_parameters(engine)
    return {
        f"{kind}/{name}": int(parameter.ds_numel)
        for name, parameter in parameters.items()
        for kind in (MASTER, *facts["states"])
    }


def facts(engine: Any) -> dict[str, Any]:
    """Return what later steps depend on besides the shards, as JSON; the same on every rank.

    The optimizer's settings as the scheduler has left them, its scalars (AdamW's `step`), the scheduler, and counters.
    """
    _check_in_memory(engine)
    groups = engine.optimizer.optimizer.param_groups
    return {
        "states": _kinds(engine),
        "scalars": _scalars(engine),
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in groups],
        "scheduler": copy.deepcopy(engine.lr_scheduler.state_dict()),
        "counters": {name: getattr(engine, name) for name in COUNTERS},
    }


def prepare(engine: Any, facts: Mapping[str, Any]) -> None:
    """Make room for the optimizer's states, and drop what is whole or half done. A collective.

    Between this and `settle` the shards are to be written into; no pass may run.
    """
    _check_in_memory(engine)
    zero.release(engine.module)
    steps.discard(engine)
    fused = any(group.get("fused") for group in engine.optimizer.optimizer.param_groups)
    for flat, state in _states(engine):
        state.clear()
        for kind, dtype in facts["states"].items():
            state[kind] = torch.zeros_like(flat, dtype=getattr(torch, dtype), requires_grad=False)
        for name, (value, dtype, device) in facts["scalars"].items():
            if name == STEP and fused:  # beside the weights, wherever the states were when it was saved
                state[name] = torch.tensor(float(value), dtype=torch.float32, device=flat.device)
                continue
            place = "cpu" if device == "cpu" else flat.device
            state[name] = value if dtype is None else torch.tensor(value, dtype=getattr(torch, dtype), device=place)


@torch.no_grad()
def settle(engine: Any, facts: Mapping[str, Any]) -> None:
    """Compute with the masters as they now are, and go on with settings, schedule and counters of `facts`."""
    for name, parameter in trained_parameters(engine).items():
        assert parameter.ds_status.name == "NOT_AVAILABLE", f"{name} has been gathered since `prepare`"
        computed = shard_of(parameter, parameter.ds_tensor)
        computed.values.copy_(shard_of(parameter, _partition(engine, parameter, MASTER)).values)
    engine.optimizer.invalidate_secondary_tensor()  # ZeRO++'s copies of what was
    for group, saved in zip(engine.optimizer.optimizer.param_groups, facts["groups"], strict=True):
        for key, value in saved.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    engine.lr_scheduler.load_state_dict(dict(facts["scheduler"]))
    for name in COUNTERS:
        setattr(engine, name, facts["counters"][name])


def _partition(engine: Any, parameter: Any, kind: str) -> Tensor:
    """Return this rank's padded part of the master or of a state, as a view."""
    key = None if kind == MASTER else kind
    partition, _ = engine.optimizer._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=True, optim_state_key=key
    )
    return torch.as_tensor(partition)


def _states(engine: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return the flat masters, each of a group of parameters, and what the optimizer keeps of each."""
    outer = engine.optimizer
    return [(flat, outer.optimizer.state[flat]) for flat in outer.fp32_partitioned_groups_flat]


def _kinds(engine: Any) -> dict[str, str]:
    """Return the states that have as many elements as the parameters, with their dtypes."""
    found = [
        {name: _dtype(one) for name, one in state.items() if torch.is_tensor(one) and one.shape == flat.shape}
        for flat, state in _states(engine)
    ]
    assert all(one == found[0] for one in found), "every group of parameters takes every step"
    return found[0]


Scalar = tuple[Any, str | None, str | None]  # value; dtype and device, None for what is no tensor


def _scalars(engine: Any) -> dict[str, Scalar]:
    """Return the other states."""
    kinds, found = _kinds(engine), []
    for _, state in _states(engine):
        scalars: dict[str, Scalar] = {}
        for name, one in state.items():
            if name in kinds:
                continue
            if torch.is_tensor(one) and one.ndim > 0:
                remedy = f"its state {name} of shape {tuple(one.shape)} cannot be put into a checkpoint; use AdamW"
                raise ConfigError("learner.deepspeed", "optimizer", remedy)
            scalars[name] = (one.item(), _dtype(one), one.device.type) if torch.is_tensor(one) else (one, None, None)
        found.append(scalars)
    assert all(one == found[0] for one in found), "every group of parameters takes every step"
    return found[0]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_in_memory(engine: Any) -> None:
    optimizer = engine.optimizer
    remedy = "a checkpoint copies what is in memory: set it to cpu or none"
    if optimizer.swap_optimizer:
        raise ConfigError("learner.offload_optimizer", "nvme", remedy)
    if optimizer.params_in_nvme_and_cpu:
        raise ConfigError("learner.offload_parameters", "nvme", remedy)
    if optimizer.offload_optimizer and optimizer.partial_offload != 1.0:
        remedy = "a checkpoint needs the states of all parameters in one optimizer: leave it at 1"
        raise ConfigError(
            "learner.deepspeed.zero_optimization.offload_optimizer.ratio", optimizer.partial_offload, remedy
        )
    if optimizer.dynamic_loss_scale:
        remedy = "a checkpoint does not hold a loss scale: use learner.dtype=bfloat16"
        raise ConfigError("learner.deepspeed.fp16", True, remedy)
