"""
Plain columns, under our names or other ones: ``--columns``, ``--values``, ``--convention`` and ``--tokens``.

``columns`` says what the columns are.  Beside those of a cache, a file of others may have, under names that the
user gives: ``lse``, the log of the sum of exp over the whole vocabulary at each position, which turns logits into
log-probs; ``mask``, 0 where a position [T] or the token [L] that it is about is left out; ``document``, the number of
each token's document.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.format import layout
from sklformat.format.columns import RECORD_LOGPROB, STARTS
from sklformat.interop.columns import Row, check_parallel, check_size, typed
from sklformat.interop.readings import (
    PROBABILITIES,
    Asked,
    Reading,
    Unreadable,
    Values,
    blank,
    log_probs,
    require,
    starts_of,
    without_first_row,
    without_last_row,
)
from sklformat.interop.tables.cells import Cell
from sklformat.interop.tables.files import Table
from sklformat.interop.tokens import check_no_more, next_tokens

_OTHERS = ("lse", "mask", "document")
_PICKED = re.compile(r"(?P<name>.+)\[(?P<index>\d+)\]")


def read_named(path: Path, table: Table, asked: Asked) -> Reading:
    """
    The sequences of a table of columns that did not come from a cache.

    Raises:
        ValueError: A column is missing, or the user must say more; rows raise CorruptError.
    """
    sources = {name: name for name in ("input_ids", "token_ids", "counts", "logprobs", *layout.COLUMNS)}
    sources = {ours: theirs for ours, theirs in sources.items() if theirs in table.names} | dict(asked.columns)
    for ours, theirs in asked.columns.items():
        if (plain := _plain_name(theirs)) not in table.names:
            raise ValueError(
                f"{path}: --columns {ours}={theirs}: it has no {plain!r} among its columns {_listed(table.names)}"
            )
    if asked.tokens is not None and "input_ids" in sources:
        raise ValueError(
            f"{path}: has tokens of its own, in the column {sources['input_ids']}; leave out --tokens, or see --columns"
        )
    values = value_column(path, sources, asked.kind, has_tokens=asked.tokens is not None)
    is_counts = values == "counts"
    needed: dict[str, object] = {"vocab_size": asked.vocab_size}
    needed |= {"rounds": asked.rounds} if is_counts else {}
    require(path, **needed, sampler=asked.sampler)
    assert asked.vocab_size is not None
    assert asked.sampler is not None
    if is_counts and asked.values is not None:
        raise ValueError(f"{path}: --values is for probabilities; this file has counts")
    kind = "logprobs" if is_counts else asked.values or "logprobs"
    if "lse" in sources and kind != "logits":
        raise ValueError(f"{path}: lse turns logits into log-probs; give --values logits, or leave it out")
    if asked.convention == "own" and asked.drop_last_row:
        raise ValueError(f"{path}: --convention own leaves out the row of the first token; leave out --drop-last-row")
    if asked.rounds and asked.sampler in ("topk", "topp"):
        raise ValueError(f"{path}: --sampler {asked.sampler} draws nothing; leave out --rounds")
    columns = tuple(name for name in layout.COLUMNS if name in sources or (name == STARTS and "document" in sources))
    says = ["row t describes token t + 1, given tokens 0..t"]
    if asked.convention == "own":
        says = ["row t describes token t, given those before it; the row of the first token is left out"]
    elif asked.drop_last_row:
        says = [says[0] + "; the last row is left out"]
    if kind != "logprobs":
        rest = ", normalised over the ids that are there" if kind == "logits" and "lse" not in sources else ""
        says.append(f"the values are {PROBABILITIES[kind]}{rest}")
    reader = _Reader(path, table, sources, values, kind, asked)
    return Reading(
        rows=reader.rows,
        values=values,
        vocab_size=asked.vocab_size,
        sampler=asked.sampler,
        rounds=asked.rounds or 0,
        columns=columns,
        says=tuple(says),
        renormalised=True if kind == "logits" and "lse" not in sources else None,
    )


class _Reader:
    """Rows of a table, as they describe the next token."""

    def __init__(
        self, path: Path, table: Table, sources: Mapping[str, str], values: str, kind: str, asked: Asked
    ) -> None:
        self._path, self._table, self._sources, self._values, self._kind = path, table, sources, values, kind
        self._asked = asked

    def rows(self, start: int) -> Iterator[Row | Unreadable]:
        tokens = None if self._asked.tokens is None else self._asked.tokens.rows(start)
        wanted = list(dict.fromkeys(_plain_name(theirs) for theirs in self._sources.values()))
        for number, values in enumerate(self._table.rows(wanted, start), start):
            ids = None if tokens is None else next_tokens(tokens, self._path, number)
            try:
                cells = {ours: _cell(values, theirs) for ours, theirs in self._sources.items()}
                cells |= {} if ids is None else {"input_ids": Cell(ids)}
                row: Row | Unreadable = self._row(cells)
            except ValueError as error:
                row = Unreadable(str(error))
            yield row
        if tokens is not None:
            check_no_more(tokens, self._path)

    def _row(self, cells: dict[str, Cell]) -> Row:
        others = {name: cells.pop(name) for name in _OTHERS if name in cells}
        row = plain_row(cells, self._values)
        if "document" in others:
            segments = others["document"].flat("document")
            check_size("document", segments, row.input_ids.size, "tokens")
            row = dataclasses.replace(row, columns={**row.columns, STARTS: starts_of(segments)})
        if self._kind != "logprobs":
            row = dataclasses.replace(row, values=self._log_probs(row, others.get("lse")))
        if self._asked.convention == "own":
            row = without_first_row(row)
        elif self._asked.drop_last_row:
            row = without_last_row(row)
        if "mask" in others:
            masked = others["mask"].flat("mask") == 0
            if masked.size != row.offsets.size - 1:
                check_size("mask", masked, row.input_ids.size, "tokens")
                masked = masked[1:]
            row = blank(row, masked)
        return row

    def _log_probs(self, row: Row, lse: Cell | None) -> NDArray[np.float64]:
        if lse is None:
            return log_probs(row.values, row.offsets, self._kind)
        sums = lse.flat("lse")
        check_size("lse", sums, row.offsets.size - 1, "rows")
        logits: NDArray[np.float64] = row.values - np.repeat(sums.astype(np.float64), np.diff(row.offsets))
        return logits


def plain_row(cells: Mapping[str, Cell], values: str) -> Row:
    """
    The row of cells under our names, whose ``values`` are "counts" or "logprobs".

    Raises:
        ValueError: A column is no list of numbers of its type, or lists that go together differ in length.
    """
    token_ids, offsets = _ragged(cells["token_ids"], "token_ids")
    flat_values, value_offsets = _ragged(cells[values], values)
    check_parallel(offsets, value_offsets, values)
    extra = {}
    for name, cell in cells.items():
        if name == RECORD_LOGPROB:
            extra[name], its_offsets = _ragged(cell, name)
            check_parallel(offsets, its_offsets, name)
        elif name in layout.COLUMNS:
            extra[name] = typed(cell.flat(name), name)
    return Row(typed(cells["input_ids"].flat("input_ids"), "input_ids"), token_ids, flat_values, offsets, extra)


def value_column(path: Path, names: Collection[str], kind: str | None, *, has_tokens: bool) -> Values:
    """
    Which of the columns "counts" and "logprobs" a file has; ``kind`` chooses where it has both.

    Raises:
        ValueError: Neither, or both and none is chosen; or the columns that must stand beside are missing.
    """
    there: list[Values] = [name for name in ("counts", "logprobs") if name in names]
    if len(there) == 2 and kind is not None:
        return "counts" if kind == "counts" else "logprobs"
    if len(there) != 1 or not ({"token_ids"} if has_tokens else {"input_ids", "token_ids"}) <= set(names):
        problem = "holds both counts and logprobs; choose with --kind" if len(there) == 2 else "lacks columns"
        raise ValueError(
            f"{path}: {problem}; needed are input_ids, token_ids and either counts or logprobs, "
            f"there are {_listed(names)}; --columns says which is which where they have other names"
        )
    return there[0]


def _ragged(cell: Cell, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    values, offsets = cell.ragged(name)
    if name == "token_ids" and values.dtype.kind == "f" and (np.floor(values) == values).all():
        values = _whole_numbers(values, cell.bits)  # ids beside values in one array of floats
    return typed(values, name), offsets


def _whole_numbers(ids: NDArray[Any], bits: int | None) -> NDArray[np.int64]:
    bits = bits or np.finfo(ids.dtype).nmant + 1
    rounded = np.abs(ids) >= 2.0**bits  # the first of these may have been its neighbour, rounded to even
    if rounded.any():
        raise ValueError(
            f"token_ids are floats of {bits} significant bits, which do not hold every whole number from {2**bits} on: "
            f"id {ids[np.argmax(rounded)]:.0f} may have been another; save ids as integers"
        )
    return ids.astype(np.int64)


def _cell(values: Mapping[str, Any], source: str) -> Cell:
    picked = _PICKED.fullmatch(source)
    name = source if picked is None else picked["name"]
    cell = values[name]
    if not isinstance(cell, Cell):
        raise ValueError(f"{name} is no list of numbers")  # noqa: TRY004  of a file, not of an argument
    return cell if picked is None else cell.pick(int(picked["index"]), name)


def _plain_name(source: str) -> str:
    picked = _PICKED.fullmatch(source)
    return source if picked is None else picked["name"]


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
