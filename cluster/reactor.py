"""What is attended to while something else is waited for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import ray


class Source(Protocol):
    """Whoever has calls under way that are to be followed up as they are done, whatever is waited for meanwhile."""

    def refs(self) -> Iterable[Any]:
        """Return the calls that are under way."""
        ...

    def ready(self, ref: Any) -> None:
        """Follow up a call that is done, without waiting for anything and without raising."""
        ...


class Reactor:
    """Waits for calls, and lets the sources follow up theirs meanwhile. All in the thread that waits."""

    def __init__(self) -> None:
        self.sources: list[Source] = []

    def wait(self, refs: Sequence[Any], *, timeout_s: float) -> list[Any]:
        """Return those of `refs` that are done, once anything is: it may be that of a source, and then this is empty.

        Empty too if nothing is done in `timeout_s` seconds.
        """
        followed = {ref: source for source in self.sources for ref in source.refs()}
        calls = [*dict.fromkeys([*refs, *followed])]
        if not calls:
            return []
        done, rest = ray.wait(calls, num_returns=1, timeout=timeout_s, fetch_local=False)
        if done and rest:  # where one is, there are often more: all are taken at once
            done += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        for ref in done:
            if ref in followed:
                followed[ref].ready(ref)
        return [ref for ref in done if ref not in followed]
