"""
A row of plain columns, checked: the rules that its values must keep before they become records.

Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat.format.columns import RECORD_LOGPROB, STARTS, find_fault, follow_records, typed_columns
from sklformat.format.header import Header
from sklformat.format.records import SparseTargets
from sklformat.interop.columns import Row, check_size

_SUM_SLACK = 0.05  # log-probs of bfloat16 sum to 1 no more exactly than this
_ABOVE_ONE = 1e-3  # log-probs above 0 by no more than this are rounding


class Item(NamedTuple):
    """One sequence: tokens [T + 1] uint32, records of T positions, optional columns by name for these records."""

    tokens: NDArray[Any]
    targets: SparseTargets
    columns: Mapping[str, NDArray[Any]]


def check_row(row: Row, header: Header, values: str, *, drop_last_row: bool, trusted: bool) -> Item:
    """
    Check a row and turn it into records; ids of a position may come in any order.

    Args:
        row: As the file gives it.
        header: vocab_size and rounds that the values must fit, and scale_log2 of weights.
        values: What ``row.values`` are, "counts" or "logprobs".
        drop_last_row: The row has as many rows of records as tokens; leave out the last.
        trusted: It was written from a cache, whose weights may sum to a little more than 1.

    Raises:
        ValueError: A value that cannot be; the message names the position.
    """
    row = _next_token_rows(row, drop_last_row=drop_last_row)
    vocab_size = header.vocab_size
    _check_ids(row.input_ids, vocab_size, "token number {place}: id {value}")
    positions = np.repeat(np.arange(row.offsets.size - 1), np.diff(row.offsets))
    _check_ids(row.token_ids, vocab_size, "position {position}: token id {value}", positions)
    keys = (positions.astype(np.int64) << 32) | row.token_ids.astype(np.int64)
    order = np.argsort(keys, kind="stable")
    if (twice := np.flatnonzero(np.diff(keys[order]) == 0)).size:
        place = order[twice[0]]
        raise ValueError(f"position {positions[place]}: token_ids has {row.token_ids[place]} twice")
    ids, ordered = row.token_ids[order].astype(np.uint32), row.values[order]
    if values == "counts":
        targets = _counts(ids, ordered, row.offsets, positions, header.rounds)
    else:
        targets = _weights(ids, ordered, positions, row.offsets, header.scale)
        if not trusted:
            _check_sums(targets)
    columns = _columns(row, targets)
    return Item(row.input_ids.astype(np.uint32), targets, columns)


def _next_token_rows(row: Row, *, drop_last_row: bool) -> Row:
    """Rows that describe the next token: L tokens have L - 1 of them."""
    tokens, rows = row.input_ids.size, row.offsets.size - 1
    if drop_last_row and rows == tokens:
        offsets = row.offsets[:-1]
        end = offsets[-1]
        ends = {STARTS: tokens, RECORD_LOGPROB: end}
        columns = {name: values[: ends.get(name, rows - 1)] for name, values in row.columns.items()}
        row, rows = Row(row.input_ids, row.token_ids[:end], row.values[:end], offsets, columns), rows - 1
    elif drop_last_row:
        raise ValueError(f"{tokens} tokens and {rows} rows: there is no last row too many; leave out --drop-last-row")
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
    return row


def _check_ids(ids: NDArray[Any], vocab_size: int, text: str, positions: NDArray[Any] | None = None) -> None:
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if bad.size:
        place = int(bad[0])
        position = None if positions is None else positions[place]
        where = text.format(place=place, position=position, value=ids[place])
        raise ValueError(f"{where} is not in [0, {vocab_size}), the vocab_size")


def _counts(
    ids: NDArray[np.uint32],
    values: NDArray[Any],
    offsets: NDArray[np.int64],
    positions: NDArray[Any],
    rounds: int,
) -> SparseTargets:
    bad = np.flatnonzero((values < 1) | (values > rounds))
    if bad.size:
        raise ValueError(f"position {positions[bad[0]]}: count {values[bad[0]]} is not in 1..{rounds}, the rounds")
    sums = np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[offsets])
    wrong = np.flatnonzero((sums != rounds) & (np.diff(offsets) > 0))
    if wrong.size:
        raise ValueError(f"position {wrong[0]}: counts sum to {sums[wrong[0]]}, not to {rounds}, the rounds")
    return SparseTargets(token_ids=ids, counts=values, offsets=offsets)


def _weights(
    ids: NDArray[np.uint32],
    logprobs: NDArray[Any],
    positions: NDArray[Any],
    offsets: NDArray[np.int64],
    scale: float,
) -> SparseTargets:
    logs = logprobs.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(logs) | (logs > np.log(scale) + _ABOVE_ONE))
    if bad.size:
        place = bad[0]
        hint = "; raw logits are not log-probabilities" if logs[place] > 0 else "; leave such entries out"
        raise ValueError(f"position {positions[place]}: logprob {logs[place]:g} of id {ids[place]} cannot be{hint}")
    # float64 keeps exp(log(w)) nearer to w than half a float32 step, so that weights of a cache come back as they were.
    weights = np.minimum(np.exp(logs), scale).astype(np.float32)
    kept = weights > 0  # exp underflows below -104; no code is that small
    if not kept.all():
        offsets = np.concatenate([[0], np.cumsum(kept)])[offsets]
    return SparseTargets(token_ids=ids[kept], weights=weights[kept], offsets=offsets)


def _check_sums(targets: SparseTargets) -> None:
    assert targets.weights is not None
    sums = np.diff(np.concatenate([[0.0], np.cumsum(targets.weights, dtype=np.float64)])[targets.offsets])
    if (sums > 1 + _SUM_SLACK).any():
        place = int(np.argmax(sums > 1 + _SUM_SLACK))
        raise ValueError(
            f"position {place}: exp(logprobs) sum to {sums[place]:.3f}, more than 1; natural log-probabilities are "
            "needed, not logits and not another base"
        )


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
