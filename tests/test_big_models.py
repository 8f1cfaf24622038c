"""Models that are larger than a rank: loaded in shards, and written in shards. With real gloo ranks."""

from __future__ import annotations

import ctypes
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import deepspeed_config

from conf.schema import LearnerConfig, ModelConfig
from learner import exports, models, zero
from learner.exports import export
from learner.ranks import Ranks
from tests.learner_ranks import on_ranks
from tests.tiny_models import tiny_checkpoint, tiny_tokenizer

pytestmark = pytest.mark.ranks

MIB = 1 << 20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
MARGIN = 256 * MIB  # what torch, DeepSpeed and gloo take for themselves while they load
LEARNER = LearnerConfig(dtype="float32")


def anonymous_bytes() -> int:
    """Return the memory of this process that is no file's: pages of a mapped checkpoint can be dropped at any time."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel says nothing of RssAnon")


class Peak:
    """The most memory that this process holds within a block, beyond what it had before; looked at every 5 ms."""

    def __enter__(self) -> Peak:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)  # what is let go is given back at once, and does not count
        self.before = self.most = anonymous_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.is_set():
            self.most = max(self.most, anonymous_bytes())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        return self.most - self.before


def load_in_shards(ranks: Ranks, path: str) -> dict[str, Any]:
    zero.join(ranks, device="cpu", timeout_s=300)
    with Peak() as peak, zero.partitioned_loading(LEARNER, "policy", device="cpu"):
        model = models.load_causal_lm(path, attn_implementation="packed")
    parameters: list[Any] = list(model.parameters())
    manifest = zero.manifest(model, "float32")
    first = manifest.groups[1]
    for group in zero.gathered_groups(model, manifest):
        if group[0][0] == first[0].name:
            layer = {name: tensor.clone().numpy() for name, tensor in group}
    return {
        "peak": peak.bytes,
        "shard": sum(4 * parameter.ds_tensor.numel() for parameter in parameters),
        "whole": sum(4 * parameter.ds_numel for parameter in parameters),
        "largest group": max(sum(meta.num_bytes for meta in group) for group in manifest.groups),
        "layer": layer,
    }


def test_no_rank_ever_holds_a_model_of_500_million_parameters(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16_384,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=17,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    model = empty.to_empty(device="cpu")
    for number, parameter in enumerate(model.parameters()):
        parameter.data.fill_(number / 512)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    del model
    results = on_ranks(load_in_shards, 2, str(tmp_path))
    for result in results:
        assert result["whole"] > 4 * 500_000_000
        assert result["shard"] == pytest.approx(result["whole"] / 2, rel=0.01)
        assert result["peak"] < result["shard"] + result["largest group"] + MARGIN, f"{result['peak'] / MIB:.0f} MiB"
        assert result["peak"] < result["whole"], "the bound says something"
    names = [name for name, _ in empty.named_parameters()]
    for name, tensor in results[1]["layer"].items():
        value = torch.tensor(names.index(name) / 512, dtype=torch.bfloat16).item()
        assert np.all(tensor == value), f"{name} is not what rank 0 has read"


def folders_of_parameters(ranks: Ranks, path: str) -> list[str]:
    """Return where DeepSpeed is told to put the parameters of two networks, each as transformers asks it to."""
    zero.join(ranks, device="cpu", timeout_s=60)
    on_disk = replace(LEARNER, offload_parameters="nvme", nvme_path=path)
    folders = []
    for network in ("policy", "reference"):
        with zero.partitioned_loading(on_disk, network, device="cpu"):
            folders.append(deepspeed_config()["zero_optimization"]["offload_param"]["nvme_path"])
    return folders


def test_each_network_has_a_folder_of_its_own_on_the_disk() -> None:
    """DeepSpeed empties the folder in which a network's parameters are to be."""
    assert on_ranks(folders_of_parameters, 1, "/disk") == [["/disk/policy", "/disk/reference"]]


def export_in_shards(ranks: Ranks, path: str, out: Path, dtype: str) -> None:
    exports.SHARD_BYTES = 64 << 10  # a few tensors a file
    zero.join(ranks, device="cpu", timeout_s=60)
    with zero.partitioned_loading(LEARNER, "policy", device="cpu"):
        model = models.load_causal_lm(path, attn_implementation="packed")
    export(model, out, dtype=dtype, settings=ModelConfig(tokenizer=path), keep=ranks.rank == 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_an_export_in_shards_is_the_model(family: str, dtype: str, tmp_path: Path) -> None:
    path, out = tiny_checkpoint(tmp_path / "model", family), tmp_path / "export"
    on_ranks(export_in_shards, 2, str(path), out, dtype)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as content:
            assert name in content.keys()  # noqa: SIM118, a file is no mapping
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, dtype))
    assert found.config.dtype == getattr(torch, dtype)
    for (name, ours), (_, theirs) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype)), name
    assert found.config.architectures == expected.config.architectures
    assert tiny_tokenizer().get_vocab() == type(tiny_tokenizer()).from_pretrained(out).get_vocab()
