"""Who imports whom, read from the source, and how light the entry point is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("actors", "learner", "cluster", "conf")
SOURCES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SOURCES += [Path("launch.py")]
ALLOWED = {  # of our own packages
    "actors": {"actors", "conf"},
    "learner": {
        "learner",
        "conf",
        "actors.four_bits",
        "actors.importing",
        "actors.rollout",
        "actors.spans",
        "actors.weights",
        "actors.weight_transport",
    },
    "cluster": {"cluster", "actors", "learner", "conf"},
    "conf": {"conf"},
    "launch": {"conf", "actors", "cluster"},
}
FOREIGN = {"ray": {"cluster", "launch"}, "vllm": {"actors"}, "deepspeed": {"learner"}}  # who may import what at all
INSIDE_VLLM = {"actors.weight_audit", "actors.weight_receiver"}  # extend vLLM's classes, and run in its process
HEAVY = ("vllm", "deepspeed", *INSIDE_VLLM)  # imported by functions alone
NO_SUBJECT = {"utils", "util", "misc", "common", "helpers", "helper"}


def imports(tree: ast.AST, *, deferred: bool = True) -> Iterator[str]:
    """Full names of the modules imported anywhere in `tree`, or only as the module is imported itself."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not deferred:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not deferred:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "relative imports hide who imports whom"
            assert node.level == 0, "relative imports hide who imports whom"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node, deferred=deferred)


def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(f"{allowed}.")


def name_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def owner(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_module_reaches_over_a_wall(path: Path) -> None:
    tree = parsed(path)
    for module in imports(tree):
        if module.split(".")[0] in (*PACKAGES, "launch", "tests"):
            assert any(within(module, allowed) for allowed in ALLOWED[owner(path)]), f"{path} imports {module}"
        for name, owners in FOREIGN.items():
            assert not within(module, name) or owner(path) in owners, f"{path} imports {module}"
    for module in imports(tree, deferred=False) if name_of(path) not in INSIDE_VLLM else ():
        assert not any(within(module, heavy) for heavy in HEAVY), f"{path} imports {module} as it is imported"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_module_says_what_it_is_for_and_has_a_subject(path: Path) -> None:
    assert ast.get_docstring(parsed(path)), f"{path} has no docstring"
    assert path.stem not in NO_SUBJECT


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        *((str(path), {"conf.schema"}) for path in SOURCES if path.parent == Path("conf/schema")),
        ("conf/check.py", {"conf"}),
        ("conf/load.py", {"conf", "hydra", "omegaconf", "yaml"}),
        ("learner/ppo.py", {"torch", "conf"}),
        ("learner/advantages.py", {"torch"}),
        ("actors/rollout.py", {"numpy"}),
    ],
)
def test_the_pure_modules_stay_pure(path: str, allowed: set[str]) -> None:
    foreign = [m for m in imports(parsed(Path(path))) if m.split(".")[0] not in sys.stdlib_module_names]
    assert [m for m in foreign if not any(within(m, each) for each in allowed)] == []


def test_the_walk_sees_what_it_should() -> None:
    tree = ast.parse(
        "import vllm.engine\nif TYPE_CHECKING:\n    import ray\nclass A:\n    import deepspeed\n"
        "    def f(self):\n        from torch import nn\n"
    )
    assert list(imports(tree)) == ["vllm.engine", "ray", "deepspeed", "torch.nn"]
    assert list(imports(tree, deferred=False)) == ["vllm.engine", "deepspeed"]
    assert within("actors.rollout.Prompt", "actors.rollout")
    assert not within("actors.rollouts", "actors.rollout")


@pytest.mark.parametrize("module", ["conf.schema", "conf.load", "launch"])
def test_settings_come_without_the_heavy_libraries(module: str) -> None:
    heavy = ("torch", "vllm", "ray", "deepspeed", "transformers", "datasets", "numpy")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (("driver", "rollouts", "shaping", "evaluation", "best"), ("ray", "torch")),
        (("generators", "rewards", "learners", "members"), ("torch", "transformers", "datasets")),
    ],
    ids=["the loop", "processes"],
)
def test_what_every_process_imports_is_light(modules: tuple[str, ...], absent: tuple[str, ...]) -> None:
    """The loop and what it is put together from run in one process without Ray, which is how they are tested."""
    names = ", ".join(f"cluster.{name}" for name in modules)
    code = f"import sys, {names}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
