"""LoRA in ZeRO-3 engines against plain PEFT with torch's AdamW: training, the reference, and the merged model.

The steps, the merge and both checkpoints are those of PEFT's own classes in one process, which share no code with
learner/lora.py. About a minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.weights import manifest_of
from conf.schema import ConfigError, LearnerConfig, LoraConfig, ModelConfig, OptimizerConfig
from learner import lora
from learner.exports import export
from learner.ranks import Ranks
from tests.learner_ranks import on_ranks
from tests.tiny_models import tiny_checkpoint

pytestmark = pytest.mark.ranks

LORA = LoraConfig(rank=4, alpha=8.0)
OPTIMIZER = OptimizerConfig(lr=1e-2, max_grad_norm=0.5, scheduler="constant", weight_decay=0.01)
SEED, UPDATES, NUM_ROLLOUTS, LENGTH = 11, 2, 4, 12


@dataclass(frozen=True)
class Case:
    family: str
    tied: bool = True
    task: str = lora.CAUSAL_LM
    gradient_checkpointing: bool = False

    @property
    def auto(self) -> Any:
        return AutoModelForCausalLM if self.task == lora.CAUSAL_LM else AutoModelForSequenceClassification


UNTIED, IN_FLIGHT = "untied and checkpointing", "in flight"
CASES = {
    "llama": Case("llama"),
    UNTIED: Case("llama", tied=False, gradient_checkpointing=True),
    "qwen2": Case("qwen2"),
    "gpt2": Case("gpt2"),
    "critic": Case("gpt2", task=lora.SEQ_CLS),
}
ALONE = ("llama", "critic")  # also on one rank


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base checkpoints by case."""
    folder = tmp_path_factory.mktemp("base")
    for name, case in CASES.items():
        tiny_checkpoint(folder / name, case.family, tied=case.tied, seed=3)
        if case.task == lora.SEQ_CLS:
            torch.manual_seed(4)
            case.auto.from_pretrained(folder / name, num_labels=1, dtype=torch.float32).save_pretrained(folder / name)
    return {name: folder / name for name in CASES}


def sequences() -> Tensor:
    return torch.randint(4, 260, (NUM_ROLLOUTS, LENGTH), generator=torch.Generator().manual_seed(5))


def advantages() -> Tensor:
    return torch.tensor([[1.0], [-0.5], [2.0], [-1.5]])


def answers(model: Any, ids: Tensor, task: str) -> Tensor:
    """Log-probabilities [B, L - 1] of the tokens, or values [B, L]: without the model's own forward, as the learner."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if task == lora.SEQ_CLS:
        values: Tensor = model.score(hidden).squeeze(-1)
        return values
    logits = model.get_output_embeddings()(hidden)
    logprobs: Tensor = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return logprobs


def loss_sum(now: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, task: str) -> Tensor:
    """PPO's clipped loss and a pull to the reference, or the squared error of the values."""
    if task == lora.SEQ_CLS:
        return (now - advantage).square().sum()
    ratio = (now - old).exp()
    clipped = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return (0.1 * (now - reference).square() - clipped).sum()


class Network(nn.Module):
    def __init__(self, model: Any, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, ids: Tensor) -> Tensor:
        return answers(self.model, ids, self.task)


def train_all(ranks: Ranks, names: Sequence[str], folders: dict[str, Path], out: Path) -> dict[str, dict[str, Any]]:
    from learner import zero

    zero.join(ranks, device="cpu", timeout_s=60)
    results = {name: train(ranks, CASES[name], folders[name], out / name) for name in names}
    if ranks.world_size > 1:
        results[IN_FLIGHT] = gather_in_flight(CASES[UNTIED], folders[UNTIED])
    return results


def train(ranks: Ranks, case: Case, folder: Path, out: Path) -> dict[str, Any]:
    """Update on this rank's share of the rollouts; return what was computed, and write both checkpoints from rank 0."""
    from learner import zero

    model = case.auto.from_pretrained(folder, dtype=torch.float32)
    manifest = manifest_of(model, "float32")
    model = lora.adapted(model, LORA, seed=SEED, task=case.task)
    learner = LearnerConfig(
        dtype="float32",
        gradient_checkpointing=case.gradient_checkpointing,
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},  # partition the small ones too
    )
    engine = zero.trained_engine(Network(model, case.task), learner, OPTIMIZER, device="cpu", num_updates=100)
    ids, advantage = (whole[ranks.rank :: ranks.world_size] for whole in (sequences(), advantages()))

    @torch.no_grad()
    def say(*, adapters: bool) -> Any:
        with nullcontext() if adapters else lora.switched_off(model):
            return engine(sequences()).numpy().copy()

    raw, off_before = whole_parameters(model), say(adapters=False)
    with torch.no_grad():
        old = engine(ids)
    for _ in range(UPDATES):
        with torch.no_grad(), lora.switched_off(model) if case.task == lora.CAUSAL_LM else nullcontext():
            reference = engine(ids)
        engine.backward(loss_sum(engine(ids), old, reference, advantage, case.task) * ranks.world_size / 100)
        engine.step()
    on, off, trained = say(adapters=True), say(adapters=False), whole_parameters(model)
    state = zero.full_state(model, dtype="float32", keep=ranks.rank == 0)
    lora.save_adapter(model, out / "adapter", keep=ranks.rank == 0)
    settings = ModelConfig(tokenizer=str(folder))
    export(model, out / "merged", dtype="float32", settings=settings, keep=ranks.rank == 0)
    return {
        "same_manifest": zero.manifest(model, "float32") == manifest,
        "changed": {name for name in raw if not np.array_equal(raw[name], trained[name])},
        "state": {name: tensor.numpy() for name, tensor in state.items()},
        "names": [meta.name for meta in manifest],
        "on": on,
        "off": off,
        "off_before": off_before,
    }


def gather_in_flight(case: Case, folder: Path) -> dict[str, Any]:
    """Gather a model without adapters while DeepSpeed is fetching for a backward pass that does not come."""
    from learner import zero

    model = base_model(case, folder)
    fetching = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 30_000,
    }
    learner = LearnerConfig(dtype="float32", deepspeed={"zero_optimization": fetching})
    engine = zero.trained_engine(Network(model, case.task), learner, OPTIMIZER, device="cpu", num_updates=100)
    for _ in range(3):
        engine.backward(engine(sequences()).sum() / 100)
        engine.step()
    with torch.no_grad():
        said = engine(sequences()).numpy().copy()
    return {
        "in_flight": any(parameter.ds_status.name == "INFLIGHT" for parameter in model.parameters()),
        "said": said,
        "state": {name: tensor.numpy() for name, tensor in zero.full_state(model, dtype="float32").items()},
    }


def whole_parameters(model: nn.Module) -> dict[str, Any]:
    import deepspeed

    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=None):
        return {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}


def base_model(case: Case, folder: Path) -> Any:
    return case.auto.from_pretrained(folder, dtype=torch.float32)


def plain_peft(case: Case, folder: Path) -> dict[str, Any]:
    """The same updates by PEFT's wrapped model and torch's AdamW over all rollouts, in this process."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=case.task)
    base = base_model(case, folder)
    torch.manual_seed(SEED)
    wrapped: Any = peft.get_peft_model(base_model(case, folder), config)
    weights = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    adam = torch.optim.AdamW(
        weights.values(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=0.01
    )
    network = wrapped.get_base_model()
    with torch.no_grad():
        old, reference = answers(network, sequences(), case.task), answers(base, sequences(), case.task)
    for _ in range(UPDATES):
        now = answers(network, sequences(), case.task)
        (loss_sum(now, old, reference, advantages(), case.task) / 100).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)
        adam.step()
        adam.zero_grad()
    with torch.no_grad():
        on = answers(network, sequences(), case.task)
    names = {name.removeprefix("base_model.model.") for name in weights}
    state = {name: tensor.numpy().copy() for name, tensor in wrapped.merge_and_unload().state_dict().items()}
    return {"on": on.numpy(), "off": reference.numpy(), "trained": names, "state": state}


@dataclass(frozen=True)
class Run:
    case: Case
    base: Path
    out: Path
    got: dict[str, Any]  # of rank 0
    others: list[dict[str, Any]]
    want: dict[str, Any]


@pytest.fixture(scope="module")
def one_rank(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("one")
    return on_ranks(train_all, 1, ALONE, folders, out), out


@pytest.fixture(scope="module")
def two_ranks(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("two")
    return on_ranks(train_all, 2, tuple(CASES), folders, out), out


@pytest.fixture(scope="module")
def wanted(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: plain_peft(case, folders[name]) for name, case in CASES.items()}


@pytest.fixture(params=[("one_rank", name) for name in ALONE] + [("two_ranks", name) for name in CASES], ids=" ".join)
def run(request: pytest.FixtureRequest, folders: dict[str, Path], wanted: dict[str, Any]) -> Run:
    ranks, name = request.param
    results, out = request.getfixturevalue(ranks)
    first, *others = [result[name] for result in results]
    return Run(CASES[name], folders[name], out / name, first, others, wanted[name])


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference; the output head of a tied model may be left out of `one`."""
    assert set(other) - set(one) <= {"lm_head.weight"}
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_updates_equal_plain_peft_and_adamw(run: Run) -> None:
    """The KL's reference is the policy with its adapters off, asked between the forward passes of training."""
    assert furthest(run.got["state"], run.want["state"]) < 1e-5
    for result in (run.got, *run.others):
        np.testing.assert_allclose(result["on"], run.want["on"], atol=1e-4)
    assert furthest(run.got["state"], load_state(run.base, run.case)) > 1e-2, "the updates are visible"


def load_state(folder: Path, case: Case) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in base_model(case, folder).state_dict().items()}


def test_adapters_and_the_scalar_head_change_and_nothing_else(run: Run) -> None:
    assert run.got["changed"] == run.want["trained"]
    linear_layers = 2 * (4 if run.case.family == "gpt2" else 7)
    assert len(run.want["trained"]) == 2 * linear_layers + (run.case.task == lora.SEQ_CLS)


def test_the_policy_switched_off_is_the_base_before_and_after_training(run: Run) -> None:
    if run.case.task == lora.SEQ_CLS:
        return  # its head has no adapter that could be switched off
    for result in (run.got, *run.others):
        for name in ("off", "off_before"):
            np.testing.assert_array_equal(result[name], run.want["off"])
    assert np.abs(run.got["on"] - run.got["off"]).max() > 0.1


def test_the_merged_model_has_the_names_order_and_shapes_of_the_plain_one(run: Run) -> None:
    assert run.got["same_manifest"]
    assert list(run.got["state"]) == run.got["names"]
    assert ("lm_head.weight" in run.got["state"]) == (run.case.task == lora.CAUSAL_LM and not run.case.tied)
    assert not any(result["state"] for result in run.others), "one rank keeps the state"


def test_peft_reads_the_adapter_and_merges_it_to_the_same_weights(run: Run) -> None:
    import peft

    model: Any = peft.PeftModel.from_pretrained(base_model(run.case, run.base), str(run.out / "adapter"))
    with torch.no_grad():
        again = answers(model.get_base_model(), sequences(), run.case.task)
    np.testing.assert_allclose(again.numpy(), run.got["on"], atol=1e-5)
    merged = {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}
    assert furthest(run.got["state"], merged) < 1e-6
    assert {path.name for path in (run.out / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_merged_checkpoint_is_an_ordinary_one_that_says_the_same(run: Run) -> None:
    model, base = base_model(run.case, run.out / "merged"), base_model(run.case, run.base)
    assert manifest_of(model, "float32") == manifest_of(base, "float32")
    assert type(model) is type(base)
    with torch.no_grad():
        again = answers(model, sequences(), run.case.task)
    np.testing.assert_allclose(again.numpy(), run.got["on"], atol=1e-4)
    if run.case.task == lora.CAUSAL_LM:
        embeddings = model.get_input_embeddings().weight
        assert (model.get_output_embeddings().weight is embeddings) == run.case.tied


def test_a_gather_waits_for_parameters_that_are_on_their_way(two_ranks: Any, folders: dict[str, Path]) -> None:
    case = CASES[UNTIED]
    for result in (results[IN_FLIGHT] for results in two_ranks[0]):
        assert result["in_flight"]
        model = base_model(case, folders[UNTIED])
        model.load_state_dict({name: torch.from_numpy(weight) for name, weight in result["state"].items()})
        with torch.no_grad():
            again = answers(model, sequences(), case.task)
        np.testing.assert_allclose(again.numpy(), result["said"], atol=1e-4)


# --- without engines -------------------------------------------------------------------------------------------------


def small_source(*, transposed: bool) -> lora.Source:
    """W = [[1, 2, 3], [4, 5, 6]], B = [[1], [2]], A = [[1, 0, -1]], scale 0.5."""
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    return lora.Source(
        nn.Parameter(weight.t() if transposed else weight),
        down=nn.Parameter(torch.tensor([[1.0, 0.0, -1.0]])),
        up=nn.Parameter(torch.tensor([[1.0], [2.0]])),
        scale=0.5,
        transposed=transposed,
    )


def test_a_merge_by_hand() -> None:
    want = torch.tensor([[1.5, 2.0, 2.5], [5.0, 5.0, 5.0]])
    assert torch.equal(small_source(transposed=False).merged(torch.float32), want)
    assert torch.equal(small_source(transposed=True).merged(torch.float32), want.t())


def test_a_merge_in_bfloat16_rounds_once() -> None:
    """256 + 1 has no place in bfloat16: a merge in it would give -256 + 256 = 0."""
    source = lora.Source(
        nn.Parameter(torch.tensor([[-256.0]], dtype=torch.bfloat16)),
        down=nn.Parameter(torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)),
        up=nn.Parameter(torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)),
        scale=1.0,
    )
    assert source.merged(torch.bfloat16).item() == 1.0


def test_adapters_come_back_on_after_an_error(folders: dict[str, Path]) -> None:
    model = lora.adapted(base_model(CASES["llama"], folders["llama"]), LORA, seed=0, task=lora.CAUSAL_LM)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    on = model(sequences()).logits
    with pytest.raises(OSError), lora.switched_off(model):  # noqa: PT011
        raise OSError
    assert torch.equal(model(sequences()).logits, on)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())


def drawn(folder: Path, seed: int) -> Tensor:
    model = lora.adapted(base_model(CASES["llama"], folder), LORA, seed=seed, task=lora.CAUSAL_LM)
    weight: Tensor = model.model.layers[1].mlp.up_proj.lora_A["default"].weight
    return weight


def test_adapters_depend_on_the_seed_alone_and_leave_the_random_state(folders: dict[str, Path]) -> None:
    torch.manual_seed(0)
    first = drawn(folders["llama"], 1)
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.rand(()) == after
    assert torch.equal(drawn(folders["llama"], 1), first)
    assert not torch.equal(drawn(folders["llama"], 2), first)


def test_named_layers_alone_get_an_adapter(folders: dict[str, Path]) -> None:
    settings = LoraConfig(rank=2, target_modules=("q_proj", "layers.1.mlp.up_proj"))
    model = lora.adapted(base_model(CASES["llama"], folders["llama"]), settings, seed=0, task=lora.CAUSAL_LM)
    assert {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("q_prj", "name layers of the model"),
        ("embed_tokens", "only linear layers"),
        ("self_attn", "only linear layers"),
        ("lm_head", "tied to another layer"),
    ],
)
def test_a_name_that_cannot_have_an_adapter_is_refused(folders: dict[str, Path], name: str, remedy: str) -> None:
    settings = LoraConfig(rank=2, target_modules=("q_proj", name))
    with pytest.raises(ConfigError, match=remedy):
        lora.adapted(base_model(CASES["llama"], folders["llama"]), settings, seed=0, task=lora.CAUSAL_LM)
