"""Which rollouts are trained on together, and by which rank: mini-batches dealt, micro-batches cut.

Which rollouts share a mini-batch depends on the seed alone, never on the number of ranks. A hand is what one rank is
dealt, or a group of ranks that share the tokens of each rollout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def deal(costs: Sequence[float], *, mini_batch_size: int, num_hands: int, seed: int) -> list[list[list[int]]]:
    """Return, for each hand and mini-batch, the indices of the rollouts in it.

    The rollouts are shuffled by the seed and cut into mini-batches; each mini-batch is dealt out, dearest first
    into the hand with the least to do so far (ties to the fewer rollouts, then the lower number). A train batch
    that lost rollouts on its way is cut into mini-batches as equal as can be.

    Args:
        costs: what each rollout takes of a rank, in any unit.
        mini_batch_size: rollouts of one optimizer step over all ranks.
        num_hands: how many there are.
        seed: of the shuffle.

    Returns:
        result[hand][mini_batch] is a list of indices into `costs`; a hand may have none.
    """
    assert costs, "a train batch has at least one rollout"
    order = np.random.default_rng(seed).permutation(len(costs))
    dealt: list[list[list[int]]] = [[] for _ in range(num_hands)]
    for part in np.array_split(order, -(-len(costs) // mini_batch_size)):
        members: list[int] = part.tolist()
        hands: list[list[int]] = [[] for _ in range(num_hands)]
        loads = [0.0] * num_hands
        for index in sorted(members, key=lambda i: (-costs[i], i)):
            least = min(range(num_hands), key=lambda h: (loads[h], len(hands[h]), h))
            hands[least].append(index)
            loads[least] += costs[index]
        for of_hand, hand in zip(dealt, hands, strict=True):
            of_hand.append(hand)
    return dealt


def micro_batches(lengths: Sequence[int], *, max_tokens: int, padded: bool) -> list[list[int]]:
    """Return the indices cut into micro-batches of at most `max_tokens` tokens; with `padded`, padding included.

    Sorted by length, longest first: little is padded, and sequences of equal length stand together, which attention
    treats as one batch. A single rollout that is longer than the budget stands alone.
    """
    batches: list[list[int]] = []
    load = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        more = lengths[batches[-1][0]] if padded and batches else lengths[index]
        if batches and load + more <= max_tokens:
            batches[-1].append(index)
            load += more
        else:
            batches.append([index])
            load = lengths[index]
    return batches
