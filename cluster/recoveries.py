"""How often what was lost has been made good, and when that is too often. No Ray in here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from cluster.driver import Metrics
from cluster.faults import ProcessError

KINDS = ("generator", "reward", "learner", "sync", "rollouts")


class Recoveries:
    """Counts what was lost by kind. A fault that comes again before the run gets any further ends it.

    Getting further means a step beyond the furthest so far: a learner that dies at the same step each time it has come
    back to it would else be restarted for ever.
    """

    def __init__(self, *, limit: int, note: Callable[[str], None]) -> None:
        self.limit, self.note = limit, note
        self.total: Counter[str] = Counter()
        self._in_a_row: dict[str, list[str]] = {}
        self._furthest: dict[str, int] = {}  # by stage

    def count(self, kind: str, cause: str) -> None:
        """Note that something of this kind is lost and will be made good.

        Raises ProcessError with the first of the causes once it is one too many in a row.
        """
        assert kind in KINDS, kind
        causes = self._in_a_row.setdefault(kind, [])
        causes.append(cause)
        if len(causes) > self.limit:
            raise ProcessError(
                f"{cause}\nThis is number {len(causes)} of its kind without the run getting any further "
                f"(cluster.max_recoveries={self.limit}); the first was: {causes[0]}"
            )
        self.total[kind] += 1
        self.note(f"{cause}; it is made good and the run goes on")

    def reached(self, stage: str, step: int) -> None:
        """Take note that a step is done."""
        if step > self._furthest.get(stage, 0):
            self._furthest[stage] = step
            self._in_a_row.clear()

    def metrics(self) -> Metrics:
        """Return how often each kind has been made good since this process began."""
        return {f"recoveries/{kind}": float(self.total[kind]) for kind in KINDS}
