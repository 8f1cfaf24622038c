"""Settings as they are composed: shipped files load, types hold, sections fit each other, and every mistake is answered
by key, value and remedy. Half a minute, nearly all of it in Hydra. The rules of each section are in test_rules.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from conf import load
from conf.check import check, check_nothing_recorded, is_hub_name, starting_model
from conf.load import group_options, load_config, to_yaml, typed_config
from conf.schema import Config, ConfigError, OptimizerConfig, RewardSourceConfig

PPO = ["model.path=.", "data.path=.", "reward.sources=[{path: .}]"]
ALGORITHMS = group_options()["algorithm"]


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    return str(caught.value)


def config_of(*settings: str) -> Config:
    """The Config of settings written key=value, without Hydra, which takes a quarter of a second."""
    values = OmegaConf.to_container(OmegaConf.from_dotlist(list(settings)))
    assert isinstance(values, dict)
    return typed_config({str(key): value for key, value in values.items()})


def unusable(*settings: str) -> str:
    config = config_of(*settings)
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


@pytest.mark.parametrize("experiment", load.group_options()["experiment"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_experiment_changes_an_algorithm_in_its_sizes_alone(name: str, experiment: str) -> None:
    algorithm = load_config([f"experiment={experiment}", f"algorithm={name}"]).algorithm
    values = OmegaConf.to_container(OmegaConf.load(load.FOLDER / "algorithm" / f"{name}.yaml"))
    assert isinstance(values, dict)
    for key, value in values.items():
        assert getattr(algorithm, str(key)) == value or key == "samples_per_prompt", (experiment, name, key)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_fits_the_quickstart(name: str) -> None:
    """Its own sizes are what the experiment says, since an experiment's values come after those of a group."""
    config = load_config(["experiment=quickstart", f"algorithm={name}"])
    check(config)
    algorithm = config.algorithm
    assert config.stages == ("sft", "reward", "ppo")
    assert (algorithm.prompts_per_step, algorithm.samples_per_prompt, algorithm.mini_batch_size) == (128, 2, 128)
    assert algorithm.num_mini_batches == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", {"estimator": "grpo", "kl_coef": 0, "kl_loss_coef": 0.04, "loss_aggregation": "sequence"}),
        ("dr_grpo", {"estimator": "dr_grpo", "kl_coef": 0, "kl_loss_coef": 0, "loss_aggregation": "constant"}),
        ("rloo", {"estimator": "rloo", "samples_per_prompt": 4, "loss_aggregation": "constant", "kl_coef": 0.05}),
        ("reinforce_pp", {"estimator": "reinforce_pp", "samples_per_prompt": 1, "kl_coef": 0.05, "whitens": True}),
        ("reinforce_pp_baseline", {"kl_coef": 0, "kl_loss_coef": 1e-3, "kl_loss_estimator": "k2", "whitens": True}),
        ("remax", {"estimator": "remax", "samples_per_prompt": 1, "kl_coef": 0.05}),
        ("gspo", {"policy_loss": "gspo", "clip_eps": 3e-4, "clip_eps_high": 4e-4, "loss_aggregation": "sequence"}),
        ("cispo", {"policy_loss": "cispo", "clip_eps": 1, "clip_eps_high": 4, "loss_aggregation": "token"}),
        ("dapo", {"clip_eps": 0.2, "clip_eps_high": 0.28, "loss_aggregation": "token", "filter_groups": True}),
        ("dapo", {"samples_per_prompt": 16, "mask_truncated": True, "kl_coef": 0, "kl_loss_coef": 0}),
        ("vapo", {"estimator": "gae", "critic_gae_lambda": 1, "length_adaptive_alpha": 0.05, "clip_eps_high": 0.28}),
        ("vapo", {"critic_warmup_steps": 50, "loss_aggregation": "token", "kl_coef": 0, "samples_per_prompt": 16}),
    ],
)
def test_an_algorithm_is_set_as_its_paper_has_it(name: str, expected: dict[str, Any]) -> None:
    algorithm = load_config([f"algorithm={name}"]).algorithm
    assert {key: getattr(algorithm, key) for key in expected} == expected


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
        ("+nokey=1", "nokey=1: there is no such setting; the top level has experiment, mode, stages"),
        ("++learner.policy.lrr=1", "learner.policy.lrr=1: there is no such setting; did you mean learner.policy.lr?"),
        ("num_generators=2", "did you mean cluster.num_generators?"),
        ("experimnt=quickstart", "did you mean experiment?"),
        (
            "experiment=quickstrat",
            "experiment='quickstrat': conf/experiment/ has no such file; choose one of llama3_70b, llama3_8b",
        ),
        ("experiment=quickstrat", "did you mean quickstart?"),
        ("algorithm=grop", "algorithm='grop': conf/algorithm/ has no such file"),
        ("algorithm=grop", "did you mean grpo?"),
        ("algorithm={num_steps:3}", "conf/algorithm/ has no such file"),
        ("algorithm.num_steps=1.5", "algorithm.num_steps=1.5: must be a whole number"),
        ("algorithm.num_steps=many", "algorithm.num_steps='many': must be a whole number"),
        ("algorithm.num_steps=null", "algorithm.num_steps=None: must be a whole number"),
        ("algorithm.num_steps=true", "algorithm.num_steps=True: must be a whole number"),
        ("algorithm.kl_target=high", "algorithm.kl_target='high': must be a number or null"),
        ("tracking.tensorboard=3", "tracking.tensorboard=3: must be true or false"),
        ("evaluation.pass_at=[1,a]", "evaluation.pass_at=[1, 'a']: must be a list, each item a whole number"),
        ("run.dir=[a]", "run.dir=['a']: must be text or null"),
        ("data.task.params=3", "data.task.params=3: must be a mapping"),
        ("learner.policy.betas=[a,2]", "must be a list of 2, each a number"),
        ("learner.policy.betas=[0.1,0.2,0.3]", "learner.policy.betas=[0.1, 0.2, 0.3]: must be a list of 2"),
        ("stages=ppo", "stages='ppo': must be a list, each item text, written [a,b]"),
        ("stages=sft,ppo", "stages='sft,ppo': one run takes one value; a list is written in brackets"),
        ("sft=3", "sft=3: is a section; name a setting in it, for example sft.data_path=..."),
        ("seed=${nokey}", "seed='${nokey}': Interpolation key 'nokey' not found"),
        ("seed=${algorithm.gamma}", "seed='${algorithm.gamma}'"),
        ("reward.path=x", "reward.path='x': there is no such setting; did you mean 'reward.sources=[{path: ...}]'?"),
        ("verifier=x", "did you mean 'reward.sources=[{verifier: ...}]' or evaluation.verifier?"),
        ("run_dir=x", "run_dir='x': there is no such setting; did you mean run.dir?"),
        ("rewrd=3", "rewrd=3: there is no such setting; did you mean reward?"),
        ("data.task.params={1: a}", "data.task.params.1=None: Key 1 (int) is incompatible with (str)"),
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


# Lists of sections ----------------------------------------------------------------------------------------------------


def test_a_list_of_sections_in_the_words_of_the_command_line() -> None:
    config = load_config(
        [
            "reward.sources=[{path: ./a model, weight: 2},{type:function,function:module:name,weight:-0.5}]",
            "data.sources=[{path: a.jsonl}, {path: b.jsonl, weight: 3, format: alpaca}]",
        ]
    )
    first, second = config.reward.sources
    assert first == RewardSourceConfig(path="./a model", weight=2.0)
    assert second == RewardSourceConfig(type="function", function="module:name", weight=-0.5)
    assert isinstance(first.weight, float)
    assert [(source.path, source.weight, source.format) for source in config.data.sources] == [
        ("a.jsonl", 1.0, None),
        ("b.jsonl", 3.0, "alpaca"),
    ]


@pytest.mark.parametrize("key", ["reward.sources[0].weight", "reward.sources.0.weight"])
def test_one_setting_of_a_list_that_a_group_gives_can_be_changed(key: str) -> None:
    (source,) = load_config(["reward=skywork_8b", f"{key}=2"]).reward.sources
    assert (source.weight, source.dtype) == (2.0, "bfloat16")


def test_interpolations_in_a_list_of_sections_reach_the_whole() -> None:
    """Defaults and the list itself among them."""
    config = load_config(
        [
            "seed=3",
            "model.path=policy",
            "reward.sources=[{path: '${model.path}/reward', max_batch_tokens: ${generator.max_new_tokens}}, "
            "{type: http, url: http://host/${seed}, weight: ${reward.sources[0].weight}}]",
        ]
    )
    first, second = config.reward.sources
    assert (first.path, first.max_batch_tokens) == ("policy/reward", 512)
    assert (second.url, second.weight) == ("http://host/3", 1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.sources=model", "reward.sources='model': is a list of sections; write 'reward.sources=[{type: ...}]'"),
        ("reward.sources=null", "reward.sources=None: is a list of sections"),
        ("reward.sources={path: a}", "reward.sources={'path': 'a'}: is a list of sections"),
        ("reward.sources=[a]", "reward.sources[0]='a': is a section; write 'reward.sources=[{type: ...}]'"),
        ("data.sources=[{path: a}, 3]", "data.sources[1]=3: is a section; write 'data.sources=[{path: ...}]'"),
        ("reward.sources=[{pth: a}]", "reward.sources[0].pth='a': there is no such setting; did you mean"),
        ("data.sources=[{path: a}, {url: b}]", "data.sources[1].url='b': there is no such setting"),
        ("reward.sources=[{}, {weight: a}]", "reward.sources[1].weight='a': must be a number"),
        ("reward.sources=[{weight: true}]", "reward.sources[0].weight=True: must be a number"),
        ("reward.sources=[{concurrency: 1.5}]", "reward.sources[0].concurrency=1.5: must be a whole number"),
        ("reward.sources=[{chat_template: 3}]", "reward.sources[0].chat_template=3: must be true or false or null"),
        ("reward.sources=[{weight: '${nokey}'}]", "reward.sources[0].weight='${nokey}': Interpolation key 'nokey'"),
        ("reward.sources=[{}, {path: a, weight: ${run}}]", "reward.sources[1].weight='${run}'"),
        ("reward.sources=[{weight: 0}]", "reward.sources[0].weight=0.0: has no effect; leave the source out"),
        ("reward.sources[0].weight=2", "is a list of sections; write 'reward.sources=[{type: ...}]'"),
    ],
)
def test_a_mistake_in_a_list_of_sections_names_the_item(override: str, message: str) -> None:
    answer = refused(override)
    assert message in answer
    assert "\n" not in answer


# Rules ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.mini_batch_size=100", "128 x 1 = 128 rollouts; the nearest that does is 128"),
        ("algorithm.kl_coef=nan", "algorithm.kl_coef=nan: must be at least 0"),
        ("learner.critic.betas=[0.9,1]", "learner.critic.betas[1]=1.0: must be at least 0 and less than 1"),
        ("sft.lora.dropout=0.1", "sft.lora.dropout=0.1: has no effect without sft.lora.rank"),
    ],
)
def test_a_rule_that_is_broken_on_the_command_line_names_the_full_key(override: str, message: str) -> None:
    assert message in refused(override)


@pytest.mark.parametrize(
    "name", ["min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "logit_bias"]
)
def test_sampling_that_the_learner_cannot_follow_is_refused_with_the_reason(name: str) -> None:
    """vLLM could; its log-probabilities would be those of another distribution (PPO details 5)."""
    answer = refused(f"generator.{name}=1")
    assert answer.startswith(f"generator.{name}=1: the learner cannot compute the log-probabilities")
    config = load_config(["generator.top_k=50", "generator.top_p=0.9"]).generator
    assert (config.top_k, config.top_p) == (50, 0.9), "these the learner can follow"


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


SFT = ["stages=[sft]", "model.path=.", "sft.data_path=."]
REWARD = ["stages=[reward,ppo]", "model.path=.", "data.path=.", "reward_training.data_path=."]
EVAL = ["stages=[eval]", "model.path=.", "data.eval_path=.", "reward.sources=[{path: .}]"]
FUNCTION = ["model.path=.", "data.path=.", "reward.sources=[{type: function, function: a:b}]"]
SHARED = [*PPO, "learner.critic_network=shared"]
NVME = ["learner.offload_parameters=nvme", "learner.nvme_path=."]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "model.path=None: set it to a Hugging Face checkpoint"),
        (["stages=[sft]"], "or set model.init_config"),
        (["stages=[eval]"], "model.path=None: set it to a Hugging Face checkpoint"),
        (["model.init_config=x", "model.path=."], "model.init_config='x': set either this or model.path='.'"),
        (["model.init_config=x"], "model.init_config='x': random weights are for the sft stage"),
        (["stages=[sft]", "model.init_config=x", "sft.model_path=."], "has no effect with sft.model_path='.'"),
        ([*SFT, "sft.model_path=."], "model.path='.': has no effect with sft.model_path='.'"),
        # --- rows
        (["model.path=."], "data.path=None: the ppo stage needs prompts"),
        (["stages=[sft]", "model.path=."], "sft.data_path=None: the sft stage needs rows"),
        (["stages=[reward]", "model.path=."], "reward_training.data_path=None: the reward stage needs rows"),
        ([*SFT, "sft.stop_accuracy=0.9"], "sft.stop_accuracy=0.9: has no effect without held-out rows; set sft.eval_"),
        ([*PPO, "data.task.name=gcd"], "data.path='.': set either this or data.task.name='gcd'"),
        (
            ["model.path=.", "data.sources=[{path: .}]", "data.task.name=gcd"],
            "data.sources=['.']: set either this or data.task.name='gcd'",
        ),
        # --- held out
        ([*PPO, "evaluation.verifier=a:b"], "evaluation.verifier='a:b': has no held-out prompts to judge"),
        ([*PPO, "evaluation.best_metric=eval/kl"], "evaluation.best_metric='eval/kl': has no held-out prompts"),
        (
            [*PPO, *NVME, "learner.ema_decay=0.9", "checkpoint.every=0"],
            "learner.ema_decay=0.9: the average reads weights that are in memory",
        ),
        ([*PPO, *NVME], "learner.offload_parameters='nvme': a checkpoint copies what is in memory"),
        ([*PPO, "learner.reference_dtype=nf4", "model.lora.rank=8"], "learner.reference_dtype='nf4': with model.lora"),
        (
            [*PPO, "learner.reference_dtype=nf4", "cluster.placement=colocated"],
            "learner.reference_dtype='nf4': it would stay on the GPU while the generators sample",
        ),
        (
            [*PPO, "learner.sequence_parallel_size=2", "cluster.num_learners=3"],
            "learner.sequence_parallel_size=2: cluster.num_learners=3 ranks do not divide by it",
        ),
        (
            [*PPO, "learner.sequence_parallel_size=2", "cluster.num_learners=2", "model.attn_implementation=sdpa"],
            "model.attn_implementation='sdpa': tokens are shared with model.attn_implementation=packed alone",
        ),
        ([*EVAL, "data.eval_path=null"], "data.eval_path=None: the eval stage needs held-out prompts"),
        # --- scores
        (["model.path=.", "data.path=."], "reward.sources=[]: rollouts need a score; name a source"),
        ([*EVAL, "reward.sources=[]"], "reward.sources=[]: rollouts need a score; name a source"),
        ([*PPO, "reward.sources=[{path: .}, {name: b}]"], "reward.sources[1].path=None: set it to a reward model"),
        ([*REWARD, "reward.sources=[{path: .}]"], "reward.sources=['model']: the reward stage trains a reward model"),
        ([*REWARD, "reward.sources=[{}, {name: b}]"], "reward.sources=['model', 'b']: the reward stage trains"),
        (FUNCTION, "learner.critic_init='reward': there is no reward model for the critic to start from"),
        (
            [*PPO, "reward.shaping.overlong_tokens=513"],
            "reward.shaping.overlong_tokens=513: is more than generator.max",
        ),
        # --- critic
        (
            [*SHARED, "algorithm.estimator=remax"],
            "learner.critic_network='shared': has no effect with algorithm.estimator=remax, which has no critic",
        ),
        ([*SHARED, "algorithm.critic_warmup_steps=1"], "algorithm.critic_warmup_steps=1: a critic on the policy's own"),
        ([*PPO, "algorithm.value_coef=1"], "algorithm.value_coef=1.0: has no effect with learner.critic_network=separ"),
        # --- paths
        ([*PPO, "model.path=./nowhere"], "model.path='./nowhere': there is no such file or folder"),
        ([*PPO, "model.path=/no/where"], "model.path='/no/where': there is no such file or folder"),
        ([*PPO, "model.path=conf/nowhere"], "model.path='conf/nowhere': there is no such file or folder"),
        ([*PPO, "data.path=prompts.jsonl"], "data.path='prompts.jsonl': there is no such file or folder"),
        ([*PPO, "data.eval_path=./e"], "data.eval_path='./e'"),
        ([*PPO, "reward.sources=[{path: .}, {path: ./r, name: r}]"], "reward.sources[1].path='./r'"),
        ([*PPO, "data.path=null", "data.sources=[{path: .}, {path: b.json}]"], "data.sources[1].path='b.json'"),
        ([*PPO, "algorithm.ptx.coef=1", "algorithm.ptx.path=./t"], "algorithm.ptx.path='./t'"),
        ([*PPO, "model.reference=./r"], "model.reference='./r'"),
        ([*PPO, "model.tokenizer=./t"], "model.tokenizer='./t'"),
        ([*PPO, "learner.critic_init=./c"], "learner.critic_init='./c'"),
        ([*SFT, "sft.data_path=./s"], "sft.data_path='./s'"),
        ([*REWARD, "reward_training.model_path=./m"], "reward_training.model_path='./m'"),
        (["stages=[sft]", "model.init_config=conf", "data.task.name=gcd"], "is no folder with a config.json"),
        ([*PPO, "run.dir=launch.py"], "run.dir='launch.py': is a file"),
    ],
)
def test_sections_that_do_not_fit_each_other_are_refused(settings: list[str], message: str) -> None:
    assert message in unusable(*settings)


@pytest.mark.parametrize(
    "settings",
    [
        PPO,
        ["model.path=org/model", "data.path=org/data", "reward.sources=[{path: org/reward}]"],
        ["model.path=.", "data.sources=[{path: .}]", "reward.sources=[{path: .}]"],
        EVAL,
        [*EVAL, "model.reference=.", "evaluation.verifier=a:b"],
        REWARD,
        [*REWARD, "reward.sources=[{}, {type: function, function: a:b}]"],
        [*FUNCTION, "learner.critic_init=policy"],
        [*FUNCTION, "learner.critic_network=shared", "algorithm.value_coef=0.5"],
        [*FUNCTION, "algorithm.estimator=reinforce_pp"],
        [*PPO, "reward.shaping.overlong_tokens=512"],
        [*SFT, "sft.stop_accuracy=0.9", "sft.eval_path=."],
        ["stages=[sft]", "model.init_config=examples/tiny_llama", "data.task.name=gcd", "sft.stop_accuracy=0.9"],
    ],
)
def test_sections_that_fit_are_let_through(settings: list[str]) -> None:
    check(config_of(*settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["evaluation.best_metric=eval/acuracy"],
            "evaluation.best_metric='eval/acuracy': choose one of eval/score_mean, ",
        ),
        (
            ["stages=[sft,reward]", "evaluation.best_metric=eval/kl"],
            "evaluation.best_metric='eval/kl': has no effect without the stage ppo",
        ),
        (
            ["algorithm=remax", "reward.shaping.whiten_rewards=true"],
            "reward.shaping.whiten_rewards=True: algorithm.estimator=remax compares whole scores with each other",
        ),
    ],
)
def test_what_does_not_fit_the_quickstart_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(load_config(["experiment=quickstart", *settings]))
    assert str(caught.value).startswith(message)
    check(load_config(["experiment=quickstart", "evaluation.best_metric=eval/accuracy"]))


@pytest.mark.parametrize("experiment", group_options()["experiment"])
def test_every_experiment_is_let_through(experiment: str) -> None:
    check(load_config([f"experiment={experiment}"]))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints", "export"])
def test_results_of_another_run_are_never_overwritten(tmp_path: Path, name: str) -> None:
    check(config_of(*PPO, f"run.dir={tmp_path}"))
    (tmp_path / name).write_text("what it has found out")
    assert f"holds the {name} of another run" in unusable(*PPO, f"run.dir={tmp_path}")
    assert "or set resume=auto to go on with that run" in unusable(*PPO, f"run.dir={tmp_path}")
    check(config_of(*PPO, f"run.dir={tmp_path}", "resume=auto"))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with one checkpoint, as far as can be seen without opening it."""
    (tmp_path / "run" / "checkpoints" / "ppo-000010").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "ppo-000010" / "manifest.json").touch()
    (tmp_path / "run" / "metrics.jsonl").touch()
    return tmp_path / "run"


def test_a_path_to_go_on_from_is_a_checkpoint_or_a_run_folder(run_folder: Path) -> None:
    checkpoint = run_folder / "checkpoints" / "ppo-000010"
    for path in (run_folder, checkpoint):
        check(config_of(*PPO, f"resume={path}"))
    message = "there is no such folder"
    assert f"resume='{run_folder}/x': {message}" in unusable(*PPO, f"resume={run_folder}/x")
    assert f"resume='{run_folder}/metrics.jsonl': {message}" in unusable(*PPO, f"resume={run_folder}/metrics.jsonl")
    (run_folder / "export").mkdir()
    answer = unusable(*PPO, f"resume={run_folder}/export")
    assert "is neither a checkpoint (no manifest.json) nor a run folder (no checkpoints)" in answer


def test_a_run_goes_on_in_its_own_folder_or_in_a_new_one(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_folder.parent)
    paths = ["model.path=run", "data.path=run", "reward.sources=[{path: run}]"]
    for path in ("run", "run/checkpoints/ppo-000010", f"{run_folder}/checkpoints/ppo-000010/"):
        check(config_of(*paths, f"resume={path}", "run.dir=run"))
        check(config_of(*paths, f"resume={path}", "run.dir=new"))
    (run_folder.parent / "other" / "export" / "policy").mkdir(parents=True)
    assert "holds the export of another run" in unusable(*paths, "resume=run", "run.dir=other")
    (run_folder / "checkpoints" / "ppo-000010").rename("a copy")
    check(config_of(*paths, "resume=a copy", "run.dir=new"))
    assert "run.dir=None: the checkpoint a copy lies in no run folder" in unusable(*paths, "resume=a copy")


def test_a_run_without_a_checkpoint_is_begun_anew_only_where_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    check_nothing_recorded(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds metrics\.jsonl, but no checkpoint to go on from"):
        check_nothing_recorded(tmp_path)


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
