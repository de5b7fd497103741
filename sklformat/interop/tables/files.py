"""
Tables of any kind, in one file or several: their columns, their rows; and writers of tables and plain columns.

A file that is written gets its name when it is whole.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from sklformat.files.disk import Disk, naming, write_atomically
from sklformat.format.columns import RECORD_LOGPROB
from sklformat.interop.columns import TYPES, Row
from sklformat.interop.tables import jsonl
from sklformat.interop.tables.cells import Cell, Columns


class Sink(Protocol):
    """Where rows of one kind of file go."""

    def append(self, cells: Mapping[str, Cell]) -> None:
        """Add one row: a cell for each column."""

    def finish(self) -> None:
        """Complete the file."""

    def close(self) -> None:
        """Let everything go, finished or not."""


SUFFIXES = {
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather"),
    "jsonl": (".jsonl",),
    "npz": (".npz",),
    "safetensors": (".safetensors",),
}
"""Endings of the files of each kind."""
_IN_PARTS = ("parquet", "arrow", "jsonl")  # kinds of which a directory holds a data set in several files


@dataclass(frozen=True, slots=True)
class Table:
    """
    Rows of a file, or of all files of one kind in a directory, one after the other.

    Attributes:
        kind: A key of ``SUFFIXES``.
        parts: The files, in the order of the numbers in their names.
        names: Of the columns.
        note: What a cache that was written here said of itself, or None.
    """

    kind: str
    parts: tuple[Path, ...]
    names: frozenset[str]
    note: dict[str, Any] | None

    def rows(self, names: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
        """
        Values of the columns ``names`` of each row from number ``start`` on: lists of numbers as ``Cell``, anything
        else as Python has it; nulls in place of inner lists are empty lists.

        Raises:
            CorruptError: A file is damaged, lacks a column, or has cells without value; names file and row.
        """
        read = _reader(self.kind)
        if len(self.parts) == 1:
            yield from read(self.parts[0], names, start)
            return
        for path in self.parts:
            if self.kind == "parquet" and start and (count := _kind_module("parquet").count_rows(path)) <= start:
                start -= count
                continue
            for row in read(path, names, 0):
                if not start:
                    yield row
                start = max(start - 1, 0)


def table_kind(path: Path) -> str | None:
    """The kind of table that a path's name, or the names in a directory, say; None: none, or several."""
    names = list(path.iterdir()) if path.is_dir() else [path]
    kinds = {kind for kind, suffixes in SUFFIXES.items() if any(name.suffix in suffixes for name in names)}
    return kinds.pop() if len(kinds) == 1 else None


def open_table(path: Path, kind: str) -> Table:
    """
    The table of a kind at a path.

    Raises:
        CorruptError: A file is damaged, or its note is.
        IsADirectoryError: A directory, of a kind that has one file.
        FileNotFoundError: The directory holds no such file.
        ModuleNotFoundError: Parquet or Arrow without pyarrow.
        OSError: The system's own.
    """
    parts = find_parts(path, kind)
    module = _kind_module(kind)
    names, text = (module.read_arrow_head if kind == "arrow" else module.read_head)(parts[0])
    note = None if text is None or len(parts) > 1 else jsonl.parse_object(text, path, "note")
    return Table(kind, parts, frozenset(names), note)


def find_parts(path: Path, kind: str) -> tuple[Path, ...]:
    """
    The files of a kind that a path names, in the order of the numbers in their names.

    Raises:
        IsADirectoryError, FileNotFoundError: As ``open_table``.
    """
    if not path.is_dir():
        return (path,)
    if kind not in _IN_PARTS:
        raise IsADirectoryError(f"{path}: is a directory, {kind} is a file; give the file, or --from skl")
    parts = sorted((file for file in path.iterdir() if file.suffix in SUFFIXES[kind]), key=natural)
    if not parts:
        raise FileNotFoundError(f"{path}: holds no file that ends in {' or '.join(SUFFIXES[kind])}")
    return tuple(parts)


def natural(path: Path) -> list[tuple[int, str]]:
    """The key that sorts ``data_2`` before ``data_10``."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _reader(kind: str) -> Any:
    module = _kind_module(kind)
    return module.read_arrow_cells if kind == "arrow" else module.read_cells


def _kind_module(kind: str) -> Any:
    """The module of a kind of file; that of Parquet and Arrow loads pyarrow, an extra."""
    name = "parquet" if kind == "arrow" else kind
    return importlib.import_module(f"sklformat.interop.tables.{name}")


def check_absent(path: Path) -> None:
    """
    Nothing is where a file is to be written.

    Raises:
        FileExistsError: Something is.
    """
    if path.exists():
        raise FileExistsError(f"{path}: exists already; choose another destination, or remove it first")


class TableWriter:
    """
    Write rows into one file; it gets its name when the context is left without an exception.

    Args:
        path: The file; must not exist.
        kind: "npz", "parquet" or "jsonl"; npz takes plain columns only.
        columns: Those of each row.
        note: Settings to carry along.

    Raises:
        FileExistsError: The file is there already.
        ModuleNotFoundError: Parquet without pyarrow.
    """

    def __init__(self, path: Path, kind: str, columns: Columns, note: Mapping[str, Any] | None = None) -> None:
        check_absent(path)
        self._path, self._kind = path, kind
        self._partial = path.with_name(path.name + ".partial")
        self._note = None if note is None else json.dumps(note, sort_keys=True)
        self._file = self._partial.open("wb")
        self._sink: Sink | None = None
        try:
            self._sink = _open_sink(kind, self._file, columns, self._note)
        except BaseException:
            self._discard()
            raise

    def append_cells(self, cells: Mapping[str, Cell]) -> None:
        """Add one row, a cell for each column."""
        assert self._sink is not None
        with naming(self._path):
            self._sink.append(cells)

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert self._sink is not None
                with naming(self._path):
                    self._sink.finish()
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._file.close()
                if self._kind == "jsonl" and self._note is not None:
                    write_atomically(jsonl.note_path(self._path), self._note.encode() + b"\n")
                Disk().rename(self._partial, self._path)
        finally:
            self._discard()

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # of bytes that nobody wants any more
            if self._sink is not None:
                self._sink.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._partial.unlink(missing_ok=True)


class ColumnsWriter(TableWriter):
    """
    Write sequences into one file of plain columns; as ``TableWriter``.

    Args:
        path: The file; must not exist.
        kind: "npz", "parquet" or "jsonl".
        values: "counts" or "logprobs".
        columns: Optional columns that every row has.
        note: Settings to carry along.
    """

    def __init__(self, path: Path, kind: str, values: str, columns: tuple[str, ...], note: Mapping[str, Any]) -> None:
        nested = {"token_ids", values, RECORD_LOGPROB}
        names = ("input_ids", "token_ids", values, *columns)
        super().__init__(path, kind, {name: (TYPES[name], 2 if name in nested else 1) for name in names}, note)
        self._values = values

    def __enter__(self) -> ColumnsWriter:
        return self

    def append(self, row: Row) -> None:
        """Add one sequence; its arrays have the lengths that ``Row`` says."""
        nested = {"token_ids": row.token_ids, self._values: row.values}
        flat = {"input_ids": row.input_ids} | dict(row.columns)
        nested |= {RECORD_LOGPROB: flat.pop(RECORD_LOGPROB)} if RECORD_LOGPROB in flat else {}
        cells = {name: Cell(values) for name, values in flat.items()}
        self.append_cells(cells | {name: Cell(values, (row.offsets,)) for name, values in nested.items()})


def _open_sink(kind: str, file: BinaryIO, columns: Columns, note: str | None) -> Sink:
    if kind == "jsonl":  # has no place for a note
        return jsonl.Sink(file, columns)
    sink: Sink = _kind_module(kind).Sink(file, columns, note)
    return sink
