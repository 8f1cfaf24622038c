"""What is to be sampled, cut into parts, and which generator samples which part. No Ray in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from actors.rollout import Prompt
from cluster.driver import Chunk, Sampling

Part = tuple[tuple[Prompt, int], ...]  # the (prompt, sample) pairs of one chunk


def planned(prompts: Sequence[Prompt], *, num_samples: int, chunk_size: int, num_generators: int) -> list[Part]:
    """Return what is to be sampled, cut into parts of consecutive requests: `chunk_size` of them, or fewer if some
    generator would have none.
    """
    pairs = [(prompt, sample) for prompt in prompts for sample in range(num_samples)]
    size = max(min(chunk_size, -(-len(pairs) // num_generators)), 1)
    return [tuple(pairs[start : start + size]) for start in range(0, len(pairs), size)]


@dataclass(eq=False)
class Order:
    """Parts that were asked for together, until each has come as a chunk."""

    sampling: Sampling
    deliver: Callable[[Chunk], None]
    waiting: dict[int, Part]  # that no generator has, by their numbers
    running: dict[int, Part] = field(default_factory=dict)  # that a generator has
    urgent: bool = False  # before those that are not

    @property
    def done(self) -> bool:
        return not self.waiting and not self.running

    def give(self, number: int) -> Part:
        """Return a part that waits, to be sampled from now on."""
        self.running[number] = self.waiting.pop(number)
        return self.running[number]

    def take_back(self, number: int) -> None:
        """Let a part wait again that was to be sampled and will not be."""
        if number in self.running:
            self.waiting[number] = self.running.pop(number)

    def came(self, number: int, chunk: Chunk) -> None:
        """Hand on the chunk of a part, unless it is not wanted any more."""
        if self.running.pop(number, None) is not None:
            self.deliver(chunk)

    def cancel(self) -> None:
        """Want nothing more."""
        self.waiting.clear()
        self.running.clear()


@dataclass
class Load:
    """What one generator has to do."""

    requests: int = 0
    tokens: int = 0  # at most


def load_of(part: Part, sampling: Sampling) -> Load:
    """Return what a part asks of a generator: its requests, and how many tokens these can come to."""
    return Load(len(part), sum(len(prompt.token_ids) + sampling.max_new_tokens for prompt, _ in part))


class Dealer:
    """Deals the parts of all orders, the urgent and then the oldest first, to the generator with the fewest tokens.

    A generator is given no more than keeps it busy for as long as a part may take, so that what remains can go to
    whoever is free first.
    """

    def __init__(self, *, enough_requests: int) -> None:
        """`enough_requests`: with so many a generator gets no more."""
        self.enough_requests = enough_requests
        self.loads: dict[int, Load] = {}  # by generator
        self._orders: dict[int, Order] = {}
        self._numbers = count()

    def take(self, order: Order) -> None:
        self._orders[next(self._numbers)] = order

    def add(self, who: int, part: Part, sampling: Sampling, *, sign: int) -> None:
        """Count a part in (sign 1) or out (sign -1)."""
        of_part, load = load_of(part, sampling), self.loads.setdefault(who, Load())
        load.requests += sign * of_part.requests
        load.tokens += sign * of_part.tokens

    def deal(self, generators: Sequence[int]) -> Mapping[int, list[tuple[Order, int]]]:
        """Return which parts each of these generators is to sample from now on: orders and numbers."""
        dealt: dict[int, list[tuple[Order, int]]] = {}
        self._orders = {number: order for number, order in self._orders.items() if not order.done}
        for number in sorted(self._orders, key=lambda number: (not self._orders[number].urgent, number)):
            order = self._orders[number]
            for part_number in sorted(order.waiting):
                loads = {who: self.loads.setdefault(who, Load()) for who in generators}
                free = [who for who, load in loads.items() if load.requests < self.enough_requests]
                if not free:
                    return dealt
                who = min(free, key=lambda one: (loads[one].tokens, one))
                self.add(who, order.give(part_number), order.sampling, sign=1)
                dealt.setdefault(who, []).append((order, part_number))
        return dealt
