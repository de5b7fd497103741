"""
The training program's own tokens, whatever holds them: one way to ask for the tokens of a sequence.

Recognises what it is given by what it can do and imports nothing for it; opens no cache.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sized
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sklformat.checksums import check_integers

COLUMN = "input_ids"
"""The field that is taken from rows with fields, such as those of a ``datasets.Dataset``."""


class Indexed(Protocol):
    """Gives the seq_len + 1 token ids of a global sequence number, or a mapping that has them as "input_ids"."""

    def __getitem__(self, index: int, /) -> Any: ...


TokenSource = Indexed | Callable[[int], Any]


class Tokens:
    """
    Sequences of tokens by number, out of any of these:

    * a numpy array or memory map [N, seq_len + 1] of integers (a flat stream of tokens has no sequences: give a
      function that cuts it);
    * anything else that is indexed by the number, such as a list, an ``mmap_ninja.RaggedMmap`` or a column
      ``dataset["input_ids"]``;
    * a ``datasets.Dataset``, or anything whose rows are mappings with the field "input_ids";
    * a function from the number to the tokens.

    Asks the source in one thread at a time.  Pickled, memory maps are their files, which are opened again where they
    arrive; everything else is pickled as it is.

    Args:
        source: As above.

    Raises:
        TypeError: It is none of these.
        ValueError: An array that does not have two dimensions of integers.
    """

    def __init__(self, source: TokenSource) -> None:
        if not (hasattr(source, "__getitem__") or callable(source)):
            raise TypeError(
                f"tokens must be indexed by the sequence number or be a function of it, got {type(source).__name__}"
            )
        if isinstance(source, np.ndarray) and source.ndim != 2:
            raise ValueError(
                f"an array of tokens has the shape [sequences, seq_len + 1], got {source.shape}; of a flat stream "
                "give a function: tokens=lambda i: stream[i * seq_len : (i + 1) * seq_len + 1]"
            )
        if isinstance(source, np.ndarray) and source.dtype.kind not in "iu":
            raise ValueError(f"tokens must be integers, got an array of {source.dtype}")
        self.source = source
        self._forget()

    def _forget(self) -> None:
        """Begin with a lock of this process: after a fork, the other's may be held by a thread that is not here."""
        self._lock = threading.Lock()
        self._pid = os.getpid()  # last: another thread that sees it uses the lock

    @property
    def num_sequences(self) -> int | None:
        """Number of sequences; None: the source does not say."""
        return len(self.source) if isinstance(self.source, Sized) else None

    def __getitem__(self, number: int) -> NDArray[np.integer[Any]]:
        """
        The tokens of a sequence, a 1-D array of integers; values are not looked at.

        Raises:
            ValueError: What the source gives is no such thing; names the sequence.
            IndexError: As the source raises it.
        """
        if self._pid != os.getpid():
            self._forget()
        with self._lock:
            source = self.source
            found = source[number] if hasattr(source, "__getitem__") else source(number)
            if isinstance(found, Mapping):
                if COLUMN not in found:
                    raise ValueError(f"sequence {number}: tokens with the fields {sorted(found)}, none is {COLUMN!r}")
                found = found[COLUMN]
            tokens = np.asarray(found)
        try:
            check_integers(tokens)
        except ValueError as error:
            raise ValueError(f"sequence {number}: {error}") from None
        return tokens

    def __getstate__(self) -> _Packed:
        return _pack(self.source)

    def __setstate__(self, packed: _Packed) -> None:
        make, arguments = packed
        self.source = make(*arguments)
        self._forget()


_Packed = tuple[Callable[..., Any], tuple[Any, ...]]


def _pack(source: Any) -> _Packed:
    """What to call, with what, to have the source again in another process; maps of files travel as their paths."""
    if isinstance(source, np.memmap) and source.flags.c_contiguous and (offset := _file_offset(source)) is not None:
        return _open_memmap, (str(source.filename), source.dtype.str, offset, source.shape)
    kind = type(source)
    if kind.__module__.partition(".")[0] == "mmap_ninja" and source.wrapper_fn is None:
        return kind, (source.out_dir, None, "r", source.starts_key, source.ends_key, source.shapes_key)
    return _same, (source,)


def _file_offset(array: np.memmap[Any, Any]) -> int | None:
    """Where in its file the array begins, which may be a part of what was mapped; None: unknown."""
    whole = array
    while not isinstance(whole.base, mmap.mmap):
        if not isinstance(whole.base, np.memmap):
            return None
        whole = whole.base
    if array.filename is None or array.mode not in ("r", "r+"):
        return None  # not of a file, or with changes of its own
    return int(whole.offset + array.ctypes.data - whole.ctypes.data)


def _open_memmap(path: str, dtype: str, offset: int, shape: tuple[int, ...]) -> Any:
    return np.memmap(path, dtype, "r", offset, shape)


def _same(source: Any) -> Any:
    return source
