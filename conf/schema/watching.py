"""What is measured and recorded of a run."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema.rules import (
    ConfigError,
    at_least,
    finite,
    module_function,
    one_of,
    sampling_temperature,
    within,
    without_effect,
)

WANDB_MODES = ("online", "offline", "off")


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 10  # steps; 0: only before the first and after the last
    num_prompts: int = 512
    samples_per_prompt: int = 1
    pass_at: tuple[int, ...] = ()  # eval/pass_at_<k> for each; needs a verifier and as many samples
    temperature: float = 1.0
    win_rate: bool = True  # of the policy's responses against the reference's, by the score
    best_metric: str | None = None  # eval/...; the policy is exported to export/best when it is the best so far
    best_is: str = "highest"  # | lowest
    verifier: str | None = None  # module:function, one score a response; right is a score of at least `threshold`
    threshold: float = 0.99

    def __post_init__(self) -> None:
        at_least("evaluation.every", self.every, 0)
        at_least("evaluation.num_prompts", self.num_prompts, 1)
        at_least("evaluation.samples_per_prompt", self.samples_per_prompt, 1)
        for k in self.pass_at:
            if not 1 <= k <= self.samples_per_prompt:
                remedy = f"each must lie between 1 and evaluation.samples_per_prompt={self.samples_per_prompt}"
                raise ConfigError("evaluation.pass_at", list(self.pass_at), remedy)
        if self.pass_at and self.verifier is None:
            raise ConfigError("evaluation.pass_at", list(self.pass_at), "needs a verifier; set evaluation.verifier")
        one_of("evaluation.best_is", self.best_is, ("highest", "lowest"))
        if self.best_metric is None:
            without_effect(self, "evaluation", ("best_is",), "without evaluation.best_metric")
        elif not self.best_metric.startswith("eval/"):
            raise ConfigError("evaluation.best_metric", self.best_metric, "name a held-out metric, eval/...")
        sampling_temperature("evaluation.temperature", self.temperature)
        module_function("evaluation.verifier", self.verifier)
        finite("evaluation.threshold", self.threshold)
        if self.verifier is None:
            without_effect(self, "evaluation", ("threshold",), "without evaluation.verifier")


@dataclass(frozen=True)
class MonitorConfig:
    """Signs that the reward is being hacked. Beyond a limit an alarm is raised, which is logged; null: no alarm."""

    max_length_correlation: float | None = 0.9  # Pearson's, of score and response length; its size counts
    max_repetition: float | None = 0.5  # mean share of a response's 4-grams that it repeats
    min_eos_rate: float | None = None  # share of the responses that the policy ended itself
    max_score_drift: float | None = 1e-3  # of the scores that the first held-out responses get again
    max_kl: float | None = None  # from the reference, nats a response

    def __post_init__(self) -> None:
        for name in ("max_length_correlation", "max_repetition", "min_eos_rate"):
            if getattr(self, name) is not None:
                within(f"monitors.{name}", getattr(self, name), 0, 1)
        for name in ("max_score_drift", "max_kl"):
            if getattr(self, name) is not None:
                at_least(f"monitors.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class TrackingConfig:
    wandb: str = "off"  # online | offline | off
    wandb_project: str = "manta"
    tensorboard: bool = False
    samples_per_step: int = 8  # rollouts a step that are written to samples.jsonl
    trace_steps: tuple[int, ...] = ()  # iterations of ppo of which trace/step_<n>.json says who was busy with what
    export_every: int = 0  # steps; 0: only at the end

    def __post_init__(self) -> None:
        one_of("tracking.wandb", self.wandb, WANDB_MODES)
        at_least("tracking.samples_per_step", self.samples_per_step, 0)
        for step in self.trace_steps:
            at_least("tracking.trace_steps", step, 1)
        at_least("tracking.export_every", self.export_every, 0)
