"""Merged LoRA weights into real vLLM: the generator samples from the adapted policy. About 40 seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.schema import LoraConfig
from learner import lora
from tests.test_weight_receiver import Pair
from tests.tiny_models import tiny_checkpoint

pytestmark = pytest.mark.engine

CLOSE = 1e-4


class LoraPair(Pair):
    """A pair whose learner's model has adapters; the generator was started from the base checkpoint."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "float32")
        self.model = lora.adapted(self.model, LoraConfig(rank=4), seed=1, task=lora.CAUSAL_LM)
        plain = self.manifest
        self.manifest = lora.merged_manifest(self.model, "float32")
        assert self.manifest == plain

    def groups(self) -> Iterator[list[tuple[str, Tensor]]]:
        sources = lora.merged_sources(self.model)
        for group in self.manifest.groups:
            yield [(meta.name, sources[meta.name].merged(meta.torch_dtype)) for meta in group]

    def change_adapters(self, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.fixture(params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LoraPair]:
    pair = LoraPair(tiny_checkpoint(tmp_path / "base", request.param))
    yield pair
    pair.close()


def test_the_generator_samples_from_the_adapted_policy_and_not_from_its_base(pair: LoraPair) -> None:
    pair.connect()
    assert pair.gaps(pair.sample()).max() < CLOSE, "new adapters change nothing"
    for version in (1, 2):
        pair.change_adapters(version)
        assert pair.gaps(pair.sample()).max() > 0.3, "not sent yet"
        pair.sync(version)
        rollouts = pair.sample()
        assert pair.gaps(rollouts).max() < CLOSE
        assert all((rollout.policy_versions == version).all() for rollout in rollouts)
    with lora.switched_off(pair.model):
        pair.sync(3)  # the base: as good a checkpoint as any to the receiver, which verifies what was sent
        base = pair.sample()
        assert pair.gaps(base).max() < CLOSE
    assert pair.gaps(base).max() > 0.3, "but it is not the policy"
