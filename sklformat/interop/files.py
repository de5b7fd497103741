"""
Files of plain columns of any kind: their contents, their rows, and a writer.

A file that is written gets its name when it is whole.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from sklformat.files.disk import Disk, naming, write_atomically
from sklformat.interop import jsonl
from sklformat.interop.columns import Row


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file says of itself: names of its columns, and the note of the cache it came from, or None."""

    names: frozenset[str]
    note: dict[str, Any] | None


class Sink(Protocol):
    """Where rows of one kind of file go."""

    def append(self, row: Row) -> None:
        """Add one sequence."""

    def finish(self) -> None:
        """Complete the file."""

    def close(self) -> None:
        """Let everything go, finished or not."""


def _kind_module(kind: str) -> Any:
    """The module of a kind of file; that of Parquet loads pyarrow, an extra."""
    return importlib.import_module(f"sklformat.interop.{kind}")


def read_contents(path: Path, kind: str) -> Contents:
    """
    The columns and the note of a file of kind "npz", "parquet" or "jsonl".

    Raises:
        CorruptError: It is no such file, or its note is no JSON object.
        ModuleNotFoundError: Parquet without pyarrow.
        OSError: The system's own.
    """
    names, text = _kind_module(kind).read_head(path)
    return Contents(frozenset(names), None if text is None else jsonl.parse_object(text, path, "note"))


def read_rows(path: Path, kind: str, values: str, columns: tuple[str, ...] = ()) -> Iterator[Row]:
    """
    Every sequence of a file, in order.

    Args:
        path: The file.
        kind: "npz", "parquet" or "jsonl".
        values: The column that goes with ``token_ids``: "counts" or "logprobs".
        columns: Optional columns to read.

    Raises:
        CorruptError: The file is damaged, a column is missing, has holes, or is no list of numbers.
        ModuleNotFoundError: Parquet without pyarrow.
    """
    rows: Iterator[Row] = _kind_module(kind).read_rows(path, values, columns)
    return rows


def check_absent(path: Path) -> None:
    """
    Nothing is where a file is to be written.

    Raises:
        FileExistsError: Something is.
    """
    if path.exists():
        raise FileExistsError(f"{path}: exists already; choose another destination, or remove it first")


class ColumnsWriter:
    """
    Write sequences into one file of plain columns; it gets its name when the context is left without an exception.

    Args:
        path: The file; must not exist.
        kind: "npz", "parquet" or "jsonl".
        values: "counts" or "logprobs".
        columns: Optional columns that every row has.
        note: Settings to carry along.

    Raises:
        FileExistsError: The file is there already.
        ModuleNotFoundError: Parquet without pyarrow.
    """

    def __init__(self, path: Path, kind: str, values: str, columns: tuple[str, ...], note: Mapping[str, Any]) -> None:
        check_absent(path)
        self._path, self._kind = path, kind
        self._partial = path.with_name(path.name + ".partial")
        self._note = json.dumps(note, sort_keys=True)
        self._file = self._partial.open("wb")
        names = ("input_ids", "token_ids", values, *columns)
        self._sink: Sink | None = None
        try:
            self._sink = _open_sink(kind, self._file, names, self._note)
        except BaseException:
            self._discard()
            raise

    def append(self, row: Row) -> None:
        """Add one sequence; its arrays have the lengths that ``Row`` says."""
        assert self._sink is not None
        with naming(self._path):
            self._sink.append(row)

    def __enter__(self) -> ColumnsWriter:
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
                if self._kind == "jsonl":
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


def _open_sink(kind: str, file: BinaryIO, names: tuple[str, ...], note: str) -> Sink:
    if kind == "jsonl":  # has no place for a note
        return jsonl.Sink(file, names)
    sink: Sink = _kind_module(kind).Sink(file, names, note)
    return sink
