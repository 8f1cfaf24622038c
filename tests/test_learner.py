"""The learner over real gloo ranks: one rank equals a plain loop, two ranks equal one, in seven variants, and so do
four of which each two share the tokens of their rollouts, in four.

The variants take their updates one after another in the same processes, since starting those takes long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.rollout import Prompt, Rollout, ScoredRollout
from conf.schema import (
    AlgorithmConfig,
    GeneratorConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PTXConfig,
    ShapingConfig,
)
from learner.batching import micro_batches
from learner.networks import LearnerSetup
from learner.ranks import Ranks
from tests.learner_ranks import on_ranks
from tests.plain_ppo import Trained, plain_updates
from tests.tiny_models import tiny_checkpoint

pytestmark = pytest.mark.ranks

NUM_UPDATES, KL_COEF, MICRO_BATCH_TOKENS = 3, 0.1, 32
Checkpoints = dict[str, str]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return checkpoints_in(tmp_path_factory.mktemp("checkpoints"))


def checkpoints_in(folder: Path) -> Checkpoints:
    from transformers import AutoModelForSequenceClassification

    paths = {name: str(tiny_checkpoint(folder / name, seed=i)) for i, name in enumerate(("policy", "reference", "lm"))}
    torch.manual_seed(0)
    critic = AutoModelForSequenceClassification.from_pretrained(paths["lm"], num_labels=1, dtype=torch.float32)
    critic.save_pretrained(folder / "critic")
    return {**paths, "critic": str(folder / "critic")}


# The variants: what is changed in the settings of each section

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "gae": {"algorithm": {"gae_lambda": 0.9, "gamma": 0.98}, "generator": {"temperature": 0.8}},
    "shared critic, entropy, KL loss": {
        "algorithm": {"entropy_coef": 0.02, "kl_loss_coef": 0.1, "value_clip_eps": 0.05, "kl_estimator": "k2"},
        "learner": {"critic_network": "shared"},
    },
    "grpo, clip-higher, mask": {
        "algorithm": {
            "estimator": "grpo",
            "loss_aggregation": "sequence",
            "clip_eps": 0.05,
            "clip_eps_high": 0.1,
            "correction": "token",
            "correction_cap": 1.5,
            "mask_truncated": True,
            "kl_loss_coef": 0.1,
            "kl_loss_estimator": "k2",
        },
    },
    "rloo, gspo, lora": {
        "algorithm": {
            "estimator": "rloo",
            "policy_loss": "gspo",
            "loss_aggregation": "sequence",
            "clip_eps": 0.02,
            "correction": "icepop",
            "kl_estimator": "k3",
        },
        "lora": {"rank": 4, "alpha": 8.0},
    },
    "reinforce++, cispo, top-k and top-p": {
        "algorithm": {
            "estimator": "reinforce_pp",
            "policy_loss": "cispo",
            "loss_aggregation": "constant",
            "clip_eps": 0.05,
            "correction": "sequence",
            "gamma": 0.95,
        },
        "generator": {"top_k": 220, "top_p": 0.98, "temperature": 1.3},
    },
    "remax, ptx, ema, engine": {
        "algorithm": {
            "estimator": "remax",
            "ptx": PTXConfig(coef=0.5, path="text.jsonl", batch_size=5),
            "old_logprobs": "engine",
            "max_mean_ratio": None,
        },
        "learner": {"ema_decay": 0.7},
    },
    "vapo": {
        "algorithm": {
            "critic_gae_lambda": 1.0,
            "length_adaptive_alpha": 0.5,
            "bootstrap_truncated": True,
            "critic_warmup_steps": 1,
            "dual_clip": 1.02,
            "clip_eps": 0.01,
            "value_clip_eps": None,
            "whiten_advantages": False,
        },
        "shaping": {"whiten_rewards": True},
        "learner": {"ema_decay": 0.5},
    },
}
# Of the first variant, on one rank: what must change nothing.
SAME: dict[str, dict[str, Any]] = {
    "one micro-batch": {"micro_batch_tokens": 10_000},
    "checkpointing, other micro-batches": {"gradient_checkpointing": True, "micro_batch_tokens": 20},
    "offloaded": {"offload_optimizer": "cpu", "offload_parameters": "cpu"},
}
# On ranks that share tokens: a critic of its own, a value head, adapters and groups over all ranks, text mixed in.
SHARED = ("gae", "shared critic, entropy, KL loss", "rloo, gspo, lora", "remax, ptx, ema, engine")
# Without this DeepSpeed keeps parameters as small as these whole on every rank.
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def make_setup(name: str, checkpoints: Checkpoints, **learner: Any) -> LearnerSetup:
    changes = VARIANTS[name]
    # Adam's eps is large, so that a rounding error of a gradient near zero is not made a step of full size.
    optimizer = OptimizerConfig(lr=3e-3, eps=1e-4, max_grad_norm=0.5, scheduler="linear", warmup_steps=2)
    adapted = LoraConfig(**changes.get("lora", {}))
    settings: dict[str, Any] = {"dtype": "float32", "micro_batch_tokens": MICRO_BATCH_TOKENS, "deepspeed": PARTITIONED}
    texts = np.random.default_rng(7)
    return LearnerSetup(
        model=ModelConfig(
            path=checkpoints["policy"],
            tokenizer=checkpoints["policy"],
            reference=None if adapted.rank else checkpoints["reference"],
            lora=adapted,
        ),
        algorithm=AlgorithmConfig(
            num_steps=NUM_UPDATES,
            prompts_per_step=6,
            samples_per_prompt=2,
            mini_batch_size=6,
            ppo_epochs=2,
            **changes.get("algorithm", {}),
        ),
        shaping=ShapingConfig(**changes.get("shaping", {})),
        learner=LearnerConfig(
            policy=optimizer,
            critic=replace(optimizer, lr=6e-3, weight_decay=0.1),
            **(settings | changes.get("learner", {}) | learner),
        ),
        generator=GeneratorConfig(max_new_tokens=9, **changes.get("generator", {})),
        critic_path=checkpoints["critic"],
        ptx_rows=tuple(texts.integers(4, 64, int(n)).astype(np.int32) for n in texts.integers(2, 12, 8)),
        device="cpu",
        seed=0,
        collective_timeout_s=60.0,
    )


# What is trained on. Samples of a prompt are in different mini-batches, and of a mini-batch on different ranks.


def train_batch(step: int) -> list[list[ScoredRollout]]:
    """Two mini-batches of six rollouts of random tokens, some cut, some with tokens of another's.

    Of the second train batch the whole first mini-batch is cut; the third has lost five rollouts.
    """
    rng = np.random.default_rng(step)
    prompts = [
        Prompt(10 * step + i, rng.integers(4, 64, int(rng.integers(2, 8))).astype(np.int32), "", ()) for i in range(6)
    ]
    every = []
    for index in range(12):
        length = int(rng.integers(1, 10))
        cut = bool(rng.random() < 0.3) or (step == 1 and index < 6)
        mask = rng.random(length) < 0.8
        mask[int(rng.integers(length))] = True
        rollout = Rollout(
            prompt=prompts[index % 5 if index < 6 else index - 6],
            sample=index // 6,
            response_ids=rng.integers(4, 64, length).astype(np.int32),
            rollout_logprobs=rng.normal(-5.5, 0.3, length).astype(np.float32),
            response_mask=mask,
            policy_versions=np.zeros(length, dtype=np.int32),
            finish_reason="length" if cut else "stop",
            text="",
        )
        every.append(ScoredRollout(rollout, float(rng.normal()), baseline=float(rng.normal())))
    if step == 2:
        every = [every[i] for i in (0, 1, 6, 3, 8, 9, 11)]
    half = len(every) // 2 + len(every) % 2
    return [every[:half], every[half:]]


def hand(mini_batch: Sequence[ScoredRollout], ranks: Ranks, *, step: int, index: int) -> list[ScoredRollout]:
    """This rank's rollouts; in the last train batch each mini-batch is in one hand alone."""
    if step == NUM_UPDATES - 1:
        return list(mini_batch) if ranks.hand == index % ranks.num_hands else []
    return [scored for i, scored in enumerate(mini_batch) if i % ranks.num_hands == ranks.hand]


def evaluated_elsewhere(worker: Any, hands: Sequence[Sequence[ScoredRollout]], *, step: int) -> Any:
    """Let each rank evaluate what another one trains on, one mini-batch after another; of the last step half."""
    import torch.distributed as dist

    rank, count, away = worker.ranks.rank, worker.ranks.world_size, worker.ranks.sequence_parallel_size
    known: list[list[Any]] = []
    for index, mini_batch in enumerate(hands):
        if step == NUM_UPDATES - 1 and index % 2:
            known.append([None] * len(mini_batch))
            continue
        every: list[Any] = [None] * count
        dist.all_gather_object(every, [scored.rollout for scored in mini_batch])
        seen: list[Any] = [None] * count
        dist.all_gather_object(seen, worker.evaluate(every[(rank + away) % count]))
        known.append(seen[(rank - away) % count])
    return known


def run_variants(ranks: Ranks, setups: dict[str, LearnerSetup], folder: Path | None = None) -> dict[str, Trained]:
    return {
        name: run_updates(ranks, setup, None if folder is None else folder / name) for name, setup in setups.items()
    }


def run_updates(ranks: Ranks, setup: LearnerSetup, folder: Path | None = None) -> Trained:
    """Take all updates; export at the end if there is a folder."""
    from learner import zero
    from learner.worker import LearnerWorker

    def whole(model: Any) -> dict[str, Any]:
        return {name: tensor.numpy() for name, tensor in zero.full_state(model, dtype="float32").items()}

    worker = LearnerWorker(setup, ranks)
    model, critic, average = worker.policy.module.model, worker.networks.critic, worker.networks.average
    metrics, policy, of_critic, averages = [], [], {}, {}
    for step in range(NUM_UPDATES):
        hands = [hand(part, ranks, step=step, index=i) for i, part in enumerate(train_batch(step))]
        known = None if ranks.world_size == 1 else evaluated_elsewhere(worker, hands, step=step)
        metrics.append(worker.update(hands, known, kl_coef=KL_COEF, seed=step, step=step))
        policy.append(whole(model))
    if critic.engine is not None:
        of_critic = whole(critic.engine.module.model)
    elif worker.policy.module.value_head is not None:
        of_critic = {name: t.numpy() for name, t in zero.trained_state(worker.policy.module.value_head).items()}
    if average is not None:
        with average.swapped_in():
            averages = whole(model)
    if folder is not None:
        worker.export(folder)
    return Trained(metrics, policy, of_critic, averages)


@pytest.fixture(scope="module")
def one_rank(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    setups = {name: make_setup(name, checkpoints) for name in VARIANTS}
    setups |= {name: make_setup("gae", checkpoints, **learner) for name, learner in SAME.items()}
    setups["bfloat16"] = make_setup("gae", checkpoints, dtype="bfloat16", micro_batch_tokens=10_000)
    done: dict[str, Trained] = on_ranks(run_variants, 1, setups, tmp_path_factory.mktemp("one"))[0]
    return done


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to which two ranks export each variant."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def two_ranks(checkpoints: Checkpoints, exported: Path) -> list[dict[str, Trained]]:
    return on_ranks(run_variants, 2, {name: make_setup(name, checkpoints) for name in VARIANTS}, exported)


@pytest.fixture(scope="module")
def sharing_tokens(checkpoints: Checkpoints) -> list[dict[str, Trained]]:
    """Four ranks, of which each two share the tokens of their rollouts."""
    setups = {name: make_setup(name, checkpoints) for name in SHARED}
    return on_ranks(run_variants, 4, setups, sequence_parallel_size=2)


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max((float(np.abs(one[name] - other[name]).max()) for name in one), default=0.0)


def mathematics(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics but those of the work that it took."""
    return {name: value for name, value in metrics.items() if not name.startswith(("throughput/", "timing/"))}


def assert_same(got: Trained, want: Trained, *, weights: float, metrics: float) -> None:
    for step, (of_got, of_want) in enumerate(
        zip(map(mathematics, got.metrics), map(mathematics, want.metrics), strict=True)
    ):
        assert of_got.keys() == of_want.keys(), step
        for name, value in of_want.items():
            assert of_got[name] == pytest.approx(value, abs=metrics, rel=metrics), (step, name)
    for of_got, of_want in zip(got.policy, want.policy, strict=True):
        assert furthest(of_got, of_want) < weights
    assert furthest(got.critic, want.critic) < weights
    assert furthest(got.average, want.average) < weights


@pytest.mark.parametrize("name", VARIANTS)
def test_one_rank_equals_a_plain_loop(name: str, checkpoints: Checkpoints, one_rank: dict[str, Trained]) -> None:
    """Every metric too, and no other. (PPO details 1, 3, 4, 5, 8)"""
    setup = make_setup(name, checkpoints)
    plain = plain_updates(setup, [train_batch(step) for step in range(NUM_UPDATES)], kl_coef=KL_COEF)
    assert_same(one_rank[name], plain, weights=2e-6, metrics=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_equal_one(name: str, two_ranks: list[dict[str, Trained]], one_rank: dict[str, Trained]) -> None:
    """Though what a rank trains on has been evaluated by the other, most of it. (PPO details 4, 8)"""
    first, second = (of_rank[name] for of_rank in two_ranks)
    assert first.metrics == second.metrics, "every rank reports the same metrics"
    assert_same(first, one_rank[name], weights=1e-6, metrics=1e-5)


@pytest.mark.parametrize("name", SHARED)
def test_ranks_that_share_tokens_equal_one(
    name: str, sharing_tokens: list[dict[str, Trained]], one_rank: dict[str, Trained]
) -> None:
    """Rows do not divide by two at times, and some states of a rollout are one rank's and some the other's."""
    first, *others = (of_rank[name] for of_rank in sharing_tokens)
    for other in others:
        assert list(map(mathematics, other.metrics)) == list(map(mathematics, first.metrics)), "on every rank"
    assert_same(first, one_rank[name], weights=1e-6, metrics=1e-5)


def evaluate_what_one_has_lost(ranks: Ranks, setup: LearnerSetup) -> list[int]:
    from learner.worker import LearnerWorker

    worker, rollouts = LearnerWorker(setup, ranks), [scored.rollout for scored in train_batch(0)[0]]
    return [len(worker.evaluate(rollouts if ranks.rank == 0 or there else None)) for there in (False, True)]


def test_ranks_that_share_tokens_leave_out_what_one_of_them_has_lost(checkpoints: Checkpoints) -> None:
    setup = make_setup("rloo, gspo, lora", checkpoints)
    assert on_ranks(evaluate_what_one_has_lost, 2, setup, sequence_parallel_size=2) == [[0, 6], [0, 6]]


def update_with_old_evaluations(ranks: Ranks, setup: LearnerSetup) -> str:
    from learner.worker import LearnerWorker

    worker, mini_batches = LearnerWorker(setup, ranks), train_batch(0)
    evaluated = [worker.evaluate([scored.rollout for scored in part]) for part in mini_batches]
    worker.update(mini_batches, evaluated, kl_coef=KL_COEF, seed=0, step=0)
    try:
        worker.update(mini_batches, evaluated, kl_coef=KL_COEF, seed=1, step=1)
    except RuntimeError as error:
        return str(error)
    return "trained"


def test_an_evaluation_by_the_policy_before_the_last_update_is_refused(checkpoints: Checkpoints) -> None:
    said = on_ranks(update_with_old_evaluations, 1, make_setup("gae", checkpoints))[0]
    assert said.startswith("evaluations after [0] updates are to be trained on after 1")


def test_the_ranks_have_micro_batches_in_different_numbers_and_one_has_none() -> None:
    counts = []
    for step in range(NUM_UPDATES):
        for index, mini_batch in enumerate(train_batch(step)):
            lengths = [
                [s.rollout.num_tokens for s in hand(mini_batch, Ranks(rank, 2, "", 0), step=step, index=index)]
                for rank in range(2)
            ]
            counts.append(
                tuple(len(micro_batches(of_rank, max_tokens=MICRO_BATCH_TOKENS, padded=False)) for of_rank in lengths)
            )
    assert any(one != other for one, other in counts if one and other)
    assert any(0 in pair for pair in counts)


@pytest.mark.parametrize("name", SAME)
def test_cut_and_checkpointing_change_nothing(name: str, one_rank: dict[str, Trained]) -> None:
    assert_same(one_rank[name], one_rank["gae"], weights=1e-6, metrics=1e-5)


def test_bfloat16_follows_float32(one_rank: dict[str, Trained]) -> None:
    for got, want in zip(one_rank["bfloat16"].metrics, one_rank["gae"].metrics, strict=True):
        assert got["objective/kl"] == pytest.approx(want["objective/kl"], abs=0.3)
        assert got["policy/entropy"] == pytest.approx(want["policy/entropy"], abs=0.05)


def test_a_warm_up_leaves_the_policy_as_it_is_bit_for_bit(
    checkpoints: Checkpoints, one_rank: dict[str, Trained]
) -> None:
    from safetensors.numpy import load_file

    trained = one_rank["vapo"]
    start = load_file(Path(checkpoints["policy"]) / "model.safetensors")
    assert all(np.array_equal(trained.policy[0][name], start[name]) for name in trained.policy[0])
    assert furthest(trained.policy[1], trained.policy[0]) > 1e-3
    assert not {"policy/loss", "policy/grad_norm", "policy/lr"} & trained.metrics[0].keys()


def test_what_the_variants_are_there_for_took_place(one_rank: dict[str, Trained]) -> None:
    def seen(name: str, metric: str) -> list[float]:
        return [of_step.get(metric, 0.0) for of_step in one_rank[name].metrics]

    assert seen("grpo, clip-higher, mask", "policy/skipped_empty") == [0, 2, 0]
    assert max(seen("grpo, clip-higher, mask", "policy/masked_rollouts")) >= 6
    assert 0 < max(seen("reinforce++, cispo, top-k and top-p", "offpolicy/outside_fraction")) < 0.5
    assert 0 < max(seen("reinforce++, cispo, top-k and top-p", "policy/outside_fraction")) < 0.2
    for name in VARIANTS:
        assert max(seen(name, "policy/clipfrac")) > 0, name
    assert max(seen("shared critic, entropy, KL loss", "critic/clipfrac")) > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_trained_is_exported(name: str, two_ranks: list[dict[str, Trained]], exported: Path) -> None:
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    def held(kind: Any, folder: Path) -> dict[str, Any]:
        model = kind.from_pretrained(folder, dtype=torch.float32)
        AutoTokenizer.from_pretrained(folder)
        return {key: parameter.detach().numpy() for key, parameter in model.named_parameters()}

    trained, folder, changes = two_ranks[0][name], exported / name, VARIANTS[name]
    expected = {"policy"}
    assert furthest(held(AutoModelForCausalLM, folder / "policy"), trained.policy[-1]) == 0
    if trained.average:
        expected.add("policy_ema")
        assert furthest(held(AutoModelForCausalLM, folder / "policy_ema"), trained.average) == 0
        assert furthest(trained.average, trained.policy[-1]) > 1e-4
    if changes.get("learner", {}).get("critic_network") == "shared":
        assert furthest(load_file(folder / "policy" / "value_head.safetensors"), trained.critic) == 0
    elif trained.critic:
        expected.add("critic")
        assert furthest(held(AutoModelForSequenceClassification, folder / "critic"), trained.critic) == 0
    if "lora" in changes:
        expected.add("adapter")
    assert {path.name for path in folder.iterdir()} == expected
