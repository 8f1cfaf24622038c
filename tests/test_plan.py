"""`mode=plan`: what a run would take, and what to change where it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from transformers import AutoConfig, AutoModelForCausalLM

import launch
from cluster.batch_arithmetic import batch_arithmetic
from cluster.estimate import estimated
from conf.load import load_config
from conf.schema import ConfigError, LearnerConfig
from learner import zero
from learner.sizes import NetworkSize, activations, checkpoint_bytes, rank_memory
from tests.tiny_models import tiny_checkpoint, tiny_config

READY = ("quickstart", "smollm2_arithmetic", "smollm2_arithmetic_grpo", "qwen2_5_0_5b", "llama3_8b", "llama3_70b")
ON_GPUS = ("qwen2_5_0_5b", "llama3_8b", "llama3_70b")


@pytest.mark.parametrize("experiment", READY)
def test_every_experiment_fits(experiment: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["mode=plan", f"experiment={experiment}"]) == 0
    printed = capsys.readouterr()
    assert any(line.startswith("fits") for line in printed.out.splitlines())
    assert printed.err == ""


@pytest.mark.parametrize(
    ("experiment", "overrides", "key"),
    [
        ("llama3_8b", ["learner.offload_optimizer=none", "learner.offload_parameters=none"],
         "learner.offload_optimizer"),
        ("llama3_8b", ["cluster.num_learners=6"], "cluster"),
        ("llama3_8b", ["cluster.node_memory_gib=400"], "cluster.num_nodes"),
        ("llama3_8b", ["learner.gradient_checkpointing=false"], "learner.gradient_checkpointing"),
        ("llama3_8b", ["learner.micro_batch_tokens=262144", "algorithm.prompts_per_step=1024",
                       "algorithm.mini_batch_size=1024"], "learner.micro_batch_tokens"),
        ("llama3_8b", ["generator.max_model_len=263168", "generator.max_new_tokens=262144"],
         "learner.sequence_parallel_size"),
        ("llama3_8b", ["cluster.placement=colocated", "cluster.num_generators=8", "cluster.num_learners=8"],
         "generator.gpu_memory_utilization"),  # a reward model is there too
        ("llama3_8b", ["cluster.num_learners=128", "cluster.num_nodes=32"], "cluster.num_learners"),
        ("llama3_70b", ["generator.tensor_parallel_size=1"], "generator.tensor_parallel_size"),
        ("llama3_70b", ["cluster.num_nodes=3"], "cluster"),
        ("qwen2_5_0_5b", ["learner.offload_optimizer=none"], "learner.offload_optimizer"),
        ("qwen2_5_0_5b", ["cluster.num_generators=2"], "cluster.num_generators"),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_the_setting(
    experiment: str, overrides: list[str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["mode=plan", f"experiment={experiment}", *overrides]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith(f"launch.py: {key}=")


def test_a_model_of_which_nothing_is_known_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["mode=plan", "experiment=llama3_8b", f"model.path={tmp_path}", "model.shape=null"]
    assert launch.main(settings) == 2
    assert "model.shape" in capsys.readouterr().err


def test_a_checkpoint_at_hand_counts_before_the_shape_in_the_settings(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    config = load_config(["experiment=llama3_8b", f"model.path={folder}", f"reward.sources[0].path={folder}"])
    estimate = estimated(config)
    assert estimate.notes == []
    assert max(line.total for line in estimate.lines if line.role == "learner") < 8 << 30


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_sizes_are_those_of_the_model_that_is_built(family: str) -> None:
    config = tiny_config(family)
    model = AutoModelForCausalLM.from_config(config)
    size = NetworkSize.of(config)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.layers == len([module for name, module in model.named_modules() if name.split(".")[-1].isdigit()])
    scalar = NetworkSize.of(config, scalar=True)
    head = 0 if config.tie_word_embeddings else size.vocabulary * size.hidden
    assert scalar.parameters == size.parameters - head + size.hidden


def llama_8b() -> NetworkSize:
    return NetworkSize.of(AutoConfig.for_model(**load_config(["experiment=llama3_8b"]).model.shape))


@pytest.mark.parametrize("num_ranks", [4, 64])
def test_states_come_to_what_deepspeed_itself_estimates(num_ranks: int) -> None:
    """DeepSpeed counts 18 bytes a parameter on GPUs, as if the gradients of all were in float32 at once; so do we."""
    network = llama_8b()
    assert network.parameters == 8_030_261_248, "as the model card of Llama 3.1 says: 8.03B"
    memory = rank_memory(network, LearnerConfig(), zero={"sub_group_size": 2**60}, num_ranks=num_ranks, trained=True)
    _, theirs, of_layer = estimate_zero3_model_states_mem_needs(
        network.parameters,
        network.largest_group,
        num_gpus_per_node=num_ranks,
        cpu_offload=False,
        cpu_offload_params=False,
    )
    ours = sum(memory.device.values()) + sum(memory.stepping.values()) - memory.device["gathered parameters"]
    assert ours / network.parameters * num_ranks == pytest.approx(20, rel=1e-3)
    # Theirs reuses the gradients in bfloat16; beside them ours are turned into float32 a sub group at a time.
    assert ours - 2 * network.parameters / num_ranks == pytest.approx(theirs - of_layer, rel=1e-3)


def test_offloaded_states_come_to_what_deepspeed_itself_estimates() -> None:
    network = llama_8b()
    learner = LearnerConfig(offload_optimizer="cpu", offload_parameters="cpu")
    memory = rank_memory(network, learner, zero={}, num_ranks=8, trained=True)
    theirs, *_ = estimate_zero3_model_states_mem_needs(
        network.parameters, network.largest_group, num_gpus_per_node=8, additional_buffer_factor=1.0
    )
    ours = 8 * sum(memory.host.values())
    assert set(memory.device) == {"gathered parameters"}
    assert ours / network.parameters == pytest.approx(20, rel=1e-3), "theirs leaves gradients in bfloat16 out: 18"
    assert ours - 2 * network.parameters == pytest.approx(theirs, rel=1e-3)


def test_one_rank_keeps_its_parameters_gathered_unless_they_are_offloaded() -> None:
    network = llama_8b()
    for place, gathered in (("none", network.parameters), ("cpu", 1_000_000_000 + network.largest_group)):
        learner = LearnerConfig(offload_parameters=place)
        settings = zero.deepspeed_config(learner, learner.policy, device="cuda", num_ranks=1)["zero_optimization"]
        assert ("stage3_param_persistence_threshold" in settings) == (place == "none"), "DeepSpeed is told the same"
        memory = rank_memory(network, learner, zero=settings, num_ranks=1, trained=True)
        assert memory.device["gathered parameters"] == 2 * gathered


def test_a_frozen_network_and_adapters_have_what_they_need_alone() -> None:
    network = llama_8b()
    frozen = rank_memory(network, LearnerConfig(), zero={}, num_ranks=8, trained=False)
    assert frozen.device["parameters"] == 2 * network.parameters // 8
    assert frozen.device["gathered parameters"] < 2 * (1_000_000_000 + network.largest_group + 1), (
        "as DeepSpeed limits it"
    )
    assert not frozen.stepping
    adapted = NetworkSize.of(AutoConfig.for_model(**load_config(["experiment=llama3_8b"]).model.shape), lora_rank=16)
    trained = rank_memory(adapted, LearnerConfig(), zero={}, num_ranks=8, trained=True)
    # PEFT's own count for rank 16 on all linear layers but the head of this model: 41.9 million.
    assert adapted.adapters == 41_943_040
    assert trained.device["AdamW's moments"] == 8 * adapted.adapters // 8
    assert checkpoint_bytes(adapted) == 12 * adapted.adapters


def test_gradient_checkpointing_leaves_the_states_between_layers_and_one_layer() -> None:
    network = llama_8b()

    def whole(**settings: Any) -> int:
        return activations(network, LearnerConfig(**settings), tokens=4096, states=0)["activations"]

    kept, few = whole(), whole(gradient_checkpointing=True)
    assert few == network.layers * 4096 * network.hidden * 2 + kept // network.layers


def test_what_does_not_divide_comes_with_the_nearest_that_does() -> None:
    config = load_config(["experiment=llama3_8b", "cluster.num_learners=5", "cluster.num_generators=2"])
    remarks = {finding.what: finding.remark for finding in batch_arithmetic(config)}
    assert (
        "5 learner ranks do not divide 64: some wait for others; the nearest that they divide is 65" in remarks.values()
    )
    assert remarks["of a train batch, a generator has"] == "2 generators"


def test_more_ranks_than_a_mini_batch_has_rollouts_cannot_work() -> None:
    config = load_config(["experiment=llama3_8b", "cluster.num_learners=65"])
    errors = [finding.error for finding in batch_arithmetic(config) if finding.error is not None]
    assert [error.key for error in errors] == ["cluster.num_learners"]


def test_it_says_nothing_of_what_it_was_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mode=plan", "experiment=llama3_8b", "cluster.node_gpus=null", "cluster.node_cpus=null"]
    assert launch.main([*words, "cluster.gpu_memory_gib=null", "cluster.node_memory_gib=null"]) == 0
    assert "set cluster.node_gpus" in capsys.readouterr().out


def test_a_mode_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode='plann'"):
        load_config(["mode=plann"])
