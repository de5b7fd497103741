"""The only door to array_record: records of ArrayRecord files, by their numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from sklformat.errors import CorruptError

_OPTIONS = "readahead_buffer_size:0"  # records are asked for by number


class Records:
    """
    The records of an open file.

    Args:
        reader: An ``ArrayRecordReader``.
        path: For errors.
    """

    def __init__(self, reader: Any, path: Path) -> None:
        self._reader, self._path = reader, path

    def __len__(self) -> int:
        return int(self._reader.num_records())

    def read(self, begin: int, end: int) -> list[bytes]:
        """
        Records from number ``begin`` to before ``end``.

        Raises:
            CorruptError: The file is damaged there.
        """
        return list(self._reader.read(list(range(begin, end))))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Records]:
    """
    The records of an ArrayRecord file.

    Raises:
        CorruptError: It is no such file, was cut short, or what is read of it inside the context is damaged.
        OSError: The system's own.
    """
    with path.open("rb"):  # the system's own errors, which the library words differently
        pass
    try:
        reader = ArrayRecordReader(str(path), _OPTIONS)
        try:
            if not reader.ok():
                reader.read([0])  # says why, if it can
                raise RuntimeError
            yield Records(reader, path)
        finally:
            reader.close()
    except (RuntimeError, IndexError) as error:
        reason = str(error).split("; ", 1)[0] or "its end, which tells where records are, is missing"
        raise CorruptError(f"array_record: {reason}; copy the file again, or leave it out", path=path) from None
