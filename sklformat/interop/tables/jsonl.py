"""Tables in JSONL, one object per line; plain columns written so, with the note in a file of its own beside it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import DTypeLike

from sklformat.errors import CorruptError, describe_bad_json
from sklformat.interop.columns import NOTE, in_row, no_sequence
from sklformat.interop.tables.cells import Cell, Columns, check_there, list_cell

_PEEK_BYTES = 1 << 26


def note_path(path: Path) -> Path:
    """Where the note of a JSONL file lies."""
    return path.with_name(f"{path.name}.{NOTE}.json")


def read_head(path: Path) -> tuple[set[str], bytes | None]:
    """Names of the columns, from the first line, and the note."""
    note = note_path(path)
    return set(next(read_lines(path))), note.read_bytes() if note.exists() else None


def parse_object(text: bytes | str, path: Path, section: str) -> dict[str, Any]:
    """
    One JSON object; NaN and Infinity, which JSON has not but its writers have, are numbers.

    Raises:
        CorruptError: It is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(describe_bad_json(error), path=path, section=section) from None
    if not isinstance(value, dict):
        raise CorruptError("not a JSON object", path=path, section=section)
    return value


def read_cells(path: Path, names: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
    """As ``files.Table.rows``, line by line."""
    for number, line in enumerate(read_lines(path)):
        if number < start:
            continue
        with in_row(path, number):
            check_there(names, line)
            row = {name: list_cell(line[name], name) if _is_numbers(line[name]) else line[name] for name in names}
        yield row


def _is_numbers(value: Any) -> bool:
    """Whether this is a list, of lists, of something other than texts and objects."""
    while isinstance(value, list):
        value = next((one for one in value if one is not None), None)
    return not isinstance(value, str | dict)


def peek_line(path: Path) -> dict[str, Any]:
    """The JSON object of a file's first line; an empty one where it is no such file, or the line is very long."""
    try:
        with path.open("rb") as file:
            line = file.readline(_PEEK_BYTES + 1)
        value = json.loads(line) if len(line) <= _PEEK_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """
    The JSON object of each line that is not empty.

    Raises:
        CorruptError: A line is none, or there is no line.
    """
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                empty = False
                yield parse_object(line, path, f"line {number}")
    if empty:
        raise no_sequence(path)


class Sink:
    """Writes rows line by line; as ``files.Sink``."""

    def __init__(self, file: BinaryIO, columns: Columns) -> None:
        self._file, self._columns = file, columns

    def append(self, cells: Mapping[str, Cell]) -> None:
        line = {name: _nested(cells[name], dtype) for name, (dtype, _) in self._columns.items()}
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def _nested(cell: Cell, dtype: DTypeLike) -> list[Any]:
    lists: list[Any] = cell.values.astype(dtype).tolist()
    for offsets in reversed(cell.levels):
        lists = [lists[begin:end] for begin, end in itertools.pairwise(offsets.tolist())]
    return lists
