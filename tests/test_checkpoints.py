"""Checkpoints on the disk: whole or not there, checked before they are used, and no more of them than are kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoints import Checkpoint, CheckpointError, Checkpoints, Draft
from cluster.identity import identity_of
from conf.schema import AlgorithmConfig, Config, ConfigError

PROJECT = Path(__file__).resolve().parent.parent
IDENTITY = identity_of(Config())


def checkpoints_in(folder: Path, *, keep: int = 2, config: Config | None = None) -> Checkpoints:
    return Checkpoints(folder, keep=keep, identity=IDENTITY if config is None else identity_of(config))


def shards_of(draft: Draft, *, ranks: int = 2) -> list[dict[str, tuple[int, str]]]:
    """Write what learner ranks would, and return what they would say of it."""
    shards = []
    for rank in range(ranks):
        shard = {}
        for ending in ("safetensors", "json"):
            name, content = f"rank_{rank:05d}.{ending}", f"{draft.stage} {draft.step} {rank} {ending}".encode() * 99
            (draft.learner / name).write_bytes(content)
            shard[name] = (len(content), hashlib.sha256(content).hexdigest())
        shards.append(shard)
    return shards


def publish(checkpoints: Checkpoints, step: int | None, *, stage: str = "ppo", **settings: Any) -> Checkpoint:
    draft = checkpoints.begin(stage, step)
    published = draft.publish(settings.pop("state", {"step": step}), shards=shards_of(draft), **settings)
    checkpoints.drop_old()
    return published


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> tuple[str | None, list[str]]:
    """The name of the newest whole checkpoint, and what was noted on the way."""
    notes: list[str] = []
    found = checkpoints_in(folder).newest(notes.append)
    return None if found is None else found.folder.name, notes


# Writing --------------------------------------------------------------------------------------------------------------


def test_what_is_published_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    state = {
        "kl_coef": 0.1 + 0.2,
        "best": -math.inf,
        "bits": 2**80 + 1,
        "nested": {"text": "ä\n", "none": None, "list": [True]},
    }
    published = publish(checkpoints_in(tmp_path), 10, state=state)
    loaded = checkpoints_in(tmp_path).newest(pytest.fail)
    assert loaded == published
    assert loaded is not None
    assert (loaded.stage, loaded.step, loaded.num_ranks, loaded.state) == ("ppo", 10, 2, state)
    assert loaded.folder == tmp_path / "ppo-000010"
    assert names(loaded.learner) == [
        f"rank_0000{rank}.{ending}" for rank in (0, 1) for ending in ("json", "safetensors")
    ]
    assert math.isnan(publish(checkpoints_in(tmp_path), 11, state={"score": math.nan}).state["score"])


def test_the_state_is_returned_as_it_will_be_read(tmp_path: Path) -> None:
    assert publish(checkpoints_in(tmp_path), 1, state={"pair": (1, 2)}).state == {"pair": [1, 2]}


@pytest.mark.parametrize(("state", "message"), [({"a": {1: 2}}, "not a string: 1 in a"), ({"a": object()}, "object")])
def test_a_state_that_json_would_change_is_refused_and_leaves_nothing(
    tmp_path: Path, state: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        publish(checkpoints_in(tmp_path), 1, state=state)
    assert names(tmp_path) == []


def test_a_draft_is_no_checkpoint_until_it_is_published(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    draft = checkpoints.begin("ppo", 10)
    shards = shards_of(draft)
    assert newest(tmp_path) == (None, [])
    draft.publish({}, shards=shards)
    assert newest(tmp_path) == ("ppo-000010", [])
    assert names(tmp_path) == ["ppo-000010"]


def test_the_start_of_a_stage_holds_no_learner(tmp_path: Path) -> None:
    start = checkpoints_in(tmp_path).begin("sft", None).publish({"a": 1}, shards=[])
    assert (start.folder.name, start.step, start.num_ranks) == ("sft-start", None, 0)
    assert names(start.folder) == ["manifest.json", "state.json"]


def test_the_manifest_names_versions_and_every_file(tmp_path: Path) -> None:
    manifest = json.loads((publish(checkpoints_in(tmp_path), 10).folder / "manifest.json").read_text())
    assert manifest["versions"].keys() >= {"python", "torch", "deepspeed", "ray", "transformers"}
    shards = {f"learner/rank_0000{rank}.{ending}" for rank in (0, 1) for ending in ("json", "safetensors")}
    assert manifest["files"].keys() == {"state.json"} | shards
    assert manifest["identity"] == IDENTITY


def test_a_shard_that_is_not_there_in_its_size_is_not_published(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    publish(checkpoints, 10)
    draft = checkpoints.begin("ppo", 20)
    shards = shards_of(draft)
    (draft.learner / "rank_00001.json").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"rank_00001\.json has 5 bytes; its rank says that it wrote \d+ bytes"):
        draft.publish({}, shards=shards)
    draft = checkpoints.begin("ppo", 20)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is not there"):
        draft.publish({}, shards=shards)
    assert names(tmp_path) == ["ppo-000010"]


@pytest.mark.parametrize("file", ["state.json", "manifest.json"])
def test_a_full_disk_costs_the_draft_and_nothing_else(tmp_path: Path, file: str) -> None:
    checkpoints = checkpoints_in(tmp_path, keep=1)
    publish(checkpoints, 10)
    draft = checkpoints.begin("ppo", 20)
    shards = shards_of(draft)
    (draft.folder / file).symlink_to("/dev/full")  # on which every write fails for want of space
    with pytest.raises(CheckpointError, match=r"\.ppo-000020\.writing could not be written: No space left on device"):
        draft.publish({}, shards=shards)
    assert names(tmp_path) == ["ppo-000010"]
    assert newest(tmp_path) == ("ppo-000010", [])
    publish(checkpoints, 20)
    assert names(tmp_path) == ["ppo-000020"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        CheckpointError, match=r"file/checkpoints/\.ppo-000001\.writing could not be written: Not a dir"
    ):
        checkpoints_in(tmp_path / "file" / "checkpoints").begin("ppo", 1)


def test_a_checkpoint_that_cannot_be_dropped_costs_no_other(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path, keep=1)
    publish(checkpoints, 10)
    (tmp_path / ".ppo-000010.dropped").touch()
    with pytest.raises(CheckpointError, match=r"checkpoint .*/ppo-000010 could not be removed: Not a directory"):
        publish(checkpoints, 20)
    assert newest(tmp_path) == ("ppo-000020", [])


def test_a_discarded_draft_is_gone(tmp_path: Path) -> None:
    draft = checkpoints_in(tmp_path).begin("ppo", 1)
    shards_of(draft)
    draft.discard()
    assert names(tmp_path) == []


# Which are kept -------------------------------------------------------------------------------------------------------


def test_the_newest_the_newest_best_and_the_starts_are_kept(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path, keep=2)
    checkpoints.begin("sft", None).publish({}, shards=[])
    publish(checkpoints, 100, stage="sft")
    checkpoints.begin("ppo", None).publish({}, shards=[])
    for step in range(0, 60, 10):
        publish(checkpoints, step, best=step in (10, 20))
    assert names(tmp_path) == ["ppo-000020", "ppo-000040", "ppo-000050", "ppo-start", "sft-start"]
    publish(checkpoints, 60, best=True)
    assert names(tmp_path) == ["ppo-000050", "ppo-000060", "ppo-start", "sft-start"]


def test_the_order_is_that_of_stages_and_steps_and_not_of_names(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path, keep=9)
    for stage, step in (("sft", 5), ("ppo", 999_999), ("ppo", 1_000_000), ("ppo", None), ("eval", None)):
        publish(checkpoints, step, stage=stage)
    found = []
    while (name := newest(tmp_path)[0]) is not None:
        found.append(name)
        (tmp_path / name).rename(tmp_path / f"seen-{name}")
    assert found == ["eval-start", "ppo-1000000", "ppo-999999", "ppo-start", "sft-000005"]


def test_what_is_newer_than_the_checkpoint_that_a_run_goes_back_to_is_forgotten(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path, keep=9)
    back = publish(checkpoints, 200, stage="sft")
    publish(checkpoints, None)
    publish(checkpoints, 10, best=True)
    (publish(checkpoints, 20).folder / "state.json").unlink()
    publish(checkpoints, 100, stage="sft")
    assert checkpoints.forget_after(back) == ["ppo-start", "ppo-000010", "ppo-000020"]
    assert names(tmp_path) == ["sft-000100", "sft-000200"]
    assert newest(tmp_path) == ("sft-000200", [])
    assert checkpoints.owns(back)
    assert not checkpoints_in(tmp_path / "other").owns(back)


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    publish(checkpoints, 10, state={"turn": 1})
    publish(checkpoints, 10, state={"turn": 2})
    assert names(tmp_path) == ["ppo-000010"]
    found = checkpoints.newest(pytest.fail)
    assert found is not None
    assert found.state == {"turn": 2}


# What a killed run leaves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renamed", ["the old one", "both"])
def test_a_replacement_that_was_cut_off_leaves_one_of_the_two(tmp_path: Path, renamed: str) -> None:
    old = publish(checkpoints_in(tmp_path), 10, state={"turn": 1})
    old.folder.rename(tmp_path / ".ppo-000010.replaced")
    if renamed == "both":
        publish(checkpoints_in(tmp_path), 10, state={"turn": 2})
        assert names(tmp_path) == ["ppo-000010"], "what stays of an earlier one is removed as well"
        other = publish(checkpoints_in(tmp_path / "other"), 10, state={"turn": 1})
        other.folder.rename(tmp_path / ".ppo-000010.replaced")
        (tmp_path / "other").rmdir()
    else:
        shards_of(checkpoints_in(tmp_path).begin("ppo", 10))
    checkpoints_in(tmp_path).tidy()
    assert names(tmp_path) == ["ppo-000010"]
    found = checkpoints_in(tmp_path).newest(pytest.fail)
    assert found is not None
    assert found.state == {"turn": 2 if renamed == "both" else 1}


def test_tidying_removes_drafts_and_touches_nothing_else(tmp_path: Path) -> None:
    publish(checkpoints_in(tmp_path), 10)
    shards_of(checkpoints_in(tmp_path).begin("ppo", 20))
    (tmp_path / ".ppo-000005.dropped").mkdir()
    for name in (".mine.writing", "notes", ".ppo-000020.mine"):
        (tmp_path / name).mkdir()
    checkpoints_in(tmp_path).tidy()
    assert names(tmp_path) == [".mine.writing", ".ppo-000020.mine", "notes", "ppo-000010"]
    checkpoints_in(tmp_path / "nowhere").tidy()
    assert not (tmp_path / "nowhere").exists()


def test_a_draft_is_begun_on_an_empty_folder(tmp_path: Path) -> None:
    shards_of(checkpoints_in(tmp_path).begin("ppo", 20), ranks=4)
    published = publish(checkpoints_in(tmp_path), 20)
    assert len(names(published.learner)) == 4
    assert newest(tmp_path) == ("ppo-000020", [])


@pytest.mark.parametrize("milliseconds", [20, 60, 110])
def test_a_kill_at_any_time_leaves_what_was_published(tmp_path: Path, milliseconds: int) -> None:
    program = f"""
from pathlib import Path
from tests.test_checkpoints import checkpoints_in, publish
checkpoints = checkpoints_in(Path({str(tmp_path / "checkpoints")!r}), keep=1)
for step in range(100_000):
    publish(checkpoints, step, best=step % 7 == 0)
    publish(checkpoints, step, state={{"again": step}})
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    last = int(process.stdout.readline())
    time.sleep(milliseconds / 1000)
    process.kill()
    last = max([last, *map(int, process.stdout.read().split())])
    assert process.wait() == -signal.SIGKILL
    checkpoints = checkpoints_in(tmp_path / "checkpoints", keep=1)
    checkpoints.tidy()
    found = checkpoints.newest(pytest.fail)
    assert found is not None
    assert found.step in (last, last + 1)
    checkpoints.forget_after(found)
    publish(checkpoints, last + 2)
    assert len(names(checkpoints.folder)) <= 2


# What is torn ---------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


TEARS: list[tuple[str, Callable[[Path], object], str]] = [
    ("learner/rank_00001.safetensors", Path.unlink, "learner/rank_00001.safetensors is missing"),
    ("learner/rank_00001.safetensors", cut, r"learner/rank_00001.safetensors has \d+ bytes instead of \d+"),
    ("learner/rank_00000.json", flip, "learner/rank_00000.json is not as it was written: its SHA-256 differs"),
    ("state.json", Path.unlink, "state.json is missing"),
    ("state.json", cut, r"state.json has \d+ bytes instead of \d+"),
    ("state.json", flip, "state.json is not as it was written"),
    ("manifest.json", Path.unlink, "manifest.json is missing"),
    ("manifest.json", cut, "manifest.json is not JSON"),
    ("manifest.json", lambda path: path.write_bytes(b"\xff\x00"), "manifest.json is not JSON"),
    ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is not as it was written"),
    (
        "manifest.json",
        lambda path: path.write_text(path.read_text().replace('"best": false', '"best": true')),
        "manifest.json is not as it was written: its own checksum differs",
    ),
]


@pytest.mark.parametrize(("file", "tear", "message"), TEARS)
def test_what_is_torn_is_named_and_the_one_before_is_taken(
    tmp_path: Path, file: str, tear: Callable[[Path], object], message: str
) -> None:
    checkpoints = checkpoints_in(tmp_path)
    publish(checkpoints, 10)
    tear(publish(checkpoints, 20).folder / file)
    name, notes = newest(tmp_path)
    assert name == "ppo-000010"
    (note,) = notes
    assert f"{tmp_path}/ppo-000020 is torn and is passed over: " in note
    with pytest.raises(ConfigError, match=message):
        checkpoints.load(tmp_path / "ppo-000020")
    assert "\n" not in note


def test_a_checkpoint_that_was_renamed_is_not_taken_for_another(tmp_path: Path) -> None:
    publish(checkpoints_in(tmp_path), 10).folder.rename(tmp_path / "ppo-000030")
    publish(checkpoints_in(tmp_path), 20)
    name, notes = newest(tmp_path)
    assert name == "ppo-000020"
    assert notes[0].endswith("ppo-000030 is torn and is passed over: its manifest is that of ppo-000010")


def test_torn_checkpoints_alone_do_not_start_the_run_anew(tmp_path: Path) -> None:
    (publish(checkpoints_in(tmp_path), 10).folder / "state.json").unlink()
    with pytest.raises(ConfigError, match=r"resume='auto': no checkpoint in .* is whole"):
        newest(tmp_path)
    assert newest(tmp_path / "nothing") == (None, [])


# What is of another run -----------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    publish(checkpoints_in(tmp_path), 10)
    publish(checkpoints_in(tmp_path, config=Config(seed=7)), 20)
    said = r"resume='auto': .*/ppo-000020 is of another run: seed is 0, was 7 in the checkpoint\. Set it as it was"
    with pytest.raises(ConfigError, match=said):
        newest(tmp_path)
    assert checkpoints_in(tmp_path).load(tmp_path / "ppo-000010").step == 10
    with pytest.raises(ConfigError, match="seed is 0, was 7"):
        checkpoints_in(tmp_path).load(tmp_path / "ppo-000020")


def test_more_steps_are_no_other_run_as_long_as_ppo_is_not_over(tmp_path: Path) -> None:
    publish(checkpoints_in(tmp_path), 10)
    longer = checkpoints_in(tmp_path, config=Config(algorithm=AlgorithmConfig(num_steps=200)))
    assert longer.newest(pytest.fail) is not None
    publish(checkpoints_in(tmp_path), None, stage="eval")
    with pytest.raises(ConfigError, match=r"algorithm\.num_steps is 200, was 100"):
        longer.newest(pytest.fail)


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the manifest says as another version of the program would have written it."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["checksum"]
    change(content)
    content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content))


def test_another_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    publish(checkpoints_in(tmp_path), 10)
    rewrite_manifest(publish(checkpoints_in(tmp_path), 20).folder, lambda content: content.update(format=2))
    with pytest.raises(ConfigError, match=r"ppo-000020 was written by another version .*\(format 2, not 1\)"):
        newest(tmp_path)
    publish(checkpoints_in(tmp_path), 30)
    assert names(tmp_path) == ["ppo-000020", "ppo-000030"]


def test_other_libraries_are_noted_and_not_refused(tmp_path: Path) -> None:
    folder = publish(checkpoints_in(tmp_path), 10).folder
    installed = json.loads((folder / "manifest.json").read_text())["versions"]["torch"]
    rewrite_manifest(folder, lambda content: content["versions"].update(torch="1.0"))
    name, notes = newest(tmp_path)
    assert name == "ppo-000010"
    assert len(notes) == 1
    assert f"this run has torch {installed} instead of 1.0" in notes[0]


# From a path ----------------------------------------------------------------------------------------------------------


def test_a_path_names_a_checkpoint_or_the_newest_whole_one_of_a_run_folder(tmp_path: Path) -> None:
    of_run = checkpoints_in(tmp_path / "run" / "checkpoints")
    publish(of_run, 10)
    cut(publish(of_run, 20).folder / "state.json")
    mine, notes = checkpoints_in(tmp_path / "new" / "checkpoints"), list[str]()
    assert mine.load(tmp_path / "run", notes.append).step == 10
    assert len(notes) == 1
    (tmp_path / "run" / "checkpoints" / "ppo-000010").rename(tmp_path / "a copy")
    assert mine.load(tmp_path / "a copy").step == 10
    assert not mine.owns(mine.load(tmp_path / "a copy"))
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="there is no checkpoint in its folder checkpoints"):
        mine.load(tmp_path / "empty")


def test_neither_ray_nor_torch_is_needed() -> None:
    code = "import sys, cluster.checkpoints; print([name for name in ('ray', 'torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Another run's --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_taken_over_whole_and_is_that_runs_still(tmp_path: Path) -> None:
    theirs = publish(checkpoints_in(tmp_path / "theirs"), 4, state={"step": 4, "run": "theirs"})
    ours = checkpoints_in(tmp_path / "ours")
    adopted = ours.adopt(theirs, {**theirs.state, "run": "ours"})
    assert ours.owns(adopted)
    assert newest(tmp_path / "ours") == ("ppo-000004", [])
    again = ours.newest(print)
    assert again is not None
    assert (again.step, again.num_ranks, again.state) == (4, 2, {"step": 4, "run": "ours"})
    for path in theirs.learner.iterdir():
        assert (again.learner / path.name).read_bytes() == path.read_bytes()
    assert newest(tmp_path / "theirs") == ("ppo-000004", [])


def test_a_checkpoint_that_cannot_be_read_is_neither_passed_over_nor_removed(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    publish(checkpoints, 1)
    last = publish(checkpoints, 2)
    (last.folder / "manifest.json").unlink()
    (last.folder / "manifest.json").mkdir()
    with pytest.raises(ConfigError, match=r"ppo-000002/manifest.json'?: cannot be read \(Is a directory\)"):
        checkpoints.newest(print)
