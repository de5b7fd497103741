"""
Write plain columns in npz, Parquet and JSONL; ``columns`` says how they are laid out.

A file gets its name when it is whole.  JSONL and Parquet are written in constant memory, npz through temporary files.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sklformat.disk import Disk, write_atomically
from sklformat.interop.columns import NOTE, TYPES, Row, note_path, offsets_of

_GROUP_RECORDS = 1 << 20  # records of one Parquet row group, about


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
        if path.exists():
            raise FileExistsError(f"{path}: exists already; choose another destination, or remove it first")
        self._path, self._kind = path, kind
        self._partial = path.with_name(path.name + ".partial")
        self._note = json.dumps(note, sort_keys=True)
        self._file = self._partial.open("wb")
        names = ("input_ids", "token_ids", values, *columns)
        self._sink: _JsonlSink | _NpzSink | _ParquetSink | None = None
        try:
            if kind == "jsonl":
                self._sink = _JsonlSink(self._file, names)
            else:
                self._sink = (_NpzSink if kind == "npz" else _ParquetSink)(self._file, names, self._note)
        except BaseException:
            self._discard()
            raise

    def append(self, row: Row) -> None:
        """Add one sequence; its arrays have the lengths that ``Row`` says."""
        assert self._sink is not None
        self._sink.append(row)

    def __enter__(self) -> ColumnsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert self._sink is not None
                self._sink.finish()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                if self._kind == "jsonl":
                    write_atomically(note_path(self._path), self._note.encode() + b"\n")
                Disk().rename(self._partial, self._path)
        finally:
            self._discard()

    def _discard(self) -> None:
        if self._sink is not None:
            self._sink.close()
        self._file.close()
        self._partial.unlink(missing_ok=True)


class _JsonlSink:
    def __init__(self, file: BinaryIO, names: tuple[str, ...]) -> None:
        self._file, self._names = file, names

    def append(self, row: Row) -> None:
        bounds = list(itertools.pairwise(row.offsets.tolist()))
        line: dict[str, Any] = {"input_ids": row.input_ids.tolist()}
        for name, values in zip(self._names[1:3], (row.token_ids.tolist(), row.values.tolist()), strict=True):
            line[name] = [values[begin:end] for begin, end in bounds]
        line |= {name: row.columns[name].astype(float).tolist() for name in self._names[3:]}
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class _NpzSink:
    """Columns grow in temporary files, since a zip file takes one member after the other."""

    def __init__(self, file: BinaryIO, names: tuple[str, ...], note: str) -> None:
        self._file, self._note = file, note
        self._types = {name: np.dtype(TYPES[name]) for name in names}
        self._types |= dict.fromkeys(("sequence_offsets", "position_offsets"), np.dtype(np.int64))
        self._spools: dict[str, Any] = {name: tempfile.TemporaryFile() for name in self._types}  # noqa: SIM115  until finish
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


class _ParquetSink:
    def __init__(self, file: BinaryIO, names: tuple[str, ...], note: str) -> None:
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415

        self._names, self._rows, self._records = names, list[Row](), 0
        types = [pa.list_(pa.from_numpy_dtype(TYPES[name])) for name in names]
        types[1:3] = [pa.list_(inner) for inner in types[1:3]]
        schema = pa.schema(list(zip(names, types, strict=True)), metadata={NOTE: note})
        self._writer = pq.ParquetWriter(file, schema)

    def append(self, row: Row) -> None:
        self._rows.append(row)
        self._records += row.token_ids.size + row.offsets.size
        if self._records >= _GROUP_RECORDS:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa  # noqa: PLC0415

        rows, self._rows, self._records = self._rows, [], 0

        def lists(name: str, parts: list[NDArray[Any]]) -> Any:
            flat = pa.array(np.concatenate(parts).astype(TYPES[name]))
            return pa.ListArray.from_arrays(offsets_of([part.size for part in parts]).astype(np.int32), flat)

        def nested(name: str, parts: list[NDArray[Any]]) -> Any:
            inner = offsets_of(np.concatenate([np.diff(row.offsets) for row in rows])).astype(np.int32)
            flat = pa.array(np.concatenate(parts).astype(TYPES[name]))
            outer = offsets_of([row.offsets.size - 1 for row in rows]).astype(np.int32)
            return pa.ListArray.from_arrays(outer, pa.ListArray.from_arrays(inner, flat))

        arrays = [
            lists("input_ids", [row.input_ids for row in rows]),
            nested("token_ids", [row.token_ids for row in rows]),
            nested(self._names[2], [row.values for row in rows]),
        ]
        arrays += [lists(name, [row.columns[name] for row in rows]) for name in self._names[3:]]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._writer.schema))

    def finish(self) -> None:
        if self._rows:
            self._write_group()
        self._writer.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # only where writing failed already; the file is thrown away
            self._writer.close()
