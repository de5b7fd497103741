"""
The descriptors of one side of a ring: made so that no forked copy of the process keeps them, and closed once.

Each side holds the writing end of a pipe, whose end of file tells the other that it is gone.  A forked child that kept
one open would hide the death of its parent; so it closes them all as its first act, and no fork happens while there are
some that it would not know.  A process that C code forks behind Python's back is safe only if it runs another program.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import NamedTuple

_held: weakref.WeakSet[Descriptors] = weakref.WeakSet()

# Held where ``_held`` does not tell the truth for a moment, and by every fork, which waits that long.
_no_fork = threading.RLock()


class PeerDescriptors(NamedTuple):
    """What the consumer's process needs to attach: hand these over (``pass_fds``), then ``close_peer``."""

    memory: int
    producer_life: int
    consumer_life: int


class Descriptors:
    """
    What one side has open.

    Args:
        own_life: The writing end that this side holds.
        peer_life: The reading end of the other side's pipe.
        others: What is closed before this side ends: a producer's ``PeerDescriptors``, a consumer's memory.
    """

    def __init__(self, own_life: int, peer_life: int, others: PeerDescriptors | tuple[int]) -> None:
        self.own_life, self.peer_life = own_life, peer_life
        self.others: PeerDescriptors | tuple[int, ...] = others
        self.closed = False
        _held.add(self)

    @classmethod
    def of_producer(cls, size_bytes: int) -> Descriptors:
        """
        Descriptors of a new anonymous file of this size, which can neither shrink nor grow, and of two pipes.

        Raises:
            OSError: No memory or descriptors.
        """
        with _no_fork, contextlib.ExitStack() as undo:
            memory = os.memfd_create("sklformat-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            undo.callback(os.close, memory)
            os.ftruncate(memory, size_bytes)
            _seal(memory)
            producer_read, producer_write = _pipe(undo)
            consumer_read, consumer_write = _pipe(undo)
            made = cls(producer_write, consumer_read, PeerDescriptors(memory, producer_read, consumer_write))
            undo.pop_all()
        return made

    def close_others(self) -> None:
        """Close what is not needed to the end."""
        with _no_fork:
            others, self.others = self.others, ()
            for fd in others:
                os.close(fd)

    def close(self) -> None:
        """Close everything; closing again does nothing."""
        with _no_fork:
            if self.closed:
                return
            self.closed = True
            _held.discard(self)
            for fd in (*self.others, self.own_life, self.peer_life):
                with contextlib.suppress(OSError):  # one that was none must not keep the others open
                    os.close(fd)
            self.others = ()


def _pipe(undo: contextlib.ExitStack) -> tuple[int, int]:
    read, write = os.pipe()
    undo.callback(os.close, read)
    undo.callback(os.close, write)
    return read, write


def _seal(memory: int) -> None:
    """Fix the size for ever: neither side can make the other fault by shrinking the file."""
    import fcntl  # noqa: PLC0415  not everywhere that this module is imported

    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


def _leave_in_forked_child() -> None:
    for descriptors in list(_held):
        descriptors.close()
    _no_fork.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_leave_in_forked_child
    )
