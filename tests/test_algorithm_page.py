"""docs/algorithm.md against what there is: its settings, their defaults and the tests that it names."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
TABLES, _, DETAILS = PAGE.partition("\n## What silently goes wrong\n")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in TABLES.splitlines()
    if line.startswith("|") and not line.startswith(("| What |", "|---"))
]
SECTIONS = ("algorithm.", "", "reward.shaping.")
DEFAULT = re.compile(r"`([a-z_.]+)` \(([^)`]+)\)")


def setting(name: str) -> Any:
    """The default of a setting by its full name, or by its name within one of the sections that the page is about."""
    for section in SECTIONS:
        value: Any = Config()
        for part in f"{section}{name}".split("."):
            value = getattr(value, part, Config)
        if value is not Config and not is_dataclass(value):
            return value
    raise AssertionError(f"docs/algorithm.md names {name}, and there is no such setting")


def test_every_row_has_a_formula_a_source_a_setting_and_a_test() -> None:
    assert len(ROWS) > 40
    for row in ROWS:
        assert len(row) == 5, row
        assert all(row), row


@pytest.mark.parametrize("name", sorted({name for row in ROWS for name in re.findall(r"`(test_\w+\.py)`", row[4])}))
def test_every_test_that_is_named_is_there(name: str) -> None:
    assert (ROOT / "tests" / name).is_file()


def test_every_setting_that_is_named_is_there() -> None:
    for row in ROWS:
        for name, value in re.findall(r"`([a-z_.]+)(?:=(\w+))?`", re.sub(r"\([^)]*\)", "", row[3])):
            default = setting(name)
            assert not value or isinstance(default, str), name


def test_the_defaults_are_those_of_the_schema() -> None:
    checked = 0
    for row in ROWS:
        for name, written in DEFAULT.findall(row[3]):
            value = setting(name)
            number = re.match(r"[\d.e-]+", written)
            if number:
                assert float(number[0]) == value, (name, written, value)
            elif written == "off":
                assert value in (None, False), (name, value)
            elif written in ("true", "false"):
                assert value is (written == "true"), (name, value)
            else:
                continue
            checked += 1
    assert checked > 25


@pytest.mark.parametrize("number", range(1, 16))
def test_every_detail_is_pinned_by_a_test_that_names_it(number: int) -> None:
    assert re.search(rf"^{number}\. \*\*", DETAILS, re.MULTILINE), "the page has it"
    named = [
        path.name
        for path in (ROOT / "tests").glob("test_*.py")
        if re.search(rf"\(PPO details [\d, ]*\b{number}\b[\d, ]*\)", path.read_text(encoding="utf-8"))
    ]
    assert named, f"no test names detail {number}"
