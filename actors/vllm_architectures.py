"""Which architectures vLLM can sample from, read from its source: importing vLLM takes ten seconds.

A model that vLLM does not know itself it may run through transformers, under other names than the learner sends.
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

REGISTRY = Path("model_executor") / "models" / "registry.py"
TABLES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")


def architectures_of_vllm() -> frozenset[str] | None:
    """The names that a config.json may have under `architectures`; None if the installed vLLM does not say."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin).parent / REGISTRY
    if not source.is_file():
        return None
    names: set[str] = set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id in TABLES for target in targets):
            assert isinstance(node, ast.Assign)
            names |= {ast.literal_eval(key) for key in getattr(node.value, "keys", []) if isinstance(key, ast.Constant)}
    return frozenset(names) or None
