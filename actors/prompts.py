"""Prompts in order: one set of them, every one once an epoch.

actors.formats says what a row asks and actors.rendering turns it into token ids; actors.mixing draws from several sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from actors.formats import RowFormat
from actors.rendering import tokenise_prompts
from actors.rollout import Prompt
from conf.schema import ConfigError, DataConfig


class PromptSource:
    """Prompts without end, every one once an epoch, in an order that follows from the seed and the epoch alone.

    Prompts of more than `data.max_prompt_tokens` tokens are left out; `num_dropped` counts them.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        data: DataConfig,
        *,
        seed: int,
        number: int | None = None,
    ) -> None:
        """Tokenises all rows, which are those of `data.path`, or of `data.sources[number]`.

        Raises ConfigError, naming the row where there is one, if no prompt is left to draw.
        """
        key, path = ("data", data.path) if number is None else (f"data.sources[{number}]", data.sources[number].path)
        if not rows:
            raise ConfigError(f"{key}.path", path, "holds no rows")
        prompts = tokenise_prompts(rows, tokenizer, RowFormat.of(data, number))
        self.path = path or ""
        self._prompts = [prompt for prompt in prompts if len(prompt.token_ids) <= data.max_prompt_tokens]
        self.num_dropped = len(prompts) - len(self._prompts)
        if not self._prompts:
            shortest = min(len(prompt.token_ids) for prompt in prompts)
            remedy = f"all {len(prompts)} prompts are longer; the shortest has {shortest} tokens ({key}.path={path})"
            raise ConfigError("data.max_prompt_tokens", data.max_prompt_tokens, remedy)
        self._seed, self._number = seed, number or 0
        self._position = 0
        self._epoch, self._order = 0, self._order_of(0)

    def __len__(self) -> int:
        """How many prompts an epoch has."""
        return len(self._prompts)

    @property
    def dropped(self) -> list[tuple[str, int]]:
        """The path of each set, here one, and how many of its prompts were left out."""
        return [(self.path, self.num_dropped)]

    def at(self, position: int) -> Prompt:
        """The prompt that is drawn after `position` others; its id is `position`. Draws nothing."""
        epoch, place = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return replace(self._prompts[self._order[place]], id=position)

    def next_batch(self, count: int) -> list[Prompt]:
        """The next `count` prompts, across epochs where they end; ids count the prompts drawn since the start."""
        start = self._position
        self._position += count
        return [self.at(position) for position in range(start, self._position)]

    def take(self, count: int) -> list[Prompt]:
        """The first `count` prompts in file order, or all if there are fewer; draws nothing."""
        return [replace(prompt, id=number) for number, prompt in enumerate(self._prompts[:count])]

    def all(self) -> list[Prompt]:
        """Every prompt in file order; draws nothing."""
        return self.take(len(self._prompts))

    def state(self) -> dict[str, int]:
        """How many prompts were drawn: all that a resumed run needs beside the seed and the data."""
        return {"position": self._position}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Goes to where `state` was taken, in the same data with the same seed."""
        self._position = state["position"]

    def _order_of(self, epoch: int) -> list[int]:
        order = np.random.default_rng([self._seed, epoch, self._number]).permutation(len(self._prompts))
        return cast(list[int], order.tolist())
