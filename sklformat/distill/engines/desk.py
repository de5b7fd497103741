"""
The driving process's end of the line to a worker: it answers what the worker asks, and keeps what the worker sends.

A thread of its own, so that a worker never waits for what the driving process does meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import asdict
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sklformat.distill.engines.assembly import Part
from sklformat.distill.engines.messages import Line, Settings, Wanted


class Records(NamedTuple):
    """Some rows of a sequence, drawn."""

    sequence: int
    part: Part


class Tested(NamedTuple):
    """Some rows of a rehearsal: log-probs of the tokens that follow, and the greatest, [P] each, of ``width`` ids."""

    sequence: int
    first: int
    labels: NDArray[np.float32]
    greatest: NDArray[np.float32]
    width: int
    dtype: str


class Refused(NamedTuple):
    """What a worker cannot do."""

    reason: str


class Synced(NamedTuple):
    """Everything that the worker had to tell when it was asked has arrived."""

    number: int


class Gone(NamedTuple):
    """A worker has ended."""


Arrived: TypeAlias = Records | Tested | Refused | Synced | Gone


class Given(NamedTuple):
    """Ids that a sequence is asked about: those of position p are token_ids[offsets[p] : offsets[p + 1]]."""

    offsets: NDArray[np.int64]
    token_ids: NDArray[np.uint32]


class _Open(NamedTuple):
    """A sequence: what is wanted of its rows, and the arrays that a worker is told."""

    wanted: Wanted
    tokens: NDArray[np.uint32]
    counted: NDArray[np.bool_]
    given: Given

    @property
    def arrays(self) -> list[NDArray[Any]]:
        return [self.tokens, self.counted, *self.given]


_NO_IDS = Given(np.empty(0, np.int64), np.empty(0, np.uint32))
_NOTHING = _Open("nothing", np.empty(0, np.uint32), np.empty(0, np.bool_), _NO_IDS)


class Desk:
    """
    A context: entering begins to answer, leaving hangs up.

    Args:
        listener: Where workers connect.
        settings: What they are told first.
    """

    def __init__(self, listener: socket.socket, settings: Settings) -> None:
        self._listener, self._settings = listener, settings
        self._open: dict[int, _Open] = {}
        self._alone: tuple[int, int] | None = None
        self._runs = 0
        self._lock = Lock()
        self._arrived: SimpleQueue[Arrived] = SimpleQueue()
        self._lines: list[Line] = []

    def __enter__(self) -> Desk:
        Thread(target=self._accept, name="desk", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for line in self._lines:
            line.close()

    def open(
        self,
        sequence: int,
        tokens: NDArray[np.uint32],
        counted: NDArray[np.bool_] | None,
        wanted: Wanted = "records",
        given: Given = _NO_IDS,
    ) -> None:
        """
        Know a sequence, before its request goes to the engine.

        Args:
            sequence: Its number.
            tokens: [T + 1].
            counted: Which positions get records, [T]; None: all.
            wanted: Of its rows.
            given: The ids, where columns at these are wanted.
        """
        mask = np.ones(tokens.size - 1, np.bool_) if counted is None else counted
        with self._lock:
            self._runs += 1
            self._open[sequence], self._alone = _Open(wanted, tokens, mask, given), (sequence, self._runs)

    def close(self, sequence: int) -> None:
        """Forget a sequence: nothing of it is wanted any more."""
        with self._lock:
            del self._open[sequence]
            if self._alone is not None and self._alone[0] == sequence:
                self._alone = None

    def sync(self, number: int) -> None:
        """Have ``Synced(number)`` arrive behind everything that workers have to tell now."""
        if not self._lines:
            self._arrived.put(Synced(number))
        for line in self._lines:
            with contextlib.suppress(OSError):  # it is gone, and arrives so
                line.send({"sync": number})

    def next(self, seconds: float) -> Arrived | None:
        """What arrived next; None: nothing for this long."""
        try:
            return self._arrived.get(timeout=seconds) if seconds else self._arrived.get_nowait()
        except Empty:
            return None

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed on leaving
            while True:
                line = Line(self._listener.accept()[0])
                self._lines.append(line)
                Thread(target=self._serve, args=(line,), name="desk line", daemon=True).start()

    def _serve(self, line: Line) -> None:
        """Answer and keep until the worker ends, or says what is not understood: then it is hung up on."""
        try:
            with contextlib.suppress(OSError):
                line.send({**asdict(self._settings), "driver": os.getpid()})
                while (message := line.receive()) is not None:
                    said, arrays = message
                    if "ask" in said:
                        self._answer(line, said["ask"])
                    else:
                        self._arrived.put(_arrived(said, arrays))
        finally:
            line.close()  # else the worker would block, once nobody takes what it sends
            self._arrived.put(Gone())

    def _answer(self, line: Line, asked: list[int] | None) -> None:
        with self._lock:  # let go of before anything is sent: a worker may take long to read
            alone = self._alone
            about = ([] if alone is None else alone[:1]) if asked is None else asked
            found = [self._open.get(sequence, _NOTHING) for sequence in about]
        arrays = [array for known in found for array in known.arrays]
        if asked is not None:
            line.send({"wanted": [known.wanted for known in found]}, *arrays)
        elif alone is None:
            line.send({"sequence": None})
        else:
            line.send({"sequence": alone[0], "run": alone[1], "wanted": found[0].wanted}, *arrays)


def _arrived(said: dict[str, Any], arrays: list[NDArray[Any]]) -> Arrived:
    if "refused" in said:
        return Refused(said["refused"])
    if "synced" in said:
        return Synced(said["synced"])
    if "tested" in said:
        return Tested(said["tested"], said["first"], arrays[0], arrays[1], said["width"], said["type"])
    lengths, token_ids, pairs, *columns = arrays
    named = dict(zip(said["columns"], columns, strict=True))
    return Records(said["rows"], Part(said["first"], lengths, token_ids, pairs, named))
