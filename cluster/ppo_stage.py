"""The ppo stage: brings up its processes and runs the driver over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from actors.mixing import MixedPromptSource, held_out_prompts, prompt_source
from actors.preflight import starts_at_reference
from actors.prompts import PromptSource
from actors.rollout import IntArray, Prompt
from actors.supervised_rows import ptx_rows
from cluster.best import BEST_EXPORT, BestPolicy
from cluster.carrying import carry, is_due
from cluster.checkpoints import Checkpoint
from cluster.console import StageProgress
from cluster.driver import Generators, Iteration, Metrics, PPODriver, Rollouts, Sampling, ScoredHandle
from cluster.evaluation import EvaluationResult, Evaluator, signs
from cluster.learners import LearnerGroup
from cluster.monitors import alarm_lines, alarms
from cluster.partners import Partners
from cluster.placement import COLOCATED
from cluster.report import before_and_after
from cluster.roles import processes_of
from cluster.rollouts import (
    AheadRollouts,
    Prompts,
    SampledAgain,
    SampledRollouts,
    VariedGroups,
    WithGreedyBaselines,
    unheard,
)
from cluster.run import Handover, Run, load_tokenizer
from cluster.shaping import ScoreShaping
from cluster.tracing import DRIVER, clipped, idle_shares, write_trace
from conf.schema import Config

SHOWN = {"score": "reward/score_mean", "kl": "objective/kl", "length": "rollout/response_length_mean"}
NUM_EXAMPLES = 5


def run_ppo(run: Run, before: Handover, resume: Checkpoint | None) -> Handover:
    """Train the policy against its reward and leave policy and critic in `export`."""
    config, model = run.config, before.model
    assert model.tokenizer is not None
    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code)
    source = prompt_source(config.data, tokenizer, seed=config.seed)
    held_out = held_out_prompts(config.data, tokenizer, config.evaluation.num_prompts)
    for name, count in source.dropped:
        if count:
            run.console.note(f"{count} prompts of more than {config.data.max_prompt_tokens} tokens left out of {name}")
    text: tuple[IntArray, ...] = ()
    if config.algorithm.ptx.coef > 0:
        text = tuple(ptx_rows(config.algorithm.ptx, tokenizer))
    with (
        run.session.placed(processes_of("ppo", config)) as placement,
        run.console.stage("ppo", config.algorithm.num_steps) as progress,
    ):
        partners = Partners(
            config, before, placement, ptx_rows=text, device=run.session.device, recoveries=run.recoveries
        )
        training = PPOTraining(run, before, partners, source, held_out, progress)
        return carry(run, training, before, resume)


class PPOTraining:
    """The policy on its way: iterations of the driver, evaluations, and what is recorded and kept of them."""

    name = "ppo"

    def __init__(
        self,
        run: Run,
        before: Handover,
        partners: Partners,
        source: PromptSource | MixedPromptSource,
        held_out: Sequence[Prompt],
        progress: StageProgress,
    ) -> None:
        config = run.config
        self.run, self.config, self.before, self.partners, self.progress = run, config, before, partners, progress
        self.learners: LearnerGroup = partners.learners
        self.source, self.held_out = source, held_out
        self.shaping = ScoreShaping(config.reward.shaping, max_new_tokens=config.generator.max_new_tokens)
        self.driver = PPODriver(
            algorithm=config.algorithm,
            rollouts=SampledAgain(rollouts_of(config, source, partners), run.recoveries),
            shaping=self.shaping,
            learners=partners.learners,
            sync=partners.sync,
            seed=config.seed,
        )
        self.evaluator = Evaluator(config, held_out, partners.generators, partners.rewards, learners=partners.learners)
        self.best = BestPolicy(config.evaluation, run.dir / BEST_EXPORT, partners.learners.export)
        self.first: HeldOut | None = None
        self.last: HeldOut | None = None
        self.raised: Metrics = {}
        self._at_start = self.state()

    @property
    def step(self) -> int:
        return self.driver.step

    @property
    def done(self) -> bool:
        return self.step >= self.config.algorithm.num_steps

    @property
    def has_best(self) -> bool:
        return self.best.best_step == self.step > 0

    def begin(self) -> None:
        self._load(self._at_start)
        self.partners.wait_started()
        reference_first = starts_at_reference(self.config)
        if reference_first:
            self.partners.put_generators_back()  # they hold the reference until the first sync
            self.evaluator.compare_with(self.evaluator.evaluate())
        started = self.driver.start() | {"rollout/num_prompts_dropped": float(self.source.num_dropped)}
        if self.held_out:
            result = self.evaluator.evaluate()
            self.first = self.last = self._held_out(result)
            started |= result.metrics
            if not reference_first:
                started |= self.evaluator.compare_with(result)
            started |= self.best.offer(0, started)
        self.run.tracker.log("ppo", 0, started)
        self.progress.at(0)

    def take_up(self, state: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        self.partners.wait_started()
        if checkpoint.num_ranks:
            self.learners.restore(checkpoint.learner)
        self._load(state)
        self.driver.start()
        self.progress.at(self.step)

    def _load(self, state: Mapping[str, Any]) -> None:
        self.driver.load_state(state["driver"])
        self.driver.rollouts.load_state(state["prompts"])
        self.shaping.load_state(state["shaping"])
        self.evaluator.load_state(state["evaluator"])
        self.best.load_state(state["best"])
        self.raised = dict(state["raised"])
        self.first, self.last = (
            None if state[which] is None else HeldOut(**state[which]) for which in ("first", "last")
        )

    def state(self) -> dict[str, Any]:
        return {
            "driver": self.driver.state(),
            "prompts": self.driver.rollouts.state(),
            "shaping": self.shaping.state(),
            "evaluator": self.evaluator.state(),
            "best": self.best.state(),
            "raised": self.raised,
            "first": None if self.first is None else asdict(self.first),
            "last": None if self.last is None else asdict(self.last),
        }

    def advance(self) -> None:
        config, run, partners = self.config, self.run, self.partners
        iteration = self.driver.iterate()
        step, metrics = iteration.step, iteration.metrics | signs(iteration.handles, prefix="monitor")
        if self.held_out and is_due(step, config.evaluation.every, last_step=config.algorithm.num_steps):
            result = self.evaluator.evaluate()
            self.last = self._held_out(result)
            metrics |= result.metrics | self.best.offer(step, result.metrics)
        metrics |= self._busy(iteration)
        for line in alarm_lines(metrics, config.monitors, known=self.raised):
            run.console.note(f"step {step}: {line}")
        now = alarms(metrics, config.monitors)
        self.raised |= now  # the score's drift is measured at evaluations alone
        metrics |= now | partners.memory() | run.saver.metrics() | run.recoveries.metrics()
        run.tracker.log("ppo", step, metrics)
        if config.tracking.samples_per_step:
            shown_handles = iteration.handles[: config.tracking.samples_per_step]
            run.tracker.samples("ppo", step, samples(partners.generators, shown_handles))
        if is_due(step, config.tracking.export_every):
            partners.learners.export(run.dir / "export" / f"step_{step:06d}")
        self.progress.advance(**shown(metrics, self.last))

    def _busy(self, iteration: Iteration) -> Metrics:
        """Return how idle each process was in the iteration, and write its trace if that is asked for."""
        whole, rows = iteration.spans[-1], self.partners.spans()
        if iteration.step in self.config.tracking.trace_steps:
            cut = {name: clipped(spans, whole.start, whole.end) for name, spans in rows.items()}
            path = self.run.dir / "trace" / f"step_{iteration.step:06d}.json"
            write_trace(path, {DRIVER: list(iteration.spans), **cut})
        return idle_shares(rows, whole.start, whole.end)

    def finish(self) -> Handover:
        self.learners.export(self.run.dir / "export")
        after = self.before.with_policy(self.run.dir / "export" / "policy")
        if self.first is None or self.last is None:
            return after
        return replace(
            after.with_summary(**before_and_after(self.first.metrics, self.last.metrics)),
            examples=examples(self.first.rows, self.last.rows),
        )

    def _held_out(self, result: EvaluationResult) -> HeldOut:
        """Return the figures of an evaluation with the first responses, one to a prompt, and the verdict on each."""
        chosen = [number for number, handle in enumerate(result.handles) if handle.info.sample == 0][:NUM_EXAMPLES]
        rows = samples(self.partners.generators, [result.handles[number] for number in chosen])
        for number, row in zip(chosen, rows, strict=True):
            verdict = None if result.verdicts is None else result.verdicts[number]
            if verdict is not None:
                row["right"] = verdict >= self.config.evaluation.threshold
        return HeldOut(dict(result.metrics), rows)


@dataclass(frozen=True)
class HeldOut:
    """What is kept of an evaluation: its figures, and a few responses as rows of samples.jsonl."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def rollouts_of(config: Config, prompts: Prompts, partners: Partners) -> Rollouts:
    """Return where the rollouts of an iteration come from, as the algorithm asks."""
    algorithm = config.algorithm
    sampled = SampledRollouts(
        prompts,
        partners.generators,
        partners.rewards,
        # Of groups that may be left out none is evaluated in vain, and on shared GPUs nobody evaluates while others
        # sample: the update does it.
        evaluate=unheard
        if algorithm.filter_groups or config.cluster.placement == COLOCATED
        else partners.learners.evaluate,
        sampling=Sampling(
            num_samples=algorithm.samples_per_prompt,
            temperature=config.generator.temperature,
            max_new_tokens=config.generator.max_new_tokens,
            seed=config.seed,
        ),
        prompts_per_step=algorithm.prompts_per_step,
    )
    if algorithm.filter_groups:
        return VariedGroups(sampled, max_rounds=algorithm.filter_max_rounds)
    if algorithm.estimator == "remax":
        return WithGreedyBaselines(sampled)
    if algorithm.max_staleness > 0:
        return AheadRollouts(sampled, max_staleness=algorithm.max_staleness, num_steps=algorithm.num_steps)
    return sampled


def shown(metrics: Metrics, last: HeldOut | None) -> Metrics:
    """Return the few numbers that the progress bar shows."""
    few = {name: metrics[key] for name, key in SHOWN.items()}
    if last is not None and "eval/accuracy" in last.metrics:
        few["accuracy"] = last.metrics["eval/accuracy"]
    return few


def samples(generators: Generators, handles: Sequence[ScoredHandle]) -> list[dict[str, Any]]:
    """Return a row for samples.jsonl for each of the rollouts, with its own score."""
    return [
        {
            "prompt_id": rollout.prompt.id,
            "sample": rollout.sample,
            "question": rollout.prompt.messages[-1]["content"],
            "prompt": rollout.prompt.text,
            "response": rollout.text,
            "score": handle.score,
            "parts": dict(handle.parts),
            "finish_reason": rollout.finish_reason,
            "num_response_tokens": len(rollout.response_ids),
        }
        for handle, rollout in zip(handles, generators.read(handles), strict=True)
    ]


def examples(first: Sequence[Mapping[str, Any]], last: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return held-out prompts with what was answered before and after, for the closing report."""
    by_prompt = {row["prompt_id"]: row for row in last}
    rows = []
    for old in first:
        new = by_prompt.get(old["prompt_id"])
        if new is None:
            continue
        row: dict[str, Any] = {"prompt": old["question"]}
        for when, sample in (("before", old), ("after", new)):
            row |= {when: sample["response"], f"score_{when}": sample["score"]}
            if "right" in sample:
                row[f"right_{when}"] = sample["right"]
        rows.append(row)
    return tuple(rows)
