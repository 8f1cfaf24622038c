"""The eval stage: the policy on held-out prompts, nothing trained."""

from __future__ import annotations

import time
from dataclasses import replace

from actors.mixing import held_out_prompts
from cluster.checkpoints import Checkpoint
from cluster.evaluation import EvaluationResult, Evaluator
from cluster.faults import LearnersLostError, RolloutsLostError
from cluster.learners import LearnerGroup
from cluster.partners import start_generators, start_rewards
from cluster.reactor import Reactor
from cluster.recoveries import Recoveries
from cluster.roles import processes_of
from cluster.run import Handover, Run, load_tokenizer
from learner.divergence import JudgeSetup, JudgeWorker


def run_eval(run: Run, before: Handover, resume: Checkpoint | None) -> Handover:
    """Judge the policy as it stands, beside `model.reference` if that is set, and leave the figures in the summary."""
    start = time.perf_counter()
    config, model = run.config, before.model
    assert model.path is not None
    assert model.tokenizer is not None
    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code)
    held_out = held_out_prompts(config.data, tokenizer, config.evaluation.num_prompts)
    # The policy that training started from is no reference of the one that it made.
    reference = config.model.reference
    with run.session.placed(processes_of("eval", config)) as placement, run.console.stage("eval", 1) as progress:
        device, recoveries, reactor = run.session.device, run.recoveries, Reactor()
        learners = None
        if reference is not None:
            setup = JudgeSetup(
                model=replace(model, reference=reference),
                learner=config.learner,
                generator=config.generator,
                device=device,
                collective_timeout_s=config.cluster.call_timeout_s,
            )
            learners = LearnerGroup(
                placement,
                JudgeWorker,
                setup,
                limits=config.cluster,
                recoveries=recoveries,
                reactor=reactor,
                sequence_parallel_size=config.learner.sequence_parallel_size,
            )
        generators = start_generators(
            config, before, placement, model_path=model.path, device=device, recoveries=recoveries, reactor=reactor
        )
        rewards = start_rewards(config, before, placement, device=device, recoveries=recoveries, reactor=reactor)
        rewards.members.wait_begun()
        generators.members.wait_begun()
        result = judged(Evaluator(config, held_out, generators, rewards, learners=learners), learners, recoveries)
        run.tracker.log("eval", 0, result.metrics | generators.memory() | rewards.memory())
        progress.advance(score=result.metrics["eval/score_mean"])
    figures = {name: value for name, value in result.metrics.items() if name.startswith("eval/")}
    return before.with_summary(**figures).with_seconds("eval", time.perf_counter() - start)


def judged(evaluator: Evaluator, learners: LearnerGroup | None, recoveries: Recoveries) -> EvaluationResult:
    """Return the evaluation; from its beginning again if a rank or rollouts are lost, as often as is allowed."""
    lost: LearnersLostError | None = None
    while True:
        try:
            if learners is not None:
                if lost is not None:
                    learners.restart(str(lost))
                    lost = None
                learners.wait_started()
            return evaluator.evaluate()
        except LearnersLostError as error:
            lost = error
        except RolloutsLostError as error:
            recoveries.count("rollouts", str(error))
