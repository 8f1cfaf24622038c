"""The whole quickstart on a cluster of three nodes, one of which is lost and replaced.

    python -m tests.soak.three_nodes --work DIR

Generator, reward actor and learner stand on nodes of their own (raylets on this machine). The generator's is killed in
the middle of the ppo stage, and another one joins. The same run without a cluster and without the loss follows, and its
numbers have to be the same. Twice as long as `make quickstart`.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from tests.nodes import all_processes, kill_node, processes_below, raylet_of
from tests.runs import launched, metrics_of, reproducible, weights_of

QUICKSTART = ("experiment=quickstart",)
LOST_AT = 30  # step of the ppo stage, of 70


def on_three_nodes(run_dir: Path) -> str:
    """Run the quickstart there, lose a node and replace it; return what the run printed."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        settings = (f"cluster.address={cluster.address}", "cluster.heartbeat_s=12")
        with launched(run_dir, *settings, settings=QUICKSTART) as run:
            run.await_step("ppo", LOST_AT, seconds=3600)
            titles = all_processes()
            there = {raylet_of(node): [titles[pid] for pid in processes_below(raylet_of(node))] for node in nodes}
            for raylet, of_node in there.items():
                print(f"node {raylet}: {', '.join(of_node)}", flush=True)
            assert all(len(of_node) == 1 for of_node in there.values()), "each role on a node of its own"
            (lost,) = (raylet for raylet, (title,) in there.items() if "GeneratorProcess" in title)
            began = time.perf_counter()
            print(f"killed node {lost} with {', '.join(kill_node(lost))}", flush=True)
            cluster.add_node(num_cpus=1)
            run.await_step("ppo", LOST_AT + 2, seconds=600)
            print(f"two steps later after {time.perf_counter() - began:.0f} s", flush=True)
            run.succeed(seconds=3600)
            return run.output
    finally:
        cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the two runs")
    work = parser.parse_args().work
    print(on_three_nodes(work / "three_nodes"))
    if not (work / "alone" / "summary.json").exists():
        with launched(work / "alone", settings=QUICKSTART) as run:
            run.succeed(seconds=3600)
    one, other = (work / name for name in ("three_nodes", "alone"))
    assert reproducible(metrics_of(one)) == reproducible(metrics_of(other)), "the metrics differ"
    assert weights_of(one) == weights_of(other), "the weights differ"
    print("the same metrics in every step, and the same weights, as without a cluster and without the loss")


if __name__ == "__main__":
    main()
