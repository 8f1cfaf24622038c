"""Every setting of Manta: its type, its default and the rules it must keep.

The one place where a default is written. YAML files in the folders beside this one say only what differs from it. Each
component is handed its own frozen slice of the tree, so nothing after launch.py sees Hydra's own types. Imports the
standard library alone, so that a wrong setting is answered in about a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.schema.algorithm import AlgorithmConfig, PTXConfig
from conf.schema.checkpoint import CheckpointConfig
from conf.schema.data import DataConfig, DataSourceConfig, RewardTrainingConfig, SupervisedConfig, TaskConfig
from conf.schema.engines import (
    NF4,
    ClusterConfig,
    GeneratorConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
)
from conf.schema.reward import RewardConfig, RewardSourceConfig, ShapingConfig
from conf.schema.rules import ConfigError, at_least, one_of
from conf.schema.watching import EvaluationConfig, MonitorConfig, TrackingConfig

__all__ = [
    "NF4",
    "STAGES",
    "AlgorithmConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DataSourceConfig",
    "EvaluationConfig",
    "GeneratorConfig",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "PTXConfig",
    "RewardConfig",
    "RewardSourceConfig",
    "RewardTrainingConfig",
    "RunConfig",
    "ShapingConfig",
    "SupervisedConfig",
    "TaskConfig",
    "TrackingConfig",
]
STAGES = ("sft", "reward", "ppo", "eval")
MODES = ("run", "plan")


@dataclass(frozen=True)
class RunConfig:
    dir: str | None = None  # None: runs/<experiment>/<time>


@dataclass(frozen=True)
class Config:
    experiment: str = "default"
    mode: str = "run"  # | plan: say where everything would stand and whether it fits, and stop
    stages: tuple[str, ...] = ("ppo",)
    seed: int = 0
    resume: str = "never"  # | auto: the newest whole checkpoint in run.dir, or a start | a checkpoint or a run folder
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SupervisedConfig = field(default_factory=SupervisedConfig)
    reward_training: RewardTrainingConfig = field(default_factory=RewardTrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitors: MonitorConfig = field(default_factory=MonitorConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if not self.stages or list(self.stages) != [stage for stage in STAGES if stage in self.stages]:
            remedy = f"name one or more of {', '.join(STAGES)}, in this order, each once"
            raise ConfigError("stages", list(self.stages), remedy)
        one_of("mode", self.mode, MODES)
        at_least("seed", self.seed, 0)
        if self.resume == "auto" and self.run.dir is None:
            remedy = "name the folder in run.dir; the same command then starts the run and resumes it"
            raise ConfigError("resume", self.resume, remedy)
        if not self.resume.strip():
            raise ConfigError("resume", self.resume, "write never, auto, or the path of a checkpoint or a run folder")
        self.sft.check("sft")
        self.reward_training.check("reward_training")
