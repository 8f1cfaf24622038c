"""The ppo stage: brings up its processes and runs the driver over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from actors.mixing import held_out_prompts, prompt_source
from actors.preflight import starts_at_reference
from actors.rollout import IntArray
from actors.supervised_rows import ptx_rows
from cluster.best import BestPolicy
from cluster.driver import Generators, Metrics, PPODriver, Rollouts, Sampling, ScoredHandle
from cluster.evaluation import EvaluationResult, Evaluator, signs
from cluster.monitors import alarm_lines, alarms
from cluster.partners import Partners
from cluster.report import before_and_after
from cluster.rollouts import Prompts, SampledRollouts, VariedGroups, WithGreedyBaselines
from cluster.run import Handover, Run, load_tokenizer
from cluster.shaping import ScoreShaping
from conf.schema import Config

SHOWN = {"score": "reward/score_mean", "kl": "objective/kl", "length": "rollout/response_length_mean"}
NUM_EXAMPLES = 5


def run_ppo(run: Run, before: Handover) -> Handover:
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
        run.session.placed("learner", "generator", "reward") as placement,
        run.console.stage("ppo", config.algorithm.num_steps) as progress,
    ):
        partners = Partners(config, before, placement, ptx_rows=text, device=run.session.device)
        evaluator = Evaluator(config, held_out, partners.generators, partners.rewards, learners=partners.learners)
        driver = PPODriver(
            algorithm=config.algorithm,
            rollouts=rollouts_of(config, source, partners),
            shaping=ScoreShaping(config.reward.shaping, max_new_tokens=config.generator.max_new_tokens),
            learners=partners.learners,
            sync=partners.sync,
            seed=config.seed,
        )
        best = BestPolicy(config.evaluation, run.dir / "checkpoints" / "best", partners.learners.export)
        first = last = None
        raised: Metrics = {}
        if starts_at_reference(config):
            evaluator.compare_with(evaluator.evaluate())  # the generators hold the reference until the first sync
        started = driver.start() | {"rollout/num_prompts_dropped": float(source.num_dropped)}
        if held_out:
            first = last = evaluator.evaluate()
            started |= first.metrics
            if not starts_at_reference(config):
                started |= evaluator.compare_with(first)
            started |= best.offer(0, started)
        run.tracker.log("ppo", 0, started)
        for step in range(1, config.algorithm.num_steps + 1):
            iteration = driver.iterate()
            metrics = iteration.metrics | signs(iteration.handles, prefix="monitor") | partners.memory()
            if held_out and is_due(step, config.evaluation.every, last_step=config.algorithm.num_steps):
                last = evaluator.evaluate()
                metrics |= last.metrics | best.offer(step, last.metrics)
            for line in alarm_lines(metrics, config.monitors, known=raised):
                run.console.note(f"step {step}: {line}")
            now = alarms(metrics, config.monitors)
            raised |= now  # the score's drift is measured at evaluations alone
            run.tracker.log("ppo", step, metrics | now)
            if config.tracking.samples_per_step:
                shown_handles = iteration.handles[: config.tracking.samples_per_step]
                run.tracker.samples("ppo", step, samples(partners.generators, shown_handles))
            if is_due(step, config.tracking.export_every):
                partners.learners.export(run.dir / "checkpoints" / f"step_{step:06d}")
            progress.advance(**shown(metrics, last))
        partners.learners.export(run.dir / "export")
        after = before.with_policy(run.dir / "export" / "policy")
        if first is None or last is None:
            return after
        return replace(
            after.with_summary(**before_and_after(first.metrics, last.metrics)),
            examples=examples(partners.generators, first, last, threshold=config.evaluation.threshold),
        )


def rollouts_of(config: Config, prompts: Prompts, partners: Partners) -> Rollouts:
    """Return where the rollouts of an iteration come from, as the algorithm asks."""
    algorithm = config.algorithm
    sampled = SampledRollouts(
        prompts,
        partners.generators,
        partners.rewards,
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
    return sampled


def is_due(step: int, every: int, *, last_step: int | None = None) -> bool:
    """Return whether `step` is a multiple of `every` (never for 0) or the last one."""
    return step == last_step or (every > 0 and step % every == 0)


def shown(metrics: Metrics, last: EvaluationResult | None) -> Metrics:
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


def examples(
    generators: Generators, first: EvaluationResult, last: EvaluationResult, *, threshold: float
) -> tuple[dict[str, Any], ...]:
    """Return the first few held-out prompts with what was answered before and after, for the closing report."""
    first_rows, last_rows = (
        {
            (handle.info.prompt_id, handle.info.sample): (handle, None if verdicts is None else verdicts[index])
            for index, handle in enumerate(result.handles)
        }
        for result, verdicts in ((first, first.verdicts), (last, last.verdicts))
    )
    both = [key for key in first_rows if key in last_rows and key[1] == 0][:NUM_EXAMPLES]
    rows = []
    before = samples(generators, [first_rows[key][0] for key in both])
    after = samples(generators, [last_rows[key][0] for key in both])
    for key, old, new in zip(both, before, after, strict=True):
        row: dict[str, Any] = {"prompt": old["question"]}
        for when, sample, verdict in (("before", old, first_rows[key][1]), ("after", new, last_rows[key][1])):
            row |= {when: sample["response"], f"score_{when}": sample["score"]}
            if verdict is not None:
                row[f"right_{when}"] = verdict >= threshold
        rows.append(row)
    return tuple(rows)
