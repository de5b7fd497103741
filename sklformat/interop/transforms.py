"""
From one kind of records to another, sequence by sequence, and what it costs.

Reads and writes no file.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from sklformat import native
from sklformat.format import layout
from sklformat.format.header import Header
from sklformat.format.records import SparseTargets

_FROM_COUNTS = {"from_kind": "counts"}  # the provenance of ratios that were counts in a cache before


def target_header(
    source: Header, *, kind: str | None, profile: str | None, drop_tokens: bool, has_tokens: bool
) -> Header:
    """
    Settings of the converted cache.

    Args:
        source: Settings of what is converted.
        kind: What is asked for; None: as it is.
        profile: What is asked for; None: as it is, or for another kind the smallest that fits.
        drop_tokens: Leave the tokens out of the cache.
        has_tokens: There are tokens to store, whether or not the source stored them.

    Raises:
        ValueError: The records do not fit the profile, or cannot become counts; says why.
    """
    kind = kind or source.kind
    capture = dict(source.capture)
    changes: dict[str, object] = {"kind": kind, "profile": profile or source.profile}
    store_tokens = has_tokens and not drop_tokens
    if store_tokens != source.store_tokens:
        changes |= {"store_tokens": store_tokens, "token_size": None}
    if kind != source.kind:
        changes |= {"profile": profile, "record_count_size": None, "scale_log2": 0}
        if kind == "counts":
            _check_drawn(source)
            if capture.get("converted") == _FROM_COUNTS:
                del capture["converted"]
        elif "converted" not in capture:
            capture["converted"] = _FROM_COUNTS
    return dataclasses.replace(source, capture=capture, **changes)  # type: ignore[arg-type]


def _check_drawn(source: Header) -> None:
    refusal = None
    if source.sampler not in layout.UNBIASED_SAMPLERS:
        refusal = f"sampler {source.sampler} drew nothing, so there are no counts"
    elif source.proposal_temperature != 1:
        refusal = f"the draws came from p**{source.proposal_temperature}, so counts do not say the weights"
    elif not 1 <= source.rounds <= 127:
        refusal = f"a count field holds 1..127 rounds, these records were drawn in {source.rounds}"
    if refusal:
        raise ValueError(f"ratios cannot become counts: {refusal}; keep kind ratios")


def to_ratios(targets: SparseTargets, rounds: int) -> SparseTargets:
    """Counts [nnz] as weights count / rounds."""
    assert targets.counts is not None
    weights = targets.counts.astype(np.float32) / np.float32(rounds)
    return SparseTargets(token_ids=targets.token_ids, weights=weights, offsets=targets.offsets)


def to_counts(targets: SparseTargets, header: Header) -> SparseTargets:
    """
    The counts that these weights must have come from.

    Args:
        targets: Weights as a cache of kind ratios holds them.
        header: Its settings.

    Raises:
        ValueError: No counts give exactly these ratio codes; says where.
    """
    assert targets.weights is not None
    rounds = header.rounds
    exact = targets.weights.astype(np.float64) * rounds
    counts = np.rint(exact).astype(np.int64)
    positions = np.repeat(np.arange(targets.num_positions), np.diff(targets.offsets))
    sums = np.diff(np.concatenate([[0], np.cumsum(counts)])[targets.offsets])
    wrong = np.flatnonzero((np.diff(targets.offsets) > 0) & (sums != rounds))
    if not wrong.size and not (zero := np.flatnonzero(counts < 1)).size:
        keys = np.argsort((positions << 32) | targets.token_ids.astype(np.int64), kind="stable")
        result = SparseTargets(token_ids=targets.token_ids[keys], counts=counts[keys], offsets=targets.offsets)
        again = quantised(to_ratios(result, rounds), header.scale_log2)
        if again == targets:
            return result
        differing = (again.token_ids != targets.token_ids) | (again.weights != targets.weights)
        place = int(np.argmax(differing)) if again.num_records == targets.num_records else 0
        raise ValueError(
            f"position {positions[place]}: the nearest counts of {rounds} rounds do not give back the stored ratios; "
            "ratios become counts only where nothing is lost; keep kind ratios"
        )
    position = int(wrong[0]) if wrong.size else int(positions[zero[0]])
    raise ValueError(
        f"position {position}: weights times {rounds} rounds are nearest to counts that sum to {sums[position]}; "
        "ratios become counts only where nothing is lost; keep kind ratios"
    )


def quantised(targets: SparseTargets, scale_log2: int) -> SparseTargets:
    """Weights as they come back from ratio codes, in the order of the format.  SPEC section 4.3."""
    assert targets.weights is not None
    offsets, ids, codes = native.quantise(targets.offsets, targets.token_ids, targets.weights, scale_log2)
    return SparseTargets.trusted(ids, None, native.expand(offsets, codes, scale_log2), offsets)


class RatioLoss:
    """What the 7-bit ratio code changes, over all sequences added."""

    def __init__(self) -> None:
        self.records = self.left_out = 0
        self._largest = 0.0

    def add(self, exact: SparseTargets, coded: SparseTargets) -> None:
        """Compare weights before and after ``quantised``."""
        assert exact.weights is not None
        assert coded.weights is not None
        before, after = _keys(exact), _keys(coded)
        old, new = np.argsort(before), np.argsort(after)
        found = old[np.searchsorted(before, after[new], sorter=old)]  # in order, which is many times as fast
        weights = exact.weights[found].astype(np.float64)
        if weights.size:
            self._largest = max(self._largest, float(np.abs(coded.weights[new] / weights - 1).max()))
        self.records += exact.num_records
        self.left_out += exact.num_records - coded.num_records

    def __str__(self) -> str:
        if not self._largest and not self.left_out:
            return f"the ratio code keeps all {self.records} weights as they are"
        return (
            f"lost: the ratio code changes a weight by up to {self._largest:.1%} and leaves out {self.left_out} of "
            f"{self.records} records, too small for it"
        )


def _keys(targets: SparseTargets) -> NDArray[np.int64]:
    positions = np.repeat(np.arange(targets.num_positions), np.diff(targets.offsets))
    return (positions << 32) | targets.token_ids.astype(np.int64)
