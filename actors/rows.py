"""Rows of a dataset, as plain dicts: from jsonl, json, parquet, a folder that `datasets` saved, or a name on the hub.

Knows nothing of what the rows mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.schema import ConfigError

Row = dict[str, Any]


def read_rows(path: str, split: str, *, key: str = "data.path") -> list[Row]:
    """All rows at `path`, in order; `split` is of a Hugging Face dataset and unused for a file.

    `key` is the setting that named the path. Raises ConfigError, naming the row where there is one, for what cannot be
    read or holds no rows.
    """
    suffix = Path(path).suffix
    if suffix in (".jsonl", ".json"):
        content = _content(path, key)
        is_array = suffix == ".json" and content.lstrip().startswith(b"[")  # otherwise an object a line, as in jsonl
        rows = _array(content, path, key) if is_array else list(_lines(content, path, key))
    elif suffix == ".parquet":
        rows = _parquet(path, key)
    else:
        rows = _dataset(path, split, key)
    if not rows:
        raise ConfigError(key, path, "holds no rows")
    return rows


def _content(path: str, key: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(key, path, f"cannot be read: {error.strerror}") from error
    return content.removeprefix(b"\xef\xbb\xbf").rstrip()


def _lines(content: bytes, path: str, key: str) -> Iterator[Row]:
    """One object a line, UTF-8; empty lines are allowed at the end alone, so a row's number is its line's."""
    for number, line in enumerate(content.split(b"\n") if content else [], start=1):
        try:
            row = _parsed(line)
        except UnicodeDecodeError as error:
            remedy = f"line {number} is not UTF-8 (byte {error.start + 1}); convert the file"
            raise ConfigError(key, path, remedy) from error
        except json.JSONDecodeError as error:
            raise ConfigError(key, path, f"line {number} is not JSON: {error.msg} at column {error.colno}") from error
        except _RowError as error:
            raise ConfigError(key, path, f"line {number} {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(key, path, f"line {number} is no JSON object but {type(row).__name__}; write {{...}}")
        yield row


def _array(content: bytes, path: str, key: str) -> list[Row]:
    """The objects of the one array that a .json file holds, as LLaMA-Factory's sets do."""
    try:
        rows: list[Any] = _parsed(content)
    except UnicodeDecodeError as error:
        raise ConfigError(key, path, f"is not UTF-8 (byte {error.start + 1}); convert the file") from error
    except json.JSONDecodeError as error:
        remedy = f"line {error.lineno} is not JSON: {error.msg} at column {error.colno}"
        raise ConfigError(key, path, remedy) from error
    except _RowError as error:
        raise ConfigError(key, path, str(error)) from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ConfigError(key, path, f"row {number} is no JSON object but {type(row).__name__}; write {{...}}")
    return rows


class _RowError(ValueError):
    """JSON that Python reads and that is no row all the same; says why."""


def _parsed(content: bytes) -> Any:
    """What the JSON in `content` says.

    Raises UnicodeDecodeError, JSONDecodeError and _RowError; the last for what would fail far from here, or mean
    something else than it seems to.
    """
    text = content.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise _RowError("is nested too deeply") from None
    except ValueError as error:  # a duplicate key, or an integer of thousands of digits
        raise _RowError(str(error) if isinstance(error, _RowError) else "holds a number of too many digits") from None
    if re.search(r"\\u[dD][89a-fA-F]", text):  # the escape of a surrogate, which is a character only as one of a pair
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise _RowError(f"holds {half}, half of a character; write the whole character") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RowError(f"has the key {twice!r} twice; leave one out")
    return found


def _parquet(path: str, key: str) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise ConfigError(key, path, f"cannot be read as parquet: {error}") from error
    return rows


def _dataset(path: str, split: str, key: str) -> list[Row]:
    """The split of a folder that `datasets` saved, of a folder of data files, or of a dataset on the hub."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if (Path(path) / "dataset_dict.json").is_file() or (Path(path) / "state.json").is_file():
            saved = datasets.load_from_disk(path)
            dataset = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            dataset = datasets.load_dataset(path, split=split)
    except KeyError as error:
        remedy = f"the dataset at {key}={path} has no such split; it has {', '.join(saved)}"
        raise ConfigError(_split_key(key), split, remedy) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        remedy = f"no jsonl, json or parquet file, and no dataset that can be loaded with split {split!r}: {reason}"
        raise ConfigError(key, path, remedy) from error
    return list(dataset)


def _split_key(key: str) -> str:
    """The setting of the split of the set whose path `key` names: beside it, or in the section data."""
    if key.endswith(".path"):
        return f"{key.removesuffix('path')}split"
    return "data.eval_split" if "eval" in key else "data.split"
