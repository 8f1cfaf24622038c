"""Data, checkpoints, paths and settings that cannot be used: each is one message before anything starts.

About ten seconds, most of them for importing transformers.
"""

from __future__ import annotations

import ast
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import launch
from actors.preflight import preflight
from actors.prompts import PromptSource
from actors.rows import read_rows
from actors.vllm_architectures import architectures_of_vllm
from actors.weight_files import check_weight_files, torn
from cluster.tracking import Tracker
from conf.load import load_config
from conf.schema import ConfigError, DataConfig, TrackingConfig
from tests.tiny_models import tiny_checkpoint, tiny_config, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
GOOD = b'{"prompt": "a"}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy and a reward model with their weights, and prompts."""
    root = tmp_path_factory.mktemp("bad input")
    tiny_checkpoint(root / "policy")
    config = tiny_config("llama")
    config.num_labels, config.architectures = 1, ["LlamaForSequenceClassification"]
    config.save_pretrained(root / "reward")
    tiny_tokenizer().save_pretrained(root / "reward")
    (root / "prompts.jsonl").write_bytes(GOOD)
    return root


def job(folder: Path, *changes: str) -> list[str]:
    settings = {
        "model.path": f"'{folder}/policy'",
        "reward.sources": f"[{{path: '{folder}/reward'}}]",
        "data.path": f"'{folder}/prompts.jsonl'",
        "data.max_prompt_tokens": "64",
        "generator.max_new_tokens": "32",
    } | dict(change.split("=", 1) for change in changes)
    return [f"{name}={value}" for name, value in settings.items()]


def refused(folder: Path, *changes: str) -> str:
    """The one line that the settings are refused with."""
    with pytest.raises(ConfigError) as caught:
        preflight(load_config(job(folder, *changes)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("second", "fault"),
    [
        pytest.param(b'{"prompt": "b', "line 2 is not JSON: Unterminated string", id="truncated"),
        pytest.param(b"\x00\x00\x00\x00", "line 2 is not JSON", id="zeros"),
        pytest.param(b'{"prompt": "b", "prompt": "c"}', "line 2 has the key 'prompt' twice", id="duplicate-key"),
        pytest.param(b'{"prompt": "b", "meta": {"x": 1, "x": 2}}', "line 2 has the key 'x' twice", id="duplicate-deep"),
        pytest.param(b'{"prompt": "b\\ud800"}', r"line 2 holds \ud800, half of a character", id="half-a-character"),
        pytest.param(b'{"prompt": "b", "n": %s}' % (b"9" * 5000), "line 2 holds a number of too many", id="digits"),
        pytest.param(b"[" * 100_000, "line 2 is nested too deeply", id="nested"),
        pytest.param('{"prompt": "ö"}'.encode("latin-1"), "line 2 is not UTF-8 (byte 13)", id="latin-1"),
        pytest.param('{"prompt": "b"}'.encode("utf-16"), "line 2 is not UTF-8 (byte 1)", id="utf-16"),
        pytest.param(b"null", "line 2 is no JSON object but NoneType", id="null"),
        pytest.param(b'{"prompt": null}', "row 2 holds neither text nor a list of chat messages", id="null-prompt"),
        pytest.param(b'{"prompt": {"text": "b"}}', "row 2 holds neither text nor a list of chat messages", id="type"),
        pytest.param(b'{"prompt": "\\n \\t"}', "row 2 is empty; leave it out of the data", id="empty-prompt"),
    ],
)
def test_a_line_of_the_prompts_that_cannot_be_used_is_named(
    folder: Path, tmp_path: Path, second: bytes, fault: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD + second)
    assert fault in refused(folder, f"data.path={tmp_path}/rows.jsonl")


def test_a_character_that_is_escaped_as_a_pair_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "\\ud83d\\ude00"}\n')
    assert read_rows(str(tmp_path / "rows.jsonl"), "train") == [{"prompt": "\N{GRINNING FACE}"}]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"], ids=["empty", "blank", "only-a-bom"])
def test_an_empty_set_of_held_out_prompts_is_named(folder: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "eval.jsonl").write_bytes(content)
    answer = refused(folder, f"data.eval_path={tmp_path}/eval.jsonl")
    assert answer == f"data.eval_path='{tmp_path}/eval.jsonl': holds no rows"


def test_a_parquet_file_that_is_broken_is_named(tmp_path: Path) -> None:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    def unreadable(content: bytes) -> str:
        path = tmp_path / "rows.parquet"
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            read_rows(str(path), "train")
        return str(caught.value)

    parquet.write_table(pyarrow.table({"prompt": ["a", "b"]}), tmp_path / "good.parquet")
    whole = (tmp_path / "good.parquet").read_bytes()
    scrambled = whole[:20] + bytes(byte ^ 0xFF for byte in whole[20:60]) + whole[60:]
    for content in (b"", whole[:-20], scrambled, b"PAR1 and no more PAR1"):
        assert "cannot be read as parquet: " in unreadable(content)
    # Bytes under the type of text: neither writer nor reader of parquet looks at them.
    ends, text = np.array([0, 2], np.int32).tobytes(), b"\xff\xfe"
    of_bytes = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, *map(pyarrow.py_buffer, (ends, text))])
    parquet.write_table(pyarrow.table({"prompt": of_bytes}), tmp_path / "bytes.parquet")
    assert "cannot be read as parquet: 'utf-8' codec" in unreadable((tmp_path / "bytes.parquet").read_bytes())
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), tmp_path / "none.parquet")
    assert unreadable((tmp_path / "none.parquet").read_bytes()).endswith("holds no rows")


@pytest.mark.parametrize("values", [[1, 2], ["a", None], [["a"], ["b"]]], ids=["numbers", "null", "lists"])
def test_a_parquet_column_of_another_type_is_named(folder: Path, tmp_path: Path, values: list[object]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": values}), tmp_path / "rows.parquet")
    number = 2 if None in values else 1
    assert f"data.prompt_key='prompt': row {number} h" in refused(folder, f"data.path={tmp_path}/rows.parquet")


STRANGE = (
    "\N{GRINNING FACE}" * 3,
    "abc\u202edef",
    "e\u0301\u0327",
    "\x00\x07\x1b[31m",
    "\ufeffa",
    "日本語\u3000",
    "\u2028",
)


def test_strange_characters_come_through_whole(tmp_path: Path) -> None:
    prompts = [f"<{text}>" for text in STRANGE]
    rows = "".join(
        json.dumps({"prompt": text}, ensure_ascii=ascii) + "\n" for ascii in (True, False) for text in prompts
    )
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    tokenizer = tiny_tokenizer()
    source = PromptSource(
        read_rows(str(tmp_path / "rows.jsonl"), "train"), tokenizer, DataConfig(chat_template=False), seed=0
    )
    assert [prompt.text for prompt in source.all()] == prompts * 2
    assert [tokenizer.decode(prompt.token_ids) for prompt in source.all()] == prompts * 2


def test_paths_with_spaces_and_letters_of_other_scripts_work(folder: Path, tmp_path: Path) -> None:
    strange = tmp_path / "a run, with späces = 日本 'quoted'"
    shutil.copytree(folder, strange)
    plain = tmp_path / "späces 日本"  # what a command line can hold without quotes of its own
    strange.rename(plain)
    config = load_config([*job(plain), f"run.dir='{plain}/the run'"])
    preflight(config)
    run_dir = launch.make_run_dir(config)
    with Tracker(run_dir, TrackingConfig(), name="x", resolved_config={}) as tracker:
        tracker.log("ppo", 1, {"policy/loss": 1.0})
    assert (plain / "the run" / "metrics.jsonl").read_text().count("\n") == 1


# Checkpoints ----------------------------------------------------------------------------------------------------------


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder / "policy", to)
    return to


def test_weights_in_a_format_that_may_run_code_are_refused(folder: Path, tmp_path: Path) -> None:
    model = copied(folder, tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    answer = refused(folder, f"model.path={model}")
    assert answer.startswith(
        f"model.path='{model}': its weights are in pytorch_model.bin, which is no safetensors file"
    )
    assert "reward.sources[0].path" in refused(folder, f"reward.sources=[{{path: '{model}'}}]")
    assert "model.reference" in refused(folder, f"model.reference={model}")


def test_an_adapter_in_a_format_that_may_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"...")
    with pytest.raises(ConfigError, match=r"its weights are in adapter_model\.bin"):
        check_weight_files("reward.sources[0].path", str(tmp_path))


def test_what_a_trainer_leaves_beside_the_weights_is_not_taken_for_them(folder: Path, tmp_path: Path) -> None:
    model = copied(folder, tmp_path / "model")
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (model / name).write_bytes(b"...")
    check_weight_files("model.path", str(model))
    (model / "pytorch_model.bin").write_bytes(b"...")
    check_weight_files("model.path", str(model))  # the safetensors are read


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_a_torn_file_of_weights_is_found_before_anything_starts(folder: Path, tmp_path: Path, keep: int) -> None:
    model = copied(folder, tmp_path / "model")
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:keep])
    answer = refused(folder, f"model.path={model}")
    assert "its model.safetensors is torn" in answer
    assert "copy or download it again" in answer
    (model / "model.safetensors").write_bytes(whole + b"\0")
    assert f"it has {len(whole) + 1} bytes of {len(whole)}" in refused(folder, f"model.path={model}")


def test_a_header_that_is_no_header_is_no_safetensors_file(tmp_path: Path) -> None:
    for content in (b"<html>Not found</html>", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 1 << 60) + b"{}"):
        (tmp_path / "x.safetensors").write_bytes(content)
        assert torn(tmp_path / "x.safetensors") == "is torn or no safetensors file"


def test_a_shard_that_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    model = copied(folder, tmp_path / "model")
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")

    def index(content: str) -> str:
        (model / "model.safetensors.index.json").write_text(content)
        return refused(folder, f"model.path={model}")

    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    missing = index(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    assert f"its {names[1]} cannot be read (No such file or directory)" in missing
    assert "which is no file of this folder" in index(json.dumps({"weight_map": {"a": "../../elsewhere"}}))
    assert "model.safetensors.index.json cannot be read" in index("{")
    assert "model.safetensors.index.json cannot be read" in index("[]")


@pytest.mark.parametrize("of", ["config.json", "tokenizer_config.json"])
def test_code_that_a_checkpoint_brings_is_not_run(folder: Path, tmp_path: Path, of: str) -> None:
    model, ran = copied(folder, tmp_path / "model"), tmp_path / "ran"
    (model / "mine.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")
    settings = json.loads((model / of).read_text())
    if of == "config.json":
        settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
    else:
        settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.MyTokenizer", None]}}
    (model / of).write_text(json.dumps(settings))
    answer = refused(folder, f"model.path={model}")
    assert answer.startswith(f"model.path='{model}': no ")
    assert "trust_remote_code" in answer
    assert not ran.exists()


def test_an_architecture_that_vllm_does_not_know_is_named(folder: Path, tmp_path: Path) -> None:
    known = architectures_of_vllm()
    assert known is not None, "vLLM keeps its list elsewhere now"
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"} <= known
    assert "LlamaForSequenceClassification" not in known
    model = copied(folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["MyLlamaForCausalLM"]}))
    answer = refused(folder, f"model.path={model}")
    assert answer.startswith(
        f"model.path='{model}': vLLM, which samples the responses, does not know MyLlamaForCausalLM"
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_checkpoint_that_lacks_a_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    model = copied(folder, tmp_path / "model")
    (model / name).unlink()
    answer = refused(folder, f"model.path={model}")
    assert answer.startswith(f"model.path='{model}': no ")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_checkpoint_whose_file_is_broken_is_named(folder: Path, tmp_path: Path, name: str, content: str) -> None:
    model = copied(folder, tmp_path / "model")
    (model / name).write_text(content)
    answer = refused(folder, f"model.path={model}")
    assert answer.startswith(f"model.path='{model}': ")


def test_a_seed_that_the_libraries_cannot_take_is_refused(folder: Path) -> None:
    preflight(load_config(job(folder, f"seed={2**32 - 1}")))
    assert refused(folder, f"seed={2**32}").startswith(f"seed={2**32}: must be at most {2**32 - 1}")


# Ports, disks and clocks ----------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_one_message() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "examples/reward_server.py", "--port", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert f"cannot listen on port {port} of 127.0.0.1: Address already in use; choose another" in last


FILLING = """
import resource, sys
from pathlib import Path
from cluster.tracking import Tracker
from conf.schema import TrackingConfig
tracker = Tracker(Path(sys.argv[1]), TrackingConfig(), name="x", resolved_config={})
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # what a full disk does, for this process alone
for step in range(200):
    tracker.log("ppo", step, {"policy/loss": step / 2})
"""


def test_a_disk_that_takes_no_more_metrics_stops_the_run_and_keeps_what_there_is(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILLING, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr.splitlines()[-1]
    *lines, torn_line = (tmp_path / "metrics.jsonl").read_text().split("\n")
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
    assert len(lines) > 10
    assert len(torn_line) < 100


CLOCKS = {
    ("launch.py", "datetime.now"),  # the name of a run's folder
    ("actors/spans.py", "time.time"),  # once, where traces of several nodes begin
}


def test_deadlines_and_times_are_of_a_clock_that_nobody_sets() -> None:
    """time.time and datetime.now jump when a clock is set; nothing that waits or measures may read them."""
    found = set()
    paths = [ROOT / "launch.py", *(path for name in ("actors", "learner", "cluster", "conf", "examples")
             for path in (ROOT / name).rglob("*.py"))]  # fmt: skip
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("time.time", ".now", ".utcnow", ".today")
            ):
                found.add((str(path.relative_to(ROOT)), ast.unparse(node.func)))
    assert found <= CLOCKS, found - CLOCKS
