"""The algorithm: sizes of a step, advantages, losses, and what keeps an update safe.

docs/algorithm.md gives the formula and the source of each setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.schema.rules import ConfigError, above, at_least, one_of, within, without_effect

# With a critic; without one, from groups of samples of a prompt; without one, from single samples.
GROUP_ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
ESTIMATORS = ("gae", *GROUP_ESTIMATORS, "reinforce_pp", "remax")
WHITENING_ESTIMATORS = ("gae", "reinforce_pp", "reinforce_pp_baseline")  # as their papers do
POLICY_LOSSES = ("clip", "gspo", "cispo")
AGGREGATIONS = ("token", "sequence", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_LOSS_ESTIMATORS = ("k2", "k3")  # k1 as a loss has a gradient of mean zero
CORRECTIONS = ("none", "token", "sequence", "icepop")
OLD_LOGPROBS = ("learner", "engine")


@dataclass(frozen=True)
class PTXConfig:
    """A language-modelling loss on other text, mixed into the policy's: Ouyang et al. 2022, arXiv 2203.02155, eq. 2."""

    coef: float = 0.0  # gamma of the paper, which takes 27.8
    path: str | None = None  # rows of text: jsonl, parquet, or the name of a Hugging Face dataset
    split: str = "train"
    text_key: str = "text"
    batch_size: int = 32  # rows over all ranks in one optimizer step
    max_tokens: int = 512  # of a row; the rest is cut off

    def __post_init__(self) -> None:
        at_least("algorithm.ptx.coef", self.coef, 0)
        at_least("algorithm.ptx.batch_size", self.batch_size, 1)
        at_least("algorithm.ptx.max_tokens", self.max_tokens, 2)
        if self.coef > 0 and self.path is None:
            raise ConfigError("algorithm.ptx.path", None, "algorithm.ptx.coef mixes in a loss on text; name its file")
        if self.coef == 0:
            names = ("path", "split", "text_key", "batch_size", "max_tokens")
            without_effect(self, "algorithm.ptx", names, "with algorithm.ptx.coef=0")


@dataclass(frozen=True)
class AlgorithmConfig:
    """PPO: Schulman et al. 2017, arXiv 1707.06347; for language models Ziegler et al. 2019, arXiv 1909.08593."""

    # --- sizes
    num_steps: int = 100  # iterations of generate, score, update, sync
    prompts_per_step: int = 128
    samples_per_prompt: int = 1
    mini_batch_size: int = 128  # rollouts over all ranks in one optimizer step
    ppo_epochs: int = 1
    max_staleness: int = (
        0  # versions by which the weights that sampled a token may be older than those it is trained on
    )
    # --- KL penalty in the reward
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    kl_target: float | None = None  # None: the coefficient stays fixed
    kl_horizon: int = 10_000  # rollouts; used with kl_target
    # --- advantages
    estimator: str = "gae"
    gamma: float = 1.0
    gae_lambda: float = 0.95
    critic_gae_lambda: float | None = None  # of the critic's targets; None: gae_lambda
    length_adaptive_alpha: float | None = None  # set: the policy's lambda is 1 - 1 / (alpha x response length)
    bootstrap_truncated: bool = False  # a response that was cut is worth the critic's value of its last state
    whiten_advantages: bool | None = None  # None: as the paper of the estimator does
    # --- policy loss
    policy_loss: str = "clip"
    clip_eps: float = 0.2
    clip_eps_high: float | None = None  # None: clip_eps
    dual_clip: float | None = None  # set: the loss of a token with A < 0 is at most this times -A
    loss_aggregation: str = "token"
    entropy_coef: float = 0.0
    kl_loss_coef: float = 0.0
    kl_loss_estimator: str = "k3"
    ptx: PTXConfig = field(default_factory=PTXConfig)
    # --- value loss
    value_clip_eps: float | None = 0.2
    value_coef: float = 0.1  # of the value loss, where policy and critic share a network
    critic_warmup_steps: int = 0  # iterations in which the critic alone learns
    # --- which rollouts and tokens count
    mask_truncated: bool = False  # responses that were cut are left out of the losses
    filter_groups: bool = False  # prompts whose samples all have the same score are replaced by others
    filter_max_rounds: int = 10  # of sampling more prompts, until the train batch is full
    old_logprobs: str = "learner"  # computed again by the learner, or as the engine gave them
    correction: str = "none"  # of the gap between engine and learner
    correction_cap: float = 2.0  # of the importance weights, for token and sequence
    icepop_low: float = 0.5
    icepop_high: float = 5.0
    # --- safety of an update
    max_mean_ratio: float | None = 10.0  # a mini-batch whose mean ratio is above takes no step
    early_stop_kl: float | None = None  # set: the update ends at a mini-batch whose approx_kl is above factor x this
    early_stop_factor: float = 1.5
    max_nonfinite: int = 5  # steps in a row with a loss or a gradient that is not finite, after which the run stops

    @property
    def train_batch_size(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def num_mini_batches(self) -> int:
        return self.train_batch_size // self.mini_batch_size

    @property
    def has_critic(self) -> bool:
        return self.estimator == "gae"

    @property
    def whitens(self) -> bool:
        if self.whiten_advantages is None:
            return self.estimator in WHITENING_ESTIMATORS
        return self.whiten_advantages

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_kl()
        self._check_advantages()
        self._check_losses()
        self._check_tokens()
        self._check_effects()

    def _check_sizes(self) -> None:
        for name in ("num_steps", "prompts_per_step", "samples_per_prompt", "mini_batch_size", "ppo_epochs"):
            at_least(f"algorithm.{name}", getattr(self, name), 1)
        at_least("algorithm.max_staleness", self.max_staleness, 0)
        if self.train_batch_size % self.mini_batch_size:
            fits = [n for n in range(1, self.train_batch_size + 1) if self.train_batch_size % n == 0]
            nearest = min(fits, key=lambda n: abs(n - self.mini_batch_size))
            raise ConfigError(
                "algorithm.mini_batch_size",
                self.mini_batch_size,
                f"must divide the train batch of prompts_per_step x samples_per_prompt = {self.prompts_per_step} x "
                f"{self.samples_per_prompt} = {self.train_batch_size} rollouts; the nearest that does is {nearest}",
            )

    def _check_kl(self) -> None:
        at_least("algorithm.kl_coef", self.kl_coef, 0)
        one_of("algorithm.kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        at_least("algorithm.kl_horizon", self.kl_horizon, 1)
        if self.kl_target is not None:
            above("algorithm.kl_target", self.kl_target, 0)
        at_least("algorithm.kl_loss_coef", self.kl_loss_coef, 0)
        if self.kl_loss_estimator == "k1":
            raise ConfigError("algorithm.kl_loss_estimator", "k1", "its gradient has mean zero; choose k2 or k3")
        one_of("algorithm.kl_loss_estimator", self.kl_loss_estimator, KL_LOSS_ESTIMATORS)

    def _check_advantages(self) -> None:
        one_of("algorithm.estimator", self.estimator, ESTIMATORS)
        for name in ("gamma", "gae_lambda", "critic_gae_lambda"):
            if getattr(self, name) is not None:
                within(f"algorithm.{name}", getattr(self, name), 0, 1)
        if self.length_adaptive_alpha is not None:
            above("algorithm.length_adaptive_alpha", self.length_adaptive_alpha, 0)
        at_least("algorithm.critic_warmup_steps", self.critic_warmup_steps, 0)
        if self.critic_warmup_steps >= self.num_steps:
            remedy = f"leaves no step for the policy; algorithm.num_steps is {self.num_steps}"
            raise ConfigError("algorithm.critic_warmup_steps", self.critic_warmup_steps, remedy)
        if self.estimator in GROUP_ESTIMATORS:
            if self.samples_per_prompt < 2:
                remedy = f"algorithm.estimator={self.estimator} compares samples of one prompt; set it to 2 or more"
                raise ConfigError("algorithm.samples_per_prompt", self.samples_per_prompt, remedy)
            if self.gamma != 1:
                remedy = f"algorithm.estimator={self.estimator} gives each token the same advantage; set it to 1"
                raise ConfigError("algorithm.gamma", self.gamma, remedy)

    def _check_losses(self) -> None:
        one_of("algorithm.policy_loss", self.policy_loss, POLICY_LOSSES)
        one_of("algorithm.loss_aggregation", self.loss_aggregation, AGGREGATIONS)
        for name in ("clip_eps", "clip_eps_high", "value_clip_eps"):
            if getattr(self, name) is not None:
                above(f"algorithm.{name}", getattr(self, name), 0)
        if self.clip_eps > 1:
            raise ConfigError("algorithm.clip_eps", self.clip_eps, "a ratio is above 0: 1 already means no lower bound")
        if self.dual_clip is not None:
            above("algorithm.dual_clip", self.dual_clip, 1)
        if self.policy_loss == "gspo" and self.loss_aggregation != "sequence":
            remedy = "GSPO's ratio is one number for a response; set algorithm.loss_aggregation=sequence"
            raise ConfigError("algorithm.loss_aggregation", self.loss_aggregation, remedy)
        for name in ("entropy_coef", "value_coef"):
            at_least(f"algorithm.{name}", getattr(self, name), 0)

    def _check_tokens(self) -> None:
        if self.filter_groups and self.samples_per_prompt < 2:
            remedy = "algorithm.filter_groups compares samples of one prompt; set it to 2 or more"
            raise ConfigError("algorithm.samples_per_prompt", self.samples_per_prompt, remedy)
        if self.filter_groups and self.estimator == "remax":
            remedy = "remax compares a sample with the greedy response, not with its group; set it to false"
            raise ConfigError("algorithm.filter_groups", True, remedy)
        at_least("algorithm.filter_max_rounds", self.filter_max_rounds, 1)
        one_of("algorithm.old_logprobs", self.old_logprobs, OLD_LOGPROBS)
        one_of("algorithm.correction", self.correction, CORRECTIONS)
        if self.correction != "none" and self.old_logprobs == "engine":
            remedy = "with algorithm.old_logprobs=engine the ratio already has the engine's; set it to none"
            raise ConfigError("algorithm.correction", self.correction, remedy)
        if self.max_staleness > 0:
            if self.correction == "none" and self.old_logprobs == "learner":
                remedy = (
                    f"with algorithm.max_staleness={self.max_staleness} rollouts are sampled by older weights, and "
                    "nothing corrects that; set algorithm.correction=token (or sequence, icepop)"
                )
                raise ConfigError("algorithm.correction", self.correction, remedy)
            for name, on in (("filter_groups", self.filter_groups), ("estimator", self.estimator == "remax")):
                if on:
                    remedy = f"{name}={getattr(self, name)} samples in rounds that wait for each other; set it to 0"
                    raise ConfigError("algorithm.max_staleness", self.max_staleness, remedy)
        above("algorithm.correction_cap", self.correction_cap, 0)
        within("algorithm.icepop_low", self.icepop_low, 0, 1)
        at_least("algorithm.icepop_high", self.icepop_high, 1)
        if self.max_mean_ratio is not None:
            above("algorithm.max_mean_ratio", self.max_mean_ratio, 1)
        if self.early_stop_kl is not None:
            above("algorithm.early_stop_kl", self.early_stop_kl, 0)
        above("algorithm.early_stop_factor", self.early_stop_factor, 0)
        at_least("algorithm.max_nonfinite", self.max_nonfinite, 1)

    def _check_effects(self) -> None:
        """A setting that another one switches off is refused: whoever sets it expects something of it."""
        of_critic = ("gae_lambda", "critic_gae_lambda", "length_adaptive_alpha", "bootstrap_truncated")
        no_critic = f"with algorithm.estimator={self.estimator}, which has no critic"
        for off, names, why in (
            (not self.has_critic, (*of_critic, "value_clip_eps", "critic_warmup_steps"), no_critic),
            (self.kl_coef == 0, ("kl_target", "kl_estimator"), "with algorithm.kl_coef=0"),
            (self.kl_target is None, ("kl_horizon",), "without algorithm.kl_target"),
            (self.kl_loss_coef == 0, ("kl_loss_estimator",), "with algorithm.kl_loss_coef=0"),
            (self.policy_loss != "clip", ("dual_clip",), f"with algorithm.policy_loss={self.policy_loss}"),
            (self.mask_truncated, ("bootstrap_truncated",), "with algorithm.mask_truncated=true"),
            (not self.filter_groups, ("filter_max_rounds",), "with algorithm.filter_groups=false"),
            (self.correction != "icepop", ("icepop_low", "icepop_high"), f"with correction={self.correction}"),
            (self.early_stop_kl is None, ("early_stop_factor",), "without algorithm.early_stop_kl"),
        ):
            if off:
                without_effect(self, "algorithm", names, why)
