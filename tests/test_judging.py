"""pass@k against every subset, the win rate against every pair. Takes less than a second."""

from __future__ import annotations

from itertools import combinations, product
from math import comb

import numpy as np
import pytest

from cluster.judging import mean_pass_at_k, pass_at_k, win_rate


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 2) == pytest.approx(1 / 2)  # 3 of the 6 pairs hold the one that is right
    assert pass_at_k(5, 2, 3) == pytest.approx(9 / 10)  # of 10 triples, one misses both
    assert pass_at_k(10, 3, 1) == pytest.approx(3 / 10)
    assert pass_at_k(3, 2, 2) == 1.0  # one is wrong, so no pair is
    assert pass_at_k(1, 1, 1) == 1.0
    assert pass_at_k(7, 0, 7) == 0.0
    assert pass_at_k(7, 1, 7) == 1.0


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_sample() -> None:
    for n in range(1, 9):
        for c, k in product(range(n + 1), range(1, n + 1)):
            subsets = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-14), (n, c, k)


def test_pass_at_k_has_no_bias() -> None:
    """Over all outcomes of n samples, each right with probability p, its mean is 1 - (1 - p)^k; 1 - (1 - c/n)^k's is
    not.
    """
    n, p = 6, 0.3
    for k in range(1, n + 1):
        weights = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        mean = sum(weight * pass_at_k(n, c, k) for c, weight in enumerate(weights))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-14)
    plugged_in = sum(weight * (1 - (1 - c / n) ** 3) for c, weight in enumerate(weights))
    assert plugged_in < 1 - (1 - p) ** 3 - 0.05


def test_pass_at_k_of_many_samples_is_exact_where_the_binomials_are_no_floats() -> None:
    n, c, k = 5000, 3, 2000
    assert comb(n, k) > 10**1000
    missed = comb(n - c, k) * 10**18 // comb(n, k) / 10**18  # exact integers, then one division
    assert pass_at_k(n, c, k) == pytest.approx(1 - missed, abs=1e-12)
    assert pass_at_k(n, n, n) == pass_at_k(n, n - k + 1, k) == 1.0


def test_pass_at_k_only_grows_with_k_and_with_right_samples() -> None:
    for n in (1, 5, 12):
        table = np.array([[pass_at_k(n, c, k) for k in range(1, n + 1)] for c in range(n + 1)])
        assert (np.diff(table, axis=0) >= 0).all()
        assert (np.diff(table, axis=1) >= 0).all()
        assert ((table >= 0) & (table <= 1)).all()


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 2, 0), (0, 0, 1), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_of_what_cannot_be_is_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="sample"):
        pass_at_k(n, c, k)


def test_the_mean_pass_at_k_weighs_each_prompt_the_same() -> None:
    right = {4: [True, False], 9: [False] * 7, 2: [True, False, False, False]}
    assert mean_pass_at_k(right, 1) == pytest.approx((1 / 2 + 0 + 1 / 4) / 3)
    assert mean_pass_at_k(right, 2) == pytest.approx((1 + 0 + 1 / 2) / 3)
    with pytest.raises(ValueError, match="pass@3 of 2 samples"):
        mean_pass_at_k(right, 3)
    with pytest.raises(ValueError, match="no prompts"):
        mean_pass_at_k({}, 1)


# The win rate


def test_the_win_rate_by_hand() -> None:
    scores = {0: [1.0, 3.0], 1: [5.0]}
    reference = {0: [2.0, 3.0, 0.0], 1: [5.0]}
    # Prompt 0: 1 beats 0; 3 beats 2 and 0 and ties with 3: 3.5 of 6. Prompt 1: a tie.
    assert win_rate(scores, reference) == pytest.approx((3.5 / 6 + 1 / 2) / 2)
    assert win_rate({7: [2.0]}, {7: [1.0]}) == 1.0
    assert win_rate({7: [1.0]}, {7: [2.0]}) == 0.0


def random_scores(*, seed: int, levels: int) -> dict[int, list[float]]:
    """Up to five scores for each of twelve prompts, with ties if there are few levels."""
    rng = np.random.default_rng(seed)
    return {prompt: (rng.integers(0, levels, rng.integers(0, 6)) / 8).tolist() for prompt in rng.permutation(12)}


@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_the_win_rate_is_that_of_all_pairs(levels: int) -> None:
    scores, reference = random_scores(seed=1, levels=levels), random_scores(seed=2, levels=levels)
    shares = []
    for prompt in range(12):
        pairs = [(ours > theirs) + (ours == theirs) / 2 for ours in scores[prompt] for theirs in reference[prompt]]
        shares += [sum(pairs) / len(pairs)] if pairs else []
    assert 3 < len(shares) < 12
    assert win_rate(scores, reference) == pytest.approx(sum(shares) / len(shares), abs=1e-14)


def test_what_one_side_wins_the_other_loses() -> None:
    scores, reference = random_scores(seed=3, levels=4), random_scores(seed=4, levels=4)
    assert win_rate(scores, reference) + win_rate(reference, scores) == pytest.approx(1.0, abs=1e-14)
    assert win_rate(scores, scores) == pytest.approx(0.5, abs=1e-14)


def test_only_the_order_of_a_prompts_scores_counts() -> None:
    scores, reference = random_scores(seed=5, levels=5), random_scores(seed=6, levels=5)
    shifted = [{p: [1000 * p + s**3 for s in given] for p, given in side.items()} for side in (scores, reference)]
    assert win_rate(*shifted) == win_rate(scores, reference)


def test_a_prompt_with_scores_on_one_side_is_left_out() -> None:
    scores = {0: [1.0], 1: [9.0], 2: [], 3: [9.0]}
    reference = {0: [2.0], 2: [0.0], 3: [], 4: [0.0]}
    assert win_rate(scores, reference) == 0.0  # prompt 0 alone
    with pytest.raises(ValueError, match="of the policy and of the reference"):
        win_rate({1: [9.0], 2: []}, reference)


def test_a_score_that_is_no_number_is_a_mistake() -> None:
    for scores in ([1.0, float("nan")], [float("nan")]):
        with pytest.raises(AssertionError, match="a score is a number"):
            win_rate({0: scores}, {0: [1.0]})
        with pytest.raises(AssertionError, match="a score is a number"):
            win_rate({0: [1.0]}, {0: scores})
