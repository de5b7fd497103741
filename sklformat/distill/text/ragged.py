"""
Ragged arrays of ``mmap_ninja``; the only door to it.

Its ``RaggedMmap`` makes a directory that is not there and believes its index, hence the checks around it.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmap_ninja import RaggedMmap
from mmap_ninja import numpy as ninja_arrays
from numpy.typing import NDArray

from sklformat.errors import CorruptError

_INDEX_ROOM = 1 << 20  # for the index files of a batch, and the file system's own
_FAULTS = (FileNotFoundError, ValueError, TypeError, AttributeError, struct.error)


def write_ragged(directory: Path, batches: Iterable[list[NDArray[Any]]]) -> None:
    """
    Write arrays of one dimension into a new directory, one after the other; a batch, not empty, in one go.

    Raises:
        OSError: The disk is full; noticed before, since RaggedMmap writes through a mapping, which kills the process.
    """
    per_batch: list[NDArray[np.int64]] = []
    for batch in batches:
        _check_room(directory.parent, sum(array.nbytes for array in batch) + _INDEX_ROOM)
        if not per_batch:
            RaggedMmap.from_lists(directory, batch)
        else:
            ninja_arrays.extend_dir(directory, np.concatenate(batch))
        per_batch.append(np.array([len(array) for array in batch], np.int64))
    if len(per_batch) < 2:
        return
    # RaggedMmap's own extend reads the whole index for each batch; here what is behind the first comes at once.
    lengths, first = np.concatenate(per_batch), len(per_batch[0])
    ends = np.cumsum(lengths)
    index = {"starts": ends - lengths, "ends": ends, "flattened_shapes": lengths, "shapes": lengths[:, None]}
    for name, values in index.items():
        ninja_arrays.extend_dir(directory / name, values[first:])


def parts_of_ragged(directory: Path) -> tuple[list[NDArray[Any]], NDArray[Any], NDArray[Any]]:
    """
    What a directory of ``write_ragged`` consists of: starts, ends and lengths; shapes; all values in a row.

    Raises:
        ValueError: It cannot be opened.
    """
    try:
        ragged = RaggedMmap(directory, mode="r")
        index = [np.asarray(part) for part in (ragged.starts, ragged.ends, ragged.flattened_shapes)]
        return index, np.asarray(ragged.shapes), np.asarray(ragged.memmap)
    except _FAULTS as error:
        raise ValueError(str(error)) from error


def open_ragged(source: Path) -> Iterator[NDArray[np.integer[Any]]]:
    """
    The arrays of a RaggedMmap, views into it; checked at the call.

    Raises:
        FileNotFoundError: No RaggedMmap there.
        CorruptError: Its files contradict each other, or hold no integers.
    """
    starts, ends, tokens = _checked_parts(source)
    return (tokens[start:end] for start, end in zip(starts, ends, strict=True))


def first_of_ragged(source: Path) -> NDArray[np.integer[Any]]:
    """
    What each array of a RaggedMmap begins with; those that are empty begin with nothing.

    Raises:
        FileNotFoundError, CorruptError: As ``open_ragged``.
    """
    starts, ends, tokens = _checked_parts(source)
    return tokens[starts[starts < ends]]


def _checked_parts(source: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.integer[Any]]]:
    kind = source / "type.ninja"
    if not kind.is_file() or kind.read_text() != "ragged":
        raise FileNotFoundError(
            f"{source} is no token store and no RaggedMmap of mmap_ninja: "
            "it has no store.json, and no type.ninja of a ragged one"
        )
    try:
        ragged = RaggedMmap(source, mode="r")
        starts, ends = (np.array(part, np.int64) for part in (ragged.starts, ragged.ends))
        tokens = np.asarray(ragged.memmap)
    except _FAULTS as error:
        raise CorruptError(f"cannot be opened as a RaggedMmap: {error}; make it again", path=source) from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise CorruptError(f"holds {tokens.dtype} of shape {tokens.shape}, must be token ids", path=source)
    inside = starts.shape == ends.shape and (starts >= 0).all() and (starts <= ends).all()
    if not inside or (ends.size and ends.max() > tokens.size):
        raise CorruptError("its index points outside of its tokens; make it again", path=source)
    return starts, ends, tokens


def open_ninja(path: Path) -> Any:
    """An mmap-ninja store, ragged or one array, read-only, whose [i] is its i-th array; None: this is no such store."""
    if (path / "shapes_are_flat.ninja").is_file():
        return RaggedMmap(path, mode="r")
    return ninja_arrays.open_existing(path, mode="r") if (path / "data.ninja").is_file() else None


def _check_room(directory: Path, size_bytes: int) -> None:
    """RaggedMmap writes through a mapping: where the disk is full, that kills the process instead of failing."""
    if shutil.disk_usage(directory).free < size_bytes:
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}; the tokens need {size_bytes} bytes more", str(directory)
        )
