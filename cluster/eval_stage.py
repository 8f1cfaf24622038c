"""The eval stage: the policy on held-out prompts, nothing trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from actors.mixing import held_out_prompts
from cluster.evaluation import Evaluator
from cluster.learners import LearnerGroup
from cluster.partners import start_generators, start_rewards
from cluster.processes import collect
from cluster.run import Handover, Run, load_tokenizer
from learner.divergence import JudgeSetup, JudgeWorker


def run_eval(run: Run, before: Handover) -> Handover:
    """Judge the policy as it stands, beside `model.reference` if that is set, and leave the figures in the summary."""
    config, model = run.config, before.model
    assert model.path is not None
    assert model.tokenizer is not None
    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code)
    held_out = held_out_prompts(config.data, tokenizer, config.evaluation.num_prompts)
    # The policy that training started from is no reference of the one that it made.
    reference = config.model.reference
    roles = ("generator", "reward") if reference is None else ("generator", "reward", "learner")
    with run.session.placed(*roles) as placement, run.console.stage("eval", 1) as progress:
        device = run.session.device
        starting: list[Any] = []
        learners = None
        if reference is not None:
            setup = JudgeSetup(
                model=replace(model, reference=reference),
                learner=config.learner,
                generator=config.generator,
                device=device,
                collective_timeout_s=config.cluster.call_timeout_s,
            )
            learners = LearnerGroup(placement, JudgeWorker, setup, limits=config.cluster)
            starting += learners.starting
        generators = start_generators(config, before, placement, model_path=model.path, device=device)
        rewards = start_rewards(config, before, placement, device=device)
        starting += [*generators.starting, *rewards.starting]
        collect(starting, what="starting the processes of the eval stage", timeout_s=config.cluster.start_timeout_s)
        result = Evaluator(config, held_out, generators, rewards, learners=learners).evaluate()
        run.tracker.log("eval", 0, result.metrics | generators.memory() | rewards.memory())
        progress.advance(score=result.metrics["eval/score_mean"])
    return before.with_summary(**{name: value for name, value in result.metrics.items() if name.startswith("eval/")})
