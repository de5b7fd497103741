"""Whatever the order of pushes, pops and closing, the ring behaves as a bounded queue."""

import os
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sklformat.capture.ring import Ring
from sklformat.errors import RingClosedError, RingTimeoutError

CAPACITY = 4096


class RingAsQueue(RuleBasedStateMachine):
    """The ring beside a deque of the frames that were accepted."""

    @initialize()
    def create(self):
        self.producer = Ring.create(CAPACITY)
        self.consumer = Ring.attach(*map(os.dup, self.producer.peer_descriptors))
        self.producer.close_peer()
        self.queue = deque()
        self.pushed = self.popped = 0
        self.finished = False

    def teardown(self):
        if hasattr(self, "producer"):
            self.consumer.close()
            self.producer.close()

    def _used(self):
        """Least bytes that the queued frames take; padding may take more."""
        return sum(64 + -(-len(payload) // 64) * 64 for payload, _, _ in self.queue)

    @precondition(lambda self: not self.finished)
    @rule(
        parts=st.lists(st.binary(max_size=700), max_size=4),
        kind=st.integers(0, 2**32 - 2),
        tag=st.integers(0, 2**64 - 1),
    )
    def push(self, parts, kind, tag):
        frame = b"".join(parts), kind, tag
        try:
            self.producer.push(*parts, type=kind, tag=tag, timeout=0)
        except RingTimeoutError:
            # Refused only when full: the frame, the queue, the one still held and one padding do not fit together.
            assert self._used() + 2 * (128 + len(frame[0])) + self.held > CAPACITY
        else:
            self.queue.append(frame)
            self.pushed += 1

    held = 0

    @rule()
    def pop(self):
        self.held = 0
        try:
            frame = self.consumer.pop(0)
        except RingTimeoutError:
            assert not self.queue
            assert not self.finished
        except RingClosedError:
            assert not self.queue
            assert self.finished
        else:
            payload, kind, tag = self.queue.popleft()
            assert (payload, kind, tag, self.popped) == (bytes(frame.payload), frame.type, frame.tag, frame.number)
            self.held = 128 + len(payload)
            self.popped += 1

    @rule()
    def release(self):
        self.consumer.release()
        self.held = 0

    @precondition(lambda self: self.pushed > 20)
    @rule()
    def finish(self):
        self.producer.finish()
        self.finished = True

    @rule(durable=st.integers(0, 2**64 - 1))
    def durable(self, durable):
        self.consumer.set_durable(durable)
        assert durable == self.producer.durable

    @invariant()
    def counts(self):
        words = self.producer.words
        assert (self.pushed, CAPACITY) == (words.pushed, words.capacity)
        assert self.popped - words.popped in (0, 1)  # one may be held
        assert words.high_water <= CAPACITY


TestRingAsQueue = RingAsQueue.TestCase
TestRingAsQueue.settings = settings(max_examples=60, stateful_step_count=60, deadline=None, derandomize=True)


def test_the_machine_reaches_wrapping():
    """The sizes above take the ring around its end many times: the law is not tested on a straight line only."""
    ring = Ring.create(CAPACITY)
    consumer = Ring.attach(*map(os.dup, ring.peer_descriptors))
    for i in range(100):
        ring.push(bytes(700), tag=i, timeout=0)
        assert i == consumer.pop(0).tag
    assert ring.words.pushed * 700 > 10 * CAPACITY
    consumer.close()
    with pytest.raises(RingClosedError):
        ring.push(b"")
    ring.close()
