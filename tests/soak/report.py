"""What a soak has shown: faults, recoveries, equal rows, memory; as a summary, as a table, and the judgement of it."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from cluster.checkpoint_files import library_versions
from tests.soak.watch import Injected, MemorySample, Observed, Seen

WINDOW_S = 600.0
MAX_GROWTH_PERCENT = 5.0
SETTLED_S = 60.0  # a process that is younger, or is suspended as it starts, may still be loading
NUM_SHOWN = 8  # evaluations in the table
CURVE = {"eval/accuracy", "eval/score_mean"}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The rows of the disturbed run beside those of the undisturbed one."""

    rows: int
    equal: int
    figures: int  # that were compared
    first_difference: str | None


@dataclass(frozen=True)
class Growth:
    """Memory of a kind of process, in two windows of time; None where the soak was too short to say."""

    early_mib: float | None
    late_mib: float | None

    @property
    def percent(self) -> float | None:
        return None if self.early_mib is None or self.late_mib is None else 100 * (self.late_mib / self.early_mib - 1)


def compared(rows: Sequence[Row], others: Sequence[Row]) -> Comparison:
    """Compare row by row, bit by bit; what `others` has beyond the last of `rows` is left out."""
    first, equal = None, 0
    for number, row in enumerate(rows):
        other = others[number] if number < len(others) else {}
        # As JSON, since NaN is not equal to itself.
        different = [key for key in row.keys() | other.keys() if as_text(row, key) != as_text(other, key)]
        equal += not different
        if different and first is None:
            key = sorted(different)[0]
            first = f"row {number + 1} ({row['stage']} {row['step']}): {key} is {row.get(key)}, not {other.get(key)}"
    return Comparison(len(rows), equal, sum(len(row.keys() - {"stage", "step"}) for row in rows), first)


def as_text(row: Row, key: str) -> str:
    return json.dumps(row[key]) if key in row else "absent"


def growths(samples: Sequence[MemorySample], *, begin_s: float, end_s: float) -> dict[str, Growth]:
    """Return the growth of each kind of process between `begin_s` and `end_s`.

    Processes are replaced all the time, so what is followed is not one process: at each moment it is the mean of those
    of a kind (of Ray's own, their sum), but for those that are still loading or suspended; then the median of the first
    ten minutes and that of the last ten. A driver is too much alone for that: it is followed within the longest of its
    lives in that time, in the first quarter and in the last.
    """
    settled = [each for each in samples if each.age_s >= SETTLED_S and not each.suspended and each.at_s >= begin_s]
    found = {}
    for kind in sorted({sample.kind for sample in samples}):
        of_kind = [sample for sample in settled if sample.kind == kind]
        if kind == "driver":
            found[kind] = growth_of_life(longest_life(of_kind))
        else:
            series = at_each_moment(of_kind, total=kind == "ray")
            early = [mib for at_s, mib in series if at_s < begin_s + WINDOW_S]
            late = [mib for at_s, mib in series if end_s - WINDOW_S <= at_s <= end_s]
            long_enough = early and late and end_s >= begin_s + 2 * WINDOW_S
            found[kind] = Growth(median(early), median(late)) if long_enough else Growth(None, None)
    return found


def at_each_moment(samples: Sequence[MemorySample], *, total: bool) -> list[tuple[float, float]]:
    """Return the moments with the mean, or the sum, of the processes there were."""
    moments: dict[float, list[float]] = defaultdict(list)
    for sample in samples:
        moments[sample.at_s].append(sample.mib)
    return [(at_s, sum(sizes) if total else fmean(sizes)) for at_s, sizes in sorted(moments.items())]


def longest_life(samples: Sequence[MemorySample]) -> list[MemorySample]:
    """Return the samples of the process that was seen for the longest time."""
    lives: dict[tuple[int, int], list[MemorySample]] = defaultdict(list)
    for sample in samples:
        lives[sample.leg, sample.pid].append(sample)
    return max(lives.values(), key=lambda life: life[-1].at_s - life[0].at_s, default=[])


def growth_of_life(life: Sequence[MemorySample]) -> Growth:
    quarter = len(life) // 4
    if quarter == 0:
        return Growth(None, None)
    return Growth(median(sample.mib for sample in life[:quarter]), median(sample.mib for sample in life[-quarter:]))


def seconds_to_next_step(fault: Injected, steps: Sequence[Seen]) -> float | None:
    """Return how long it took until a step was recorded; after the end of a driver, by the next one."""
    return next((seen.at_s - fault.at_s for seen in steps if seen.is_after(fault.at_s) and seen.leg >= fault.leg), None)


def by_name(observed: Observed) -> dict[str, dict[str, Any]]:
    """Return for each kind of fault how often it was done, and how long until the next step was recorded."""
    seconds: dict[str, list[float | None]] = defaultdict(list)
    for fault in observed.faults:
        if fault.outcome != "not met":
            seconds[fault.name].append(seconds_to_next_step(fault, observed.steps))
    found = {}
    for name in sorted(seconds):
        known = [value for value in seconds[name] if value is not None]
        median_s, longest_s = (round(median(known), 1), round(max(known), 1)) if known else (None, None)
        found[name] = {"count": len(seconds[name]), "median_s": median_s, "longest_s": longest_s}
    return found


def recoveries(steps: Sequence[Seen]) -> dict[str, float]:
    """Return the counts of all legs together; each leg counts from zero."""
    highest: dict[tuple[int, str], float] = {}
    for seen in steps:
        for key, value in seen.recoveries.items():
            highest[seen.leg, key] = max(value, highest.get((seen.leg, key), 0.0))
    total: Counter[str] = Counter()
    for (_, key), value in highest.items():
        total[key] += int(value)
    return dict(total)


def summary_of(observed: Observed, rows: Sequence[Row], *, num_legs: int, end_s: float) -> dict[str, Any]:
    """Return what was seen of the run, as JSON can hold it; `rows` are those of metrics.jsonl in the end."""
    # A learner of another stage holds other networks.
    begin_s = max([WINDOW_S, *(seen.at_s for seen in observed.steps if (seen.stage, seen.step) == ("ppo", 0))])
    times = [0.0, *(seen.at_s for seen in observed.steps)]
    times.append(max([times[-1], *(sample.at_s for sample in observed.memory)]))
    reached = {row["stage"]: row["step"] for row in rows}
    return {
        "faults": by_name(observed),
        "num_faults": sum(fault.outcome != "not met" for fault in observed.faults),
        "num_not_met": sum(fault.outcome == "not met" for fault in observed.faults),
        "resumes": num_legs - 1,
        "recoveries": recoveries(observed.steps),
        "reached": reached,
        "rows": len(rows),
        "rows_recorded": len(observed.steps),
        "longest_without_step_s": round(max((b - a for a, b in pairwise(times)), default=0.0), 1),
        "curve": [[row["step"], row["eval/accuracy"], row["eval/score_mean"]] for row in rows if row.keys() >= CURVE],
        "memory": {
            kind: asdict(growth) | {"percent": growth.percent}
            for kind, growth in growths(observed.memory, begin_s=begin_s, end_s=end_s).items()
        },
    }


def judged(summary: Mapping[str, Any], *, comparing: bool) -> list[str]:
    """Return what is wrong, a line each; nothing if the soak is passed."""
    wrong = [] if summary["failure"] is None else [summary["failure"]]
    comparison = summary["compared"]
    if comparing and comparison is None:
        wrong.append("nothing was compared")
    if comparison is not None and comparison["equal"] < comparison["rows"]:
        wrong.append(f"rows differ; the first: {comparison['first_difference']}")
    if summary["leaked"]:
        wrong.append(f"processes that outlive the run: {', '.join(summary['leaked'])}")
    for kind, growth in summary["memory"].items():
        if growth["percent"] is not None and growth["percent"] > MAX_GROWTH_PERCENT:
            wrong.append(f"memory of {kind} has grown by {growth['percent']:.1f} %")
    return wrong


def machine() -> dict[str, Any]:
    """Return where it ran, and with what."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
        "versions": library_versions(),
    }


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary in Markdown."""
    comparison, wrong = summary["compared"], summary["wrong"]
    facts = {
        "disturbed training": f"{summary['minutes']:g} minutes, a fault every {summary['every_s']:g} s, "
        f"seed {summary['seed']}",
        "outcome": "; ".join(line.splitlines()[0] for line in wrong) if wrong else "passed",
        "faults done": f"{summary['num_faults']}, and {summary['num_not_met']} for which the call was not met",
        "run started again": f"{summary['resumes']} times",
        "recoveries": ", ".join(f"{key.partition('/')[2]} {value}" for key, value in summary["recoveries"].items()),
        "steps reached": ", ".join(f"{stage} {step}" for stage, step in summary["reached"].items()),
        "steps recorded, those done again included": f"{summary['rows_recorded']} for {summary['rows']} rows",
        "longest time without a recorded step": f"{summary['longest_without_step_s']:g} s",
        "rows equal to the undisturbed run's": "not compared"
        if comparison is None
        else f"{comparison['equal']} of {comparison['rows']} ({comparison['figures']} figures)",
        "the undisturbed run took": "-" if summary["undisturbed_s"] is None else f"{summary['undisturbed_s']:.0f} s",
        "processes left": ", ".join(summary["leaked"]) or "none",
        "machine": f"{summary['machine']['cores']} cores of {summary['machine']['cpu']}, "
        f"{summary['machine']['memory_gib']} GiB; {summary['machine']['system']}",
        "versions": ", ".join(f"{name} {version}" for name, version in summary["machine"]["versions"].items()),
    }
    faults = [
        (name, of["count"], shown(of["median_s"]), shown(of["longest_s"])) for name, of in summary["faults"].items()
    ]
    memory = [
        (kind, shown(of["early_mib"]), shown(of["late_mib"]), shown(of["percent"], "+.1f"))
        for kind, of in summary["memory"].items()
    ]
    curve = [(step, f"{accuracy:.1%}", f"{score:.2f}") for step, accuracy, score in spread(summary["curve"], NUM_SHOWN)]
    return "\n".join(
        [
            *markdown(("", ""), list(facts.items())),
            *markdown(("fault", "times", "median s to the next recorded step", "longest"), faults),
            *markdown(("memory", "early MiB", "late MiB", "growth %"), memory),
            *markdown(("ppo step", "held-out accuracy", "score"), curve),
        ]
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def shown(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most so many of the items, the first, the last, and others evenly between."""
    if len(items) <= count:
        return list(items)
    return [items[round(number * (len(items) - 1) / (count - 1))] for number in range(count)]
