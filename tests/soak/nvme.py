"""States and parameters of a learner rank on a disk: the same updates as in memory.

    python -m tests.soak.nvme --work DIR

DeepSpeed compiles kernels for it the first time (a C++ compiler, ninja and libaio's headers are needed), which takes
minutes; so this is not among the tests.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.learner_ranks import on_ranks
from tests.test_learner import assert_same, make_setup, run_variants
from tests.tiny_models import tiny_config, tiny_tokenizer


def checkpoints_in(folder: Path) -> dict[str, str]:
    """Write networks whose matrices have a mebibyte and more: DeepSpeed keeps what is smaller in memory."""
    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size = 512, 1024
    config.num_attention_heads, config.num_key_value_heads, config.num_labels = 16, 8, 1
    config.initializer_range = 0.02
    torch.manual_seed(0)
    for name in ("policy", "reference"):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "critic")
    return {name: str(folder / name) for name in ("policy", "reference", "critic")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder, on the disk")
    work = parser.parse_args().work.resolve()
    paths = checkpoints_in(work / "checkpoints")
    on_disk = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": str(work / "swap")}
    setups = {"in memory": make_setup("gae", paths), "on the disk": make_setup("gae", paths, **on_disk)}
    (done,) = on_ranks(run_variants, 1, setups, timeout_s=1800)
    assert_same(done["on the disk"], done["in memory"], weights=2e-6, metrics=2e-5)
    for kind in ("optimizer", "float32params"):
        swapped = [path for path in (work / "swap").glob(f"**/{kind}/**/*") if path.is_file()]
        assert swapped, f"no {kind} were written to the disk"
        print(f"{kind}: {len(swapped)} files of {sum(path.stat().st_size for path in swapped):,} bytes on the disk")
    print("the same metrics and weights")


if __name__ == "__main__":
    main()
