"""What is to be sampled, cut into parts and dealt to generators. No Ray, no engine."""

from __future__ import annotations

from cluster.driver import Chunk, Sampling
from cluster.sampling import Dealer, Order, Part, planned
from tests.stand_ins import prompt

SAMPLING = Sampling(num_samples=1, temperature=1.0, max_new_tokens=7, seed=0)  # 3 prompt tokens: 10 in all


def keys(part: Part) -> list[tuple[int, int]]:
    return [(of.id, sample) for of, sample in part]


def order_of(*counts: int, urgent: bool = False, deliver: list[Chunk] | None = None) -> Order:
    """An order whose parts have so many requests."""
    parts = {number: tuple((prompt(i), 0) for i in range(count)) for number, count in enumerate(counts)}
    return Order(SAMPLING, ([] if deliver is None else deliver).append, parts, urgent=urgent)


def dealt(dealer: Dealer, generators: list[int]) -> dict[int, list[int]]:
    return {who: [number for _, number in given] for who, given in dealer.deal(generators).items()}


def test_parts_are_consecutive_requests_and_hold_each_once() -> None:
    parts = planned([prompt(i) for i in range(5)], num_samples=2, chunk_size=4, num_generators=2)
    assert [keys(part) for part in parts] == [
        [(0, 0), (0, 1), (1, 0), (1, 1)],
        [(2, 0), (2, 1), (3, 0), (3, 1)],
        [(4, 0), (4, 1)],
    ]


def test_parts_do_not_depend_on_the_generators_unless_some_had_none() -> None:
    prompts = [prompt(i) for i in range(16)]
    sizes = [
        [len(part) for part in planned(prompts, num_samples=1, chunk_size=4, num_generators=count)]
        for count in (1, 2, 4, 8)
    ]
    assert sizes == [[4] * 4] * 3 + [[2] * 8]
    assert planned([], num_samples=1, chunk_size=4, num_generators=2) == []


def test_a_part_goes_to_the_generator_with_the_fewest_tokens() -> None:
    dealer = Dealer(enough_requests=100)
    order = order_of(4, 2, 1, 3)
    dealer.take(order)
    assert dealt(dealer, [0, 1]) == {0: [0], 1: [1, 2, 3]}  # 40 beside 0, 20, 30
    assert [(load.requests, load.tokens) for _, load in sorted(dealer.loads.items())] == [(4, 40), (6, 60)]
    assert not order.waiting


def test_what_a_busy_generator_cannot_begin_stays_for_whoever_is_free_first() -> None:
    dealer = Dealer(enough_requests=4)
    order = order_of(2, 2, 2, 2, 2)
    dealer.take(order)
    assert dealt(dealer, [0, 1]) == {0: [0, 2], 1: [1, 3]}
    assert dealt(dealer, [0, 1]) == {}
    dealer.add(1, order.running[1], SAMPLING, sign=-1)
    order.came(1, Chunk((), None))
    assert dealt(dealer, [0, 1]) == {1: [4]}


def test_urgent_orders_come_first_and_then_the_oldest() -> None:
    dealer = Dealer(enough_requests=2)
    first, second, urgent = order_of(2), order_of(2), order_of(2, urgent=True)
    for order in (first, second, urgent):
        dealer.take(order)
    given = dealer.deal([0, 1])
    assert [of for who in (0, 1) for of, _ in given[who]] == [urgent, first]


def test_a_part_of_a_lost_generator_is_dealt_again_and_comes_once() -> None:
    come: list[Chunk] = []
    dealer, order = Dealer(enough_requests=100), order_of(2, deliver=come)
    dealer.take(order)
    dealer.deal([0])
    order.take_back(0)
    assert dealt(dealer, [1]) == {1: [0]}
    order.came(0, Chunk((), "new"))
    order.came(0, Chunk((), "late"))
    assert [chunk.payload for chunk in come] == ["new"]
    assert order.done


def test_nothing_comes_of_an_order_that_was_cancelled() -> None:
    come: list[Chunk] = []
    dealer, order = Dealer(enough_requests=100), order_of(2, 2, deliver=come)
    dealer.take(order)
    dealer.deal([0])
    order.cancel()
    order.came(0, Chunk((), None))
    order.take_back(1)
    assert not come
    assert order.done
    assert dealt(dealer, [0]) == {}
