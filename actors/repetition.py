"""How much a response repeats itself.

Looks at token ids alone: knows nothing of tokenizers, rewards or where the response came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def repeated_fraction(token_ids: Sequence[int] | NDArray[np.integer[Any]], *, n: int = 4) -> float:
    """Return the share of the n-grams of a response that occurred before in it: 0 for none, close to 1 for a loop.

    seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319), section 6: 1 - |unique n-grams| / |n-grams|. A response of n
    tokens or fewer cannot repeat an n-gram and gives 0. Time and memory grow with the length of the response.

    Args:
        token_ids: [T] integers; T may be 0.
        n: at least 1.
    """
    assert n >= 1, n
    ids = np.asarray(token_ids).tolist()
    count = len(ids) - n + 1
    if count < 2:
        return 0.0
    unique = len(set(zip(*(ids[start : start + count] for start in range(n)), strict=True)))
    return (count - unique) / count
