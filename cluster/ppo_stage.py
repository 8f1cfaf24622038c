"""The ppo stage: brings up generators, reward actors and learner ranks, and runs the driver over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from actors.prompts import PromptSource
from actors.rollout import Prompt
from actors.rows import read_rows
from cluster.driver import EvaluationResult, Metrics, PPODriver, ScoredHandle
from cluster.generators import GeneratorGroup, GeneratorSetup
from cluster.learners import LearnerGroup
from cluster.processes import Placement, collect
from cluster.report import before_and_after
from cluster.rewards import RewardGroup, RewardSetup
from cluster.run import Handover, Run, load_tokenizer
from cluster.weight_sync import VerifiedWeightSync
from conf.schema import Config
from learner.worker import LearnerSetup, LearnerWorker

SHOWN = {"score": "reward/score_mean", "kl": "objective/kl", "length": "rollout/response_length_mean"}
NUM_EXAMPLES = 5


class Partners:
    """The three groups of processes of the ppo stage, started side by side."""

    def __init__(self, config: Config, before: Handover, placement: Placement, *, device: str) -> None:
        cluster, model = config.cluster, before.model
        assert model.path is not None
        assert model.tokenizer is not None
        self.learners = LearnerGroup(
            placement, LearnerWorker, learner_setup(config, before, device=device), limits=cluster
        )
        self.generators = GeneratorGroup(
            placement,
            GeneratorSetup(model.path, model.tokenizer, config.generator, device, config.seed, model.trust_remote_code),
            chunk_size=config.reward.batch_size,
            limits=cluster,
        )
        self.rewards = RewardGroup(
            placement,
            RewardSetup(config.reward, before.reward_path, config.evaluation.verifier, device, model.trust_remote_code),
            limits=cluster,
        )
        starting = [*self.learners.starting, *self.generators.starting, *self.rewards.starting]
        collect(starting, what="starting the processes of the ppo stage", timeout_s=cluster.start_timeout_s)
        self.sync = VerifiedWeightSync(
            self.learners,
            self.generators,
            dtype=config.generator.dtype,
            processes_per_generator=config.generator.tensor_parallel_size,
            timeout_s=cluster.sync_timeout_s,
        )

    def memory(self) -> dict[str, float]:
        return self.learners.memory() | self.generators.memory() | self.rewards.memory()


def learner_setup(config: Config, before: Handover, *, device: str) -> LearnerSetup:
    assert before.model.path is not None
    critic = {"reward": before.reward_path, "policy": before.model.path}
    critic_path = critic.get(config.learner.critic_init, config.learner.critic_init)
    assert critic_path is not None, "checked with the settings"
    return LearnerSetup(
        model=before.model,
        algorithm=config.algorithm,
        learner=config.learner,
        critic_path=critic_path,
        temperature=config.generator.temperature,
        device=device,
        seed=config.seed,
        collective_timeout_s=config.cluster.call_timeout_s,
    )


def run_ppo(run: Run, before: Handover) -> Handover:
    """Train the policy against its reward and leave policy and critic in `export`."""
    config = run.config
    source, held_out = prompts_of(config, before)
    if source.num_dropped:
        run.console.note(f"{source.num_dropped} prompts of more than {config.data.max_prompt_tokens} tokens left out")
    with (
        run.session.placed("learner", "generator", "reward") as placement,
        run.console.stage("ppo", config.algorithm.num_steps) as progress,
    ):
        partners = Partners(config, before, placement, device=run.session.device)
        driver = PPODriver(
            algorithm=config.algorithm,
            generator=config.generator,
            evaluation=config.evaluation,
            prompts=source,
            generators=partners.generators,
            rewards=partners.rewards,
            learners=partners.learners,
            sync=partners.sync,
            seed=config.seed,
        )
        started = driver.start() | {"rollout/num_prompts_dropped": float(source.num_dropped)}
        first = last = driver.evaluate(held_out) if held_out else None
        run.tracker.log("ppo", 0, started | (first.metrics if first else {}))
        for step in range(1, config.algorithm.num_steps + 1):
            iteration = driver.iterate()
            metrics = iteration.metrics | partners.memory()
            if held_out and is_due(step, config.evaluation.every, last_step=config.algorithm.num_steps):
                last = driver.evaluate(held_out)
                metrics |= last.metrics
            run.tracker.log("ppo", step, metrics)
            run.tracker.samples("ppo", step, samples(partners, iteration.handles[: config.tracking.samples_per_step]))
            if is_due(step, config.tracking.export_every):
                partners.learners.export(run.dir / "checkpoints" / f"step_{step:06d}")
            progress.advance(**shown(metrics, last))
        partners.learners.export(run.dir / "export")
        after = before.with_policy(run.dir / "export" / "policy")
        if first is None or last is None:
            return after
        return replace(
            after.with_summary(**before_and_after(first.metrics, last.metrics)),
            examples=examples(partners, first, last, threshold=config.evaluation.threshold),
        )


def prompts_of(config: Config, before: Handover) -> tuple[PromptSource, list[Prompt]]:
    """Return where training prompts come from, and the held-out ones, none if the settings name none."""
    data = config.data
    assert before.model.tokenizer is not None
    assert data.path is not None
    tokenizer = load_tokenizer(before.model.tokenizer, trust_remote_code=before.model.trust_remote_code)
    source = PromptSource(read_rows(data.path, data.split), tokenizer, data, seed=config.seed)
    if data.eval_path is None:
        return source, []
    rows = read_rows(data.eval_path, data.eval_split, key="data.eval_path")
    held_out = PromptSource(rows, tokenizer, replace(data, path=data.eval_path), seed=config.seed)
    return source, held_out.take(config.evaluation.num_prompts)


def is_due(step: int, every: int, *, last_step: int | None = None) -> bool:
    """Return whether `step` is a multiple of `every` (never for 0) or the last one."""
    return step == last_step or (every > 0 and step % every == 0)


def shown(metrics: Metrics, last: EvaluationResult | None) -> Metrics:
    """Return the few numbers that the progress bar shows."""
    few = {name: metrics[key] for name, key in SHOWN.items()}
    if last is not None and "eval/accuracy" in last.metrics:
        few["accuracy"] = last.metrics["eval/accuracy"]
    return few


def samples(partners: Partners, handles: Sequence[ScoredHandle]) -> list[dict[str, Any]]:
    """Return a row for samples.jsonl for each of the rollouts, with its own score."""
    return [
        {
            "prompt_id": rollout.prompt.id,
            "sample": rollout.sample,
            "question": rollout.prompt.messages[-1]["content"],
            "prompt": rollout.prompt.text,
            "response": rollout.text,
            "score": handle.score,
            "finish_reason": rollout.finish_reason,
            "num_response_tokens": len(rollout.response_ids),
        }
        for handle, rollout in zip(handles, partners.generators.read(handles), strict=True)
    ]


def examples(
    partners: Partners, first: EvaluationResult, last: EvaluationResult, *, threshold: float
) -> tuple[dict[str, Any], ...]:
    """Return the first few held-out prompts with what was answered before and after, for the closing report."""
    count = min(NUM_EXAMPLES, len(first.handles))
    rows = []
    before, after = (samples(partners, evaluation.handles[:count]) for evaluation in (first, last))
    for index in range(count):
        row: dict[str, Any] = {"prompt": before[index]["question"]}
        for when, sample, evaluation in (("before", before[index], first), ("after", after[index], last)):
            row |= {when: sample["response"], f"score_{when}": sample["score"]}
            if evaluation.verdicts is not None:
                row[f"right_{when}"] = evaluation.verdicts[index] >= threshold
        rows.append(row)
    return tuple(rows)
