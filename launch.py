"""Runs what its command line asks for: `python launch.py experiment=quickstart`.

Parses and checks the settings before anything heavy is imported, so that a mistake is answered in about a second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cluster.checkpoints import Checkpoint, CheckpointError, Checkpoints
from cluster.identity import identity_of
from cluster.run_lock import run_lock
from conf.check import CHECKPOINTS, check, check_nothing_recorded, run_of
from conf.load import group_options, load_config, to_yaml
from conf.schema import Config, ConfigError

USAGE = """\
Manta trains language models with PPO: vLLM generates, reward actors score, DeepSpeed learns, Ray carries it.

Usage: python launch.py [GROUP=OPTION ...] [SETTING=VALUE ...]
       python launch.py --cfg job [...]     print every setting that the run would have, and stop
       python launch.py --help              this text

Groups, and the options in conf/GROUP/:
{groups}

Common settings (all of them: --cfg job; what they mean: conf/schema/):
  stages=[sft,reward,ppo,eval]   which stages run, in this order; [ppo] unless an experiment says more
  model.path=PATH                the policy: a Hugging Face checkpoint, a folder or a hub name
  reward.sources=[{path:PATH}]   a reward model; or {type:function,function:module:function}, {type:http,url:URL},
                                 {type:verifier,verifier:math_verify}, or several with a weight each
  data.path=PATH                 prompts: jsonl, parquet or a Hugging Face dataset
  data.eval_path=PATH            held-out prompts; evaluation.verifier=module:function judges the responses
  seed=0                         of everything that is drawn
  run.dir=PATH                   where the results go; runs/EXPERIMENT/TIME unless given
  resume=auto                    goes on from the newest whole checkpoint in run.dir, or starts if there is none yet;
                                 resume=PATH from that checkpoint, or from the newest in that run folder
  checkpoint.every=N             steps between checkpoints; checkpoint.keep=N of them stay, and the best
  algorithm=grpo                 another algorithm than PPO with a critic, as its paper sets it
  algorithm.num_steps=N          iterations of generate, score, learn, sync
  algorithm.kl_coef=X            how closely the policy is held to the reference
  generator.max_new_tokens=N     longest response
  generator.temperature=X        of sampling
  model.lora.rank=N              trains adapters in the ppo stage instead of all weights
  mode=plan                      says where everything would stand and whether it fits, without a GPU, and stops
  cluster.num_generators=N       vLLM engines; cluster.num_learners=N for DeepSpeed ranks
  tracking.wandb=online          online, offline or off

Examples:
  python launch.py experiment=quickstart
  python launch.py experiment=quickstart algorithm.kl_coef=0.1 cluster.num_generators=2
  python launch.py experiment=quickstart algorithm=grpo algorithm.prompts_per_step=32 algorithm.samples_per_prompt=8
  python launch.py model.path=./policy 'reward.sources=[{path: ./reward_model}]' data.path=prompts.jsonl learner=cpu
  python launch.py experiment=quickstart run.dir=runs/mine resume=auto
  python launch.py experiment=llama3_8b data.path=prompts.jsonl data.eval_path=null --cfg job
"""


def main(argv: Sequence[str]) -> int:
    """The exit code of the run: 0 when it went well, 2 when a setting is wrong, otherwise what the run says.

    2 also for a folder that cannot be used, or a checkpoint that the run cannot go on from.
    """
    try:
        overrides, only_print = _parse(argv)
        if overrides is None:
            _answer(_help())
            return 0
        config = load_config(overrides)
        if only_print:
            _answer(to_yaml(config).rstrip())
            return 0
        if config.mode == "plan":
            from cluster.estimate import run_plan

            check(config)  # what a run would refuse does not fit
            return run_plan(config)
        return _run(config)
    except ConfigError as error:
        _note(str(error))
        return 2
    except CheckpointError as error:
        _note(str(error))
        return 1


def _answer(text: str) -> None:
    """Print what was asked for; whoever reads no further, such as `head`, has what they want."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more as it ends


def _run(config: Config) -> int:
    """Checks `config`, takes the run's folder for this process alone, and runs the stages from where it stood."""
    check(config)
    from actors.preflight import preflight

    preflight(config)
    run_dir = make_run_dir(config).resolve()
    with run_lock(run_dir):
        checkpoints = Checkpoints(run_dir / CHECKPOINTS, keep=config.checkpoint.keep, identity=identity_of(config))
        checkpoints.tidy()
        resume = _found(config, checkpoints)
        if resume is not None:
            _note(f"going on from {resume.folder}")
        _save_settings(config, run_dir)
        from cluster.stages import run

        return run(config, run_dir, checkpoints=checkpoints, resume=resume)


def _found(config: Config, checkpoints: Checkpoints) -> Checkpoint | None:
    """The checkpoint to go on from, with newer ones of the run removed; None for a run that starts.

    Raises ConfigError if the run cannot go on from what there is.
    """
    if config.resume == "never":
        return None
    is_auto = config.resume == "auto"
    checkpoint = checkpoints.newest(_note) if is_auto else checkpoints.load(Path(config.resume), _note)
    if checkpoint is None:
        check_nothing_recorded(checkpoints.folder.parent)
        return None
    if checkpoints.owns(checkpoint) and (newer := checkpoints.forget_after(checkpoint)):
        _note(f"removed what is newer: {', '.join(newer)}")
    return checkpoint


def _save_settings(config: Config, run_dir: Path) -> None:
    try:
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError("run.dir", str(run_dir), f"config.yaml cannot be written ({error.strerror})") from error


def _note(line: str) -> None:
    print(f"launch.py: {line}", file=sys.stderr)


def make_run_dir(config: Config) -> Path:
    """The folder of this run: run.dir, that of the checkpoint of resume=PATH, or a new runs/<experiment>/<time>.

    Raises ConfigError if it cannot be made.
    """
    folder = None if config.run.dir is None else Path(config.run.dir)
    if folder is None and config.resume != "never":
        folder = run_of(Path(config.resume))
    try:
        if folder is None:
            return _new_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = f"cannot be made ({error.strerror}: {error.filename}); name a folder that this user may write to"
        raise ConfigError("run.dir", config.run.dir, remedy) from error
    return folder


def _new_folder(config: Config) -> Path:
    """A new runs/<experiment>/<time> for this run alone."""
    parent = Path("runs") / config.experiment
    parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for name in (now, *(f"{now}_{number}" for number in range(2, 100))):  # runs started within one second
        try:
            (parent / name).mkdir()
        except FileExistsError:
            continue
        return parent / name
    raise RuntimeError(f"a hundred runs started in {parent} within one second")


def _parse(argv: Sequence[str]) -> tuple[list[str] | None, bool]:
    """The overrides, None when help is asked for, and whether the config is only to be printed."""
    words = [word for argument in argv for word in ((argument.split("=", 1)) if argument[:2] == "--" else [argument])]
    if "-h" in words or "--help" in words:
        return None, False
    only_print = "--cfg" in words
    if only_print:
        at = words.index("--cfg")
        if words[at + 1 : at + 2] != ["job"]:
            raise ConfigError("--cfg", " ".join(words[at + 1 : at + 2]), "write --cfg job")
        del words[at : at + 2]
    for word in words:
        if word.startswith("-"):
            raise ConfigError("option", word, "there is no such option; see python launch.py --help")
    return words, only_print


def _help() -> str:
    groups = group_options()
    width = max(map(len, groups))
    lines = "\n".join(f"  {name:<{width}}  {', '.join(groups[name])}" for name in groups)
    return USAGE.replace("{groups}", lines).rstrip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
