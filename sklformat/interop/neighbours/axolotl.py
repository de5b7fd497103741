"""
Axolotl's data sets for distillation, in JSONL, Parquet or Arrow.

* v1: ``logprobs``, for each position a list of objects with ``token`` (``token_id:123``) and ``logprob``;
* v2: ``logprobs`` and ``target_token_ids``, lists of numbers for each position;
* prepared: ``target_logprobs``, ``target_token_ids`` and ``target_mask``, as its trainer takes them, a row for each
  token and row t about token t + 1.  This form is written, beside ``input_ids``, ``attention_mask`` and ``labels``,
  with which Axolotl takes a data set as it is.

The first two name no tokens, and their rows belong to the last tokens, as many as there are; some describe the token
that they belong to, others the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import SklError
from sklformat.interop.columns import Row, check_parallel, offsets_of, typed
from sklformat.interop.readings import (
    PROBABILITIES,
    Asked,
    Reading,
    Unreadable,
    log_probs,
    refuse_flags,
    require,
    select,
    truncated_sampler,
    without_fillers,
    without_first_row,
    without_last_row,
)
from sklformat.interop.tables.cells import Cell, Columns, array_cell
from sklformat.interop.tables.exports import Evened, EvenTable, Export, Exporter
from sklformat.interop.tables.files import Table, open_table, table_kind
from sklformat.interop.tokens import check_no_more, next_tokens

_PREFIX = "token_id:"
_PREPARED = {"logprobs": "target_logprobs", "token_ids": "target_token_ids", "mask": "target_mask"}
_NOT_COUNTED = -100  # a label that no loss looks at


def recognise(path: Path) -> str | None:
    """``axolotl`` where the columns are those of v2 or prepared, or the first row's ``logprobs`` are objects of v1."""
    try:
        kind = table_kind(path)
        if kind is None or kind == "npz":
            return None
        table = open_table(path, kind)
        certain = table.names >= set(_PREPARED.values()) or table.names >= {"logprobs", "target_token_ids"}
        if certain or ("logprobs" in table.names and _holds_objects(next(table.rows(["logprobs"]))["logprobs"])):
            return "axolotl"
    except (OSError, ValueError, SklError, ImportError, StopIteration):
        return None
    return None


def _holds_objects(value: Any) -> bool:
    first = next((entry for row in value if row for entry in row), None) if isinstance(value, list) else None
    return isinstance(first, Mapping) and str(first.get("token")).startswith(_PREFIX)


def read(path: Path, kind: str, asked: Asked) -> Reading:
    """
    The sequences of a data set of any of the three forms.

    Raises:
        ValueError: The user must say more, or says what the data set says itself.
    """
    takes = ("vocab_size", "sampler", "convention", "values", "columns", "tokens")
    refuse_flags(path, kind, asked, takes)
    require(path, vocab_size=asked.vocab_size)
    assert asked.vocab_size is not None
    table_of = table_kind(path)
    if table_of is None:
        raise ValueError(f"{path}: an Axolotl data set is Parquet, Arrow or JSONL files; it is or holds none of these")
    table = open_table(path, table_of)
    names, form = _columns(path, table, asked)
    values, convention = asked.values or "logprobs", asked.convention
    if form == "prepared":
        convention = convention or "next"
    elif convention is None:
        raise ValueError(
            f"{path}: its last row is about the last token or the one after it; give --convention own or next"
        )

    def rows(start: int) -> Iterator[Row | Unreadable]:
        tokens = None if asked.tokens is None else asked.tokens.rows(start)
        for number, theirs in enumerate(table.rows(list(dict.fromkeys(names.values())), start), start):
            given = None if tokens is None else next_tokens(tokens, path, number)
            yield _read_row({ours: theirs[name] for ours, name in names.items()}, given, convention, values)
        if tokens is not None:
            check_no_more(tokens, path)

    about = "token t + 1" if convention == "next" else "token t, and is moved to the one before"
    named = PROBABILITIES[values] + (", normalised over the ids that are there" if values == "logits" else "")
    return Reading(
        rows=rows,
        values="logprobs",
        vocab_size=asked.vocab_size,
        sampler=truncated_sampler(path, kind, asked),
        provenance={"system": "axolotl", "form": form},
        says=(
            f"row t describes {about}; rows belong to the last tokens",
            f"the values are {named}; their temperature is not in the files, 1 is taken",
        ),
        renormalised=True if values == "logits" else None,
    )


def _columns(path: Path, table: Table, asked: Asked) -> tuple[dict[str, str], str]:
    """Name in the data set by our name, and the form."""
    if table.names >= set(_PREPARED.values()) and not asked.columns:
        names, form = dict(_PREPARED), "prepared"
    else:
        names = {"logprobs": "logprobs", "token_ids": "target_token_ids"} | dict(asked.columns)
        form = "v2" if names["token_ids"] in table.names or "token_ids" in asked.columns else "v1"
        if form == "v1":
            del names["token_ids"]
    if strange := sorted(asked.columns.keys() - {"input_ids", "logprobs", "token_ids", "mask"}):
        raise ValueError(f"{path}: --columns {strange[0]}=…: an Axolotl data set has no such column")
    if "input_ids" in table.names:
        names = {"input_ids": "input_ids"} | names
    if missing := [name for name in names.values() if name not in table.names]:
        there = ", ".join(sorted(table.names))
        raise ValueError(f"{path}: there is no column {missing[0]!r}, only {there}; say with --columns which has them")
    if "input_ids" in names and asked.tokens is not None:
        raise ValueError(f"{path}: its tokens are in the column {names['input_ids']}; leave out --tokens")
    if "input_ids" not in names and asked.tokens is None:
        raise ValueError(f"{path}: holds no token ids; give them with --tokens FILE")
    return names, form


def _read_row(cells: Mapping[str, Any], given: NDArray[Any] | None, convention: str, values: str) -> Row | Unreadable:
    try:
        return _row(cells, given, convention, values)
    except ValueError as error:
        return Unreadable(str(error))


def _row(cells: Mapping[str, Any], given: NDArray[Any] | None, convention: str, values: str) -> Row:
    tokens = given if given is not None else typed(_cell(cells, "input_ids").flat("input_ids"), "input_ids")
    ids, logs, offsets = _numbers(cells) if "token_ids" in cells else _objects(cells["logprobs"])
    missing = tokens.size - (offsets.size - 1)
    if missing < 0:
        raise ValueError(f"has {offsets.size - 1} rows for {tokens.size} tokens; Axolotl would take the wrong ones")
    row = Row(tokens, ids, logs, np.concatenate([np.zeros(missing, np.int64), offsets]))
    if "mask" in cells:
        mask, its_offsets = _cell(cells, "mask").ragged("target_mask")
        check_parallel(offsets, its_offsets, "target_mask")
        row = select(row, mask != 0)
    row = without_last_row(row) if convention == "next" else without_first_row(row)
    row = row if values == "logits" else without_fillers(row)
    return Row(row.input_ids, row.token_ids, log_probs(row.values, row.offsets, values), row.offsets)


def _numbers(cells: Mapping[str, Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
    ids, offsets = _cell(cells, "token_ids").ragged("target_token_ids")
    logs, others = _cell(cells, "logprobs").ragged("logprobs")
    check_parallel(offsets, others, "logprobs")
    return typed(ids, "token_ids"), typed(logs, "logprobs"), offsets


def _objects(rows: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
    """Ids and values of v1."""
    ids, logs, lengths = list[int](), list[float](), list[int]()
    if isinstance(rows, Cell):
        if rows.values.size:
            raise ValueError("logprobs are numbers without ids; --columns token_ids=NAME says where these are")
        rows = [()] * (rows.levels[0].size - 1 if rows.levels else 0)
    try:
        for row in rows:
            entries = row or ()
            lengths.append(len(entries))
            for entry in entries:
                prefix, _, number = entry["token"].rpartition(":")
                if prefix + ":" != _PREFIX:
                    raise ValueError(f"token {entry['token']!r} is no {_PREFIX} with its number; texts name no id")
                ids.append(int(number))
                logs.append(float(entry["logprob"]))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"logprobs is no list of lists of objects with token and logprob: {error!r}") from None
    return np.array(ids, np.int64), np.array(logs, np.float64), offsets_of(lengths)


def _cell(cells: Mapping[str, Any], name: str) -> Cell:
    cell = cells[name]
    if not isinstance(cell, Cell):
        raise ValueError(f"{name} holds something other than lists of numbers")  # noqa: TRY004  of a file
    return cell


def open_export(path: Path, kind: str, export: Export) -> Exporter:  # noqa: ARG001  of all kinds
    """A prepared data set: as ``kinds.open_export``."""
    return _Prepared(path, export)


class _Prepared(EvenTable):
    """What Axolotl's own preparation would make; an entry of mask 0 enters no loss."""

    COLUMNS: ClassVar[Columns] = {
        "input_ids": (np.int64, 1),
        "attention_mask": (np.int8, 1),
        "labels": (np.int64, 1),
        "target_logprobs": (np.float32, 2),
        "target_token_ids": (np.int64, 2),
        "target_mask": (np.int8, 2),
    }

    def cells(self, tokens: NDArray[Any], evened: Evened) -> dict[str, Cell]:
        labels = tokens.astype(np.int64)
        labels[1:][~evened.real[:-1].any(1)] = _NOT_COUNTED
        return {
            "input_ids": Cell(tokens),
            "attention_mask": Cell(np.ones(tokens.size)),
            "labels": Cell(labels),
            "target_logprobs": array_cell(evened.logprobs),
            "target_token_ids": array_cell(evened.token_ids),
            "target_mask": array_cell(evened.real),
        }

    @property
    def says(self) -> list[str]:
        row = "row t describes token t + 1, the last row is masked; Axolotl takes the file as it is, type left out"
        said = super().says
        advice = "train with kd_normalize_topk: false, else the student's probabilities of fillers count"
        return [row, *said, *([advice] if self.fillers else [])]
