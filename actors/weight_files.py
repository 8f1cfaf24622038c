"""Whether the weights of a checkpoint in a folder may be read: all there, whole, and safetensors.

A file of PyTorch's own format is a pickle, which may run code as it is read; safetensors are numbers and names alone.
Reads headers and sizes, never a weight, so that a torn file is found before anything starts.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.schema import ConfigError

WHOLE, SHARDED, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state*.pth")  # what the Trainer leaves
LONGEST_HEADER = 100 << 20  # bytes; the library's own limit


def check_weight_files(key: str, path: str) -> None:
    """Raise ConfigError for a folder of weights that cannot be read as safetensors; `key` is what named it.

    A name on the hub, which is no folder here, and a folder without any weights are not looked into.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    for file in _safetensors(key, folder):
        if fault := torn(file):
            raise ConfigError(key, path, f"its {file.name} {fault}; copy or download it again")


def _safetensors(key: str, folder: Path) -> Sequence[Path]:
    """The files that a reader of the checkpoint or of the adapter would read."""
    for name in (ADAPTER, WHOLE):
        if (folder / name).is_file():
            return [folder / name]
    if (folder / SHARDED).is_file():
        return [folder / name for name in _shards(key, folder)]
    pickles = [file.name for pattern in PICKLES for file in folder.glob(pattern) if not _leftover(file)]
    if pickles:
        remedy = "which is no safetensors file and may run code as it is read"
        how = "write it anew with save_pretrained of a transformers that you trust, or take a safetensors version of it"
        raise ConfigError(key, str(folder), f"its weights are in {sorted(pickles)[0]}, {remedy}; {how}")
    return []


def _leftover(file: Path) -> bool:
    return any(file.match(pattern) for pattern in NOT_WEIGHTS)


def _shards(key: str, folder: Path) -> list[str]:
    try:
        names = sorted(set(json.loads((folder / SHARDED).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(key, str(folder), f"its {SHARDED} cannot be read ({error!r}); copy it again") from error
    for name in names:
        if Path(name).name != name:
            raise ConfigError(key, str(folder), f"its {SHARDED} names {name!r}, which is no file of this folder")
    return names


def torn(file: Path) -> str | None:
    """What is wrong with a safetensors file, None if its header and its size agree. Completes "the file ..."."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else LONGEST_HEADER + 1
            header: Any = json.loads(opened.read(length)) if length <= LONGEST_HEADER else None
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, AttributeError, KeyError, IndexError, TypeError):
        return "is torn or no safetensors file"
    whole = 8 + length + max(ends, default=0)
    return None if size == whole else f"is torn: it has {size} bytes of {whole}"
