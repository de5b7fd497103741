"""
Importance weights: the records that one teacher drew, weighted so that they stand for another teacher's distribution.

Knows no cache and no teacher.
Source: Anshumann et al. 2025 (arXiv 2503.16870), section 6.1; weights p / q of a proposal q.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sklformat.format.records import SparseTargets


def importance_weights(
    targets: SparseTargets,
    rounds: int,
    own_logprob: NDArray[np.floating],
    other_logprob: NDArray[np.floating],
    *,
    normalised: bool = False,
    largest: float | None = None,
) -> SparseTargets:
    """
    Records of teacher A as records of teacher B.

    Of N rounds at a position, c_i drew id i: ids come from q ∝ p_A^t, and E[c_i / N] = q_i, for independent draws and
    for systematic ones. A's own target is t_i = (c_i / N) p_A(i) / q_i, which is c_i / N where q = p_A, and B's is

        w_i = t_i p_B(i) / p_A(i),    so that    E[w_i] = q_i p_B(i) / q_i = p_B(i)    for each id i with p_A(i) > 0.

    So what is linear in the targets keeps its mean: the gradient of "random_sampling" with respect to the logits,
    (Σ_j w_j) s - w for a student s, has the mean s - p_B, that of full distillation from B. Σ w is 1 in the mean only:
    divided by their sum, weights vary less and are biased by O(1 / N), as section 6.1 has it for a proposal. Weights of
    a proposal that were divided by their sum before stay biased likewise. Var(w_i) = p_B(i)² (1 / q_i - 1) / N for
    independent draws: it is large where B gives an id much that A gives little.

    Args:
        targets: Of A, unbiased: counts, or weights as they are.
        rounds: N of counts.
        own_logprob: [nnz] log p_A of each record, nats.
        other_logprob: [nnz] log p_B.
        normalised: Divide by the sum of the position.
        largest: Cut weights to this; biased.

    Returns:
        The same records with weights; without those whose weight is 0 in float32.
    """
    base = targets.weights if targets.counts is None else targets.counts / rounds
    assert base is not None
    lengths = np.diff(targets.offsets)
    positions = np.repeat(np.arange(lengths.size), lengths)
    logarithm = other_logprob.astype(np.float64) - own_logprob.astype(np.float64)
    if normalised:  # by the greatest of the position, so that no ratio overflows, nor all of them vanish
        greatest = np.full(lengths.size, -np.inf)
        np.maximum.at(greatest, positions, logarithm)
        logarithm -= greatest[positions]
    with np.errstate(over="ignore"):  # an infinite weight is cut, or refused by its size
        weights = base * np.exp(logarithm)
    if largest is not None:
        weights = np.minimum(weights, largest)
    if normalised:
        weights /= np.bincount(positions, weights, minlength=lengths.size)[positions]
    floats = weights.astype(np.float32)
    kept = floats > 0
    offsets = np.concatenate([[0], np.cumsum(np.bincount(positions[kept], minlength=lengths.size))])
    return SparseTargets(token_ids=targets.token_ids[kept], weights=floats[kept], offsets=offsets)
