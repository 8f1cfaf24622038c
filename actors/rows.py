"""Rows of a dataset, as plain dicts: from jsonl, parquet, a folder that `datasets` saved, or a name on the hub.

Knows nothing of what the rows mean.
"""

from __future__ import annotations

import json
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
        rows = list(_jsonl(path, key))
    elif suffix == ".parquet":
        rows = _parquet(path, key)
    else:
        rows = _dataset(path, split, key)
    if not rows:
        raise ConfigError(key, path, "holds no rows")
    return rows


def _jsonl(path: str, key: str) -> Iterator[Row]:
    """One object a line, UTF-8; empty lines are allowed at the end alone, so a row's number is its line's."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(key, path, f"cannot be read: {error.strerror}") from error
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n"), start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(
                key, path, f"line {number} is not UTF-8 (byte {error.start + 1}); convert the file"
            ) from error
        except json.JSONDecodeError as error:
            if not content.strip():
                return
            raise ConfigError(key, path, f"line {number} is not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise ConfigError(key, path, f"line {number} is no JSON object but {type(row).__name__}; write {{...}}")
        yield row


def _parquet(path: str, key: str) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
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
        raise ConfigError("data.eval_split" if "eval" in key else "data.split", split, remedy) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        remedy = f"neither a jsonl or parquet file nor a dataset that can be loaded with split {split!r}: {reason}"
        raise ConfigError(key, path, remedy) from error
    return list(dataset)
