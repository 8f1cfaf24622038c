"""What a run records, and that every sink holds the same numbers."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import sinks
from cluster.report import read_metrics
from cluster.tracking import Tracker, to_json
from conf.schema import ConfigError, TrackingConfig

PROJECT = Path(__file__).resolve().parent.parent


def open_tracker(run_dir: Path, *, resume_at: dict[str, Any] | None = None, **settings: Any) -> Tracker:
    config = {"seed": 3, "model": {"lr": 0.1}}
    return Tracker(run_dir, TrackingConfig(**settings), name="a run", resolved_config=config, resume_at=resume_at)


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file, read strictly."""
    return [json.loads(line, parse_constant=refuse_constant) for line in path.read_text().splitlines()]


def test_each_call_is_a_line_with_stage_step_and_figures(tmp_path: Path) -> None:
    with open_tracker(tmp_path / "new" / "run") as tracker:
        tracker.log("sft", 1, {"sft/loss": 2.5, "sft/lr": 1e-5})
        from_numpy: dict[str, Any] = {"eval/accuracy": np.float32(0.25), "sync/version": np.int64(7)}
        tracker.log("ppo", 0, from_numpy)
    assert rows(tmp_path / "new" / "run" / "metrics.jsonl") == [
        {"stage": "sft", "step": 1, "sft/loss": 2.5, "sft/lr": 1e-5},
        {"stage": "ppo", "step": 0, "eval/accuracy": 0.25, "sync/version": 7},
    ]


def test_what_is_not_finite_stays_visible_and_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), open_tracker(tmp_path) as tracker:
        tracker.log("ppo", 1, {"policy/loss": math.nan, "policy/grad_norm": math.inf, "critic/loss": -math.inf})
        tracker.log("ppo", 2, {"policy/loss": math.nan})
    first = rows(tmp_path / "metrics.jsonl")[0]
    assert (first["policy/loss"], first["policy/grad_norm"], first["critic/loss"]) == ("nan", "inf", "-inf")
    figures = read_metrics(tmp_path / "metrics.jsonl")[0].figures
    assert math.isnan(figures["policy/loss"])
    assert (figures["policy/grad_norm"], figures["critic/loss"]) == (math.inf, -math.inf)
    warned = [record.getMessage() for record in caplog.records if record.name == "cluster.tracking"]
    assert [text for text in warned if "policy/loss" in text] == ["policy/loss is nan at step 1 of stage ppo"]


def test_a_step_may_be_logged_in_parts(tmp_path: Path) -> None:
    with open_tracker(tmp_path) as tracker:
        tracker.log("sft", 50, {"sft/loss": 2.0})
        tracker.log("reward", 1, {"reward_model/loss": 0.7})
        tracker.log("sft", 50, {"sft/eval_loss": 2.1})
    steps = {(step.stage, step.step): step.figures for step in read_metrics(tmp_path / "metrics.jsonl")}
    assert steps == {
        ("sft", 50): {"sft/loss": 2.0, "sft/eval_loss": 2.1},
        ("reward", 1): {"reward_model/loss": 0.7},
    }


@pytest.mark.parametrize(
    ("stage", "step", "metrics", "error", "message"),
    [
        ("ppo", 5, {"policy/loss": 1.0}, ValueError, "policy/loss logged twice at step 5 of stage ppo"),
        ("ppo", 4, {"policy/lr": 1.0}, ValueError, "step 4 of stage ppo after step 5"),
        ("ppo", 6, {"loss": 1.0}, ValueError, "write it as group/name"),
        ("ppo", 6, {"Policy/loss": 1.0}, ValueError, "write it as group/name"),
        ("ppo/eval", 6, {"policy/loss": 1.0}, ValueError, "stage 'ppo/eval'"),
        ("ppo", 6, {"policy/loss": "1.0"}, TypeError, "metric policy/loss: '1.0' of type str"),
    ],
)
def test_a_wrong_call_is_refused_and_leaves_no_trace(
    tmp_path: Path, stage: str, step: int, metrics: Any, error: type[Exception], message: str
) -> None:
    with open_tracker(tmp_path) as tracker:
        tracker.log("ppo", 5, {"policy/loss": 1.0})
        with pytest.raises(error, match=message):
            tracker.log(stage, step, metrics)
        tracker.log("ppo", 6, {"policy/loss": 0.5})
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [5, 6]


def test_a_killed_run_keeps_what_it_had(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from cluster.tracking import Tracker
from conf.schema import TrackingConfig
tracker = Tracker(Path({str(tmp_path)!r}), TrackingConfig(), name="x", resolved_config={{}})
for step in range(20):
    tracker.log("ppo", step, {{"policy/loss": step / 2}})
    tracker.samples("ppo", step, [{{"response": "a"}}])
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert [row["policy/loss"] for row in rows(tmp_path / "metrics.jsonl")] == [step / 2 for step in range(20)]
    assert len(rows(tmp_path / "samples.jsonl")) == 20


def test_samples_are_written_up_to_the_limit(tmp_path: Path) -> None:
    drawn = [{"prompt": "wörter", "response": str(i), "score": np.float32(i)} for i in range(5)]
    with open_tracker(tmp_path, samples_per_step=2) as tracker:
        tracker.samples("ppo", 3, drawn)
    assert rows(tmp_path / "samples.jsonl") == [
        {"stage": "ppo", "step": 3, "prompt": "wörter", "response": str(i), "score": float(i)} for i in range(2)
    ]


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with open_tracker(tmp_path) as tracker:
        tracker.log("ppo", 1, {"policy/loss": 1.0})
    with pytest.raises(ConfigError, match=r"run\.dir=.*already holds") as refused:
        open_tracker(tmp_path)
    assert refused.value.key == "run.dir"
    assert len(rows(tmp_path / "metrics.jsonl")) == 1


def test_json_refuses_what_it_would_have_to_guess() -> None:
    assert to_json({"a": (1, np.float64("nan"), None, True), 2: Path("x")}) == {"a": [1, "nan", None, True], "2": "x"}
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        to_json({"a": object()})


def test_every_sink_holds_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = [
        ("sft", 1, {"sft/loss": 2.5, "sft/lr": 1e-5}),
        ("sft", 2, {"sft/loss": 2.25, "sft/lr": 1e-5}),
        ("ppo", 1, {"policy/loss": 0.125, "rollout/num_tokens": 4096}),  # counts from 1 again
    ]
    children_before = children()
    with open_tracker(tmp_path, wandb="offline", tensorboard=True) as tracker:
        for stage, step, metrics in logged:
            tracker.log(stage, step, metrics)
    assert children() == children_before, "W&B left a process behind"

    expected = {(stage, step): {**metrics} for stage, step, metrics in logged}
    assert {(s.stage, s.step): s.figures for s in read_metrics(tmp_path / "metrics.jsonl")} == expected

    history, step_of = wandb_contents(tmp_path)
    assert step_of == {"sft/*": "sft/step", "ppo/*": "ppo/step"}
    assert history == [{f"{s}/step": at, **{f"{s}/{k}": v for k, v in m.items()}} for s, at, m in logged]

    for stage in ("sft", "ppo"):
        assert tensorboard_scalars(tmp_path / "tensorboard" / stage) == {
            (f"{of}/{key}", step, value)
            for of, step, metrics in logged
            for key, value in metrics.items()
            if of == stage
        }


def test_wandb_that_cannot_be_reached_is_a_settings_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"tracking\.wandb='online'.*API key.*tracking\.wandb=offline") as refused:
        open_tracker(tmp_path / "run", wandb="online")
    assert refused.value.key == "tracking.wandb"


# Going back, and going on ---------------------------------------------------------------------------------------------


def log_steps(tracker: Tracker, stage: str, steps: range, *, turn: int) -> None:
    for step in steps:
        tracker.log(stage, step, {"policy/loss": turn + step / 8})
        tracker.samples(stage, step, [{"response": "ü" * step}])


def steps_of(path: Path) -> list[tuple[str, int, float]]:
    return [(row["stage"], row["step"], row.get("policy/loss", math.nan)) for row in rows(path)]


@pytest.mark.parametrize("in_one_process", [True, False])
def test_what_was_recorded_after_a_position_is_taken_back(tmp_path: Path, in_one_process: bool) -> None:
    """Byte for byte what a run that was never interrupted records, and the same in TensorBoard."""
    with open_tracker(tmp_path / "whole", tensorboard=True) as tracker:
        log_steps(tracker, "sft", range(1, 3), turn=0)
        log_steps(tracker, "ppo", range(6), turn=0)
    with open_tracker(tmp_path / "run", tensorboard=True) as tracker:
        log_steps(tracker, "sft", range(1, 3), turn=0)
        log_steps(tracker, "ppo", range(3), turn=0)
        position = json.loads(json.dumps(tracker.position()))
        log_steps(tracker, "ppo", range(3, 6), turn=1)
        log_steps(tracker, "eval", range(1), turn=1)
        if in_one_process:
            tracker.rewind(position)
            log_steps(tracker, "ppo", range(3, 6), turn=0)
    if not in_one_process:
        with (tmp_path / "run" / "metrics.jsonl").open("a") as torn:
            torn.write('{"stage": "ppo", "st')
        with open_tracker(tmp_path / "run", resume_at=position, tensorboard=True) as tracker:
            assert tracker.position() == position
            log_steps(tracker, "ppo", range(3, 6), turn=0)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for stage in ("sft", "ppo"):
        shown = tensorboard_scalars(tmp_path / "run" / "tensorboard" / stage)
        assert shown == tensorboard_scalars(tmp_path / "whole" / "tensorboard" / stage)
    assert tensorboard_scalars(tmp_path / "run" / "tensorboard" / "eval") == set()


def test_a_position_says_how_far_each_stage_is(tmp_path: Path) -> None:
    with open_tracker(tmp_path) as tracker:
        assert tracker.position() == {"files": {"metrics.jsonl": 0, "samples.jsonl": 0}, "steps": {}, "wandb": None}
        log_steps(tracker, "sft", range(3), turn=0)
        log_steps(tracker, "ppo", range(1), turn=0)
        position = tracker.position()
    assert position["steps"] == {"sft": 2, "ppo": 0}
    assert position["files"] == {name: (tmp_path / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")}


def test_steps_go_on_from_the_position(tmp_path: Path) -> None:
    with open_tracker(tmp_path) as tracker:
        log_steps(tracker, "ppo", range(3), turn=0)
        position = tracker.position()
    with open_tracker(tmp_path, resume_at=position) as tracker:
        with pytest.raises(ValueError, match="step 1 of stage ppo after step 2"):
            tracker.log("ppo", 1, {"policy/loss": 0.0})
        tracker.log("ppo", 2, {"eval/accuracy": 0.5})
        log_steps(tracker, "ppo", range(3, 5), turn=0)
        tracker.rewind(position)
        log_steps(tracker, "ppo", range(3, 4), turn=0)
    assert [step for _, step, _ in steps_of(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


@pytest.mark.parametrize(("name", "there"), [("metrics.jsonl", 10), ("samples.jsonl", 0)])
def test_a_file_that_lost_its_end_is_named_and_nothing_is_cut(tmp_path: Path, name: str, there: int) -> None:
    with open_tracker(tmp_path) as tracker:
        log_steps(tracker, "ppo", range(3), turn=0)
        position = tracker.position()
        log_steps(tracker, "ppo", range(3, 5), turn=0)
    os.truncate(tmp_path / name, there)
    if not there:
        (tmp_path / name).unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    expected = f"its {name} has {there} bytes, {position['files'][name]} when the checkpoint was written"
    with pytest.raises(ConfigError, match=expected) as refused:
        open_tracker(tmp_path, resume_at=position)
    assert refused.value.key == "run.dir"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# W&B ------------------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_the_same_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    with open_tracker(tmp_path, wandb="offline") as tracker:
        position = tracker.position()
    with open_tracker(tmp_path, wandb="offline", resume_at=position) as tracker:
        assert tracker.position()["wandb"] == position["wandb"]
    ids = [path.name.split("-")[3] for path in tmp_path.glob("wandb/offline-run-*")]
    assert set(ids) == {position["wandb"]}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_service_of_wandb_that_dies_or_hangs_does_not_hold_the_run_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sinks, "WANDB_UPLOAD_S", 1.0)
    monkeypatch.setattr(sinks, "WANDB_END_S", 1.0)
    before = children()
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING), open_tracker(tmp_path, wandb="offline") as tracker:
        (service,) = children() - before
        os.kill(service, number)
        for step in range(500):  # more than fits into the pipe to a process that does not read
            tracker.log("ppo", step, {f"policy/number_{i}": i for i in range(50)})
    assert time.perf_counter() - start < 15
    assert children() == before
    assert len(rows(tmp_path / "metrics.jsonl")) == 500
    warned = [record.getMessage() for record in caplog.records if record.name == "cluster.sinks"]
    said = ["W&B does not answer and is ended"] if number == signal.SIGSTOP else []
    for text, expected in zip(warned, [*said, "W&B failed and records no more of this run"], strict=True):
        assert text.startswith(expected)


def test_a_network_that_goes_away_does_not_hold_the_run_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "WANDB_UPLOAD_S", 2.0)
    before = children()
    with wandb_server() as server:
        for name, value in (("BASE_URL", server), ("API_KEY", "a" * 40), ("SILENT", "true"), ("DISABLE_GIT", "true")):
            monkeypatch.setenv(f"WANDB_{name}", value)
        tracker = open_tracker(tmp_path, wandb="online")
        assert tracker.position()["wandb"] == "abc123"
        tracker.log("ppo", 1, {"policy/loss": 1.0})
    start = time.perf_counter()
    tracker.log("ppo", 2, {"policy/loss": 0.5})
    tracker.close(failed=False)
    assert time.perf_counter() - start < 10
    assert children() == before
    assert len(rows(tmp_path / "metrics.jsonl")) == 2
    (upload,) = tmp_path.glob("wandb/run-*/*.wandb")
    assert upload.stat().st_size, "what can be uploaded later"


@contextmanager
def wandb_server() -> Iterator[str]:
    """The address of a server on this machine that answers as W&B's does when a run begins."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
            bucket = {"id": "b", "name": "abc123", "displayName": "x", "config": "{}", "project": project}
            upsert = {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
            answer = json.dumps({"data": upsert if b"UpsertBucket" in body else {}}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_optional_sinks_are_imported_only_when_asked_for(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from cluster.tracking import Tracker
from conf.schema import TrackingConfig
with Tracker(Path({str(tmp_path)!r}), TrackingConfig(), name="x", resolved_config={{}}) as tracker:
    tracker.log("ppo", 1, {{"policy/loss": 1.0}})
print([name for name in ("wandb", "torch", "tensorboard", "matplotlib", "ray") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, check=True, timeout=60, capture_output=True)
    assert done.stdout.decode().strip() == "[]"


def children() -> set[int]:
    """Process ids of the direct children of this process."""
    ids = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            ids |= {int(word) for word in (task / "children").read_text().split()}
    return ids


def wandb_contents(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The logged rows of the offline run in a folder, and the horizontal axis of each pattern of keys."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    history, step_of = [], {}
    for data in log_records(path.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append({key: value for key, value in items.items() if not key.startswith("_")})
        if record.HasField("metric") and record.metric.glob_name:
            step_of[record.metric.glob_name] = record.metric.step_metric
    return history, step_of


def log_records(data: bytes, block_size: int = 32768) -> Iterator[bytes]:
    """The records of a LevelDB log, which is the format of a .wandb file after a header of seven bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if block_size - at % block_size < 7:  # no room for a header: the rest of the block is padding
            at += block_size - at % block_size
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last part
            yield whole
            whole = b""


def tensorboard_scalars(folder: Path) -> set[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    # TensorBoard stores 32-bit floats; six digits of each survive.
    return {(tag, e.step, float(f"{e.value:.6g}")) for tag, found in scalars.items() for e in found}
