"""The two supervised stages: fine-tuning the policy, and training a reward model on pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from actors.rows import read_rows
from actors.supervised_rows import preference_pairs, supervised_examples
from cluster.carrying import carry
from cluster.checkpoints import Checkpoint
from cluster.console import StageProgress
from cluster.driver import Metrics, derived_seed
from cluster.learners import SupervisedGroup
from cluster.roles import processes_of
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


def run_sft(run: Run, before: Handover, resume: Checkpoint | None) -> Handover:
    """Fine-tune the policy on prompts and answers; the result is the policy of the stages that follow."""
    config, model = run.config, before.model
    assert model.tokenizer is not None
    assert config.sft.data_path is not None
    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code)
    longest = context_length(model)

    def read(path: str, split: str, key: str) -> list[Any]:
        rows = read_rows(path, split, key=key)
        return list(supervised_examples(rows, tokenizer, config.data, source=(key, path), max_tokens=longest))

    return train(run, SFT, config.sft, model, read, before, resume).with_policy(run.dir / "export" / SFT.name)


def run_reward(run: Run, before: Handover, resume: Checkpoint | None) -> Handover:
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

    made = str(run.dir / "export" / REWARD.name)
    after = train(run, REWARD, settings, model, read, before, resume)
    return replace(after, reward_path=made, critic_start=made)


def train(
    run: Run,
    stage: SupervisedStage,
    settings: SupervisedConfig,
    model: ModelConfig,
    read: Reader,
    before: Handover,
    resume: Checkpoint | None,
) -> Handover:
    """Train one network; return `before` with its checkpoint and its figures as the stage hands them on."""
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
    with (
        session.placed(processes_of(stage.name, config)) as placement,
        run.console.stage(stage.name, settings.num_steps) as progress,
    ):
        learners = SupervisedGroup(
            placement,
            stage.worker,
            setup,
            limits=config.cluster,
            recoveries=run.recoveries,
            sequence_parallel_size=config.learner.sequence_parallel_size,
        )
        training = SupervisedTraining(run, stage, settings, learners, rows, held_out, before, progress)
        return carry(run, training, before, resume)


class SupervisedTraining:
    """One network on its way through the rows."""

    has_best = False  # held-out figures are recorded, and the last network is the one that is handed on

    def __init__(
        self,
        run: Run,
        stage: SupervisedStage,
        settings: SupervisedConfig,
        learners: SupervisedGroup,
        rows: Sequence[Any],
        held_out: Sequence[Any],
        before: Handover,
        progress: StageProgress,
    ) -> None:
        self.run, self.stage, self.settings, self.learners = run, stage, settings, learners
        self.rows, self.held_out, self.before, self.progress = rows, held_out, before, progress
        self.name, self.folder = stage.name, run.dir / "export" / stage.name
        self._go_to(0, {})

    def _go_to(self, step: int, metrics: Metrics) -> None:
        self.step, self.metrics = step, metrics
        batches = endless_batches(self.rows, self.settings.batch_size, seed=derived_seed(self.run.config.seed, 1))
        self.batches = islice(batches, step, None)
        self.progress.at(step)

    @property
    def done(self) -> bool:
        accurate = self.metrics.get(self.stage.judged, 0.0)
        early = self.settings.stop_accuracy is not None and accurate >= self.settings.stop_accuracy
        return early or self.step >= self.settings.num_steps

    def begin(self) -> None:
        self._wait_started()
        self._go_to(0, {})

    def take_up(self, state: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        self._wait_started()
        if checkpoint.num_ranks:
            self.learners.restore(checkpoint.learner)
        self._go_to(checkpoint.step or 0, state["metrics"])

    def _wait_started(self) -> None:
        """Return when the ranks are up; from then on they leave room for the next stage's processes to start."""
        self.learners.wait_started()
        self.run.start_ahead_after(self.name)

    def state(self) -> dict[str, Any]:
        return {"metrics": self.metrics}

    def advance(self) -> None:
        metrics = self.learners.train_step(next(self.batches))
        self.step += 1
        last = self.step == self.settings.num_steps
        if self.held_out and (self.step % self.settings.eval_every == 0 or last):
            metrics |= self.learners.evaluate(self.held_out)
        self.metrics = metrics
        self.run.tracker.log(self.name, self.step, metrics | self.run.saver.metrics() | self.run.recoveries.metrics())
        self.progress.advance(**{name.split("/")[-1]: metrics[name] for name in self.stage.shown})

    def finish(self) -> Handover:
        self.learners.export(self.folder)
        return self.before.with_summary(**{name: value for name, value in self.metrics.items() if "/eval_" in name})


def endless_batches(rows: Sequence[Row], size: int, *, seed: int) -> Iterator[list[Row]]:
    """Yield batches of `size` rows without end, shuffled anew in every epoch; a batch may span two."""
    rng = np.random.default_rng(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += rng.permutation(len(rows)).tolist()
        yield [rows[i] for i in waiting[:size]]
        del waiting[:size]
