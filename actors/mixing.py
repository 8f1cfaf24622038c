"""Where the prompts of a run come from: one set or several that are mixed by weight, and the held-out ones.

Reads the rows that a DataConfig names. Knows nothing of what the prompts are sampled for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from actors.prompts import PromptSource
from actors.rollout import Prompt
from actors.rows import read_rows
from conf.schema import DataConfig


class MixedPromptSource:
    """Prompts without end from several sources, each drawn from in proportion to its weight.

    Of the first n prompts, n times its share come from a source, rounded up or down, for every n (`next_turn`). Each
    source goes through epochs of its own, every prompt once an epoch. So what the n-th prompt is follows from the seed
    and n alone.
    """

    def __init__(self, sources: Sequence[PromptSource], weights: Sequence[float]) -> None:
        """`weights` are greater than 0, one for each source."""
        assert len(sources) == len(weights) > 0, (len(sources), len(weights))
        self._sources, self._shares = list(sources), whole_shares(weights)
        self._position, self._drawn = 0, [0] * len(sources)

    def __len__(self) -> int:
        """How many different prompts there are."""
        return sum(map(len, self._sources))

    @property
    def num_dropped(self) -> int:
        """How many prompts of all sources were left out, being too long."""
        return sum(source.num_dropped for source in self._sources)

    @property
    def dropped(self) -> list[tuple[str, int]]:
        """The path of each source, and how many of its prompts were left out."""
        return [each for source in self._sources for each in source.dropped]

    def next_batch(self, count: int) -> list[Prompt]:
        """The next `count` prompts; ids count the prompts of all sources that were drawn since the start."""
        return [self._draw() for _ in range(count)]

    def state(self) -> dict[str, int]:
        """How many prompts were drawn: all that a resumed run needs beside the seed and the data."""
        return {"position": self._position}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Goes to where `state` was taken, in the same data with the same seed and weights."""
        self._position = state["position"]
        self._drawn = turns_taken(self._shares, self._position)

    def _draw(self) -> Prompt:
        which = next_turn(self._shares, self._drawn)
        prompt = replace(self._sources[which].at(self._drawn[which]), id=self._position)
        self._drawn[which] += 1
        self._position += 1
        return prompt


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of `weights`, read as the decimals that they are written as; lowest terms."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    return [weight // divisor for weight in whole]


def next_turn(shares: Sequence[int], taken: Sequence[int]) -> int:
    """Whose turn comes next, if so many turns were taken by each so far, all of them by this rule.

    Turn c (from 0) of a member with the part p = share / total of all turns lies between floor(c / p) and
    ceil((c + 1) / p). Of the members whose next turn may lie here, the one whose turn has to come first takes it. Then
    after any n turns each has taken floor(n p) or ceil(n p): the chairman assignment problem, Tijdeman 1980 (Discrete
    Mathematics 32); as earliest deadline first, Baruah et al. 1996 (Algorithmica 15).
    """
    total, now = sum(shares), sum(taken)
    due = [
        (-(-(count + 1) * total // share), member)
        for member, (share, count) in enumerate(zip(shares, taken, strict=True))
        if count * total // share <= now
    ]
    return min(due)[1]


def turns_taken(shares: Sequence[int], count: int) -> list[int]:
    """How many of the first `count` turns each member takes. The turns repeat after sum(shares) of them."""
    rounds, rest = divmod(count, sum(shares))
    taken = [0] * len(shares)
    for _ in range(rest):
        taken[next_turn(shares, taken)] += 1
    return [rounds * share + more for share, more in zip(shares, taken, strict=True)]


def prompt_source(data: DataConfig, tokenizer: Any, *, seed: int) -> PromptSource | MixedPromptSource:
    """Where training prompts come from, all rows read and tokenised.

    Raises ConfigError, naming the setting and where there is one the row, for what cannot be used.
    """
    if not data.sources:
        assert data.path is not None, "the caller has checked data.path"
        return PromptSource(read_rows(data.path, data.split), tokenizer, data, seed=seed)
    sources = []
    for number, source in enumerate(data.sources):
        assert source.path is not None, "checked by DataSourceConfig"
        rows = read_rows(source.path, source.split or data.split, key=f"data.sources[{number}].path")
        sources.append(PromptSource(rows, tokenizer, data, seed=seed, number=number))
    return MixedPromptSource(sources, [source.weight for source in data.sources])


def held_out_prompts(data: DataConfig, tokenizer: Any, count: int) -> list[Prompt]:
    """The first `count` prompts of `data.eval_path`, or all if there are fewer; none if it is null.

    Its rows have the format of the section `data`. Raises ConfigError as `prompt_source` does.
    """
    if data.eval_path is None:
        return []
    rows = read_rows(data.eval_path, data.eval_split, key="data.eval_path")
    return PromptSource(rows, tokenizer, replace(data, path=data.eval_path, sources=()), seed=0).take(count)
