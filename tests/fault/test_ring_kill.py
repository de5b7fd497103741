"""Either side of a ring may be killed or stopped at any moment; the other tells death from slowness, losing nothing."""

import contextlib
import gc
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import threading
import time
from pathlib import Path

import pytest
from system import open_descriptors

from sklformat.capture.ring import Ring
from sklformat.errors import RingClosedError

ROOT = Path(__file__).resolve().parents[2]
CAPACITY = 1 << 16
TORN = 3  # exit status of a child that met a frame which is not whole
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded:DeprecationWarning"
)  # the children need no other thread
SOME_OR_MANY = [10, pytest.param(200, marks=pytest.mark.soak)]


def payload_of(number):
    """Frame ``number``, from empty to almost as large as the ring; no two neighbours alike."""
    size = random.Random(number).choice((0, 8, 700, 9000, 33_000, CAPACITY - 64))
    return (number + 1).to_bytes(8, "little") * (size // 8)


def push_for_ever(ring):
    for number in range(1 << 40):
        ring.push(payload_of(number), tag=number)


def is_whole(frame, expected):
    return frame.tag == frame.number == expected and bytes(frame.payload) == payload_of(expected)


def pop_for_ever(ring):
    expected = 0
    while True:
        if not is_whole(ring.pop(), expected):
            os._exit(TORN)
        expected += 1
        ring.set_durable(expected)


def fork(run):
    """A child that runs until it is killed; whatever else ends it, is seen in its status."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            run()
        os._exit(1)
    return child


def make_producer():
    """This side of a ring, the producer, and a child that pops for ever."""
    ring = Ring.create(CAPACITY)
    inherited = tuple(map(os.dup, ring.peer_descriptors))
    child = fork(lambda: pop_for_ever(Ring.attach(*inherited)))
    for fd in inherited:
        os.close(fd)
    ring.close_peer()
    return ring, child


def make_consumer():
    """This side of a ring, the consumer, and a child that pushes for ever."""
    here, there = socket.socketpair()

    def run():
        ring = Ring.create(CAPACITY)
        socket.send_fds(there, [b"."], ring.peer_descriptors)
        ring.close_peer()
        push_for_ever(ring)

    child = fork(run)
    with here, there:
        return Ring.attach(*socket.recv_fds(here, 1, 3)[1]), child


def rings_mapped():
    return Path("/proc/self/maps").read_text().count("sklformat-ring")


@contextlib.contextmanager
def nothing_left():
    """Neither descriptors, mapped memory nor shared files are more than before."""
    gc.collect()  # what earlier tests left to the collector must not go while this counts
    descriptors, rings, shared = open_descriptors(), rings_mapped(), set(os.listdir("/dev/shm"))
    yield
    assert open_descriptors() <= descriptors
    assert rings_mapped() <= rings
    assert not {name for name in set(os.listdir("/dev/shm")) - shared if "sklformat" in name}


def kill_after(child, deadline):
    """Kill at a moment that has nothing to do with what either side is doing; returns when it was."""

    def kill():
        time.sleep(deadline)
        os.kill(child, signal.SIGKILL)
        killed.append(time.monotonic())

    killed = []
    thread = threading.Thread(target=kill)
    thread.start()
    return thread, killed


def show(seconds, what):
    """The figure of many kills; of a few it would say nothing."""
    if len(seconds) > 100:
        print(f"{what}: {statistics.median(seconds) * 1e3:.1f} ms, at the most {max(seconds) * 1e3:.1f} ms")
        assert statistics.median(seconds) < 0.2


@pytest.mark.parametrize("times", SOME_OR_MANY)
def test_a_consumer_killed_at_any_moment(times):
    """The producer notices, the consumer met whole frames only, and nothing is left behind."""
    rng, seconds = random.Random(1), []
    with nothing_left():
        for _ in range(times):
            ring, child = make_producer()
            thread, killed = kill_after(child, rng.uniform(0.001, 0.03))
            with pytest.raises(RingClosedError, match="the consumer died"):
                push_for_ever(ring)
            noticed = time.monotonic()
            thread.join()
            seconds.append(noticed - killed[0])
            assert -signal.SIGKILL == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert ring.durable <= ring.words.pushed
            ring.close()
    show(seconds, "a killed consumer is noticed after")


@pytest.mark.parametrize("times", SOME_OR_MANY)
def test_a_producer_killed_at_any_moment(times):
    """The consumer gets every frame that was pushed whole, none that was not, and the end."""
    rng, seconds = random.Random(2), []
    with nothing_left():
        for _ in range(times):
            ring, child = make_consumer()
            thread, killed = kill_after(child, rng.uniform(0.001, 0.03))
            expected = 0
            with pytest.raises(RingClosedError, match="the producer died after frame"):
                while True:
                    assert is_whole(ring.pop(), expected)
                    expected += 1
            noticed = time.monotonic()
            thread.join()
            seconds.append(noticed - killed[0])
            assert ring.words.pushed - expected in (0, 1)  # one may be counted and not yet published
            assert -signal.SIGKILL == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            ring.close()
    show(seconds, "a killed producer is noticed after")


@pytest.mark.soak
@pytest.mark.parametrize("make", [make_producer, make_consumer])
def test_stopped_is_not_dead(make):
    """A side that is stopped for 30 seconds keeps the other waiting, and then goes on where it was."""
    ring, child = make()
    numbers = iter(range(1 << 40))

    def one_frame():
        number = next(numbers)
        if make is make_producer:
            ring.push(payload_of(number), tag=number)
        else:
            assert is_whole(ring.pop(), number)

    for _ in range(100):
        one_frame()
    os.kill(child, signal.SIGSTOP)
    timer = threading.Timer(30, os.kill, (child, signal.SIGCONT))
    stopped = time.monotonic()
    timer.start()
    longest = 0.0
    while time.monotonic() - stopped < 31:
        begin = time.monotonic()
        one_frame()
        longest = max(longest, time.monotonic() - begin)
    timer.join()
    assert longest > 29
    assert make is make_consumer or ring.wait_seconds > 29
    os.kill(child, signal.SIGKILL)
    assert -signal.SIGKILL == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ring.close()


@pytest.mark.soak
def test_a_hundred_million_messages(tmp_path):
    """10^8 messages of mixed sizes reach another process once, whole and in order; C on both sides."""
    compiler = shutil.which("cc")
    assert compiler is not None
    sources = [ROOT / "tests/c/soak_ring.c", ROOT / "csrc/ring.c", ROOT / "csrc/sleep.c"]
    program = tmp_path / "soak_ring"
    subprocess.run([compiler, "-O3", "-std=gnu11", f"-I{ROOT / 'csrc'}", *sources, "-o", program], check=True)
    done = subprocess.run([program, "100000000"], capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stderr)
    print(done.stdout)
