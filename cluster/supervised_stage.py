"""The two supervised stages: fine-tuning the policy, and training a reward model on pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from actors.rows import read_rows
from actors.supervised_rows import preference_pairs, supervised_examples
from cluster.driver import Metrics, derived_seed
from cluster.learners import SupervisedGroup
from cluster.processes import collect
from cluster.run import Handover, Run, context_length, load_tokenizer
from conf.check import starting_model
from conf.schema import ConfigError, ModelConfig, RewardTrainingConfig, SupervisedConfig
from learner.reward_training import RewardModelWorker
from learner.sft import SFTWorker
from learner.supervised import SupervisedSetup

Row = TypeVar("Row")
Reader = Callable[[str, str, str], list[Any]]  # path, split, and the key of the setting that names them -> rows


@dataclass(frozen=True)
class SupervisedStage:
    """What tells the two stages apart."""

    name: str
    section: str  # of the settings
    worker: Callable[..., Any]
    shown: tuple[str, ...]  # metrics of the progress bar
    judged: str  # the held-out metric that may end the stage early


SFT = SupervisedStage("sft", "sft", SFTWorker, ("sft/loss", "sft/token_accuracy"), "sft/eval_token_accuracy")
REWARD = SupervisedStage(
    "reward",
    "reward_training",
    RewardModelWorker,
    ("reward_model/loss", "reward_model/accuracy"),
    "reward_model/eval_accuracy",
)


def run_sft(run: Run, before: Handover) -> Handover:
    """Fine-tune the policy on prompts and answers; the result is the policy of the stages that follow."""
    config, model = run.config, before.model
    assert model.tokenizer is not None
    assert config.sft.data_path is not None
    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code)
    longest = context_length(model)

    def read(path: str, split: str, key: str) -> list[Any]:
        rows = read_rows(path, split, key=key)
        return list(supervised_examples(rows, tokenizer, config.data, source=(key, path), max_tokens=longest))

    folder, metrics = train(run, SFT, config.sft, model, read)
    return before.with_policy(folder).with_summary(**{name: metrics[name] for name in metrics if "/eval_" in name})


def run_reward(run: Run, before: Handover) -> Handover:
    """Train a reward model on pairs of answers; it scores the rollouts of the ppo stage that follows."""
    config = run.config
    settings = config.reward_training
    model = before.model if settings.model_path is None else replace(before.model, path=settings.model_path)
    if settings.model_path is not None:
        model = replace(model, tokenizer=settings.model_path, init_config=None)
    if model.path is None:
        raise ConfigError("reward_training.model_path", None, f"set it: {starting_model(config)[0]} has no weights yet")
    assert model.tokenizer is not None
    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code)
    longest = context_length(model)
    template = next((s.chat_template for s in config.reward.sources if s.type == "model" and s.path is None), None)

    def read(path: str, split: str, key: str) -> list[Any]:
        rows = read_rows(path, split, key=key)
        return list(
            preference_pairs(
                rows, tokenizer, config.data, chat_template=template, source=(key, path), max_tokens=longest
            )
        )

    folder, metrics = train(run, REWARD, settings, model, read)
    after = replace(before, reward_path=str(folder), critic_start=str(folder))
    return after.with_summary(**{name: metrics[name] for name in metrics if "/eval_" in name})


def train(
    run: Run, stage: SupervisedStage, settings: SupervisedConfig, model: ModelConfig, read: Reader
) -> tuple[Path, Metrics]:
    """Train one network and return its checkpoint and the metrics of the last step."""
    config, session = run.config, run.session
    assert settings.data_path is not None
    rows = read(settings.data_path, config.data.split, f"{stage.section}.data_path")
    held_out = []
    if settings.eval_path is not None:
        held_out = read(settings.eval_path, config.data.eval_split, f"{stage.section}.eval_path")
    setup = SupervisedSetup(
        model=model,
        learner=config.learner,
        optimizer=settings.optimizer,
        num_steps=settings.num_steps,
        device=session.device,
        seed=config.seed,
        lora=settings.lora,
        center_coef=settings.center_coef if isinstance(settings, RewardTrainingConfig) else 0.0,
        collective_timeout_s=config.cluster.call_timeout_s,
    )
    folder = run.dir / "checkpoints" / stage.name
    with session.placed("learner") as placement, run.console.stage(stage.name, settings.num_steps) as progress:
        group = SupervisedGroup(placement, stage.worker, setup, limits=config.cluster)
        collect(group.starting, what=f"starting the {stage.name} stage", timeout_s=config.cluster.start_timeout_s)
        batches = endless_batches(rows, settings.batch_size, seed=derived_seed(config.seed, 1))
        metrics: Metrics = {}
        for step in range(1, settings.num_steps + 1):
            metrics = group.train_step(next(batches))
            if held_out and (step % settings.eval_every == 0 or step == settings.num_steps):
                metrics |= group.evaluate(held_out)
            run.tracker.log(stage.name, step, metrics)
            progress.advance(**{name.split("/")[-1]: metrics[name] for name in stage.shown})
            if settings.stop_accuracy is not None and metrics.get(stage.judged, 0.0) >= settings.stop_accuracy:
                break
        group.export(folder)
    return folder, metrics


def endless_batches(rows: Sequence[Row], size: int, *, seed: int) -> Iterator[list[Row]]:
    """Yield batches of `size` rows without end, shuffled anew in every epoch; a batch may span two."""
    rng = np.random.default_rng(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += rng.permutation(len(rows)).tolist()
        yield [rows[i] for i in waiting[:size]]
        del waiting[:size]
