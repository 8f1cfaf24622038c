"""Reward functions that go wrong, for the tests to name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def raises(prompts: list[str], responses: list[str], rows: list[Mapping[str, Any]]) -> list[float]:
    raise ValueError("no score for this one")
