"""Plain columns as npz: flat arrays, nothing pickled.  Reads a file whole, writes it through temporary files."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError
from sklformat.format.columns import RECORD_LOGPROB, STARTS
from sklformat.interop.columns import NOTE, TYPES, Row, check_size, no_sequence, typed


def read_head(path: Path) -> tuple[set[str], str | None]:
    """Names of the arrays, and the note."""
    with _opened(path) as arrays:
        names = set(arrays.files)
        return names, str(arrays[NOTE]) if NOTE in names else None


def read_rows(path: Path, values: str, columns: tuple[str, ...]) -> Iterator[Row]:
    """As ``files.read_rows``; all arrays are in memory."""
    with _opened(path) as file:
        names = ("input_ids", "token_ids", values, *columns)
        missing = [name for name in (*names, "sequence_offsets", "position_offsets") if name not in file.files]
        if missing:
            raise ValueError(f"no array {missing[0]!r}, only {', '.join(file.files)}")
        arrays = {name: typed(file[name], name) for name in names}
        tokens = _checked_offsets(file["sequence_offsets"], arrays["input_ids"].size, "sequence_offsets")
        records = _checked_offsets(file["position_offsets"], arrays["token_ids"].size, "position_offsets")
        positions, count = records.size - 1, tokens.size - 1
        if arrays[values].size != arrays["token_ids"].size:
            raise ValueError(f"{arrays['token_ids'].size} token_ids, but {arrays[values].size} {values}")
        if count < 1:
            raise no_sequence(path)
        # L rows per sequence are taken as they are; the caller decides whether they are right.
        rows_less = 0 if positions == arrays["input_ids"].size else 1
        starts = tokens - rows_less * np.arange(count + 1)
        if positions != starts[-1] or (np.diff(starts) < 0).any():
            raise ValueError(f"{positions} positions do not fit {count} sequences of {arrays['input_ids'].size} tokens")
        sizes = dict.fromkeys(columns, (positions, "positions"))
        sizes |= {STARTS: (arrays["input_ids"].size, "tokens"), RECORD_LOGPROB: (arrays["token_ids"].size, "token_ids")}
        for name in columns:
            check_size(name, arrays[name], *sizes[name])
    for s in range(count):
        first, last = int(starts[s]), int(starts[s + 1])
        begin, end = int(records[first]), int(records[last])
        parts = dict.fromkeys(columns, slice(first, last))
        parts |= {STARTS: slice(tokens[s], tokens[s + 1]), RECORD_LOGPROB: slice(begin, end)}
        yield Row(
            arrays["input_ids"][tokens[s] : tokens[s + 1]],
            arrays["token_ids"][begin:end],
            arrays[values][begin:end],
            records[first : last + 1] - begin,
            {name: arrays[name][parts[name]] for name in columns},
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise CorruptError("not an npz file", path=path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise CorruptError(f"npz: {error}", path=path) from None


def _checked_offsets(offsets: NDArray[Any], end: int, name: str) -> NDArray[np.int64]:
    if offsets.ndim != 1 or offsets.size < 1 or offsets.dtype.kind not in "iu":
        raise ValueError(f"{name} is not a list of integers")
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
        raise ValueError(f"{name} does not rise from 0 to {end}")
    return offsets


class Sink:
    """As ``files.Sink``. Columns grow in temporary files, since a zip file takes one member after the other."""

    def __init__(self, file: BinaryIO, names: tuple[str, ...], note: str) -> None:
        self._file, self._note = file, note
        self._types: dict[str, np.dtype[Any]] = {name: np.dtype(TYPES[name]) for name in names}
        self._types |= dict.fromkeys(("sequence_offsets", "position_offsets"), np.dtype(np.int64))
        beside = Path(file.name).parent  # where there is room for the file there is room for its columns
        self._spools: dict[str, Any] = {}
        for name in self._types:
            self._spools[name] = tempfile.TemporaryFile(dir=beside)  # noqa: SIM115  close() does
        self._sizes = dict.fromkeys(self._types, 0)
        self._values = names[2]
        self._add("sequence_offsets", np.zeros(1))
        self._add("position_offsets", np.zeros(1))

    def append(self, row: Row) -> None:
        records = self._sizes["token_ids"]
        self._add("input_ids", row.input_ids)
        self._add("token_ids", row.token_ids)
        self._add(self._values, row.values)
        self._add("sequence_offsets", np.array([self._sizes["input_ids"]]))
        self._add("position_offsets", row.offsets[1:] + records)
        for name, values in row.columns.items():
            self._add(name, values)

    def _add(self, name: str, values: NDArray[Any]) -> None:
        self._spools[name].write(values.astype(self._types[name]).tobytes())
        self._sizes[name] += values.size

    def finish(self) -> None:
        with zipfile.ZipFile(self._file, "w") as archive:
            for name, dtype in self._types.items():
                head = {"descr": dtype.str, "fortran_order": False, "shape": (self._sizes[name],)}
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, head)
                    self._spools[name].seek(0)
                    shutil.copyfileobj(self._spools[name], member)
            with archive.open(zipfile.ZipInfo(f"{NOTE}.npy"), "w") as member:
                np.lib.format.write_array(member, np.array(self._note), allow_pickle=False)

    def close(self) -> None:
        for spool in self._spools.values():
            spool.close()
