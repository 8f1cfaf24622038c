"""States and parameters of a learner rank on a disk: the same updates as in memory.

    python -m tests.soak.nvme --work DIR

DeepSpeed compiles two kernels for it the first time (a compiler, ninja and libaio's headers are needed), which takes
minutes; so this is not among the tests.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.learner_ranks import on_ranks
from tests.test_learner import assert_same, checkpoints_in, make_setup, run_variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder, on the disk")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    paths = checkpoints_in(work / "checkpoints")
    on_disk = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": str(work / "swap")}
    setups = {"in memory": make_setup("gae", paths), "on the disk": make_setup("gae", paths, **on_disk)}
    (done,) = on_ranks(run_variants, 1, setups, timeout_s=1800)
    assert_same(done["on the disk"], done["in memory"], weights=1e-6, metrics=1e-5)
    swapped = [path for path in (work / "swap").rglob("*") if path.is_file()]
    assert swapped, "nothing was written to the disk"
    print(f"the same metrics and weights; {len(swapped)} files of {sum(f.stat().st_size for f in swapped):,} bytes")


if __name__ == "__main__":
    main()
