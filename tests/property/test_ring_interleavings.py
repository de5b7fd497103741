"""
Every order of a few ring operations of both sides, beside a model of the ring in plain numbers.

In C all of a ring is in its memory, so each order continues from a copy of what its beginning left; crashes and
descriptors need two sides in Python, where each order begins with a new ring.
"""

import mmap
import os
from typing import NamedTuple

import pytest

from sklformat import native
from sklformat.capture.ring import Ring
from sklformat.errors import RingClosedError, RingTimeoutError

CAPACITY = 4096
SMALL, HALF, LARGE = PAYLOADS = 0, 1984, 2700
"""Bytes of payload: frames of 64, 2048 and 2816 bytes, of which the second large one needs padding before it."""


class Frame(NamedTuple):
    """What lies in the ring; padding has no number."""

    size: int
    length: int
    number: int | None


class Model(NamedTuple):
    """A ring as its user sees it: frames in order, and where the next one begins."""

    frames: tuple = ()
    tail: int = 0
    pushed: int = 0
    popped: int = 0
    producer: str = "open"
    consumer: str = "open"
    held: bool = False

    def used(self):
        return sum(frame.size for frame in self.frames)

    def push(self, length):
        """The answer and the ring after it; padding stays also where the frame itself has no room."""
        if self.consumer == "closed":
            return "closed", self
        size, to_end, ring = 64 + -(-length // 64) * 64, CAPACITY - self.tail, self
        if size > to_end:
            if CAPACITY - self.used() < to_end:
                return "full", self
            ring = self._replace(frames=(*self.frames, Frame(to_end, 0, None)), tail=0)
        if CAPACITY - ring.used() < size:
            return "full", ring
        frames = (*ring.frames, Frame(size, length, ring.pushed))
        return "ok", ring._replace(frames=frames, tail=(ring.tail + size) % CAPACITY, pushed=ring.pushed + 1)

    def peek(self):
        frames = self.frames[1:] if self.frames and self.frames[0].number is None else self.frames
        ring = self._replace(frames=frames)
        if frames:
            return (frames[0].length, frames[0].number), ring
        return "closed" if self.producer == "closed" else "empty", ring

    def release(self):
        if not self.frames or self.frames[0].number is None:
            return "nothing", self
        return "ok", self._replace(frames=self.frames[1:], popped=self.popped + 1)

    def close(self, side, how="closed"):
        return "ok", self._replace(**{side: how})


def answer(call, *args, **kwargs):
    """What a call says, as the model says it."""
    try:
        return call(*args, **kwargs)
    except RingClosedError:
        return "closed"
    except ValueError:
        return "nothing"


def payload_of(number, length):
    return bytes([number + 1]) * length


def in_c(memory, model, operation):
    """One operation on the ring in memory: what it says, and what the model says and becomes."""
    if operation in PAYLOADS:
        payload = payload_of(model.pushed, operation)
        said = answer(native.ring_push, memory, 7, model.pushed, [payload], 0)
        return {True: "ok", False: "full"}.get(said, said), *model.push(operation)
    if operation == "peek":
        said = answer(native.ring_peek, memory, 0)
        if isinstance(said, native.RingFrame):
            found = bytes(memory[said.offset : said.offset + said.length])
            assert (payload_of(said.number, said.length), 7, said.number) == (found, said.type, said.tag)
            said = said.length, said.number
        return said or "empty", *model.peek()
    if operation == "release":
        return answer(native.ring_release, memory) or "ok", *model.release()
    native.ring_close(memory, producer=operation == "producer")
    return "ok", *model.close(operation)


def follow(mapping, memory, model, operations, depth):
    """Take every operation that a side has left, compare, and follow each of them; how many orders there are."""
    if depth == 0:
        return 1
    before, orders = mapping[:], 0
    for operation in operations:
        if operation in (*PAYLOADS, "producer") and model.producer == "closed":
            continue
        if operation in ("peek", "release", "consumer") and model.consumer == "closed":
            continue
        said, expected, after = in_c(memory, model, operation)
        assert expected == said, (model, operation)
        words = native.ring_words(memory)
        counts = after.pushed, after.popped, after.producer == "closed", after.consumer == "closed"
        assert counts == (words.pushed, words.popped, words.producer_closed, words.consumer_closed)
        orders += follow(mapping, memory, after, operations, depth - 1)
        mapping[:] = before
    return orders


@pytest.mark.parametrize("start", [0, 1280, CAPACITY - 64])
def test_every_order_in_c(start):
    """Six operations in any order, from the beginning, the middle and the last line of the memory, do what they say."""
    mapping = mmap.mmap(-1, native.RING_CONTROL_SIZE + CAPACITY)
    memory = native.ring_memory(mapping)
    native.ring_init(memory)
    if start:
        native.ring_push(memory, 7, 0, [bytes(start - 64)], 0)
        native.ring_release(memory)
    model = Model(tail=start, pushed=bool(start), popped=bool(start))
    assert 20_000 < follow(mapping, memory, model, (*PAYLOADS, "peek", "release", "producer", "consumer"), 6)
    native.ring_unmap(memory)
    mapping.close()


class Sides:
    """Both sides of a new ring, and what they say to operations, with the model beside them."""

    def __init__(self):
        self.producer = Ring.create(CAPACITY)
        self.consumer = Ring.attach(*map(os.dup, self.producer.peer_descriptors))
        self.producer.close_peer()

    def do(self, model, operation):
        """One operation: what it says, and what the model says and becomes."""
        if operation in PAYLOADS:
            self.producer._last_look = 0.0  # looks at the consumer's life now, not after a while
            said = answer_of(self.producer.push, payload_of(model.pushed, operation), timeout=0)
            if model.consumer == "died":
                return said, "the consumer died", model
            expected, after = model.push(operation)
            texts = {"closed": "the consumer closed the ring", "full": "no room in the ring for 0 s"}
            return said or "ok", texts.get(expected, expected), after
        if operation == "pop":
            said = answer_of(self.consumer.pop, 0)
            free = model.release()[1] if model.held else model
            expected, after = free._replace(held=False).peek()
            if isinstance(expected, tuple):
                return (len(said.payload), said.number), expected, after._replace(held=True)
            texts = {
                "open": "nothing in the ring for 0 s",
                "closed": f"the producer closed the ring after frame {after.popped}",
                "died": f"the producer died after frame {after.popped}",
            }
            return said, texts[model.producer], after
        if operation == "release":
            self.consumer.release()
            return "ok", "ok", (model.release()[1] if model.held else model)._replace(held=False)
        side, how = operation
        ring = getattr(self, side)
        if how == "died":
            ring._descriptors.close()  # as the system does for a dead process
        elif side == "producer":
            ring.finish()
        else:
            ring.close()
        return "ok", *model.close(side, how)


def answer_of(call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except (RingClosedError, RingTimeoutError) as error:
        return str(error)


ENDS = [(side, how) for side in ("producer", "consumer") for how in ("closed", "died")]


def orders(depth, producer=True, consumer=True):
    """All orders of operations; a side that has ended does nothing more."""
    left = [*((SMALL, LARGE, *ENDS[:2]) if producer else ()), *(("pop", "release", *ENDS[2:]) if consumer else ())]
    if depth == 0 or not left:
        yield ()
        return
    for operation in left:
        ended = operation[0] if isinstance(operation, tuple) else None
        for rest in orders(depth - 1, producer and ended != "producer", consumer and ended != "consumer"):
            yield (operation, *rest)


@pytest.mark.parametrize("depth", [5, pytest.param(6, marks=pytest.mark.soak)])
def test_every_order_of_two_sides(depth):
    """Five operations in any order, closing and dying among them, say what the model says; six in make soak."""
    for order in orders(depth):
        sides, model = Sides(), Model()
        for operation in order:
            said, expected, model = sides.do(model, operation)
            assert expected == said, (order, operation)
        sides.consumer.close()
        sides.producer.close()
