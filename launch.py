"""Runs what its command line asks for: `python launch.py experiment=quickstart`.

Parses and checks the settings before anything heavy is imported, so that a mistake is answered in about a second.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from conf.check import check
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
  algorithm=grpo                 another algorithm than PPO with a critic, as its paper sets it
  algorithm.num_steps=N          iterations of generate, score, learn, sync
  algorithm.kl_coef=X            how closely the policy is held to the reference
  generator.max_new_tokens=N     longest response
  generator.temperature=X        of sampling
  model.lora.rank=N              trains adapters in the ppo stage instead of all weights
  cluster.num_generators=N       vLLM engines; cluster.num_learners=N for DeepSpeed ranks
  tracking.wandb=online          online, offline or off

Examples:
  python launch.py experiment=quickstart
  python launch.py experiment=quickstart algorithm.kl_coef=0.1 cluster.num_generators=2
  python launch.py experiment=quickstart algorithm=grpo algorithm.prompts_per_step=32 algorithm.samples_per_prompt=8
  python launch.py model.path=./policy 'reward.sources=[{path: ./reward_model}]' data.path=prompts.jsonl learner=cpu
  python launch.py experiment=llama3_8b data.path=prompts.jsonl data.eval_path=null --cfg job
"""


def main(argv: Sequence[str]) -> int:
    """The exit code of the run: 0 when it went well, 2 when a setting is wrong, otherwise what the run says."""
    try:
        overrides, only_print = _parse(argv)
        if overrides is None:
            print(_help())
            return 0
        config = load_config(overrides)
        if only_print:
            print(to_yaml(config), end="")
            return 0
        return _run(config)
    except ConfigError as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return 2


def _run(config: Config) -> int:
    """Checks `config`, makes the run's folder with the resolved config in it, and runs the stages."""
    check(config)
    from actors.preflight import preflight

    preflight(config)
    run_dir = make_run_dir(config)
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    from cluster.stages import run

    return run(config, run_dir.resolve())


def make_run_dir(config: Config) -> Path:
    """A folder for this run alone: run.dir, or a new runs/<experiment>/<time>."""
    if config.run.dir is not None:
        folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
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
