"""The typed Config that a command line asks for, and what it can ask for.

Hydra composes the YAML files and the overrides; they hold only what differs from the schema. The schema is applied
here, once, to whatever was composed, so that no file and no `+key=value` escapes it. Every mistake becomes a
ConfigError.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from conf.schema import Config, ConfigError
from conf.schema.engines import REFUSED

FOLDER = Path(__file__).parent
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
Section = TypeVar("Section")


def load_config(overrides: Sequence[str]) -> Config:
    """The Config of conf/config.yaml with `overrides` (Hydra's syntax) applied.

    Raises ConfigError for a key, an option or a value that the schema does not know or allow.
    """
    return typed_config(_compose(overrides))


def typed_config(values: Mapping[str, Any]) -> Config:
    """The schema's defaults with `values` (nested, possibly with interpolations) in their place.

    Raises ConfigError naming the full key.
    """
    _check_keys(values, Config)
    return _build(Config, _merged(Config, values, resolve=True))


def _merged(section: type, values: Mapping[str, Any], prefix: str = "", *, resolve: bool) -> dict[str, Any]:
    """The defaults of the dataclass `section` with `values` in their place; ConfigError for one of another type.

    Interpolations are resolved within `values`, or left as they are.
    """
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(_schema(section), dict(values)), resolve=resolve)
    except OmegaConfBaseException as error:
        key, message = re.sub(r"\[\d+\]$", "", error.full_key or ""), str(error).splitlines()[0]
        expected = None if isinstance(error, InterpolationResolutionError) else _expected(section, key)
        raise ConfigError(f"{prefix}{key}", _value_at(values, key), expected or message) from error
    return cast(dict[str, Any], merged)


def to_yaml(config: Config) -> str:
    """Every setting of `config`, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def group_options() -> dict[str, list[str]]:
    """Each group, a folder beside this module, and the options that its YAML files give."""
    folders = sorted(path for path in FOLDER.iterdir() if path.is_dir() and any(path.glob("*.yaml")))
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    """What the YAML files and the overrides say, not yet checked against the schema."""
    try:
        parsed = OverridesParser.create().parse_overrides([_dotted(override) for override in overrides])
        prepared = [_prepare(override) for override in parsed]
        with initialize_config_dir(str(FOLDER), job_name="launch", version_base="1.3"):
            composed = compose("config", prepared, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError("overrides", " ".join(overrides), " ".join(str(error).split())) from error
    values = {key: composed._get_node(key) for key in composed if key != "hydra"}
    experiment = composed.hydra.runtime.choices.get("experiment")
    named = {"experiment": experiment} if experiment is not None else {}
    return {**named, **cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(values), resolve=False))}


def _dotted(override: str) -> str:
    """The override with its key as Hydra reads it, reward.sources.0.path for reward.sources[0].path."""
    key, equals, value = override.partition("=")
    return re.sub(r"\[(\d+)\]", r".\1", key) + equals + value


def _prepare(override: Override) -> str:
    """The override as Hydra is to read it: a group's option as it is, a value forced in, since the schema judges it.

    Raises ConfigError for an option that is not there and for what would have no effect.
    """
    key, line = override.key_or_group, str(override.input_line)
    written = line.partition("=")[2]
    if key.split(".")[0] == "hydra":
        raise ConfigError(key, written, "Hydra's own settings have no effect here; run.dir=PATH names the run's folder")
    if override.is_sweep_override():
        raise ConfigError(key, written, f"one run takes one value; a list is written in brackets: '{key}=[{written}]'")
    if override.is_delete():
        return line
    groups = group_options()
    if key not in groups:
        return "++" + line.lstrip("+")
    option = override.value()
    if option is not None and option not in groups[key]:
        suggestion = _nearest(written, groups[key])
        remedy = f"conf/{key}/ has no such file; choose one of {', '.join(groups[key])}{suggestion}"
        raise ConfigError(key, written, remedy)
    return line.lstrip("+")


def _check_keys(values: Mapping[str, Any], section: type, prefix: str = "") -> None:
    """Raises ConfigError for the first key of `values` that the dataclass `section` does not have."""
    hints = get_type_hints(section)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in REFUSED:
            raise ConfigError(key, value, REFUSED[key])
        if name not in hints:
            raise ConfigError(key, value, f"there is no such setting; {_advice(str(name), prefix, list(hints))}")
        if is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                first = fields(hints[name])[0].name
                raise ConfigError(key, value, f"is a section; name a setting in it, for example {key}.{first}=...")
            _check_keys(value, hints[name], f"{key}.")
        elif (item := _item_section(hints[name])) is not None:
            _check_items(key, value, item)
        elif _mixes_bool_and_number(value, hints[name]):
            raise ConfigError(key, value, f"must be {_in_words(hints[name])}")


def _item_section(hint: Any) -> type | None:
    """The dataclass that a list of sections holds, tuple[Section, ...]; None for any other type."""
    kinds = get_args(hint)
    return cast(type, kinds[0]) if get_origin(hint) is tuple and is_dataclass(kinds[0]) else None


def _check_items(key: str, values: Any, section: type) -> None:
    """Raises ConfigError unless `values` is a list of mappings with keys of the dataclass `section`."""
    first = fields(section)[0].name
    if not isinstance(values, list | tuple):
        raise ConfigError(key, values, f"is a list of sections; write '{key}=[{{{first}: ...}}]'")
    for number, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}[{number}]", value, f"is a section; write '{key}=[{{{first}: ...}}]'")
        _check_keys(value, section, f"{key}[{number}].")
        # Alone, since OmegaConf does not say in which item a value is wrong. Interpolations wait for the whole.
        _merged(section, value, f"{key}[{number}].", resolve=False)


def _mixes_bool_and_number(value: object, hint: Any) -> bool:
    """Whether `value` is true or false where `hint` asks for a number, or the other way; OmegaConf would convert it."""
    kinds = {hint, *get_args(hint)}
    if isinstance(value, bool):
        return bool not in kinds and bool(kinds & {int, float})
    return isinstance(value, int) and bool in kinds


def _advice(name: str, prefix: str, siblings: Sequence[str]) -> str:
    """What may have been meant by the unknown `name` in the section of `prefix`, which has `siblings`."""
    elsewhere = [key for key in _all_keys(Config) if key.split(".")[-1] == name]
    if elsewhere:
        near = [key for key in elsewhere if key.startswith(prefix)]
        return f"did you mean {' or '.join(map(_as_written, near or elsewhere))}?"
    close = difflib.get_close_matches(f"{prefix}{name}", list(_all_keys(Config)), n=1)
    if close:
        return f"did you mean {_as_written(close[0])}?"
    close = difflib.get_close_matches(name, siblings, n=1)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    return f"{prefix.rstrip('.') or 'the top level'} has {', '.join(siblings)}"


def _all_keys(section: type, prefix: str = "") -> Iterator[str]:
    """Every setting by its full key, those of a list of sections in its first item."""
    for name, hint in get_type_hints(section).items():
        item = _item_section(hint)
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _all_keys(hint, f"{prefix}{name}.")
        elif item is not None:
            yield f"{prefix}{name}"
            yield from _all_keys(item, f"{prefix}{name}[0].")
        else:
            yield f"{prefix}{name}"


def _as_written(key: str) -> str:
    """How a setting of `_all_keys` is set on the command line."""
    of_list, bracket, name = key.partition("[0].")
    return f"'{of_list}=[{{{name}: ...}}]'" if bracket else key


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _expected(section: type, key: str) -> str | None:
    """What a value of `key` in `section` has to be, in words; None where the schema does not say."""
    hint: Any = section
    for name in re.sub(r"\[\d+\]", "", key).split("."):
        if not is_dataclass(hint):
            return None  # inside a free mapping
        hint = get_type_hints(hint).get(name)
        hint = _item_section(hint) or hint
    return f"must be {_in_words(hint)}" if hint is not None and not is_dataclass(hint) else None


def _in_words(hint: Any) -> str:
    if get_origin(hint) is UnionType:
        return " or ".join("null" if kind is NoneType else _in_words(kind) for kind in get_args(hint))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if kinds[-1] is Ellipsis:
            return f"a list, each item {_in_words(kinds[0])}, written [a,b]"
        return f"a list of {len(kinds)}, each {_in_words(kinds[0])}"
    return KINDS[get_origin(hint) or hint]


def _value_at(values: Mapping[str, Any], key: str) -> Any:
    """What was written for `key` (a full key such as a.b or a[0].b), for the message."""
    value: Any = values
    for name in re.findall(r"[^.\[\]]+", key):
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, list | tuple):
            value = value[int(name)]
    return value


@cache
def _schema(section: type) -> DictConfig:
    """The dataclass `section` as OmegaConf has it. A merge copies it first, and leaves it as it is."""
    schema = OmegaConf.structured(section)
    _make_writable(schema)
    return cast(DictConfig, schema)


def _make_writable(node: DictConfig) -> None:
    """Lifts the read-only flag that OmegaConf puts on every section whose dataclass is frozen."""
    OmegaConf.set_readonly(node, False)
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig):
            _make_writable(child)


def _build(section: type[Section], values: Mapping[str, Any], prefix: str = "") -> Section:
    """The dataclass `section` of `values`, nested sections built and lists made tuples where the schema says so."""
    hints = get_type_hints(section)
    built: dict[str, Any] = {}
    for name, value in values.items():
        hint, key = hints[name], f"{prefix}{name}"
        item = _item_section(hint)
        if is_dataclass(hint):
            assert isinstance(hint, type)
            built[name] = _build(hint, value, f"{key}.")
        elif item is not None:
            built[name] = tuple(_build(item, each, f"{key}[{number}].") for number, each in enumerate(value))
        elif get_origin(hint) is tuple:
            kinds = get_args(hint)
            if kinds[-1] is not Ellipsis and len(value) != len(kinds):
                raise ConfigError(key, value, f"must be {_in_words(hint)}")
            built[name] = tuple(value)
        else:
            built[name] = value
    return section(**built)
