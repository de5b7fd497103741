"""Plain columns as JSONL: one object per line, and the note in a file of its own beside it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError, describe_bad_json
from sklformat.format.columns import RECORD_LOGPROB, STARTS
from sklformat.interop.columns import NOTE, Row, check_parallel, in_row, no_sequence, offsets_of, typed


def note_path(path: Path) -> Path:
    """Where the note of a JSONL file lies."""
    return path.with_name(f"{path.name}.{NOTE}.json")


def read_head(path: Path) -> tuple[set[str], bytes | None]:
    """Names of the columns, from the first line, and the note."""
    note = note_path(path)
    return set(next(_lines(path))), note.read_bytes() if note.exists() else None


def parse_object(text: bytes | str, path: Path, section: str) -> dict[str, Any]:
    """
    One JSON object.

    Raises:
        CorruptError: It is none, or holds NaN or infinity.
    """

    def refuse(constant: str) -> None:
        raise ValueError(
            f"{constant} is not a number; leave such entries out, as an id without probability has no record"
        )

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptError(describe_bad_json(error), path=path, section=section) from None
    if not isinstance(value, dict):
        raise CorruptError("not a JSON object", path=path, section=section)
    return value


def read_rows(path: Path, values: str, columns: tuple[str, ...]) -> Iterator[Row]:
    """As ``files.read_rows``, line by line."""
    for number, line in enumerate(_lines(path)):
        with in_row(path, number):
            row = _parsed(line, values, columns)
        yield row


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON object of each line that is not empty."""
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                empty = False
                yield parse_object(line, path, f"line {number}")
    if empty:
        raise no_sequence(path)


def _parsed(line: dict[str, Any], values: str, columns: tuple[str, ...]) -> Row:
    missing = [name for name in ("input_ids", "token_ids", values, *columns) if name not in line]
    if missing:
        raise ValueError(f"no key {missing[0]!r}, only {', '.join(sorted(line))}")
    token_ids, offsets = _flat(line["token_ids"], "token_ids")
    flat_values, value_offsets = _flat(line[values], values)
    check_parallel(offsets, value_offsets, values)
    extra = {name: _numbers(line[name], name) for name in columns if name != RECORD_LOGPROB}
    if RECORD_LOGPROB in columns:
        extra[RECORD_LOGPROB], its_offsets = _flat(line[RECORD_LOGPROB], RECORD_LOGPROB)
        check_parallel(offsets, its_offsets, RECORD_LOGPROB)
    return Row(_numbers(line["input_ids"], "input_ids"), token_ids, flat_values, offsets, extra)


def _flat(lists: Any, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """A list of lists as one array and offsets."""
    if not isinstance(lists, list) or not all(isinstance(one, list) for one in lists):
        raise ValueError(f"{name} is not a list of lists")
    return _numbers(list(itertools.chain.from_iterable(lists)), name), offsets_of([len(one) for one in lists])


def _numbers(values: Any, name: str) -> NDArray[Any]:
    """A list of numbers as an array; integers where the column has integers."""
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} is not a list of numbers") from None
    return typed(array, name)


class Sink:
    """Writes rows line by line; as ``files.Sink``."""

    def __init__(self, file: BinaryIO, names: tuple[str, ...]) -> None:
        self._file, self._names = file, names

    def append(self, row: Row) -> None:
        bounds = list(itertools.pairwise(row.offsets.tolist()))

        def nested(values: NDArray[Any]) -> list[Any]:
            flat = values.tolist()
            return [flat[begin:end] for begin, end in bounds]

        line: dict[str, Any] = {"input_ids": row.input_ids.tolist()}
        line |= {
            name: nested(values) for name, values in zip(self._names[1:3], (row.token_ids, row.values), strict=True)
        }
        for name in self._names[3:]:
            values = row.columns[name].astype(bool if name == STARTS else float)
            line[name] = nested(values) if name == RECORD_LOGPROB else values.tolist()
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass
