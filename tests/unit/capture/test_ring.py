"""Ring and merge: what goes in comes out, and the end of either side is told apart from slowness."""

import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from system import HANGS, alive, open_descriptors

from sklformat import native
from sklformat._native import ffi
from sklformat.capture import merge_draws
from sklformat.capture.ring import Ring
from sklformat.errors import CorruptError, RingClosedError, RingTimeoutError, UnsupportedError


@pytest.fixture
def pair():
    producer = Ring.create(1 << 16)
    consumer = Ring.attach(*map(os.dup, producer.peer_descriptors))
    producer.close_peer()
    yield producer, consumer
    consumer.close()
    producer.close()


def test_parts_arrive_joined_with_type_tag_and_number(pair):
    """A frame is its parts one after the other; type and tag are the user's, numbers count from 0."""
    producer, consumer = pair
    producer.push(b"ab", np.arange(3, dtype=np.uint32), type=5, tag=2**64 - 1)
    producer.push()
    frame = consumer.pop(0)
    assert (b"ab" + np.arange(3, dtype="<u4").tobytes(), 5, 2**64 - 1, 0) == (
        bytes(frame.payload),
        frame.type,
        frame.tag,
        frame.number,
    )
    frame = consumer.pop(0)
    assert (b"", 0, 0, 1) == (bytes(frame.payload), frame.type, frame.tag, frame.number)


def test_payload_ends_with_the_next_pop(pair):
    """A payload cannot be read after its frame was handed back: an error, not another frame's bytes."""
    producer, consumer = pair
    producer.push(b"12345678")
    producer.push(b"x")
    first = consumer.pop(0)
    assert b"x" == bytes(consumer.pop(0).payload)
    with pytest.raises(ValueError, match="released"):
        bytes(first.payload)


def test_payload_cannot_be_written(pair):
    """The consumer's view is read-only."""
    producer, consumer = pair
    producer.push(b"a")
    assert consumer.pop(0).payload.readonly


def test_full_ring_blocks_counts_and_drops_nothing(pair):
    """A push without room waits, is counted, and nothing that was accepted is lost."""
    producer, consumer = pair
    payload = bytes(8192 - 64)
    for i in range(8):
        producer.push(payload, tag=i)
    with pytest.raises(RingTimeoutError):
        producer.push(payload, tag=8, timeout=0.02)
    assert producer.wait_seconds >= 0.02
    assert producer.capacity == producer.words.high_water
    assert list(range(8)) == [consumer.pop(0).tag for _ in range(8)]


def test_empty_ring_times_out(pair):
    """A pop without a frame ends in time, also with no time at all."""
    _, consumer = pair
    for seconds in (0.0, 0.06):
        started = time.monotonic()
        with pytest.raises(RingTimeoutError):
            consumer.pop(seconds)
        assert seconds <= time.monotonic() - started


def test_largest_frame(pair):
    """A frame may be as large as the ring's data less its header, wherever the last one ended; no larger."""
    producer, consumer = pair
    producer.push(b"shift")
    consumer.pop(0)
    consumer.release()
    with pytest.raises(RingTimeoutError):  # padding first; the frame itself when that was taken
        producer.push(bytes(producer.max_payload), timeout=0)
    with pytest.raises(RingTimeoutError):
        consumer.pop(0)
    producer.push(b"\7" * producer.max_payload, timeout=0)
    assert b"\7" * producer.max_payload == bytes(consumer.pop(0).payload)
    with pytest.raises(ValueError, match="65473 bytes, the ring takes up to 65472"):
        producer.push(bytes(producer.max_payload + 1))


def test_closing_lets_the_rest_out(pair):
    """After the producer closes, frames already pushed still come out, then the end is told."""
    producer, consumer = pair
    producer.push(b"last")
    producer.finish()
    assert b"last" == bytes(consumer.pop().payload)
    with pytest.raises(RingClosedError, match="producer closed the ring after frame 1"):
        consumer.pop()


def test_a_closed_consumer_refuses_and_leaves_its_words(pair):
    """A push to a consumer that closed fails at once; what it reported can be read after its end."""
    producer, consumer = pair
    consumer.set_durable(17)
    consumer.report("disk full: é")
    consumer.close()
    with pytest.raises(RingClosedError, match="consumer closed"):
        producer.push(b"x")
    assert "disk full: é" == producer.last_words()
    assert 17 == producer.durable
    producer.close()
    assert 17 == producer.durable


def test_each_side_keeps_to_its_side(pair):
    """Only the producer pushes and only the consumer pops; a closed ring does neither."""
    producer, consumer = pair
    with pytest.raises(ValueError, match=r"^this is the ring's consumer$"):
        consumer.push(b"")
    with pytest.raises(ValueError, match=r"^this is the ring's producer$"):
        producer.pop()
    with pytest.raises(ValueError, match=r"type must be in 0\.\.4294967294, got 4294967295"):
        producer.push(b"", type=2**32 - 1)
    producer.close()
    with pytest.raises(ValueError, match=r"^the ring is closed$"):
        producer.push(b"")


def test_memory_is_sealed():
    """Neither side can shrink the memory under the other."""
    with Ring.create(1) as ring:
        fd = ring.peer_descriptors.memory
        assert fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL == fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        with pytest.raises(PermissionError) as caught:
            os.ftruncate(fd, 0)
        assert errno.EPERM == caught.value.errno
        assert 4096 == ring.capacity


def test_overwritten_words_are_an_error(pair):
    """Control words that contradict each other raise, on either side."""
    producer, consumer = pair
    producer.push(b"x")
    consumer._map[128:136] = (2**40).to_bytes(8, "little")  # tail
    with pytest.raises(CorruptError, match="the ring's shared memory contradicts itself: something overwrote it"):
        consumer.pop(0)
    with pytest.raises(CorruptError, match="overwrote"):
        producer.push(b"x", timeout=0)


def test_other_memory_is_refused():
    """Memory that holds no ring is not attached to."""
    with Ring.create(4096) as ring:
        _, producer_life, consumer_life = map(os.dup, ring.peer_descriptors)
        other = os.memfd_create("not-a-ring")
        os.ftruncate(other, 8192)
        with pytest.raises(UnsupportedError):
            Ring.attach(other, producer_life, consumer_life)


def test_elsewhere_than_on_linux(monkeypatch):
    """Creating a ring on another system says what capture needs; importing works."""
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(UnsupportedError, match=r"the ring needs Linux \(memfd, futex\), this is linux; capture there"):
        Ring.create(4096)


def test_a_ring_without_room():
    """A size that means nothing is refused."""
    with pytest.raises(ValueError, match="size_bytes must be positive, got 0"):
        Ring.create(0)


def test_creating_and_closing_leaks_no_descriptor():
    """Rings, closed on both sides, leave the process as it was."""
    before = open_descriptors()
    for _ in range(50):
        producer = Ring.create(4096)
        consumer = Ring.attach(*map(os.dup, producer.peer_descriptors))
        producer.push(b"x")
        consumer.pop()
        consumer.close()
        producer.close()
        producer.close()
    assert open_descriptors() <= before


def test_a_ring_that_is_dropped_is_closed_and_told():
    """A side that nobody closes gives its descriptors back, says so, and is dead to the other side."""
    gc.collect()
    before = open_descriptors()
    producer = Ring.create(4096)
    consumer = Ring.attach(*map(os.dup, producer.peer_descriptors))
    producer.close_peer()
    with pytest.warns(ResourceWarning, match="a ring was dropped that is not closed"):
        del consumer
    with pytest.raises(RingClosedError, match="the consumer died"):
        producer.push(b"x")
    with pytest.warns(ResourceWarning, match="dropped"):
        del producer
    with pytest.warns(ResourceWarning, match="dropped"):
        Ring.create(4096)  # with its peer's descriptors
    assert open_descriptors() <= before


@pytest.mark.parametrize("size", [8192, 5000, None])
def test_a_failed_attach_closes_what_it_took(size):
    """Whatever is wrong with the memory, also where it is none: the three descriptors are closed."""
    gc.collect()
    before = open_descriptors()
    with Ring.create(4096) as ring:
        producer_life, consumer_life = map(os.dup, ring.peer_descriptors[1:])
        if size is None:
            memory = os.open("/dev/null", os.O_RDWR)
        else:
            memory = os.memfd_create("not-a-ring")
            os.ftruncate(memory, size)
        with pytest.raises((UnsupportedError, ValueError, OSError)):
            Ring.attach(memory, producer_life, consumer_life)
    assert open_descriptors() <= before


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_a_ring_is_made_does_not_hide_a_death(monkeypatch):
    """A process that another thread forks in the middle keeps no end of the pipes: the consumer's death is seen."""
    children, forked, threads = [], threading.Event(), []

    def fork():
        child = os.fork()
        if child == 0:
            os.write(ready[1], b"x")  # here the child has done what it does first
            signal.alarm(HANGS)
            signal.pause()
        children.append(child)
        forked.set()

    def pipe():
        ends = os_pipe()
        if len(threads) < 2:  # after each of the two pipes of the ring
            threads.append(threading.Thread(target=fork))
            threads[-1].start()
            forked.wait(0.2)
            forked.clear()
        return ends

    os_pipe, ready = os.pipe, os.pipe()
    monkeypatch.setattr(os, "pipe", pipe)
    with Ring.create(4096) as producer:
        for thread in threads:
            thread.join()
        try:
            assert b"xx" == os.read(ready[0], 1) + os.read(ready[0], 1)
            consumer = Ring.attach(*map(os.dup, producer.peer_descriptors))
            producer.close_peer()
            with pytest.warns(ResourceWarning):
                del consumer
            with pytest.raises(RingClosedError, match="the consumer died"):
                producer.push(b"x")
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            for end in ready:
                os.close(end)
    assert 2 == len(children)


_CONSUME = """
import sys
from sklformat.errors import RingClosedError
from sklformat.capture.ring import Ring
ring = Ring.attach(*map(int, sys.argv[1:]))
expected = 0
try:
    while True:
        frame = ring.pop()
        assert frame.tag == expected and set(frame.payload) <= {expected & 255}
        expected += 1
        ring.set_durable(expected)
except RingClosedError as error:
    print(expected, error)
"""


def _consumer(ring, code=_CONSUME):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, ring.peer_descriptors)],
        pass_fds=ring.peer_descriptors,
        stdout=subprocess.PIPE,
        text=True,
    )
    ring.close_peer()
    return process


def test_between_processes():
    """Frames of mixed sizes reach another process whole and in order."""
    with Ring.create(1 << 14) as ring:
        process = _consumer(ring)
        for i in range(2000):
            ring.push(bytes([i & 255]) * (i * 37 % 5000), tag=i)
        ring.finish()
        assert "2000 the producer closed the ring after frame 2000\n" == process.communicate()[0]
        assert 2000 == ring.durable


def test_a_killed_consumer_is_noticed():
    """A producer with a full ring waits for a consumer that is stopped, and learns that it was killed."""
    with Ring.create(1 << 14) as ring:
        process = _consumer(ring)
        ring.push(b"")
        while ring.durable < 1:
            os.sched_yield()
        process.send_signal(signal.SIGSTOP)  # so that the ring fills; stopped is not dead
        with pytest.raises(RingTimeoutError):
            for i in range(100):
                ring.push(bytes([i + 1]) * 1000, tag=i + 1, timeout=0.3)
        process.kill()
        with pytest.raises(RingClosedError, match="died"):
            ring.push(bytes(1000), timeout=HANGS)
        process.wait()
        process.stdout.close()


_PRODUCE_AND_DIE = """
import os, signal, subprocess, sys
from sklformat.capture.ring import Ring
ring = Ring.create(1 << 20)
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], *map(str, ring.peer_descriptors)],
                         pass_fds=ring.peer_descriptors)
ring.close_peer()
copy = os.fork()
if copy == 0:  # it must not hide the death of its parent
    signal.alarm(300)
    signal.pause()
print(copy, flush=True)
for i in range(40):
    ring.push(bytes([i]) * 10000, tag=i)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_producer_is_noticed_and_drained():
    """The consumer takes every complete frame of a producer that was killed, then ends; forked copies do not count."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PRODUCE_AND_DIE, _CONSUME], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    lines = [process.stdout.readline(), process.stdout.readline()]
    try:
        assert "40 the producer died after frame 40\n" == lines[1]
        assert -signal.SIGKILL == process.wait()
        assert alive(int(lines[0]))
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the forked copy
        process.stdout.close()


def test_merge_counts_equal_draws():
    """Merged draws are the row's distinct ids with how often each was drawn; the counts sum to rounds."""
    rng = np.random.default_rng(0)
    draws = np.sort(rng.integers(0, 40, (50, 127)), axis=1)
    targets = merge_draws(draws)
    for t, row in enumerate(draws):
        ids, counts = np.unique(row, return_counts=True)
        pairs = slice(targets.offsets[t], targets.offsets[t + 1])
        np.testing.assert_array_equal(ids, targets.token_ids[pairs])
        np.testing.assert_array_equal(counts, targets.counts[pairs])


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int64])
def test_merge_takes_any_integer_type(dtype):
    """The type of the draws does not change the records."""
    assert merge_draws(np.array([[3, 3, 9]], np.uint32)) == merge_draws(np.array([[3, 3, 9]], dtype))


def test_merge_refuses():
    """What is not a sorted [T, rounds] array of ids with 1..127 rounds is refused by name."""
    with pytest.raises(ValueError, match="position 1: draws are not sorted"):
        merge_draws([[1, 2], [5, 4]])
    with pytest.raises(ValueError, match=r"1\.\.127 rounds, got 128"):
        merge_draws(np.zeros((1, 128), np.uint32))
    with pytest.raises(ValueError, match="integers"):
        merge_draws([[1.0]])
    with pytest.raises(ValueError, match="integers"):
        merge_draws([1, 2])
    with pytest.raises(ValueError, match=r"\[0, 2\*\*32\)"):
        merge_draws([[-1, 2]])


def test_words_match_the_c_structs():
    """The tuples of native.py name the fields of skl.h in order."""
    for name, fields in (("skl_frame", native.RingFrame._fields), ("skl_ring_words", native.RingWords._fields)):
        assert fields == tuple(field for field, _ in ffi.typeof(name).fields)
