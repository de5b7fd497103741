"""The control words and frames of a shared-memory ring: ring.c."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sklformat.errors import CorruptError
from sklformat.native.door import check, ffi, lib

RING_CONTROL_SIZE = 4096


"""Bytes of a ring's memory before its data; the data is a power of two of at least as many."""


class RingFrame(NamedTuple):
    """Where a frame's payload lies in the ring's memory, and what its header says; as ``skl_frame`` in skl.h."""

    offset: int
    length: int
    number: int
    tag: int
    type: int


class RingWords(NamedTuple):
    """The shared words of a ring; as ``skl_ring_words`` in skl.h."""

    capacity: int
    durable: int
    pushed: int
    popped: int
    wait_ns: int
    high_water: int
    producer_closed: bool
    consumer_closed: bool


def ring_memory(memory: Any) -> Any:
    """A handle on a writable mapping for the functions below; ``ring_unmap`` lets go of it."""
    return ffi.from_buffer("uint8_t[]", memory, require_writable=True)


def ring_unmap(memory: Any) -> None:
    """Let go of the mapping, so that it can be closed."""
    ffi.release(memory)


def ring_init(memory: Any) -> None:
    """
    Make zero-filled memory a ring.

    Raises:
        ValueError: The size is not RING_CONTROL_SIZE plus a power of two of at least as many bytes.
        UnsupportedError: The system has no futex: not a 64-bit Linux.
    """
    _check_ring(lib.skl_ring_init(memory, len(memory)))


def ring_push(memory: Any, type_: int, tag: int, parts: Sequence[Any], timeout_ns: int) -> bool:
    """
    Append a frame of contiguous buffers one after the other; False: no room in time.

    Raises:
        ValueError: The frame is larger than the ring.
        RingClosedError: The consumer closed.
        CorruptError: The ring's words were overwritten.
    """
    handles = [ffi.from_buffer("uint8_t[]", part) for part in parts]
    lengths = ffi.new("size_t[]", [len(handle) for handle in handles])
    pointers = ffi.new("void *[]", handles)
    status = lib.skl_ring_push(memory, len(memory), type_, tag, pointers, lengths, len(handles), timeout_ns)
    return _check_ring(status)


def ring_peek(memory: Any, timeout_ns: int) -> RingFrame | None:
    """
    The oldest frame, without taking it; None: nothing in time.

    Raises:
        RingClosedError: The producer closed and nothing is left.
        CorruptError: The ring's words were overwritten.
    """
    frame = ffi.new("skl_frame *")
    if not _check_ring(lib.skl_ring_peek(memory, len(memory), timeout_ns, frame)):
        return None
    return RingFrame(frame.offset, frame.length, frame.number, frame.tag, frame.type)


def ring_release(memory: Any) -> None:
    """Hand back the space of the frame last peeked."""
    _check_ring(lib.skl_ring_release(memory, len(memory)))


def ring_set_durable(memory: Any, durable: int) -> None:
    """Publish how far the consumer's output is safe, 0..2**64 - 1."""
    _check_ring(lib.skl_ring_set_durable(memory, len(memory), durable))


def ring_close(memory: Any, *, producer: bool) -> None:
    """Say that this side pushes or pops no more, and wake the other."""
    side = lib.SKL_SIDE_PRODUCER if producer else lib.SKL_SIDE_CONSUMER
    _check_ring(lib.skl_ring_close(memory, len(memory), side))


def ring_words(memory: Any) -> RingWords:
    """The shared words, each read by itself."""
    words = ffi.new("skl_ring_words *")
    _check_ring(lib.skl_ring_state(memory, len(memory), words))
    return RingWords(
        words.capacity,
        words.durable,
        words.pushed,
        words.popped,
        words.wait_ns,
        words.high_water,
        bool(words.producer_closed),
        bool(words.consumer_closed),
    )


def _check_ring(status: int) -> bool:
    """False on a time-out, which is no error here: the caller looks whether the other side lives, and continues."""
    if status == lib.SKL_ERR_TIMEOUT:
        return False
    if status == lib.SKL_ERR_CORRUPT:
        raise CorruptError("the ring's shared memory contradicts itself: something overwrote it")
    check(status)
    return True
