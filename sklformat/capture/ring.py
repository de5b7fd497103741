"""
A ring of frames in shared memory, from one producer process to one consumer process.

Owns the memory, the descriptors and the question whether the other side still lives; the protocol is in ring.c, the
meaning of a frame is its user's.  For Linux: elsewhere the module can be imported, and ``Ring.create`` says so.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import sys
import time
import warnings
from types import TracebackType
from typing import Any, NamedTuple

from sklformat import native
from sklformat.capture.descriptors import Descriptors, PeerDescriptors
from sklformat.capture.memory import capacity_of, check_room
from sklformat.errors import CorruptError, RingClosedError, RingTimeoutError, UnsupportedError

_FRAME_HEADER = 64
_MAX_TYPE = 2**32 - 2  # the largest value marks padding
# Longest sleep before the other side's life is looked at: what a death costs at most, scheduling aside.
_SLICE_SECONDS = 0.05
_MAX_MESSAGE = 4096  # bytes; less than any pipe holds, so that reporting never blocks


class Frame(NamedTuple):
    """One frame; ``payload`` lies in the ring and ends with the next pop, release or close."""

    payload: memoryview
    type: int
    tag: int
    number: int


class Ring:
    """
    One side of a ring; use one thread per side.

    The producer's process creates it, the consumer's attaches to descriptors that it inherited.  Memory is an
    anonymous file that can neither shrink nor grow, without a name that could be left behind.  Each side holds the
    writing end of a pipe whose end of file, for whatever reason, tells the other that it is gone; a stopped process
    keeps its pipe, so being slow is not death.
    """

    def __init__(self, descriptors: Descriptors, *, producer: bool) -> None:
        self._descriptors, self._producer = descriptors, producer
        self._payload: memoryview | None = None
        self._last_look = 0.0
        try:
            self._map_memory(descriptors.others[0])
        except BaseException:
            descriptors.close()
            raise
        self._poll = select.poll()
        self._poll.register(descriptors.peer_life, 0)  # a hang-up is always reported
        self._words = native.RingWords(len(self._map) - native.RING_CONTROL_SIZE, 0, 0, 0, 0, 0, False, False)

    def _map_memory(self, fd: int) -> None:
        # Populated: the first touch of a page costs more than the copy into it, and the teacher would pay.
        self._map = mmap.mmap(fd, os.fstat(fd).st_size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._bytes = memoryview(self._map)
        self._memory: Any = native.ring_memory(self._map)
        if self._producer:
            native.ring_init(self._memory)
        else:
            native.ring_words(self._memory)  # is it a ring?

    def __del__(self) -> None:
        descriptors = getattr(self, "_descriptors", None)
        if descriptors is not None and not descriptors.closed:
            warnings.warn("a ring was dropped that is not closed", ResourceWarning, stacklevel=1, source=self)
            descriptors.close()  # to the other side it died: it said no more

    @classmethod
    def create(cls, size_bytes: int) -> Ring:
        """
        Make a ring and be its producer.

        Args:
            size_bytes: Room for frames, rounded up to a power of two, at least 4096, taken from memory at once; a frame
                takes its payload rounded up to 64 bytes, and 64 more.

        Raises:
            UnsupportedError: Not a 64-bit Linux.
            ValueError: size_bytes < 1, or more than the memory that is free.
            OSError: No memory or descriptors.
        """
        if not hasattr(os, "memfd_create"):
            raise UnsupportedError(
                f"the ring needs Linux (memfd, futex), this is {sys.platform}; capture there, read and train anywhere"
            )
        if size_bytes < 1:
            raise ValueError(f"size_bytes must be positive, got {size_bytes}")
        capacity = capacity_of(size_bytes)
        check_room(capacity, "size_bytes")
        return cls(Descriptors.of_producer(native.RING_CONTROL_SIZE + capacity), producer=True)

    @classmethod
    def attach(cls, memory: int, producer_life: int, consumer_life: int) -> Ring:
        """
        Be the consumer of a ring; takes over the three descriptors of ``peer_descriptors``, and closes them on failure.

        Raises:
            ValueError, UnsupportedError, CorruptError: The memory holds no ring of this version.
        """
        ring = cls(Descriptors(consumer_life, producer_life, (memory,)), producer=False)
        ring._descriptors.close_others()
        return ring

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def peer_descriptors(self) -> PeerDescriptors:
        """
        Descriptors for the consumer's process.

        Raises:
            ValueError: This side is the consumer, or handed them over already.
        """
        others = self._descriptors.others
        peers = others if isinstance(others, PeerDescriptors) else None
        if peers is None:
            raise ValueError("only a producer that has not handed over yet has descriptors to give")
        return peers

    def close_peer(self) -> None:
        """Close this process's copies of the consumer's descriptors, else its death could not be seen."""
        self._descriptors.close_others()

    @property
    def capacity(self) -> int:
        """Room for frames in bytes."""
        return self._words.capacity

    @property
    def max_payload(self) -> int:
        """Largest payload of one frame in bytes."""
        return self.capacity - _FRAME_HEADER

    @property
    def words(self) -> native.RingWords:
        """Counters and flags of both sides; the last ones after closing."""
        if not self._closed:
            self._words = native.ring_words(self._memory)
        return self._words

    @property
    def durable(self) -> int:
        """What the consumer said last about how far its output is safe."""
        return self.words.durable

    @property
    def wait_seconds(self) -> float:
        """Time the producer has waited for room."""
        return self.words.wait_ns * 1e-9

    def push(self, *parts: Any, type: int = 0, tag: int = 0, timeout: float | None = None) -> None:  # noqa: A002
        """
        Copy one frame into the ring, waiting for room.

        Args:
            parts: Contiguous buffers, put one after the other; the first lies on a multiple of 64 bytes.
            type: 0..2**32 - 2, the user's.
            tag: 0..2**64 - 1, the user's.
            timeout: Seconds to wait; None: as long as the consumer lives.

        Raises:
            RingClosedError: The consumer closed or died; noticed within 100 ms also while waiting.
            RingTimeoutError: No room in time; nothing was pushed.
            ValueError: The frame is larger than the ring, a value is out of range, or the ring is closed.
        """
        self._check_side(producer=True)
        if not 0 <= type <= _MAX_TYPE:
            raise ValueError(f"type must be in 0..{_MAX_TYPE}, got {type}")
        if time.monotonic() - self._last_look > _SLICE_SECONDS and self._peer_died():
            raise self._consumer_gone()
        for wait_ns in _slices(timeout):
            try:
                if native.ring_push(self._memory, type, tag, parts, wait_ns):
                    return
            except ValueError:
                size = sum(memoryview(part).nbytes for part in parts)
                if size <= self.max_payload:
                    raise
                raise ValueError(
                    f"frame of {size} bytes, the ring takes up to {self.max_payload}; make the ring larger "
                    "(ring_bytes of a Capture, ring_mib of sklformat cache)"
                ) from None
            except RingClosedError:
                raise self._consumer_gone() from None
            if self._peer_died():
                raise self._consumer_gone()
        raise RingTimeoutError(f"no room in the ring for {timeout} s")

    def pop(self, timeout: float | None = None) -> Frame:
        """
        Take the oldest frame, releasing the one before.

        Args:
            timeout: Seconds to wait; None: as long as the producer lives.

        Returns:
            The frame; its payload is a view into the ring, valid until the next pop, release or close.  Arrays made
            on top of it (``np.frombuffer``) must not be read after that: the producer overwrites them.

        Raises:
            RingClosedError: The producer closed or died, and every frame it completed was taken.
            RingTimeoutError: Nothing in time.
            CorruptError: The ring's memory was overwritten.
        """
        self._check_side(producer=False)
        self.release()
        for wait_ns in _slices(timeout):
            found = self._peek(wait_ns)
            # Dead first, then a last look: the dead push nothing after it.
            if found is None and self._peer_died():
                found = self._peek(0)
                if found is None:
                    raise RingClosedError(f"the producer died after frame {self.words.popped}")
            if found is not None:
                self._payload = self._bytes[found.offset : found.offset + found.length].toreadonly()
                return Frame(self._payload, found.type, found.tag, found.number)
        raise RingTimeoutError(f"nothing in the ring for {timeout} s")

    def release(self) -> None:
        """Hand the space of the last popped frame back to the producer; does nothing where there is none."""
        if self._payload is not None:
            self._payload.release()
            self._payload = None
            native.ring_release(self._memory)

    def set_durable(self, durable: int) -> None:
        """Tell the producer how far the consumer's output is safe."""
        self._check_side(producer=False)
        native.ring_set_durable(self._memory, durable)

    def report(self, message: str) -> None:
        """Leave a message for the producer, up to 4096 bytes of UTF-8, that outlives this process."""
        self._check_side(producer=False)
        os.write(self._descriptors.own_life, message.encode()[:_MAX_MESSAGE])

    def last_words(self) -> str:
        """What the consumer reported before it closed; waits for its end."""
        self._check_side(producer=True)
        self.close_peer()
        parts = []
        while part := os.read(self._descriptors.peer_life, _MAX_MESSAGE):
            parts.append(part)
        return b"".join(parts).decode(errors="replace")

    def finish(self) -> None:
        """Say that no more frames will be pushed, or popped, and wake the other side; the memory stays mapped."""
        if not self._closed:
            native.ring_close(self._memory, producer=self._producer)

    def close(self) -> None:
        """Finish, and let go of memory and descriptors; closing again does nothing."""
        if self._closed:
            return
        with contextlib.suppress(CorruptError, UnsupportedError):  # overwritten memory has to be let go of too
            self.finish()
            self._words = native.ring_words(self._memory)
        self._descriptors.close()
        native.ring_unmap(self._memory)
        # A view that somebody still holds keeps the mapping; the kernel frees it with the last one.
        with contextlib.suppress(BufferError):
            if self._payload is not None:
                self._payload.release()
            self._bytes.release()
            self._map.close()

    @property
    def _closed(self) -> bool:
        """Here, or in a forked copy of the process, which is no side of the ring."""
        return self._descriptors.closed

    def _peek(self, wait_ns: int) -> native.RingFrame | None:
        try:
            return native.ring_peek(self._memory, wait_ns)
        except RingClosedError:
            raise RingClosedError(f"the producer closed the ring after frame {self.words.popped}") from None

    def _consumer_gone(self) -> RingClosedError:
        return RingClosedError("the consumer closed the ring" if self.words.consumer_closed else "the consumer died")

    def _peer_died(self) -> bool:
        self._last_look = time.monotonic()
        return bool(self._poll.poll(0))

    def _check_side(self, *, producer: bool) -> None:
        if self._closed:
            raise ValueError("the ring is closed")
        if producer != self._producer:
            raise ValueError(f"this is the ring's {'producer' if self._producer else 'consumer'}")


def _slices(timeout: float | None) -> Any:
    """Nanoseconds to wait, at most a slice at a time, until the time is over; at least once."""
    if timeout is None:
        while True:
            yield int(_SLICE_SECONDS * 1e9)
    end = time.monotonic() + timeout
    while True:
        left = end - time.monotonic()
        yield max(0, int(min(left, _SLICE_SECONDS) * 1e9))
        if left <= _SLICE_SECONDS:
            return
