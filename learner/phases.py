"""How long a rank takes for each phase of an update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from actors.spans import Span, now

EVALUATION, POLICY, CRITIC, OPTIMIZER = "evaluation", "policy", "critic", "optimizer"
PHASES = (EVALUATION, POLICY, CRITIC, OPTIMIZER)


class Phases:
    """The spans of one update, each named after its phase."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextmanager
    def record(self, name: str) -> Iterator[None]:
        """Count the block as a part of the phase `name`, one of PHASES."""
        start = now()
        yield
        self.spans.append(Span(name, start, now()))

    def seconds(self) -> dict[str, float]:
        """Return how long each phase took in all, 0.0 for one that did not come."""
        return {name: sum(span.end - span.start for span in self.spans if span.name == name) for name in PHASES}
