"""How much a response repeats itself, against hand-counted n-grams and a slow loop. Takes less than a second."""

from __future__ import annotations

import time

import numpy as np
import pytest

from actors.repetition import repeated_fraction


def slow(token_ids: list[int], n: int) -> float:
    """Counts the n-grams that stand somewhere before, one by one."""
    grams = [token_ids[i : i + n] for i in range(len(token_ids) - n + 1)]
    return sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams) if grams else 0.0


@pytest.mark.parametrize(
    ("token_ids", "n", "expected"),
    [
        ([1, 2, 3, 1, 2, 3], 2, 2 / 5),  # 12 23 31 12 23: the last two occurred before
        ([7, 7, 7, 7, 7, 7, 7], 4, 3 / 4),  # 7777 four times
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 4, 1 / 6),
        ([1, 2, 1, 3, 1], 1, 2 / 5),
        ([1, 2, 3, 4, 5, 6, 7, 8], 4, 0.0),
        ([1, 2, 3, 1, 3, 2], 2, 0.0),  # the order of the tokens counts
        ([5, 5, 5, 5], 4, 0.0),  # one n-gram
        ([5, 5, 5, 5, 5], 4, 1 / 2),  # two, the shortest that can repeat
        ([5], 4, 0.0),
        ([], 4, 0.0),
    ],
)
def test_the_repeated_share_by_hand(token_ids: list[int], n: int, expected: float) -> None:
    assert repeated_fraction(token_ids, n=n) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("vocabulary", [1, 2, 5])
def test_the_repeated_share_is_that_of_a_slow_loop(n: int, vocabulary: int) -> None:
    rng = np.random.default_rng(10 * n + vocabulary)
    for length in range(40):
        token_ids = rng.integers(0, vocabulary, length, dtype=np.int32)
        assert repeated_fraction(token_ids, n=n) == pytest.approx(slow(token_ids.tolist(), n), abs=1e-15)


def test_four_tokens_make_an_n_gram_unless_another_number_is_given() -> None:
    token_ids = [1, 2, 3, 9, 1, 2, 3, 8]
    assert repeated_fraction(token_ids) == 0.0
    assert repeated_fraction(token_ids, n=3) == pytest.approx(1 / 6)


def test_another_name_for_each_token_changes_nothing() -> None:
    token_ids = np.random.default_rng(0).integers(0, 4, 60)
    names = np.array([2**40, 0, 151_643, 17])
    assert repeated_fraction(names[token_ids], n=3) == repeated_fraction(token_ids, n=3) > 0


def test_saying_it_twice_more_only_raises_the_share() -> None:
    token_ids = list(range(12))
    shares = [repeated_fraction(token_ids * times) for times in (1, 2, 3, 50)]
    # 12 different n-grams once a period is complete, of 12 x times - 3.
    assert shares == pytest.approx([0.0, 9 / 21, 21 / 33, 585 / 597])


def test_the_time_grows_with_the_length_alone() -> None:
    start = time.perf_counter()
    assert repeated_fraction(np.arange(200_000)) == 0.0
    assert time.perf_counter() - start < 5.0, "comparing each n-gram with all before it would take hours"
