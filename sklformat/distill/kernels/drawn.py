"""
What draws from rows of logits give, whoever makes them; imports no Triton.

Shape letters: P positions (rows), N rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Drawn:
    """
    What the rows of one call gave, on their device.

    Attributes:
        ids: [P, N] integers, ascending; of no meaning where the row is bad.
        weights: [P, N] float32, the share of each draw in the weight of its id; None where all draws weigh the same.
        is_bad: [P] bool: the row holds NaN, a logit above 2^20, or none above -2^20.
        log_sum: [P] float32, log of the sum of exp(logit); None where it was not made.
        entropy: [P] float32, of the row's softmax, nats; None where it was not asked for.
    """

    ids: Tensor
    weights: Tensor | None
    is_bad: Tensor
    log_sum: Tensor | None
    entropy: Tensor | None


@dataclass(frozen=True)
class Sums:
    """
    What one pass over rows gave, on their device.

    Attributes:
        largest: [P] float32, each row's largest logit.
        total: [P] float64, sum of exp(logit - largest).
        is_bad: As of ``Drawn``.
        entropy: As of ``Drawn``.
    """

    largest: Tensor
    total: Tensor
    is_bad: Tensor
    entropy: Tensor | None

    def log_sum(self) -> Tensor:
        """[P] float32, as of ``Drawn``."""
        return self.largest + self.total.log().float()

    def of_rows(self, first: int, end: int) -> Sums:
        """Those of some rows, without entropies."""
        return Sums(self.largest[first:end], self.total[first:end], self.is_bad[first:end], None)
