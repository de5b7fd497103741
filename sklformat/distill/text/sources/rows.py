"""
The rows of all files that a user chose: one stream of named fields, whatever kind of file each is.

Knows no documents and no chats; a function makes these of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sklformat.distill.text.sources import json_rows, prose, streams
from sklformat.distill.text.sources.selection import File, find_files
from sklformat.errors import FormatError
from sklformat.progress import say
from sklformat.settings.files import TextFiles

_PACKED = (".gz", ".zst")
_NAMED_FILES = 10  # of those that are skipped

Made = TypeVar("Made")


class Row(NamedTuple):
    """
    One row of a file or a dataset.

    Attributes:
        name: File and number, ``a/b.jsonl#17``; a plain text file's has no number, unless it is one of its parts.
        place: Where it stands, for messages: ``data/a/b.jsonl: line 18``.
        values: Its fields. A plain text file is one row, its text in the field that was asked for.
    """

    name: str
    place: str
    values: Mapping[str, Any]


class UnlikeError(ValueError):
    """Rows are of unlike kinds. None of their files is bad: which to leave out is for their user to say."""


def read_made(
    files: TextFiles, make: Callable[[Row], Made | None], *, wanted: Collection[str] | None = None
) -> Iterator[Made]:
    """
    What a function makes of the rows of all files, in order; one row is in memory at a time.

    With ``on_bad_file`` "skip", a file that holds a row which cannot be read, or of which ``make`` makes nothing but a
    ``ValueError`` (``UnlikeError`` apart), is left out whole: every file is read twice. Those left out are named on
    stderr at the end.

    Args:
        files: The choice; looked at in the call, the content of the files later.
        make: From a row to what is wanted; None leaves the row out.
        wanted: Fields that will be looked at; others may be left out where that saves reading. None: all.

    Yields:
        What was made.

    Raises:
        FileNotFoundError, PermissionError: A path does not exist or cannot be read; in the call for the paths given.
        ValueError: No file, or one that cannot be read as what it should be; with file and line, row, or byte.
        CorruptError: A damaged Parquet or Arrow file.
        ModuleNotFoundError: A kind of file that needs pyarrow or zstandard, which is not installed.
    """
    found = find_files(files)

    def made(file: File) -> Iterator[Made]:
        for row in _rows_of(file, files, wanted):
            if (one := make(row)) is not None:
                yield one

    if files.on_bad_file == "refuse":
        return itertools.chain.from_iterable(map(made, found))
    return _skipping(found, made)


def _skipping(found: list[File], made: Callable[[File], Iterator[Made]]) -> Iterator[Made]:
    faults: list[str] = []
    for file in found:
        try:
            for _ in made(file):
                pass
        except UnlikeError:
            raise
        except (ValueError, FormatError, PermissionError) as error:
            faults.append(" ".join(str(error).split()))
            continue
        yield from made(file)
    if faults:
        shown = [*faults[:_NAMED_FILES], *([f"and {len(faults) - _NAMED_FILES} more"] * (len(faults) > _NAMED_FILES))]
        say(f"skipped {len(faults)} of {len(found)} files, which cannot be read: {'; '.join(shown)}")


def _rows_of(file: File, files: TextFiles, wanted: Collection[str] | None) -> Iterator[Row]:
    try:
        for number, place, values in _numbered(file.path, files, wanted):
            name = file.name if number is None else f"{file.name}#{number}"
            yield Row(name, f"{file.path}: {place}" if place else str(file.path), values)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _numbered(
    path: Path, files: TextFiles, wanted: Collection[str] | None
) -> Iterable[tuple[int | None, str, Mapping[str, Any]]]:
    """Number, place and fields of the rows of one file, which is of the kind that its name says."""
    packed = path.suffix.lower() in _PACKED
    kind = Path(path.stem).suffix.lower() if packed else path.suffix.lower()
    if kind in (".parquet", ".arrow"):
        if packed:
            raise ValueError(
                f"cannot be read before it is unpacked; such files are compressed inside, without {path.suffix}"
            )
        from sklformat.distill.text.sources import tables  # noqa: PLC0415  loads pyarrow, an extra

        if kind == ".arrow":
            return tables.read_arrow(path, wanted)
        return tables.read_parquet(path, wanted, max_unpack_ratio=files.max_unpack_ratio)
    pieces = streams.read_text(path, files.encoding, max_unpack_ratio=files.max_unpack_ratio)
    if kind in (".jsonl", ".ndjson"):
        return json_rows.read_lines(_without_mark(pieces))
    if kind == ".json":
        return json_rows.read_array(_without_mark(pieces))
    return (
        (number, "" if number is None else f"part {number}", {files.text_field: text})
        for number, text in prose.read_prose(pieces)
    )


def _without_mark(pieces: Iterator[str]) -> Iterator[str]:
    """Without the byte order mark that some programs begin UTF-8 with."""
    return itertools.chain((next(pieces, "").removeprefix("\ufeff"),), pieces)
