"""The sets of prompts that a LLaMA-Factory YAML names, found with its dataset_info.json, in the words of `data.*`.

What dataset_info.json means is in data/README.md and src/llamafactory/data/parser.py of LLaMA-Factory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.rows import read_rows
from conf.schema import ConfigError
from examples.llamafactory_keys import Given

ALPACA = {"prompt": "instruction", "query": "input", "system": "system", "history": "history"}
ALPACA_DEFAULT = {"prompt": "instruction", "query": "input"}
TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "system_tag": ("system", None),
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
}


@dataclass(frozen=True)
class Dataset:
    """Where one set of rows is and how they are read, in the words of DataSourceConfig."""

    source: dict[str, Any]
    count: int | None  # rows; None if they cannot be counted here


def read_datasets(given: Given) -> list[Dataset]:
    """The sets that `dataset` names; none if there is no dataset_info.json to say where they are."""
    names, folder = given.items("dataset"), given.text("dataset_dir") or "data"
    limit = given.take("max_samples", 0)
    if not names:
        raise ConfigError("dataset", None, "name the set of prompts")
    if limit:
        given.note("max_samples", "prompts are drawn from all rows; algorithm.num_steps counts so many of each set")
    if folder == "ONLINE":
        return [Dataset({"path": name, "format": "alpaca"}, None) for name in names]
    places = (Path(folder), given.path.parent / folder)
    root = next((place for place in places if (place / "dataset_info.json").is_file()), None)
    if root is None:
        given.note("dataset_dir", f"{folder} has no dataset_info.json that describes {', '.join(names)}; set data.path")
        return []
    try:
        described = json.loads((root / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("dataset_dir", folder, f"its dataset_info.json cannot be read: {error}") from error
    for name in names:
        if not isinstance(described.get(name), dict):
            raise ConfigError("dataset", name, f"{root / 'dataset_info.json'} does not describe it")
    return [_dataset(given, name, described[name], root=root, limit=limit) for name in names]


def _dataset(given: Given, name: str, entry: Mapping[str, Any], *, root: Path, limit: int) -> Dataset:
    for key in ("ranking", "script_url", "cloud_file_name"):
        if entry.get(key):
            raise ConfigError("dataset", name, f"has {key} in dataset_info.json, which is no set of prompts in a file")
    for key in ("subset", "folder", "revision", "num_samples"):
        if entry.get(key):
            given.note("dataset", f"{name} has {key}={entry[key]} in dataset_info.json, for which there is no setting")
    source = _columns(given, name, entry)
    if entry.get("split", "train") != "train":
        source["split"] = entry["split"]
    if "hf_hub_url" in entry:
        return Dataset({"path": entry["hf_hub_url"]} | source, None)
    if not isinstance(entry.get("file_name"), str):
        raise ConfigError("dataset", name, "has neither file_name nor hf_hub_url in dataset_info.json")
    path = root / entry["file_name"]
    if path.suffix not in (".json", ".jsonl", ".parquet") and not path.is_dir():
        raise ConfigError("dataset", name, f"{path} is no json, jsonl or parquet file; convert it")
    count = None
    if not path.is_dir():
        try:
            rows = read_rows(str(path), "train", key="dataset")
        except ConfigError as error:
            given.note("dataset", f"{name}: its rows cannot be counted: {error.remedy}")
        else:
            _note_unused_columns(given, name, source, entry, rows)
            count = min(len(rows), limit) if limit else len(rows)
    return Dataset({"path": str(path)} | source, count)


def _columns(given: Given, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The format of the set, and its prompt_key where that is needed. Raises ConfigError for columns of other names."""
    formatting, columns = entry.get("formatting", "alpaca"), entry.get("columns")
    if columns is not None and any(columns.get(kind) for kind in ("images", "videos", "audios")):
        raise ConfigError("dataset", name, "has images, videos or audios; only text is trained on")
    if columns is not None and columns.get("tools"):
        given.note("dataset", f"{name} has a column of tools, which are left out of the prompt")
    if formatting == "alpaca":
        used = {kind: (columns or ALPACA_DEFAULT).get(kind) for kind in ALPACA}
        used = {kind: column for kind, column in used.items() if column}
        if set(used) == {"prompt"}:
            return {"format": "prompt", "prompt_key": used["prompt"]}
        if "prompt" in used and all(column == ALPACA[kind] for kind, column in used.items()):
            return {"format": "alpaca"}
        raise ConfigError("dataset", name, f"has other columns than {', '.join(ALPACA.values())}; rename them: {used}")
    messages, system = ("conversations", None) if columns is None else (columns.get("messages"), columns.get("system"))
    tags = entry.get("tags") or {}
    known = all(tags.get(tag, allowed[0]) in allowed for tag, allowed in TAGS.items())
    if formatting not in ("sharegpt", "openai") or messages not in ("conversations", "messages") or not known:
        remedy = f"has formatting={formatting}, messages={messages}, tags={tags}; write it as sharegpt or openai has it"
        raise ConfigError("dataset", name, remedy)
    if system not in (None, "system"):
        raise ConfigError("dataset", name, f"has its system prompt under {system!r}; rename the column to system")
    return {"format": "sharegpt"}


def _note_unused_columns(
    given: Given, name: str, source: dict[str, Any], entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Names the columns that make part of the prompt here and that dataset_info.json leaves out."""
    candidates = {"alpaca": ("input", "system", "history"), "sharegpt": ("system",)}.get(source["format"], ())
    used = (entry.get("columns") or (ALPACA_DEFAULT if source["format"] == "alpaca" else {})).values()
    for column in candidates:
        if column not in used and any(row.get(column) for row in rows):
            given.note("dataset", f"{name} has a column {column} that dataset_info.json leaves out; here it is read")


def data_overrides(given: Given, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """The overrides of `data.*`. Several sets are mixed in the proportions that LLaMA-Factory has."""
    overrides: dict[str, Any] = {"data.max_prompt_tokens": given.take("cutoff_len", 2048)}
    given.note("cutoff_len", "longer prompts are left out, not cut")
    if system := given.text("default_system"):
        overrides["data.system_prompt"] = system
    weights = _weights(given, datasets)
    if len(datasets) == 1:
        overrides = {f"data.{key}": value for key, value in datasets[0].source.items()} | overrides
    elif datasets:
        sources = [each.source | {"weight": weight} for each, weight in zip(datasets, weights, strict=True)]
        overrides = {"data.sources": sources} | overrides
    return overrides


def _weights(given: Given, datasets: Sequence[Dataset]) -> list[float]:
    """The weight of each set: its rows, as in one set of all; or with mix_strategy=interleave_* its probability."""
    strategy, shares = given.text("mix_strategy") or "concat", given.items("interleave_probs")
    equal = [1.0] * len(datasets)
    if strategy == "concat":
        counts = [each.count for each in datasets if each.count is not None]
        if len(counts) == len(datasets):
            return [float(count) for count in counts]
        given.note("mix_strategy", "not all rows can be counted, so the sets have equal parts; set data.sources")
        return equal
    given.note("mix_strategy", "the sets are drawn from without end; algorithm.num_steps counts the rows of all")
    if not shares:
        return equal
    try:
        weights = [float(share) for share in shares]
    except ValueError as error:
        raise ConfigError("interleave_probs", shares, "must be numbers") from error
    if datasets and len(weights) != len(datasets):
        raise ConfigError("interleave_probs", shares, f"must be one for each of the {len(datasets)} sets")
    return weights
