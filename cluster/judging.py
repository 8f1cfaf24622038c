"""How good held-out responses are, several to a prompt: pass@k and the win rate against the reference.

Pure functions of verdicts and scores by prompt id. Knows nothing of how they were sampled, scored or judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that at least one of k samples is right, estimated without bias from num_samples of them.

    Chen et al. 2021 (arXiv 2107.03374), equation 1, of one prompt: 1 - C(n - c, k) / C(n, k) with n samples of which c
    are right, computed as their product 1 - prod_{i = n-c+1}^{n} (1 - k / i), which cannot overflow. With k = 1 it is
    the share of right samples.

    Raises ValueError unless 1 <= k <= num_samples and 0 <= num_right <= num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples: k must lie between 1 and the number of samples")
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"{num_right} right of {num_samples} samples")
    if num_samples - num_right < k:
        return 1.0  # any k hold a right one; the product has a factor 0, and others that may overflow before it
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_right + 1, num_samples + 1))


def mean_pass_at_k(right: Mapping[int, Sequence[bool]], k: int) -> float:
    """Return the mean of `pass_at_k` over prompts, each weighing the same whatever the number of its samples.

    Args:
        right: prompt id -> verdicts of its samples.
        k: at most the number of samples of any prompt.

    Raises ValueError for a prompt with fewer than k samples, and if there is no prompt.
    """
    if not right:
        raise ValueError(f"pass@{k} of no prompts")
    return math.fsum(pass_at_k(len(verdicts), sum(verdicts), k) for verdicts in right.values()) / len(right)


def win_rate(scores: Mapping[int, Sequence[float]], reference_scores: Mapping[int, Sequence[float]]) -> float:
    """Return how probable it is that a response of the policy scores above one of the reference to the same prompt.

    Of all pairs of a prompt's responses, the share that the policy wins, ties counting one half; then the mean over
    prompts, each weighing the same. 0.5 is no difference. A prompt without scores on one side is left out.

    Args:
        scores: prompt id -> scores of the policy's responses, none NaN.
        reference_scores: the same of the reference's.

    Raises ValueError if no prompt has scores on both sides.
    """
    shared = [prompt for prompt in scores if len(scores[prompt]) and len(reference_scores.get(prompt, ()))]
    if not shared:
        raise ValueError("a win rate needs a prompt with scores of the policy and of the reference")
    return math.fsum(_share_won(scores[prompt], reference_scores[prompt]) for prompt in shared) / len(shared)


def _share_won(scores: Sequence[float], reference_scores: Sequence[float]) -> float:
    ours = np.asarray(scores, dtype=np.float64)
    theirs = np.sort(np.asarray(reference_scores, dtype=np.float64))
    assert not np.isnan(ours).any(), "a score is a number"
    assert not np.isnan(theirs).any(), "a score is a number"
    below = np.searchsorted(theirs, ours, side="left")
    below_or_equal = np.searchsorted(theirs, ours, side="right")
    return float((below + below_or_equal).sum()) / (2 * len(ours) * len(theirs))
