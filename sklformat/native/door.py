"""
Handing arrays to C, and its status back as an exception; every call of this package goes through here.

Buffers stay referenced by a typed ``from_buffer`` handle for the length of the call; cffi releases the GIL.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import STATUS_ERRORS

# By name, since the graph of imports that lint-imports checks knows Python files only.
_compiled: Any = import_module("sklformat._native")
ffi, lib = _compiled.ffi, _compiled.lib

NULL = ffi.NULL


_STATUS_NAMES: dict[int, str] = {value: name for name, value in ffi.typeof("skl_status").relements.items()}


_REASONS: dict[str, str] = {
    "SKL_REASON_SHAPE": "sizes contradict each other (position {position}, got {value})",
    "SKL_REASON_ID_RANGE": "position {position}: token id {value} is not below vocab_size",
    "SKL_REASON_ID_ORDER": "position {position}: token id {value} comes twice or out of order; ids must rise strictly",
    "SKL_REASON_ID_TWICE": "position {position}: token id {value} comes twice",
    "SKL_REASON_COUNT_RANGE": "position {position}: count {value} is not in 1..rounds",
    "SKL_REASON_COUNT_SUM": "position {position}: counts sum to {value}, not to rounds",
    "SKL_REASON_WEIGHT_RANGE": "position {position}: weight number {value} is not in (0, scale]",
    "SKL_REASON_NUM_RECORDS": "position {position}: {value} records do not fit; set record_count_size=2 (up to 65535)",
    "SKL_REASON_RATIO_ZERO": "position {position}: ratio code {value} takes the weight to zero",
    "SKL_REASON_RESERVED": "position {position}: the reserved bit of record number {value} is set",
    "SKL_REASON_TOKEN_RANGE": "token number {position} of the sequence is {value}, not below vocab_size",
    "SKL_REASON_PADDING": "padding at payload byte {value} is not zero",
    "SKL_REASON_NOT_FINITE": "position {position}: the logits hold NaN, +inf or a value above 2**20, or none above "
    "-2**20 (first at id {value})",
}


_REASON_TEXTS: dict[int, str] = {
    value: _REASONS[name] for name, value in ffi.typeof("skl_reason").relements.items() if name != "SKL_REASON_NONE"
}


def view(ctype: str, array: NDArray[Any] | None, *, writable: bool = False) -> Any:
    """Hand a C-contiguous array to C as ``ctype`` (such as "uint8_t[]"), NULL for None; keep the result referenced."""
    return NULL if array is None else ffi.from_buffer(ctype, array, require_writable=writable)


def expect(array: NDArray[Any] | None, size: int, dtype: type[Any]) -> None:
    """
    C trusts the lengths and types of what it is handed; here they are made sure of.  None is an array that is absent.

    Raises:
        ValueError: The array has another size or type, or gaps.
    """
    if array is not None and not (array.size == size and array.dtype == dtype and array.flags.c_contiguous):
        raise ValueError(
            f"C needs {size} {np.dtype(dtype).name} in one piece, got {array.size} {array.dtype.name}; "
            "was an array changed after it was handed over?"
        )


def address_of(buffer: memoryview) -> int:
    """Address of the first byte; good only while whoever owns the memory keeps it."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def check(status: int, fault: Any = None, where: str = "") -> None:
    """
    Raise what a C status means; the message begins with ``where``.

    Raises:
        ValueError, CorruptError, TruncatedError, UnsupportedError, RingClosedError, RingTimeoutError: As STATUS_ERRORS.
    """
    if status == lib.SKL_OK:
        return
    name = _STATUS_NAMES[status]
    text = name
    if fault is not None and fault.reason:
        text = _REASON_TEXTS[fault.reason].format(position=fault.position, value=fault.value)
    raise STATUS_ERRORS[name](where + text)


def use_kernels(name: str) -> None:
    """
    Make the sampler run on "avx512", "avx2", "neon" or "portable" kernels; all give the same records.

    Raises:
        UnsupportedError: This processor, or this build, does not have them.
    """
    check(lib.skl_use_kernels(name.encode()))


def kernels_name() -> str:
    """Name of the kernels that the sampler runs on."""
    return str(ffi.string(lib.skl_kernels_name()).decode())
