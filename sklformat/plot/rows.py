"""What is drawn: the rows that each figure takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict


class ReliabilityBin(TypedDict):
    """One confidence bin of a reliability diagram."""

    confidence: float
    """Mean confidence of the predictions in the bin, 0..1."""

    accuracy: float
    """Share of them that were right, 0..1."""

    share: float
    """Share of all predictions that fell into the bin, 0..1."""


class ComparisonRow(TypedDict):
    """What is drawn of one method."""

    method: str
    """Name next to the bar."""

    lm_loss: float
    """Nats per token on held-out text."""

    calibration_error: float
    """Expected calibration error, a fraction in 0..1."""

    reliability: Sequence[ReliabilityBin]
    """Bins in rising order of confidence; empty bins may be left out."""


class RunRow(TypedDict):
    """What is drawn of one training run."""

    name: str
    """In the legend."""

    curves: Mapping[str, Sequence[tuple[int, float]]]
    """(step, value) of loss, lm_loss, kl, kl_to_records (nats) and calibration_error (a fraction); may be empty."""

    reliability: Sequence[ReliabilityBin]
    """As in ``ComparisonRow``; empty where the run was not evaluated."""


class CacheRow(TypedDict):
    """What is drawn of one cache; what is not known of it is empty."""

    name: str
    """In the legend."""

    notes: Sequence[str]
    """Below the name."""

    uniques: Sequence[tuple[float, float]]
    """(number of records, share of the positions that have any)."""

    reliability: Sequence[ReliabilityBin]
    """As in ``ComparisonRow``, of the largest record."""

    in_support: Sequence[tuple[float, float]]
    """(position, share of the labels that have a record)."""

    chance: Sequence[tuple[float, float]]
    """The same of labels of elsewhere."""

    expected: float | None
    """Share of the labels that are expected to have a record."""

    bytes: Mapping[str, float]
    """By column, per position."""

    sizes: Sequence[tuple[float, float]]
    """(count or weight, share of the records)."""


class NoiseRow(TypedDict):
    """What is drawn of one sampler and number of rounds."""

    sampler: str
    """Of which the rows are one line."""

    bytes_per_position: float
    """How large a cache of it is."""

    shares: Sequence[float]
    """Of each student the draws' part of the gradient's noise, above 0."""

    share_errors: Sequence[float]
    """Their standard errors."""
