"""The only door to h5py: arrays of an HDF5 file, read in slices.  Follows no link to another file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError


class Arrays:
    """
    The arrays of an open file.

    Args:
        file: An ``h5py.File``.
        path: For errors.
    """

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path = file, path

    def __contains__(self, name: str) -> bool:
        with _damage(self._path):
            return name in self._file

    def length(self, name: str, kinds: str) -> int:
        """
        The length of a flat array whose type is of these kinds.

        Raises:
            CorruptError: There is none of this name, or it is something else.
        """
        array = self._get(name)
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise CorruptError(f"{name} is {array.dtype} with {array.ndim} axes", path=self._path)
        return int(array.shape[0])

    def read(self, name: str, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """
        Rows of an array from ``begin`` to ``end``.

        Raises:
            CorruptError: There is none of this name, or what is read of it is damaged.
        """
        array = self._get(name)
        with _damage(self._path):
            return np.asarray(array[begin:end])

    def attribute(self, group: str, name: str) -> int:
        """
        A whole number among a group's attributes.

        Raises:
            CorruptError: There is none.
        """
        with _damage(self._path):
            found = self._file[group].attrs.get(name)
        if not isinstance(found, int | np.integer):
            raise CorruptError(f"{group} has {name} {found!r}, must be an integer", path=self._path)
        return int(found)

    def _get(self, name: str) -> Any:
        with _damage(self._path):
            array = self._file.get(name)
        if not isinstance(array, h5py.Dataset):
            raise CorruptError(f"has no array named {name}", path=self._path)
        if array.is_virtual or array.external or array.file != self._file:
            raise CorruptError(f"{name} lies in another file; only what is here is read", path=self._path)
        return array


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Arrays]:
    """
    The arrays of an HDF5 file.

    Raises:
        CorruptError: It is no such file, or is damaged.
        OSError: The system's own.
    """
    with path.open("rb"):  # the system's own errors, which h5py words differently
        pass
    with _damage(path):
        file = h5py.File(path, "r")
    with file:
        yield Arrays(file, path)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Say that it is the file that h5py complains of."""
    try:
        yield
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise CorruptError(f"hdf5: {error}", path=path) from None
