"""The examples for Kubernetes and Slurm: they say what a cluster understands, and run what Manta understands."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from conf.load import load_config
from conf.schema import Config
from tests.runs import PROJECT

MANIFEST, SCRIPT = PROJECT / "examples" / "kuberay_job.yaml", PROJECT / "examples" / "slurm.sh"
QUANTITY = re.compile(r"\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?")  # as Kubernetes writes resources


def settings_in(command: str) -> Config:
    """Return the settings of a command line that runs launch.py."""
    return load_config([word for word in command.split() if "=" in word and not word.startswith("$")])


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    return manifest


def test_the_manifest_has_the_form_of_a_ray_job(job: dict[str, Any]) -> None:
    """By the fields that KubeRay's API reference for RayJob (ray.io/v1) requires, and their types."""
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    known = {
        "entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "submissionMode",
        "runtimeEnvYAML", "rayClusterSpec",
    }  # fmt: skip
    assert set(spec) <= known
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"], dict)
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "Ray's flags are strings"
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            for kind in ("limits", "requests"):
                for value in container["resources"][kind].values():
                    assert QUANTITY.fullmatch(value)
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_manifest_brings_the_nodes_that_its_run_needs(job: dict[str, Any]) -> None:
    config = settings_in(job["spec"]["entrypoint"])
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert workers["replicas"] == config.cluster.num_nodes
    assert int(limits["nvidia.com/gpu"]) == config.cluster.node_gpus
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned("ray")
    assert config.run.dir is not None
    assert config.run.dir.startswith("/")
    grace = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert int(grace) > config.cluster.grace_s


def pinned(package: str) -> str:
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(rf'"{package}(\[\w+\])?==([\d.]+)"', text)
    assert match is not None
    return match[2]


def test_the_script_is_bash_and_says_how_it_is_used() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    empty = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, check=False)
    assert empty.returncode == 2
    assert "usage" in empty.stderr


def test_the_script_asks_slurm_for_the_nodes_of_its_example() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    example = re.search(r"#   sbatch examples/slurm.sh (.*)", text)
    assert example is not None
    config = settings_in(example[1])
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", text))
    assert int(asked["nodes"]) == config.cluster.num_nodes
    assert int(asked["gpus-per-node"]) == config.cluster.node_gpus
