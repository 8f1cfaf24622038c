"""What a learner rank puts into a checkpoint, and how a rank of the same or another number of ranks takes it up again.

    snapshot = take(ranks, {"policy": engine}, average=None, counters={...})    copies to host memory; training goes on
    files = snapshot.write(folder)                                              in another thread
    counters = put_back(folder, ranks, {"policy": engine}, average=None)        a collective

Every rank writes two files: `rank_00000.safetensors` with its shards, `ENGINE/KIND/PARAMETER`, `ema/PARAMETER` and
`rng/...`, and `rank_00000.json` with the rest. Nothing is pickled. Which folder, when, and whether it is whole is not
known here.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conf.schema import ConfigError
from learner import shards
from learner.ema import PolicyEMA
from learner.ranks import Ranks
from learner.shards import Shard

AVERAGE, RNG = "ema", "rng"  # beside the names of the engines
OTHER_MODEL = "this is a checkpoint of another model, or of other settings of it"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything of one rank, in host memory of its own."""

    rank: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]  # JSON

    def write(self, folder: Path) -> dict[str, tuple[int, str]]:
        """Write both files to `folder`, on the disk when this returns; return their bytes and sha256 by name.

        Reads nothing but its own copies, so it may run in another thread than the training.

        Raises:
            OSError: the disk is full, or something else keeps the files from being written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors, facts = rank_files(folder, self.rank)
        try:
            save_file(self.tensors, tensors)
        except SafetensorError as error:  # what it makes of an OSError
            raise OSError(f"{tensors}: {error}") from error
        facts.write_text(json.dumps(self.facts), encoding="utf-8")
        return {path.name: _sealed(path) for path in (tensors, facts)}


def rank_files(folder: Path, rank: int) -> tuple[Path, Path]:
    """Return the paths of a rank's tensors and of its facts."""
    return folder / f"rank_{rank:05d}.safetensors", folder / f"rank_{rank:05d}.json"


def take(
    ranks: Ranks, engines: Mapping[str, Any], *, average: PolicyEMA | None, counters: Mapping[str, int]
) -> Snapshot:
    """Return copies of what this rank keeps of `engines` and `average`, of `counters` and of its random states.

    To be called between steps; it does not communicate.

    Raises:
        ConfigError: a setting keeps a part of it out of memory.
    """
    live = {name: shard.values for name, shard in _shards(engines, average).items()}
    random_tensors, random_facts = random_states()
    facts = {
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "engines": {name: shards.facts(engine) for name, engine in engines.items()},
        "counters": dict(counters),
        "rng": random_facts,
    }
    copies = {name: values.to("cpu", copy=True) for name, values in live.items()}
    return Snapshot(ranks.rank, copies | random_tensors, facts)


def put_back(folder: Path, ranks: Ranks, engines: Mapping[str, Any], *, average: PolicyEMA | None) -> dict[str, int]:
    """Go on from the files in `folder`, of as many ranks or of another number; return the counters. A collective.

    With as many ranks every bit is as it was. With another number the weights and the optimizer's states are too, and
    later steps differ by the order of sums. Rank r takes the random states of rank r modulo their number: they only
    feed the dropout of adapters, where any rank's state is as good as another's.

    Raises:
        ConfigError: a file cannot be read, or is of another model; nothing has been changed. Every rank raises it.
    """
    with ShardFiles.of(folder) as files:
        facts = files.facts(ranks.rank)
        if facts["engines"].keys() != engines.keys():
            detail = f"it holds the networks {sorted(facts['engines'])}, this run has {sorted(engines)}: {OTHER_MODEL}"
            raise ConfigError("resume", str(folder), detail)
        wanted = {
            f"{name}/{which}": numel
            for name, engine in engines.items()
            for which, numel in shards.numels(engine, facts["engines"][name]).items()
        }
        files.check(wanted | {name: shard.numel for name, shard in _shards({}, average).items()})
        for name, engine in engines.items():
            shards.prepare(engine, facts["engines"][name])
        for name, shard in _shards(engines, average).items():
            files.read_into(shard, name)
        for name, engine in engines.items():
            shards.settle(engine, facts["engines"][name])
        set_random_states(files.random_tensors(ranks.rank), facts["rng"])
    return dict(facts["counters"])


def _shards(engines: Mapping[str, Any], average: PolicyEMA | None) -> dict[str, Shard]:
    """Return live memory by the names that it has in the files."""
    found = {
        f"{name}/{which}": shard for name, engine in engines.items() for which, shard in shards.shards(engine).items()
    }
    of_average = {} if average is None else average.shards()
    return found | {f"{AVERAGE}/{name}": shard for name, shard in of_average.items()}


class ShardFiles:
    """The files of all ranks as whole flat tensors, of which any range can be read. Only that range is read."""

    def __init__(self, folder: Path, opened: list[Any], facts: list[dict[str, Any]]) -> None:
        """`opened` and `facts` are of each rank, in order."""
        self.folder, self._opened, self._facts = folder, opened, facts
        self._lengths: dict[str, list[int]] = {}  # by name, on each rank
        for place, one in enumerate(opened):
            for name in one.keys():  # noqa: SIM118  (it is no dictionary)
                if not name.startswith(f"{RNG}/"):
                    lengths = self._lengths.setdefault(name, [0] * len(opened))
                    lengths[place] = int(one.get_slice(name).get_shape()[0])

    @staticmethod
    @contextmanager
    def of(folder: Path) -> Iterator[ShardFiles]:
        """Open the files of every rank in `folder`.

        Raises:
            ConfigError: one is missing or cannot be read.
        """
        with ExitStack() as stack:
            first = _read_facts(folder, 0)
            facts = [first, *(_read_facts(folder, rank) for rank in range(1, first["world_size"]))]
            opened = []
            for rank in range(len(facts)):
                path = rank_files(folder, rank)[0]
                try:
                    opened.append(stack.enter_context(safe_open(path, framework="pt")))
                except (OSError, SafetensorError) as error:
                    raise _unreadable(path, error) from error
            yield ShardFiles(folder, opened, facts)

    def facts(self, rank: int) -> dict[str, Any]:
        return self._facts[rank % len(self._facts)]

    def check(self, wanted: Mapping[str, int]) -> None:
        """Compare with `wanted`, elements by name.

        Raises:
            ConfigError: names the first that is missing, too many, or of another size.
        """
        for name in [*wanted, *self._lengths]:
            have = sum(self._lengths[name]) if name in self._lengths else None
            want = wanted.get(name)
            if have != want:
                sizes = [f"{size} elements" if size is not None else "nothing" for size in (have, want)]
                detail = f"of {name} it holds {sizes[0]}, and this run's networks have {sizes[1]}: {OTHER_MODEL}"
                raise ConfigError("resume", str(self.folder), detail)

    def read_into(self, shard: Shard, name: str) -> None:
        """Copy the elements of `shard` out of the flat tensor `name`, whichever ranks have written them."""
        stop, offset = shard.start + len(shard.values), 0
        for one, length in zip(self._opened, self._lengths[name], strict=True):
            low, high = max(shard.start, offset), min(stop, offset + length)
            if low < high:
                part = one.get_slice(name)[low - offset : high - offset]
                shard.values[low - shard.start : high - shard.start].copy_(part)
            offset += length

    def random_tensors(self, rank: int) -> dict[str, Tensor]:
        one = self._opened[rank % len(self._opened)]
        return {name: one.get_tensor(name) for name in one.keys() if name.startswith(f"{RNG}/")}  # noqa: SIM118


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of torch's generators as tensors, those of Python and numpy as JSON."""
    tensors = {f"{RNG}/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"{RNG}/cuda/{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    of_numpy: Any = np.random.get_state(legacy=False)
    inner = of_numpy["state"]
    return tensors, {
        "python": [version, list(words), gauss],
        "numpy": of_numpy | {"state": {"key": inner["key"].tolist(), "pos": inner["pos"]}},
    }


def set_random_states(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Set what `random_states` returned; of devices that this process does not have there is nothing to set."""
    torch.set_rng_state(tensors[f"{RNG}/torch"])
    for index in range(torch.cuda.device_count()):
        if f"{RNG}/cuda/{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"{RNG}/cuda/{index}"], index)
    version, words, gauss = facts["python"]
    random.setstate((version, tuple(words), gauss))
    inner = facts["numpy"]["state"]
    key = np.array(inner["key"], dtype=np.uint32)
    np.random.set_state({**facts["numpy"], "state": {"key": key, "pos": inner["pos"]}})


def _read_facts(folder: Path, rank: int) -> dict[str, Any]:
    path = rank_files(folder, rank)[1]
    try:
        facts: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return facts


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError("resume", str(path), f"cannot be read ({error}); resume from an earlier checkpoint")


def _sealed(path: Path) -> tuple[int, str]:
    """Return the bytes and the sha256 of a file once the disk has it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
