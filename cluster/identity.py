"""What a run is: its settings, and the files that they name; and how two runs differ.

A run may go on from a checkpoint only as what it was. Free to change in between is what leaves the numbers of a run as
they are up to rounding, or does not enter them: where it runs and on how many processes, how memory is used, what is
recorded, retries and time limits. `algorithm.num_steps` may be raised as long as the ppo stage is not over and no
learning rate depends on it. Files are compared by content, so they may have moved.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.check import named_paths
from conf.schema import STAGES, Config

FREE_TO_CHANGE = (
    "Free to change are run, resume, checkpoint, tracking, monitors, cluster, generator's and learner's use of memory, "
    "retries and time limits of rewards, url and concurrency of their sources, and "
    "algorithm.num_steps upwards where no learning rate depends on it"
)
SMALL = 1 << 20  # bytes; a file below is read whole
BLOCK, NUM_BLOCKS = 1 << 16, 64  # of a larger file, evenly spread, the first and the last among them
WITHOUT_HORIZON = ("constant", "constant_with_warmup", "inverse_sqrt")  # schedulers that do not ask for num_steps
_FREE_SECTIONS = ("experiment", "mode", "run", "resume", "checkpoint", "tracking", "monitors", "cluster")
_FREE = {
    "generator": ("max_num_seqs", "kv_cache_mib", "gpu_memory_utilization", "tensor_parallel_size", "enforce_eager"),
    "learner": (
        "offload_optimizer",
        "offload_parameters",
        "nvme_path",
        "gradient_checkpointing",
        "micro_batch_tokens",
        "sequence_parallel_size",
    ),
    "model": ("shape",),
    "reward": ("retries", "backoff_s"),
}
_FREE_OF_SOURCE = re.compile(r"reward\.sources\[\d+\]\.(timeout_s|concurrency|url|shape)")
_MISSING = object()


def identity_of(config: Config) -> dict[str, Any]:
    """The settings as they were given, and a fingerprint of each local file or folder that they name; plain JSON.

    Of the config before the files of data.task are filled in, since those lie in the run folder.
    """
    given = json.loads(json.dumps(asdict(config)))  # lists for tuples, as a checkpoint has them
    paths = {key: Path(path) for key, path in named_paths(config).items() if path is not None and Path(path).exists()}
    return {"config": given, "files": {key: fingerprint(path) for key, path in paths.items()}}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], *, stage: str = "ppo") -> list[str]:
    """One line for each way in which the run `current` is not the one that `saved` is of; none: it may go on.

    `stage` is the one that the checkpoint was written in.
    """
    before, now = saved["config"], current["config"]
    defaults = json.loads(json.dumps(asdict(Config())))
    found = []
    for key, old, new in _settings(before, now, defaults):
        files, files_now = saved["files"].get(key), current["files"].get(key)
        if _is_free(key) or (key == "algorithm.num_steps" and _may_run_longer(before, old, new, stage)):
            continue
        if old == new and files != files_now:
            found.append(f"{key}: the files at {new} are not those that the run began with")
        elif old != new and (files is None or files != files_now):
            found.append(_difference(key, old, new))
    return found


def fingerprint(path: Path) -> str:
    """A SHA-256 of the files at `path`, of each its name in the folder, its size, and its content or samples of it.

    Reads at most 4 MiB of a file, so that it takes a moment even for a large model. What is hidden and Markdown files
    do not count.
    """
    total = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(_files(path)):
        name = "" if file == path else file.relative_to(path).as_posix()
        total.update(f"{name}\0{file.stat().st_size}\0".encode())
        for block in _blocks(file):
            total.update(block)
    return total.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        shown = (Path(parent, name) for name in names if not name.startswith(".") and not name.endswith(".md"))
        yield from (path for path in shown if path.is_file())  # not a link to nowhere


def _blocks(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as content:
        if size < SMALL:
            yield content.read()
            return
        for number in range(NUM_BLOCKS):
            content.seek((size - BLOCK) * number // (NUM_BLOCKS - 1))
            yield content.read(BLOCK)


def _settings(old: Any, new: Any, default: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every setting by its full key, as it was and as it is; _MISSING where it was or is not there.

    One that is younger than the checkpoint was at its default. A list of sections is taken apart if its length is the
    same; else it is one setting.
    """
    if old is _MISSING:
        old = default
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        defaults = default if isinstance(default, Mapping) else {}
        for name in [*new, *(name for name in old if name not in new)]:
            before, now, at_default = (each.get(name, _MISSING) for each in (old, new, defaults))
            yield from _settings(before, now, at_default, f"{key}.{name}" if key else name)
    elif _is_list_of_sections(old) and _is_list_of_sections(new) and len(old) == len(new):
        for number, (was, is_now) in enumerate(zip(old, new, strict=True)):
            yield from _settings(was, is_now, _MISSING, f"{key}[{number}]")
    else:
        yield key, old, new


def _is_list_of_sections(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _is_free(key: str) -> bool:
    section, _, name = key.partition(".")
    return section in _FREE_SECTIONS or name in _FREE.get(section, ()) or _FREE_OF_SOURCE.fullmatch(key) is not None


def _may_run_longer(before: Mapping[str, Any], old: Any, new: Any, stage: str) -> bool:
    """Whether a ppo stage of `old` steps can go on to `new` as if that had been asked for from the beginning."""
    schedulers = {before["learner"][network]["scheduler"] for network in ("policy", "critic")}
    return new > old and schedulers <= set(WITHOUT_HORIZON) and STAGES.index(stage) <= STAGES.index("ppo")


def _difference(key: str, old: Any, new: Any) -> str:
    if new is _MISSING:
        return f"{key} was {_in_words(old)} in the checkpoint, and is not there now"
    if old is _MISSING:
        return f"{key} is {_in_words(new)}, and was not there in the checkpoint"
    return f"{key} is {_in_words(new)}, was {_in_words(old)} in the checkpoint"


def _in_words(value: Any) -> str:
    """The value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
