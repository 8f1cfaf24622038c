"""How a setting is refused: the error that names it, and the few checks that every section shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be used: names the key, the value and the remedy."""

    def __init__(self, key: str, value: object, remedy: str) -> None:
        self.key, self.value, self.remedy = key, value, remedy
        super().__init__(f"{key}={value!r}: {remedy}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str]]:
        return ConfigError, (self.key, self.value, self.remedy)  # an exception is rebuilt in another process


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(key, value, f"choose one of {', '.join(allowed)}")


def at_least(key: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ConfigError(key, value, f"must be at least {least:g}")


def above(key: str, value: float, bound: float) -> None:
    if not bound < value < math.inf:
        raise ConfigError(key, value, f"must be greater than {bound:g}")


def within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(key, value, f"must lie between {low:g} and {high:g}")


def finite(key: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(key, value, "must be a finite number")


def without_effect(section: Any, prefix: str, names: Sequence[str], why: str) -> None:
    """Raises ConfigError for the first of the named settings of a dataclass that is not at its default.

    `why` completes "has no effect", for example "without algorithm.kl_target".
    """
    made = {item.name: item.default_factory for item in fields(section) if item.default_factory is not MISSING}
    defaults = {item.name: item.default for item in fields(section)} | {name: make() for name, make in made.items()}
    for name in names:
        if getattr(section, name) != defaults[name]:
            raise ConfigError(f"{prefix}.{name}", getattr(section, name), f"has no effect {why}")


def sampling_temperature(key: str, value: float) -> None:
    above(key, value, 0)
    if value > 2:
        raise ConfigError(key, value, "vLLM samples at 2 at most")


def module_function(key: str, value: str | None) -> None:
    if value is not None and value.count(":") != 1:
        raise ConfigError(key, value, "write it as module:function")
