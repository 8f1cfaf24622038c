"""Settings: shipped files load, types and rules hold, and every mistake is answered by key, value and remedy."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from conf import load
from conf.check import check, is_hub_name, starting_model
from conf.load import group_options, load_config, to_yaml, typed_config
from conf.schema import AlgorithmConfig, Config, ConfigError, LearnerConfig, OptimizerConfig

PPO = ["model.path=.", "data.path=.", "reward.path=."]


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    return str(caught.value)


def unusable(*overrides: str) -> str:
    config = load_config(overrides)
    with pytest.raises(ConfigError) as caught:
        check(config)
    return str(caught.value)


def shipped() -> list[str]:
    return [f"{group}={option}" for group, options in group_options().items() for option in options]


def test_the_groups_are_those_of_the_design() -> None:
    groups = {"algorithm", "cluster", "data", "experiment", "generator", "learner", "model", "reward"}
    assert set(group_options()) == groups


@pytest.mark.parametrize("choice", shipped())
def test_every_shipped_file_loads(choice: str) -> None:
    assert isinstance(load_config([choice]), Config)


def test_a_shipped_file_says_only_what_differs_from_the_schema() -> None:
    defaults = Config()
    for choice in shipped():
        group, option = choice.split("=")
        if group == "experiment":
            continue
        section = getattr(defaults, group)
        values = OmegaConf.to_container(OmegaConf.load(load.FOLDER / group / f"{option}.yaml"))
        assert isinstance(values, dict)
        for name, value in values.items():
            assert getattr(section, str(name)) != value, f"{choice} repeats the default of {name!r}"


def test_without_arguments_the_defaults_of_the_schema_hold() -> None:
    assert load_config([]) == Config()


def test_types_are_those_of_the_schema() -> None:
    config = load_config(["learner.policy.betas=[0.8,1e-1]", "stages=[sft,ppo]", "algorithm.kl_coef=1", "run.dir=2026"])
    assert config.learner.policy.betas == (0.8, 0.1)
    assert config.stages == ("sft", "ppo")
    assert isinstance(config.algorithm.kl_coef, float)
    assert config.run.dir == "2026"
    assert config.learner.critic == OptimizerConfig(lr=9e-6)


def test_an_experiment_sets_its_name_and_its_groups_and_overrides_win() -> None:
    config = load_config(["experiment=quickstart", "algorithm.kl_coef=0.1", "cluster.num_generators=2"])
    assert config.experiment == "quickstart"
    assert config.stages == ("sft", "reward", "ppo")
    assert config.model.init_config is not None
    assert (config.learner.dtype, config.generator.dtype, config.cluster.threads) == ("float32", "float32", 1)
    assert config.cluster.device == "auto"
    assert config.data.task.params == {"min_word_len": 3, "max_word_len": 5}
    assert (config.algorithm.kl_coef, config.cluster.num_generators) == (0.1, 2)
    assert load_config(["cluster.num_generators=2", "experiment=quickstart"]).cluster.num_generators == 2
    assert load_config(["experiment=llama3_8b", "learner=cpu"]).learner.offload_optimizer == "none"


def test_free_mappings_take_new_keys_and_interpolations_reach_defaults() -> None:
    config = load_config(
        [
            "data.task.params.min_terms=2",
            "learner.deepspeed.zero_optimization.reduce_bucket_size=5",
            "algorithm.mini_batch_size=${algorithm.prompts_per_step}",
            "sft.optimizer.scheduler_kwargs={num_cycles:2}",
        ]
    )
    assert config.data.task.params == {"min_terms": 2}
    assert config.learner.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5}}
    assert config.algorithm.mini_batch_size == 128
    assert config.sft.optimizer.scheduler_kwargs == {"num_cycles": 2}


def test_the_saved_yaml_gives_the_same_config_back() -> None:
    config = load_config(["experiment=quickstart", "seed=7", "learner.policy.betas=[0.8,0.9]"])
    values = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    assert isinstance(values, dict)
    assert typed_config({str(key): value for key, value in values.items()}) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.clip_ep=0.3", "algorithm.clip_ep=0.3: there is no such setting; did you mean algorithm.clip_eps?"),
        ("+algorithm.clip_ep=0.3", "did you mean algorithm.clip_eps?"),
        ("+nokey=1", "nokey=1: there is no such setting; the top level has experiment, stages"),
        ("++learner.policy.lrr=1", "learner.policy.lrr=1: there is no such setting; did you mean learner.policy.lr?"),
        ("num_generators=2", "did you mean cluster.num_generators?"),
        ("experimnt=quickstart", "did you mean experiment?"),
        (
            "experiment=quickstrat",
            "experiment='quickstrat': conf/experiment/ has no such file; choose one of llama3_8b",
        ),
        ("experiment=quickstrat", "did you mean quickstart?"),
        ("algorithm=grpo", "algorithm='grpo': conf/algorithm/ has no such file"),
        ("algorithm={num_steps:3}", "conf/algorithm/ has no such file"),
        ("algorithm.num_steps=1.5", "algorithm.num_steps=1.5: must be a whole number"),
        ("algorithm.num_steps=many", "algorithm.num_steps='many': must be a whole number"),
        ("algorithm.num_steps=null", "algorithm.num_steps=None: must be a whole number"),
        ("algorithm.num_steps=true", "algorithm.num_steps=True: must be a whole number"),
        ("algorithm.kl_target=high", "algorithm.kl_target='high': must be a number or null"),
        ("tracking.tensorboard=3", "tracking.tensorboard=3: must be true or false"),
        ("reward.chat_template=maybe", "reward.chat_template='maybe': must be true or false or null"),
        ("run.dir=[a]", "run.dir=['a']: must be text or null"),
        ("data.task.params=3", "data.task.params=3: must be a mapping"),
        ("learner.policy.betas=[a,2]", "must be a list of 2, each a number"),
        ("learner.policy.betas=[0.1,0.2,0.3]", "learner.policy.betas=[0.1, 0.2, 0.3]: must be a list of 2"),
        ("stages=ppo", "stages='ppo': must be a list, each item text, written [a,b]"),
        ("stages=sft,ppo", "stages='sft,ppo': one run takes one value; a list is written in brackets"),
        ("sft=3", "sft=3: is a section; name a setting in it, for example sft.data_path=..."),
        ("seed=${nokey}", "seed='${nokey}': Interpolation key 'nokey' not found"),
        ("seed=${algorithm.gamma}", "seed='${algorithm.gamma}'"),
        ("hydra.run.dir=x", "hydra.run.dir='x': Hydra's own settings have no effect here; run.dir=PATH"),
        ("~algorithm.clip_eps", "'~algorithm.clip_eps'"),
        ("seed", "overrides='seed': Error parsing override 'seed' missing EQUAL"),
        ("seed=[1", "overrides='seed=[1'"),
    ],
)
def test_what_the_schema_does_not_allow_is_named(override: str, message: str) -> None:
    answer = refused(override)
    assert message in answer
    assert "\n" not in answer


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages=[]", "stages=[]: name one or more of sft, reward, ppo"),
        ("stages=[ppo,sft]", "in this order"),
        ("stages=[dpo]", "stages=['dpo']"),
        ("seed=-1", "seed=-1: must be at least 0"),
        ("resume=auto", "resume='auto': resuming a run is not implemented yet"),
        ("algorithm.mini_batch_size=100", "128 x 1 = 128 rollouts; the nearest that does is 128"),
        ("algorithm.kl_coef=nan", "algorithm.kl_coef=nan: must be at least 0"),
        ("algorithm.clip_eps=inf", "algorithm.clip_eps=inf: must be greater than 0"),
        ("learner.policy.lr=-1", "learner.policy.lr=-1.0: must be greater than 0"),
        ("learner.critic.scheduler=cosin", "learner.critic.scheduler='cosin': choose one of linear, cosine"),
        ("learner.critic.warmup_steps=3", "has no effect with learner.critic.scheduler=constant"),
        ("learner.critic.betas=[0.9,1]", "learner.critic.betas[1]=1.0: must be at least 0 and less than 1"),
        ("sft.optimizer.lr=0", "sft.optimizer.lr=0.0: must be greater than 0"),
        ("reward_training.optimizer.lr=0", "reward_training.optimizer.lr=0.0"),
        ("reward_training.batch_size=0", "reward_training.batch_size=0: must be at least 1"),
        ("sft.num_steps=0", "sft.num_steps=0: must be at least 1"),
        ("data.task.sft_wrong_share=2", "data.task.sft_wrong_share=2.0: must lie between 0 and 1"),
    ],
)
def test_a_rule_that_is_broken_names_the_full_key(override: str, message: str) -> None:
    assert message in refused(override)


def test_the_rules_hold_without_hydra_too() -> None:
    with pytest.raises(ConfigError, match=r"^algorithm\.gamma=nan"):
        AlgorithmConfig(gamma=math.nan)
    with pytest.raises(ConfigError, match=r"^learner\.policy\.lr="):
        LearnerConfig(policy=OptimizerConfig(lr=0.0))


def test_a_typo_in_an_experiment_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the user's own, with a file that no schema is mentioned in."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "config.yaml").write_text("defaults:\n  - _self_\n  - experiment: null\n")
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nalgorithm:\n  clip_ep: 0.3\n")
    (tmp_path / "experiment" / "torn.yaml").write_text("# @package _global_\nalgorithm: [\n")
    monkeypatch.setattr(load, "FOLDER", tmp_path)
    assert refused("experiment=mine") == (
        "algorithm.clip_ep=0.3: there is no such setting; did you mean algorithm.clip_eps?"
    )
    assert "overrides='experiment=torn'" in refused("experiment=torn")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "model.path=None: set it to a Hugging Face checkpoint"),
        (["stages=[sft]"], "or set model.init_config"),
        (["model.path=."], "data.path=None: the ppo stage needs prompts"),
        (["model.path=.", "data.path=."], "reward.path=None: the ppo stage needs scores"),
        (["stages=[sft]", "model.path=."], "sft.data_path=None: the sft stage needs rows"),
        (["stages=[reward]", "model.path=."], "reward_training.data_path=None: the reward stage needs rows"),
        (["model.init_config=x", "model.path=."], "model.init_config='x': set either this or model.path='.'"),
        (["model.init_config=x"], "model.init_config='x': random weights are for the sft stage"),
        (["stages=[sft]", "model.init_config=x", "sft.model_path=."], "has no effect with sft.model_path='.'"),
        ([*PPO, "data.task.name=gcd"], "data.path='.': set either this or data.task.name='gcd'"),
        ([*PPO, "evaluation.verifier=a:b"], "evaluation.verifier='a:b': has no held-out prompts to judge"),
        ([*PPO, "stages=[reward,ppo]", "reward_training.data_path=."], "reward.path='.': the reward stage trains"),
        (
            ["model.path=.", "data.path=.", "reward.function=a:b"],
            "learner.critic_init='reward': a reward function has no weights",
        ),
        ([*PPO, "model.path=./nowhere"], "model.path='./nowhere': there is no such file or folder"),
        ([*PPO, "model.path=/no/where"], "model.path='/no/where': there is no such file or folder"),
        ([*PPO, "model.path=conf/nowhere"], "model.path='conf/nowhere': there is no such file or folder"),
        ([*PPO, "data.path=prompts.jsonl"], "data.path='prompts.jsonl': there is no such file or folder"),
        ([*PPO, "data.eval_path=./e"], "data.eval_path='./e'"),
        ([*PPO, "reward.path=./r"], "reward.path='./r'"),
        ([*PPO, "model.reference=./r"], "model.reference='./r'"),
        ([*PPO, "model.tokenizer=./t"], "model.tokenizer='./t'"),
        ([*PPO, "learner.critic_init=./c"], "learner.critic_init='./c'"),
        (["stages=[sft]", "model.path=.", "sft.data_path=./s"], "sft.data_path='./s'"),
        (["stages=[sft]", "model.init_config=conf", "data.task.name=gcd"], "is no folder with a config.json"),
        ([*PPO, "run.dir=launch.py"], "run.dir='launch.py': is a file"),
    ],
)
def test_sections_that_do_not_fit_each_other_are_refused(overrides: list[str], message: str) -> None:
    assert message in unusable(*overrides)


def test_sections_that_fit_are_let_through() -> None:
    check(load_config(PPO))
    check(load_config(["model.path=org/model", "data.path=org/data", "reward.path=org/reward"]))
    check(load_config(["experiment=llama3_8b"]))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints", "export"])
def test_results_of_another_run_are_never_overwritten(tmp_path: Path, name: str) -> None:
    check(load_config([*PPO, f"run.dir={tmp_path}"]))
    (tmp_path / name).touch()
    assert f"holds the {name} of another run" in unusable(*PPO, f"run.dir={tmp_path}")


def test_names_that_can_be_on_the_hub() -> None:
    assert is_hub_name("gpt2")
    assert is_hub_name("org/model-1.5_x")
    assert not any(map(is_hub_name, ("./x", "../x", "/x/y", "a/b/c", "~/x", "", "conf/x")))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model": {"path": "m"}}, ("model.path", "m")),
        ({"model": {"init_config": "i"}}, ("model.init_config", "i")),
        ({"model": {"path": "m"}, "sft": {"model_path": "s"}}, ("model.path", "m")),
        ({"stages": ["sft"], "model": {"path": "m"}, "sft": {"model_path": "s"}}, ("sft.model_path", "s")),
    ],
)
def test_where_the_policy_starts(values: dict[str, Any], expected: tuple[str, str]) -> None:
    assert starting_model(typed_config(values)) == expected


def test_every_section_is_frozen() -> None:
    def sections(section: Any) -> list[Any]:
        inner = [getattr(section, field.name) for field in dataclasses.fields(section)]
        return [section, *(one for value in inner if dataclasses.is_dataclass(value) for one in sections(value))]

    for section in sections(Config()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, dataclasses.fields(section)[0].name, None)
