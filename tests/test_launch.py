"""The command line: help and settings at once, mistakes in one message, and a folder of its own for each run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import launch
from actors.preflight import preflight
from cluster.checkpoints import Checkpoints
from cluster.identity import identity_of
from cluster.run import Handover
from cluster.run_lock import run_lock
from conf.load import load_config
from conf.schema import Config, ConfigError
from tests.tiny_models import CONTEXT_LENGTH, VOCAB_SIZE, tiny_config, tiny_tokenizer

ROOT = Path(__file__).parent.parent
FITTING = ("data.max_prompt_tokens=64", "generator.max_new_tokens=32")


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def checkpoint(folder: Path, *, tokenizer: Any = None, **changes: Any) -> Path:
    """A config.json and a tokenizer; no weights, since none are read before Ray starts."""
    config = tiny_config("llama")
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reward model and prompts that fit each other."""
    root = tmp_path_factory.mktemp("launch")
    checkpoint(root / "policy", architectures=["LlamaForCausalLM"])
    checkpoint(root / "reward", architectures=["LlamaForSequenceClassification"], num_labels=1)
    (root / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return root


def scored_by(path: str) -> str:
    return f"reward.sources=[{{type: model, path: '{path}'}}]"


def job(folder: Path, *changes: str) -> list[str]:
    paths = (f"model.path={folder}/policy", scored_by(f"{folder}/reward"), f"data.path={folder}/prompts.jsonl")
    changed = {change.partition("=")[0] for change in changes}
    return [*(one for one in (*paths, *FITTING) if one.partition("=")[0] not in changed), *changes]


def refused(folder: Path, *changes: str) -> str:
    with pytest.raises(ConfigError) as caught:
        preflight(load_config(job(folder, *changes)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--cfg", "job", "experiment=quickstart"]])
def test_help_and_settings_are_answered_without_the_heavy_libraries(arguments: list[str]) -> None:
    heavy = ("torch", "vllm", "ray", "deepspeed", "transformers", "datasets", "numpy")
    code = f"import launch, sys; assert launch.main({arguments}) == 0; assert not set({heavy}) & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_whoever_stops_reading_an_answer_gets_no_traceback(arguments: list[str]) -> None:
    """As `| head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_help_names_every_group_and_option() -> None:
    answer = command("--help").stdout
    assert "python launch.py experiment=quickstart" in answer
    for word in ("algorithm", "ppo_adaptive_kl", "quickstart", "llama3_8b", "zero3_offload", "gpu_1x8", "run.dir"):
        assert word in answer
    assert command("-h").stdout == answer


def test_the_examples_of_the_help_are_right() -> None:
    for line in launch.USAGE.splitlines():
        if line.startswith("  python launch.py"):
            assert isinstance(
                load_config([word for word in shlex.split(line)[2:] if word not in ("--cfg", "job")]), Config
            )
        elif match := re.match(r"  ([\w.]+)=\S+ {2,}", line):
            config: Any = load_config([])
            for name in match[1].split("."):
                config = getattr(config, name)


def test_the_settings_are_printed_whole_as_yaml() -> None:
    done = command("--cfg=job", "experiment=quickstart", "algorithm.kl_coef=0.5")
    assert done.returncode == 0
    printed = OmegaConf.create(done.stdout)
    assert printed.experiment == "quickstart"
    assert printed.algorithm.kl_coef == 0.5
    assert printed.algorithm.gamma == 1.0, "a default of the schema"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model.path=None: set it to a Hugging Face checkpoint"),
        (
            ["algorithm.clip_ep=0.3"],
            "algorithm.clip_ep=0.3: there is no such setting; did you mean algorithm.clip_eps?",
        ),
        (["+nokey=1"], "nokey=1: there is no such setting"),
        (["algorithm.num_steps=many"], "algorithm.num_steps='many': must be a whole number"),
        (["algorithm.mini_batch_size=100"], "algorithm.mini_batch_size=100: must divide the train batch"),
        (["model.path=./nowhere", scored_by("."), "data.path=."], "model.path='./nowhere': there is no such file"),
        (["--multirun"], "--multirun"),
        (["--cfg", "hydra"], "--cfg='hydra': write --cfg job"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("launch.py: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == [], "no runs/ or outputs/ folder"


def test_a_mistake_in_a_checkpoint_is_one_message_too(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "policy", tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    done = command(*job(folder, f"model.path={tmp_path}/small", f"run.dir={tmp_path}/run"), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"launch.py: model.path='{tmp_path}/small': the tokenizer has")
    assert "Traceback" not in done.stderr
    assert "ray" not in done.stderr.lower()
    assert not (tmp_path / "run").exists()


# The run's folder -----------------------------------------------------------------------------------------------------


def test_each_run_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(["experiment=quickstart"])
    folders = [launch.make_run_dir(config) for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(re.fullmatch(r"runs/quickstart/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d)?", str(folder)) for folder in folders)
    assert launch.make_run_dir(load_config(["run.dir=here/it/is"])) == Path("here/it/is")
    assert Path("here/it/is").is_dir()


def test_the_folder_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    done = command(*job(folder, f"run.dir={tmp_path}"))
    assert done.returncode == 2
    assert f"run.dir='{tmp_path}': holds the metrics.jsonl of another run" in done.stderr


def test_a_folder_that_cannot_be_made_is_a_settings_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(job(folder, "run.dir=/proc/run")) == 2
    assert "launch.py: run.dir='/proc/run': cannot be made (" in capsys.readouterr().err


# Going on -------------------------------------------------------------------------------------------------------------


def checkpoints_of(run_dir: Path, arguments: list[str]) -> Checkpoints:
    return Checkpoints(run_dir / "checkpoints", keep=2, identity=identity_of(load_config(arguments)))


def test_what_cannot_be_put_right_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    draft = tmp_path / "checkpoints" / ".ppo-000010.writing"
    draft.touch()
    assert launch.main(job(folder, f"run.dir={tmp_path}", "resume=auto")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"launch.py: the checkpoint {draft} could not be removed: Not a directory")


def test_a_checkpoint_of_other_settings_is_one_message(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = job(folder, f"run.dir={tmp_path}", "resume=auto")
    checkpoints_of(tmp_path, arguments).begin("ppo", None).publish({}, shards=[])
    assert launch.main([*arguments, "algorithm.kl_coef=0.25"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"launch.py: resume='auto': {tmp_path}/checkpoints/ppo-start is of another run: ")
    assert "algorithm.kl_coef is 0.25, was 0.05 in the checkpoint. Set it as it was" in error


def test_a_folder_that_another_run_works_in_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for resume in ("auto", "never"):
        with run_lock(tmp_path):
            assert launch.main(job(folder, f"run.dir={tmp_path}", f"resume={resume}")) == 2
        assert f"process {os.getpid()} on" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_taken_over_before_anything_that_may_fail(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    arguments = job(folder, f"run.dir={ours}", f"resume={theirs}", "cluster.address=127.0.0.1:1")
    handover = Handover.at_start(load_config(arguments)).to_plain()
    tracker: dict[str, Any] = {"files": {}, "steps": {}, "wandb": None}
    state = {"run_dir": str(theirs), "asked_steps": 1, "handover": handover, "tracker": tracker, "stage": None}
    checkpoints_of(theirs, arguments).begin("ppo", None).publish(state, shards=[])
    assert launch.main(arguments) == 2
    assert "cluster.address='127.0.0.1:1'" in capsys.readouterr().err
    taken_over = checkpoints_of(ours, arguments).newest(print)
    assert taken_over is not None
    assert (taken_over.stage, taken_over.state["run_dir"]) == ("ppo", str(ours))


def test_an_empty_record_is_no_run_that_would_be_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert launch.main(job(folder, f"run.dir={tmp_path}", "cluster.address=127.0.0.1:1")) == 2
    assert "cluster.address='127.0.0.1:1'" in capsys.readouterr().err


def test_results_without_a_checkpoint_are_not_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert launch.main(job(folder, f"run.dir={tmp_path}", "resume=auto")) == 2
    assert f"run.dir='{tmp_path}': holds metrics.jsonl, but no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("new_folder", [False, True])
def test_a_path_goes_on_from_there(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], new_folder: bool
) -> None:
    """In its own folder without what came after it; in a new one, with nothing taken from the old."""
    old = tmp_path / "old"
    of_old = checkpoints_of(old, job(folder))
    for step in (10, 20):
        of_old.begin("ppo", step).publish({"step": step}, shards=[])
    arguments = job(folder, f"resume={old}/checkpoints/ppo-000010")
    config = load_config([*arguments, f"run.dir={tmp_path}/new"] if new_folder else arguments)
    run_dir = launch.make_run_dir(config)
    assert run_dir == (tmp_path / "new" if new_folder else old)
    found = launch._found(config, checkpoints_of(run_dir, arguments))
    assert found is not None
    assert found.state == {"step": 10}
    kept = ["ppo-000010", "ppo-000020"] if new_folder else ["ppo-000010"]
    assert sorted(path.name for path in (old / "checkpoints").iterdir()) == kept
    assert capsys.readouterr().err == ("" if new_folder else "launch.py: removed what is newer: ppo-000020\n")


# Before anything starts -----------------------------------------------------------------------------------------------


def test_what_fits_is_let_through(folder: Path) -> None:
    preflight(load_config(job(folder)))
    preflight(load_config(job(folder, "learner.critic_init=policy", f"model.reference={folder}/policy")))
    preflight(load_config(job(folder, f"learner.critic_init={folder}/policy", f"model.tokenizer={folder}/reward")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.path={0}"], "no Hugging Face checkpoint can be read there"),
        (["model.path=nobody/no-such-model"], "model.path='nobody/no-such-model': no Hugging Face checkpoint"),
        (
            ["model.tokenizer=nobody/no-such-model"],
            "model.tokenizer='nobody/no-such-model': no tokenizer can be loaded",
        ),
        ([scored_by("{0}")], "reward.sources[0].path='{0}': no Hugging Face checkpoint can be read there"),
        ([scored_by("{0}/policy")], "is no reward model: its classification head has 2 labels"),
        (["model.reference={0}"], "model.reference='{0}': no Hugging Face checkpoint"),
        (["learner.critic_init={0}"], "learner.critic_init='{0}': no Hugging Face checkpoint"),
        (
            ["generator.max_model_len=1000"],
            f"generator.max_model_len=1000: the model's context has {CONTEXT_LENGTH} tokens; lower it to that",
        ),
        (
            ["generator.max_model_len=90"],
            "data.max_prompt_tokens=64: with generator.max_new_tokens=32 it does not fit in generator.max_model_len of "
            "90 tokens; lower it to 58 or less",
        ),
        (
            ["data.max_prompt_tokens=250"],
            f"does not fit in the model's context of {CONTEXT_LENGTH} tokens; lower it to 224 or less",
        ),
        (["generator.max_new_tokens=300"], "lower both"),
        (["evaluation.verifier=no_such_module:f"], "evaluation.verifier='no_such_module:f': there is no module"),
        (
            ["reward.sources=[{type: function, function: 'actors.verifiers:f'}]", "learner.critic_init=policy"],
            "reward.sources[0].function='actors.verifiers:f': actors.verifiers has no function f",
        ),
        (["data.prompt_key=question"], "data.prompt_key='question': row 1 has no such key; it has prompt"),
        (["data.max_prompt_tokens=1"], "data.max_prompt_tokens=1: all 2 prompts are longer"),
        (
            ["stages=[sft]", "sft.data_path={0}/prompts.jsonl"],
            "sft.data_path='{0}/prompts.jsonl': row 1 has no text under 'answer'; it has prompt",
        ),
        (
            ["stages=[reward]", "reward_training.data_path={0}/prompts.jsonl"],
            "row 1 has no text under 'chosen'",
        ),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, changes: list[str], message: str) -> None:
    answer = refused(folder, *(change.replace("{0}", str(folder)) for change in changes))
    assert message.replace("{0}", str(folder)) in answer


def test_a_malformed_line_is_named_with_its_number(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    answer = refused(folder, f"data.path={tmp_path}/torn.jsonl")
    assert answer.startswith(f"data.path='{tmp_path}/torn.jsonl': line 2 is not JSON")
    good = f"data.path={folder}/prompts.jsonl"
    assert "data.eval_path" in refused(folder, good, f"data.eval_path={tmp_path}/torn.jsonl")


def test_a_tokenizer_without_an_end_or_a_template_is_refused(folder: Path, tmp_path: Path) -> None:
    endless, plain = tiny_tokenizer(), tiny_tokenizer()
    endless.eos_token = None
    plain.chat_template = None
    checkpoint(tmp_path / "endless", tokenizer=endless)
    checkpoint(tmp_path / "plain", tokenizer=plain)
    assert "its tokenizer has no EOS token" in refused(folder, f"model.path={tmp_path}/endless")
    assert refused(folder, f"model.tokenizer={tmp_path}/endless").startswith("model.tokenizer=")
    answer = refused(folder, f"model.path={tmp_path}/plain")
    assert answer.startswith("data.chat_template=True: ")
    assert "set data.chat_template=false" in answer
    preflight(load_config(job(folder, f"model.path={tmp_path}/plain", "data.chat_template=false")))


def test_vocabularies_that_differ_are_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "small", vocab_size=VOCAB_SIZE - 1)
    checkpoint(tmp_path / "padded", vocab_size=VOCAB_SIZE + 60)
    renamed = tiny_tokenizer()
    renamed.add_tokens(["more"])
    checkpoint(tmp_path / "renamed", tokenizer=renamed, num_labels=1)
    sizes = f"the tokenizer has {VOCAB_SIZE} tokens but the model's vocabulary only {VOCAB_SIZE - 1}"
    assert sizes in refused(folder, f"model.path={tmp_path}/small")
    assert f"model.tokenizer='{tmp_path}/renamed'" in refused(folder, f"model.tokenizer={tmp_path}/renamed")
    preflight(load_config(job(folder, f"model.path={tmp_path}/padded")))
    answer = refused(folder, f"model.reference={tmp_path}/padded")
    assert f"has a vocabulary of {VOCAB_SIZE + 60}, the policy one of {VOCAB_SIZE}" in answer
    assert "numbers its tokens differently" in refused(folder, f"model.reference={tmp_path}/renamed")
    answer = refused(folder, scored_by(f"{tmp_path}/renamed"))
    assert answer.startswith("learner.critic_init='reward': ")
    assert "set learner.critic_init=policy" in answer
    preflight(load_config(job(folder, scored_by(f"{tmp_path}/renamed"), "learner.critic_init=policy")))
