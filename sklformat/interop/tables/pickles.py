"""
The only door to pickles: PyTorch's files, by its loader of tensors alone, and numpy's arrays of objects.

Neither runs anything that a file says.  Knows no rows.
"""

from __future__ import annotations

import io
import pickle
import re
import tokenize
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError

_TYPE = re.compile(r"[biuf][1248]|O8?")
_SPOILT = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    AssertionError,
    SyntaxError,
    MemoryError,
    tokenize.TokenError,
    zipfile.BadZipFile,
)  # fmt: skip  what a pickle that is cut short or altered may end in


def read_torch(path: Path, content: bytes | None = None) -> Any:
    """
    What ``torch.save`` wrote: lists, dictionaries, numbers and texts; tensors as arrays, bfloat16 as float32.

    A file is mapped where it is no older than PyTorch 1.6, so that only the tensors that one looks at are read.

    Args:
        path: The file, or where ``content`` lay.
        content: The file's bytes.

    Raises:
        CorruptError: It is no such file, is damaged, or holds objects other than tensors, which are never loaded.
        ModuleNotFoundError: PyTorch is missing.
        OSError: The system's own.
    """
    import torch  # noqa: PLC0415  an extra, needed only here

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        return value

    try:
        if content is None and zipfile.is_zipfile(path):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            source = io.BytesIO(path.read_bytes() if content is None else content)
            loaded = torch.load(source, map_location="cpu", weights_only=True)
        return plain(loaded)
    except _SPOILT as error:
        reason = str(error).strip().split("\n", 1)[0][:200]
        raise CorruptError(
            f"torch.load(weights_only=True) refuses it: {reason or type(error).__name__}", path=path
        ) from None


def pack_torch(content: Mapping[str, Any]) -> bytes:
    """
    What ``torch.save`` writes, always the same for the same version of PyTorch; arrays as tensors.

    Raises:
        ModuleNotFoundError: PyTorch is missing.
    """
    import torch  # noqa: PLC0415  an extra, needed only here

    file = io.BytesIO()
    is_array = {name: isinstance(value, np.ndarray) for name, value in content.items()}
    torch.save({name: torch.from_numpy(value) if is_array[name] else value for name, value in content.items()}, file)
    return file.getvalue()


def read_npy(file: BinaryIO, path: Path) -> NDArray[Any]:
    """
    An .npy array, of numbers, texts or objects; objects may be None, numbers, texts, lists, and arrays of these.

    Args:
        file: Open where the array begins; read whole.
        path: For errors.

    Raises:
        CorruptError: It is no array, is damaged, or asks for any other object.
        OSError: The system's own.
    """
    try:
        content = io.BytesIO(file.read())
        shape, fortran, dtype = _read_header(content)
        rest = content.read()
        if not dtype.hasobject:
            return np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran else "C")
        array = _Unpickler(io.BytesIO(rest)).load()
        objects: NDArray[Any] | None = array.value if isinstance(array, _Array) else None
    except _SPOILT as error:
        raise CorruptError(f"array of objects: {error}", path=path) from None
    if objects is None or objects.shape != shape:
        raise CorruptError("its objects are no array of the shape that its header says", path=path)
    return objects


def _read_header(content: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(content)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote
        return read(content)


class _Type:
    """Stands for a ``numpy.dtype`` while a pickle is read: what is not known to be harmless is refused."""

    def __init__(self, name: str, *_flags: bool) -> None:
        if not _TYPE.fullmatch(name):
            raise ValueError(f"type {name!r} is not of numbers or objects")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, parts, names, fields, *_ = state
        if (parts, names, fields) != (None, None, None):
            raise ValueError("a type with fields is not of numbers or objects")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for a ``numpy.ndarray`` while a pickle is read."""

    def __init__(self, *_new: object) -> None:
        self._value: NDArray[Any] | None = None

    @property
    def value(self) -> NDArray[Any]:
        if self._value is None:
            raise ValueError("an array without content")
        return self._value

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        if kind.dtype.hasobject:  # a list, in the order of C whatever the array's is
            flat = np.empty(len(content), object)
            for i, one in enumerate(content):
                flat[i] = one.value if isinstance(one, _Array) else one
            self._value = flat.reshape(shape)
        else:
            flat = np.frombuffer(content, kind.dtype).astype(kind.dtype.newbyteorder("="))
            self._value = flat.reshape(shape, order="F" if fortran else "C")


_STANDINS = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Type,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray._reconstruct": _Array,
}


class _Unpickler(pickle.Unpickler):
    """Knows the names of arrays and their types, and calls none of them."""

    def find_class(self, module: str, name: str) -> Any:
        if (known := _STANDINS.get(f"{module}.{name}")) is None:
            raise ValueError(f"asks for {module}.{name}, which is never loaded; only arrays are")
        return known
