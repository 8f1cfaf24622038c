"""Checkpoints beside a run: what fails in writing them is said, and the run goes on. Without learner ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.checkpoints import Checkpoints
from cluster.identity import identity_of
from cluster.saving import Saver
from conf.schema import Config


def make(folder: Path, notes: list[str]) -> Saver:
    return Saver(Checkpoints(folder, keep=1, identity=identity_of(Config())), note=notes.append)


def test_what_is_saved_can_be_gone_back_to(tmp_path: Path) -> None:
    saver = make(tmp_path / "checkpoints", [])
    saver.save("ppo", None, lambda: {"stage": None})
    saver.save("ppo", 3, lambda: {"stage": {"step": 3}})
    assert saver.is_current
    newest = saver.checkpoints.newest(print)
    assert newest is not None
    assert (newest.stage, newest.step, newest.state) == ("ppo", 3, {"stage": {"step": 3}})


def test_a_checkpoint_that_cannot_be_written_is_said_and_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "file").write_text("no folder")
    saver = make(tmp_path / "file" / "checkpoints", notes)
    saver.save("ppo", 1, lambda: {"stage": {}})
    assert "no checkpoint this time; the one before stays" in notes[0]
    assert "Not a directory" in notes[0]
    assert saver.metrics()["recoveries/checkpoints_failed"] == 1


class RanksOnAFullDisk:
    """Ranks that write nothing, and leave no room for what is written after them."""

    def take_snapshot(self) -> None: ...

    def write_snapshot(self, folder: Path) -> list[Any]:
        (folder.parent / "state.json").symlink_to("/dev/full")
        return []

    def written(self, calls: list[Any]) -> list[Any]:
        return []


def test_a_disk_that_is_full_when_it_is_published_leaves_the_one_before(tmp_path: Path) -> None:
    notes: list[str] = []
    saver = make(tmp_path / "checkpoints", notes)
    saver.save("ppo", 1, lambda: {"stage": {"step": 1}})
    saver.save("ppo", 2, lambda: {"stage": {"step": 2}}, learners=RanksOnAFullDisk())  # type: ignore[arg-type]
    saver.finish()
    assert "No space left on device" in notes[0]
    assert not saver.is_current
    newest = saver.checkpoints.newest(print)
    assert newest is not None
    assert newest.step == 1
    assert not (tmp_path / "checkpoints" / ".ppo-000002.writing").exists()


def test_an_old_one_that_cannot_be_removed_is_said_and_the_new_one_counts(tmp_path: Path) -> None:
    notes: list[str] = []
    saver = make(tmp_path / "checkpoints", notes)
    saver.save("ppo", 1, lambda: {"stage": {}})
    (tmp_path / "checkpoints" / ".ppo-000001.dropped").touch()
    saver.save("ppo", 2, lambda: {"stage": {}})
    assert "a checkpoint that is no longer needed stays" in notes[0]
    assert "ppo-000001 could not be removed" in notes[0]
    assert saver.is_current
    assert saver.metrics()["recoveries/checkpoints_failed"] == 0


def test_a_run_is_saved_up_to_here_only_if_its_last_step_is_published(tmp_path: Path) -> None:
    saver = make(tmp_path / "checkpoints", [])
    assert saver.is_current, "nothing is done yet"
    saver.reached("ppo", 1)
    assert not saver.is_current
    saver.save("ppo", 1, lambda: {"stage": {}})
    assert saver.is_current
    saver.reached("ppo", 2)
    (tmp_path / "checkpoints" / ".ppo-000002.writing").symlink_to(tmp_path)  # which no draft can be
    saver.save("ppo", 2, lambda: {"stage": {}})
    assert not saver.is_current, "it could not be written"


def test_the_time_that_a_run_stood_still_is_reported_once(tmp_path: Path) -> None:
    saver = make(tmp_path / "checkpoints", [])
    saver.save("ppo", 1, lambda: {"stage": {}})
    assert saver.metrics()["timing/checkpoint_s"] > 0
    assert saver.metrics()["timing/checkpoint_s"] == 0
