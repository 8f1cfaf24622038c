"""What every test process needs in its environment, and the order of the tiers: quick ones first."""

from __future__ import annotations

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="passive",
    DS_ACCELERATOR="cpu",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
)

import pytest

TIERS = ("ranks", "engine", "ray", "system")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def tier(item: pytest.Item) -> int:
        return max((1 + TIERS.index(mark.name) for mark in item.iter_markers() if mark.name in TIERS), default=0)

    items.sort(key=tier)
