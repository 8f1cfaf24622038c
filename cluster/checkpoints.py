"""What a run can go on from: checkpoints that appear only when whole, and are checked before they are used.

    <run folder>/checkpoints/
        ppo-start/  ppo-000010/  ppo-000020/ ...   step = steps of the stage that are done
        .ppo-000030.writing/                       a draft; it becomes ppo-000030 by rename

cluster/checkpoint_files.py says what is in a folder. Works on files alone: it knows neither Ray nor torch. Two
processes must not use one folder at a time; cluster/run_lock.py sees to that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkpoint_files import (
    FORMAT,
    LEARNER,
    CheckpointError,
    Manifest,
    Shards,
    TornError,
    as_json,
    changing,
    library_versions,
    link_or_copy,
    name_of,
    parsed_name,
    position,
    read_manifest,
    read_state,
    remove,
    rename_for_good,
    verify_files,
    write_folder,
)
from cluster.identity import FREE_TO_CHANGE, differences
from conf.check import CHECKPOINTS
from conf.schema import ConfigError

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints", "Draft"]
Note = Callable[[str], None]
_WRITING, _REPLACED, _DROPPED = "writing", "replaced", "dropped"  # .NAME.<one of them>: never a checkpoint
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    folder: Path
    stage: str
    step: int | None  # steps of the stage that are done; None: it has only begun
    state: dict[str, Any]
    num_ranks: int  # learner ranks that wrote it; 0: it holds no learner

    @property
    def learner(self) -> Path:
        """The folder of the shards, which is there if `num_ranks` is not 0."""
        return self.folder / LEARNER


class Draft:
    """A checkpoint in the making. The learner ranks write to `learner`; `publish` or `discard` ends it."""

    def __init__(self, checkpoints: Checkpoints, stage: str, step: int | None) -> None:
        self.stage, self.step = stage, step
        self.folder = checkpoints.hidden(name_of(stage, step), _WRITING)
        self._checkpoints = checkpoints
        with changing(self.folder):
            remove(self.folder)
            self.learner.mkdir(parents=True)

    @property
    def learner(self) -> Path:
        return self.folder / LEARNER

    def publish(self, state: Mapping[str, Any], *, shards: Shards, best: bool = False) -> Checkpoint:
        """Make a checkpoint of the draft and return it as it will be read.

        `state`: what JSON can hold, with strings as keys (else TypeError); floats come back bit for bit, tuples as
        lists. `shards`: for each learner rank the files that it wrote to `learner`, by name, each with its bytes and
        the SHA-256, in hexadecimal, of what was written. `best`: the newest checkpoint so marked is kept, however old.

        All of it is on the disk before it gets its name. Raises CheckpointError if something cannot be written, or a
        shard is not there in its size: then the draft is gone, and every other checkpoint is as it was.
        """
        manifest = Manifest(
            stage=self.stage,
            step=self.step,
            best=best,
            num_ranks=len(shards),
            versions=library_versions(),
            identity=self._checkpoints.identity,
            files={},
        )
        try:
            text = as_json(state)
            with changing(self.folder):
                write_folder(self.folder, text, manifest, shards)
                folder = self._checkpoints.take_in(self)
        except BaseException:
            with suppress(CheckpointError):  # the first cause is the one to hear of; `tidy` removes what stays
                self.discard()
            raise
        return Checkpoint(folder, self.stage, self.step, json.loads(text), len(shards))

    def discard(self) -> None:
        """Remove the draft; a rank that is still writing to it will fail."""
        with changing(self.folder, "removed"):
            remove(self.folder)


class Checkpoints:
    """The checkpoints of one run, in the order of (stage, step).

    checkpoints = Checkpoints(run_dir / "checkpoints", keep=2, identity=identity_of(config))
    checkpoints.tidy()                         # once, as a run starts
    resume = checkpoints.newest(print)
    draft = checkpoints.begin("ppo", 10)       # the learner ranks write their shards to draft.learner
    checkpoint = draft.publish(state, shards=[{"rank_00000.safetensors": (1024, "9f86...")}])
    checkpoints.drop_old()
    """

    def __init__(self, folder: Path, *, keep: int, identity: Mapping[str, Any]) -> None:
        assert keep >= 1, keep
        self.folder, self.keep = folder, keep
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # as it will be read: lists for tuples

    def tidy(self) -> None:
        """Put right what a killed run left half done: remove drafts, and finish or take back a replacement.

        Raises CheckpointError if that cannot be done.
        """
        for path in sorted(self.folder.glob(".*.*")) if self.folder.is_dir() else ():
            name, _, what = path.name[1:].rpartition(".")
            if parsed_name(name) is None or what not in (_WRITING, _REPLACED, _DROPPED):
                continue
            with changing(path, "removed"):
                if what == _REPLACED and not (self.folder / name).exists():
                    rename_for_good(path, self.folder / name)
                else:
                    remove(path)

    def begin(self, stage: str, step: int | None) -> Draft:
        """Start a checkpoint of `stage` after `step` steps of it (None: at its start); raises CheckpointError."""
        return Draft(self, stage, step)

    def newest(self, note: Note) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there is none at all.

        One that is torn is passed over, with a line to `note` that says what is wrong. Raises ConfigError for one that
        is of another run than this, or of another version of the format, and if all there are are torn.
        """
        return self._newest(self.folder, "auto", note)

    def load(self, path: Path, note: Note = _log.warning) -> Checkpoint:
        """The checkpoint at `path`, of any run; or, if that is a run folder, the newest whole one in it.

        Raises ConfigError if there is none, if it is torn, and as `newest` does.
        """
        if (path / CHECKPOINTS).is_dir():
            found = self._newest(path / CHECKPOINTS, str(path), note)
            if found is None:
                raise ConfigError("resume", str(path), f"there is no checkpoint in its folder {CHECKPOINTS}")
            return found
        try:
            return self._open(path, str(path), note)
        except TornError as error:
            remedy = f"is no whole checkpoint: {error}; name another one, or its run folder for the newest whole one"
            raise ConfigError("resume", str(path), remedy) from error

    def owns(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint is one of this run's folder, rather than of another run that it goes on from."""
        return checkpoint.folder.resolve().parent == self.folder.resolve()

    def adopt(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> Checkpoint:
        """Make another run's checkpoint the first of this one, with a state of its own; return that.

        Its shards are linked, and copied where the file system has no links. Raises CheckpointError.
        """
        manifest = read_manifest(checkpoint.folder)
        draft = self.begin(checkpoint.stage, checkpoint.step)
        shards: list[dict[str, tuple[int, str]]] = [{} for _ in range(checkpoint.num_ranks)]
        with changing(draft.folder):
            for path in sorted(checkpoint.learner.glob("*")) if checkpoint.num_ranks else ():
                link_or_copy(path, draft.learner / path.name)
                size, checksum = manifest.files[f"{LEARNER}/{path.name}"]
                shards[int(path.stem.rpartition("_")[2])][path.name] = size, checksum
        return draft.publish(state, shards=shards, best=manifest.best)

    def forget_after(self, checkpoint: Checkpoint) -> list[str]:
        """Remove every checkpoint that is newer, and return their names: the run goes on from this one without them.

        Call it before the metrics are taken back, so that there never is a checkpoint that knows more steps than they.
        """
        assert self.owns(checkpoint), checkpoint.folder
        here = position(checkpoint.stage, checkpoint.step)
        newer = [name for name in _names(self.folder) if _position(name) > here]
        for name in reversed(newer):  # the newest first: a kill in between leaves one line of time
            self._drop(name)
        return newer

    def hidden(self, name: str, what: str) -> Path:
        return self.folder / f".{name}.{what}"

    def take_in(self, draft: Draft) -> Path:
        """Give a draft that is written its name. One that has the name already is there until the new one is."""
        name = name_of(draft.stage, draft.step)
        folder, replaced = self.folder / name, self.hidden(name, _REPLACED)
        if folder.exists():
            remove(replaced)
            rename_for_good(folder, replaced)
        try:
            rename_for_good(draft.folder, folder)
        except OSError:
            if replaced.exists() and not folder.exists():
                rename_for_good(replaced, folder)
            raise
        remove(replaced)
        return folder

    def drop_old(self) -> None:
        """Drop all but the starts of stages, the newest `keep` others, and the newest of the best.

        Raises CheckpointError if one cannot be removed.
        """
        newest_first = [name for name in reversed(_names(self.folder)) if not name.endswith("-start")]
        kept = newest_first[: self.keep]
        best = next((name for name in newest_first if self._is_best(name)), None)
        for name in newest_first:
            if name not in kept and name != best:
                self._drop(name)

    def _newest(self, folder: Path, asked: str, note: Note) -> Checkpoint | None:
        names = _names(folder)
        for name in reversed(names):
            try:
                return self._open(folder / name, asked, note)
            except TornError as error:
                note(f"the checkpoint {folder / name} is torn and is passed over: {error}")
        if names:
            raise ConfigError("resume", asked, f"no checkpoint in {folder} is whole; start again in another run.dir")
        return None

    def _is_best(self, name: str) -> bool:
        try:
            return read_manifest(self.folder / name).best
        except TornError:
            return False

    def _drop(self, name: str) -> None:
        """Remove one at once as far as any reader can see, then its files."""
        with changing(self.folder / name, "removed"):
            dropped = self.hidden(name, _DROPPED)
            remove(dropped)
            rename_for_good(self.folder / name, dropped)
            remove(dropped)

    def _open(self, folder: Path, asked: str, note: Note) -> Checkpoint:
        """The checkpoint in `folder`; TornError if it is not whole, ConfigError if this run cannot go on from it."""
        manifest = read_manifest(folder)
        if manifest.format != FORMAT:
            remedy = f"{folder} was written by another version of this program (format {manifest.format}, not {FORMAT})"
            raise ConfigError("resume", asked, f"{remedy}; resume with that version")
        parsed = parsed_name(folder.name)
        if parsed is not None and parsed != (manifest.stage, manifest.step):
            raise TornError(f"its manifest is that of {name_of(manifest.stage, manifest.step)}")
        self._check_identity(folder, manifest, asked)
        verify_files(folder, manifest)
        _note_versions(manifest.versions, note)
        state = read_state(folder)
        return Checkpoint(folder, manifest.stage, manifest.step, state, manifest.num_ranks)

    def _check_identity(self, folder: Path, manifest: Manifest, asked: str) -> None:
        differ = differences(manifest.identity, self.identity, stage=manifest.stage)
        if differ:
            remedy = f"{folder} is of another run: {'; '.join(differ)}. Set it as it was, or start anew in another "
            raise ConfigError("resume", asked, f"{remedy}run.dir. {FREE_TO_CHANGE}")


def _names(folder: Path) -> list[str]:
    """Of what is named as a checkpoint there, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path.name for path in folder.iterdir() if parsed_name(path.name)), key=_position)


def _position(name: str) -> tuple[int, int]:
    parsed = parsed_name(name)
    assert parsed is not None, name
    return position(*parsed)


def _note_versions(saved: Mapping[str, str], note: Note) -> None:
    current = library_versions()
    differ = [
        f"{name} {current.get(name, 'none')} instead of {saved.get(name, 'none')}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if differ:
        note(f"the checkpoint was written with other libraries, so the last bits of numbers may differ: "
             f"this run has {', '.join(differ)}")  # fmt: skip
