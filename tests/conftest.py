"""What every test process needs in its environment, and the order of the tests: quick ones first."""

from __future__ import annotations

import gc
import os
from functools import cache

os.environ.update(
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="passive",
    DS_ACCELERATOR="cpu",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    TORCHDYNAMO_DISABLE="1",  # as in every process of a run on a CPU: importing DeepSpeed and vLLM takes seconds less
    WANDB_MODE="offline",
    RAY_prestart_worker_first_driver="0",  # as in a run's own cluster: ours have an environment of their own
)

import pytest

from actors.generator import import_engine

TIERS = ("ranks", "engine", "ray", "system")
# Runs of the whole system take minutes. A worker of pytest-xdist takes on files of few tests until it has three tests
# to do: in this order the long ones are spread over both.
LONG = ("test_system", "test_recovery", "test_resume", "test_node", "test_stop", "test_ray_job", "test_colocated")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def tier(item: pytest.Item) -> int:
        return max((1 + TIERS.index(mark.name) for mark in item.iter_markers() if mark.name in TIERS), default=0)

    def place(item: pytest.Item) -> int:
        return LONG.index(item.path.stem) if item.path.stem in LONG else -1

    items.sort(key=lambda item: (tier(item), place(item)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("engine") is not None:
        freeze_modules()


@cache
def freeze_modules() -> None:
    """Keep the garbage collector away from what importing vLLM has made, which is never let go, and from no engine.

    Shutting down an engine collects garbage seven times, which takes 0.3 s each with these modules in it. vLLM freezes
    all that there is as an engine starts, and takes it back before it collects.
    """
    import_engine("cpu")
    gc.freeze()
    vars(gc).update(freeze=lambda: None, unfreeze=lambda: None)
