"""
A row, checked: the rules that its values must keep before they become records.

Knows nothing of files.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat.format.columns import RECORD_LOGPROB, STARTS, find_fault, follow_records, typed_columns
from sklformat.format.header import Header
from sklformat.format.records import SparseTargets
from sklformat.interop.columns import Row, check_size, offsets_of
from sklformat.interop.readings import blank

_SUM_SLACK = 0.05  # log-probs of bfloat16 sum to 1 no more exactly than this
_ABOVE_ONE = 1e-3  # log-probs above 0 by no more than this are rounding


class Item(NamedTuple):
    """One sequence: tokens [T + 1] uint32, records of T positions, optional columns by name for these records."""

    tokens: NDArray[Any]
    targets: SparseTargets
    columns: Mapping[str, NDArray[Any]]


@dataclass
class Dropped:
    """
    What was left out since it could not be.

    Attributes:
        rows: Positions whose records were left out, by the reason.
        sequences: Sequences that were left out whole.
        first: What was wrong with the first of these.
    """

    rows: Counter[str] = field(default_factory=Counter)
    sequences: int = 0
    first: str = ""

    def add_sequence(self, reason: str) -> None:
        """Count one sequence."""
        self.sequences, self.first = self.sequences + 1, self.first or reason

    def totals(self) -> dict[str, int]:
        """For a cache's provenance."""
        return {"positions": sum(self.rows.values()), "sequences": self.sequences}

    def __str__(self) -> str:
        parts = [f"the records of {number} positions {reason}" for reason, number in sorted(self.rows.items())]
        parts += [f"{self.sequences} sequences, the first: {self.first}"] if self.sequences else []
        return "dropped: " + ("; ".join(parts) or "nothing")


class _Given:
    """A row, and what several checks need of it."""

    def __init__(self, row: Row, header: Header) -> None:
        self.row, self.header = row, header

    @functools.cached_property
    def positions(self) -> NDArray[np.int64]:
        """[nnz] of each record."""
        return np.repeat(np.arange(self.row.offsets.size - 1), np.diff(self.row.offsets))

    @functools.cached_property
    def order(self) -> NDArray[np.intp]:
        """[nnz] what sorts the records of each position by id."""
        keys = (self.positions.astype(np.int64) << 32) | self.row.token_ids.astype(np.int64)
        return np.argsort(keys, kind="stable")


class _Fault(NamedTuple):
    bad: NDArray[np.bool_]  # [nnz] records
    reason: str
    message: str


def check_row(row: Row, header: Header, values: str, *, trusted: bool, dropped: Dropped | None = None) -> Item:
    """
    Check a row and turn it into records; ids of a position may come in any order.

    Args:
        row: As a reader gives it; row t describes token t + 1.
        header: vocab_size and rounds that the values must fit, and scale_log2 of weights.
        values: What ``row.values`` are, "counts" or "logprobs".
        trusted: It was written from a cache, whose weights may sum to a little more than 1.
        dropped: Where to count positions that can't be, which then have no records; None: they are refused.

    Raises:
        ValueError: A value that cannot be, if it is refused; the message names the position.  Or the row as a whole.
    """
    _check_shape(row)
    bad = np.flatnonzero((row.input_ids < 0) | (row.input_ids >= header.vocab_size))
    if bad.size:
        raise ValueError(f"token number {bad[0]}: id {row.input_ids[bad[0]]} {_outside(header)}")
    checks = [_find_strangers, _find_twins]
    if values == "counts":
        checks += [_find_false_counts, _find_false_totals]
    else:
        checks += [_find_false_logprobs] if trusted else [_find_false_logprobs, _find_false_sums]
    given = _Given(row, header)
    for find in checks:
        fault = find(given)
        if fault is None:
            continue
        if dropped is None:
            raise ValueError(f"position {given.positions[np.argmax(fault.bad)]}: {fault.message}")
        marked = np.zeros(row.offsets.size - 1, np.bool_)
        marked[given.positions[fault.bad]] = True
        dropped.rows[fault.reason] += int(marked.sum())
        row = blank(row, marked)
        given = _Given(row, header)
    targets = _targets(given, values)
    return Item(row.input_ids.astype(np.uint32), targets, _columns(row, targets))


def _check_shape(row: Row) -> None:
    """Rows that describe the next token: L tokens have L - 1 of them."""
    tokens, rows = row.input_ids.size, row.offsets.size - 1
    if rows != tokens - 1 or rows < 1:
        hint = "; if the last row belongs to the token after the sequence, give --drop-last-row"
        raise ValueError(
            f"{tokens} tokens and {rows} rows of records; row t describes token t + 1, so L tokens (at least 2) have "
            f"L - 1 rows{hint if rows == tokens else ''}"
        )
    sizes = {STARTS: (tokens, "tokens"), RECORD_LOGPROB: (row.token_ids.size, "token_ids")}
    for name, values in row.columns.items():
        size, what = sizes.get(name, (rows, "rows"))
        check_size(name, values, size, what)


def _outside(header: Header) -> str:
    return f"is not in [0, {header.vocab_size}), the vocab_size"


def _find_strangers(given: _Given) -> _Fault | None:
    row, header = given.row, given.header
    bad = (row.token_ids < 0) | (row.token_ids >= header.vocab_size)
    if not bad.any():
        return None
    return _Fault(
        bad, "with an id outside the vocabulary", f"token id {row.token_ids[np.argmax(bad)]} {_outside(header)}"
    )


def _find_twins(given: _Given) -> _Fault | None:
    row, positions, order = given.row, given.positions, given.order
    ids = row.token_ids[order]
    twice = np.flatnonzero((ids[1:] == ids[:-1]) & (positions[1:] == positions[:-1]))
    if not twice.size:
        return None
    bad = np.zeros(positions.size, np.bool_)
    bad[order[twice]] = True
    return _Fault(bad, "with an id twice", f"token_ids has {row.token_ids[np.argmax(bad)]} twice")


def _find_false_counts(given: _Given) -> _Fault | None:
    row, header = given.row, given.header
    bad = (row.values < 1) | (row.values > header.rounds)
    if not bad.any():
        return None
    message = f"count {row.values[np.argmax(bad)]} is not in 1..{header.rounds}, the rounds"
    return _Fault(bad, "with a count outside the rounds", message)


def _find_false_totals(given: _Given) -> _Fault | None:
    row, positions, header = given.row, given.positions, given.header
    sums = np.diff(np.concatenate([[0], np.cumsum(row.values, dtype=np.int64)])[row.offsets])
    bad = sums[positions] != header.rounds
    if not bad.any():
        return None
    message = f"counts sum to {sums[positions[np.argmax(bad)]]}, not to {header.rounds}, the rounds"
    return _Fault(bad, "with counts that do not sum to the rounds", message)


def _find_false_logprobs(given: _Given) -> _Fault | None:
    row, header = given.row, given.header
    logs = row.values.astype(np.float64)
    bad = ~np.isfinite(logs) | (logs > np.log(header.scale) + _ABOVE_ONE)
    if not bad.any():
        return None
    place = np.argmax(bad)
    hint = "raw logits are not log-probabilities" if logs[place] > 0 else "leave such entries out"
    message = f"logprob {logs[place]:g} of id {row.token_ids[place]} cannot be; {hint}"
    reason = "with a log-prob above 0" if np.isfinite(logs[place]) else "with a value that is no finite number"
    return _Fault(bad, reason, message)


def _find_false_sums(given: _Given) -> _Fault | None:
    row, positions = given.row, given.positions
    weights = np.exp(row.values.astype(np.float64))
    sums = np.diff(np.concatenate([[0.0], np.cumsum(weights)])[row.offsets])
    bad = sums[positions] > 1 + _SUM_SLACK
    if not bad.any():
        return None
    message = (
        f"exp(logprobs) sum to {sums[positions[np.argmax(bad)]]:.3f}, more than 1; natural log-probabilities are "
        "needed, not logits and not another base"
    )
    return _Fault(bad, "with probabilities that sum to more than 1", message)


def _targets(given: _Given, values: str) -> SparseTargets:
    row, header, order = given.row, given.header, given.order
    ids, ordered = row.token_ids[order].astype(np.uint32), row.values[order]
    if values == "counts":
        return SparseTargets(token_ids=ids, counts=ordered, offsets=row.offsets)
    # float64 keeps exp(log(w)) nearer to w than half a float32 step, so that weights of a cache come back as they were.
    weights = np.minimum(np.exp(ordered.astype(np.float64)), header.scale).astype(np.float32)
    kept = weights > 0  # exp underflows below -104; no code is that small
    offsets = row.offsets if kept.all() else offsets_of(kept)[row.offsets]
    return SparseTargets(token_ids=ids[kept], weights=weights[kept], offsets=offsets)


def position_sums(values: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum of values [nnz] over each position that has records; offsets [T + 1]."""
    return np.add.reduceat(values, offsets[:-1][np.diff(offsets) > 0])


def _columns(row: Row, targets: SparseTargets) -> dict[str, NDArray[Any]]:
    """The row's columns for the records that it became; their values must be what a block may hold."""
    ids = row.token_ids.astype(np.uint32)
    columns = follow_records(row.columns, (row.offsets, ids), (targets.offsets, targets.token_ids))
    typed = typed_columns(tuple(columns), columns, targets.num_positions, (targets.num_records,))
    if fault := find_fault(typed, targets.offsets):
        raise ValueError(fault)
    return columns | {name: values for name, values in typed.items() if name == STARTS}
