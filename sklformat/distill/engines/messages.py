"""
What the driving process of a capture and a worker of its engine say to each other, over a socket of this machine.

A message is a JSON object with arrays behind it; nothing is pickled.  The worker asks ``{"ask": [sequences]}``, or
``{"ask": null}`` for the sequence that runs alone, and waits for the answer; it tells ``{"rows": …}`` with records,
``{"tested": …}`` with log-probs, ``{"refused": reason}``.  It is told the settings first, and the number of the
``driver``'s process, and ``{"sync": number}``, to which it says ``{"synced": number}`` behind everything that it had to
tell.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import EngineError

Hook: TypeAlias = Literal["runner", "layer"]
"""Where a worker sees rows: in its model runner, or in the layer that makes logits."""

Wanted: TypeAlias = Literal["records", "given", "log-probs", "nothing"]
"""Of the rows of a sequence: what a cache is made of, the columns at ids that are given, what a rehearsal compares, or
nothing any more."""

ADDRESS = "SKLFORMAT_CAPTURE"
"""Variable of the environment by which the processes of an engine know whose capture they belong to: hook:path."""

Message: TypeAlias = tuple[dict[str, Any], list[NDArray[Any]]]

_LENGTH = struct.Struct("<I")  # bytes of the object
_LONGEST_PATH = 107  # of a socket, in bytes
_TYPES = ("bool", "uint8", "float16", "float32", "uint32", "int64")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    How a worker draws.

    Attributes:
        kind: Of the records: "counts" or "ratios".
        rounds: Draws per position; 0 for topk and topp.
        sampling: Further arguments of ``skl.draw``.
        columns: Of the cache.
        vocab_size: Logits beyond it are padding.
        on_device: Whether the device that has the logits draws.
    """

    kind: str
    rounds: int
    sampling: dict[str, Any]
    columns: tuple[str, ...]
    vocab_size: int
    on_device: bool


class Line:
    """
    One end of a connection.

    Args:
        connection: A connected stream socket; closed with the line.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = Lock()

    def send(self, said: dict[str, Any], *arrays: NDArray[Any]) -> None:
        """
        Say something; several threads may.

        Args:
            said: Plain values.
            arrays: 1-D, of the types above.

        Raises:
            OSError: The other end is gone.
        """
        text = json.dumps(said | {"arrays": [(array.dtype.name, array.size) for array in arrays]}).encode()
        parts = [_LENGTH.pack(len(text)), text, *(array.tobytes() for array in arrays)]
        with self._sending:
            self._socket.sendall(b"".join(parts))

    def receive(self) -> Message | None:
        """
        What the other end says next; None: it is gone.

        Raises:
            OSError: The connection broke.
        """
        try:
            said = json.loads(self._read(_LENGTH.unpack(self._read(_LENGTH.size))[0]))
            arrays = []
            for name, count in said.pop("arrays"):
                assert name in _TYPES
                arrays.append(np.frombuffer(self._read(count * np.dtype(name).itemsize), name, count))
        except EOFError:
            return None
        return said, arrays

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            count = self._socket.recv_into(view[at:])
            if count == 0:
                raise EOFError
            at += count
        return data

    def close(self) -> None:
        """Hang up; whoever waits for a message of the other end is told that it is gone."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@contextlib.contextmanager
def listening() -> Iterator[tuple[socket.socket, str]]:
    """
    A socket that listens, and its path, in a directory that no other user can enter.

    Raises:
        EngineError: The path is too long for a socket.
    """
    with tempfile.TemporaryDirectory(prefix="sklformat-") as directory:
        path = str(Path(directory) / "line")
        if (size := len(os.fsencode(path))) > _LONGEST_PATH:
            raise EngineError(
                f"{path}: the path has {size} bytes, a socket takes {_LONGEST_PATH}; set TMPDIR to a directory with a "
                "shorter path"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen()
            yield listener, path


@contextlib.contextmanager
def announced(hook: Hook, path: str) -> Iterator[None]:
    """Tell the processes that are started meanwhile, and this one, where to connect."""
    os.environ[ADDRESS] = f"{hook}:{path}"
    try:
        yield
    finally:
        del os.environ[ADDRESS]


def find_address() -> tuple[Hook, str] | None:
    """Hook and path, where this process belongs to a capture."""
    hook, _, path = os.environ.get(ADDRESS, "").partition(":")
    return ("layer" if hook == "layer" else "runner", path) if path else None


def dial(path: str) -> Line:
    """
    Connect to who listens there.

    Raises:
        OSError: Nobody does.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return Line(connection)
