"""
How fast do frames go from one process to another through the ring?

Against memcpy of the same size, which is the limit, and against multiprocessing's Pipe and Queue, in the same run.
The ring's producer copies each frame in; the consumer looks at it in place.  A frame's memory is not in cache when
its turn comes again: buffers go round through 64 MiB.  Prints Markdown.

Usage: python benchmarks/ring.py [--seconds 1.0] [--rounds 3]
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time

import numpy as np

from sklformat.capture.ring import Ring

SIZES = {"4 KiB": 4096, "64 KiB": 65536, "1 MiB": 1 << 20}
SOURCE_BYTES = 64 << 20

_CONSUME = """
import sys
from sklformat.errors import RingClosedError
from sklformat.capture.ring import Ring
with Ring.attach(*map(int, sys.argv[1:])) as ring:
    total = 0
    try:
        while True:
            frame = ring.pop()
            total += len(frame.payload) + frame.payload[0] + frame.payload[-1]
            ring.set_durable(frame.number + 1)
    except RingClosedError:
        pass
"""


def buffers(size):
    """Views of ``size`` bytes that together are larger than the caches."""
    data = np.random.default_rng(0).integers(0, 256, SOURCE_BYTES, np.uint8)
    return [data[i : i + size] for i in range(0, SOURCE_BYTES, size)]


def through_memcpy(size, seconds):
    source, target = buffers(size), buffers(size)
    return _rate(size, seconds, lambda i: np.copyto(target[i], source[i]), len(source), lambda: None)


def through_ring(size, seconds):
    source = buffers(size)
    with Ring.create(SOURCE_BYTES) as ring:
        process = subprocess.Popen(
            [sys.executable, "-c", _CONSUME, *map(str, ring.peer_descriptors)], pass_fds=ring.peer_descriptors
        )
        ring.close_peer()
        ring.push(b"\0")
        while ring.durable < 1:  # the other interpreter has started
            os.sched_yield()

        def finish():
            while ring.words.popped < ring.words.pushed - 1:  # the last is popped, not yet handed back
                os.sched_yield()

        rate = _rate(size, seconds, lambda i: ring.push(source[i]), len(source), finish)
        ring.finish()
        process.wait()
    return rate


def _drain_pipe(connection):
    total = 0
    while data := connection.recv_bytes():
        total += len(data) + data[0] + data[-1]


def through_pipe(size, seconds):
    source = buffers(size)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_drain_pipe, args=(receiver,))
    process.start()

    def finish():
        sender.send_bytes(b"")
        process.join()

    return _rate(size, seconds, lambda i: sender.send_bytes(source[i]), len(source), finish)


def _drain_queue(queue):
    total = 0
    while (array := queue.get()) is not None:
        total += array.size + int(array[0]) + int(array[-1])


def through_queue(size, seconds):
    source = buffers(size)
    queue = multiprocessing.get_context("fork").Queue(maxsize=max(2, (8 << 20) // size))
    process = multiprocessing.get_context("fork").Process(target=_drain_queue, args=(queue,))
    process.start()

    def finish():
        queue.put(None)
        process.join()

    return _rate(size, seconds, lambda i: queue.put(source[i]), len(source), finish)


def _rate(size, seconds, send, count, finish):
    """GB/s from the first frame until the receiver has taken the last."""
    for i in range(min(count, 16)):
        send(i)
    started, sent = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(16):
            send(sent % count)
            sent += 1
    finish()
    return sent * size / (time.perf_counter() - started) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--seconds", type=float, default=1.0, help="time of one measurement, in seconds")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each; the median counts")
    options = parser.parse_args()
    ways = {
        "memcpy": through_memcpy,
        "ring": through_ring,
        "Pipe": through_pipe,
        "Queue": through_queue,
    }
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, GB/s (median of rounds)\n"
    )
    print("| frame | " + " | ".join(ways) + " | ring / memcpy | ring / best of multiprocessing |")
    print("|---|" + "---:|" * (len(ways) + 2))
    for name, size in SIZES.items():
        rates = {way: [] for way in ways}
        for _ in range(options.rounds):  # interleaved, so that a disturbance meets all
            for way, measure in ways.items():
                rates[way].append(measure(size, options.seconds))
        medians = {way: statistics.median(values) for way, values in rates.items()}
        cells = [f"{value:.2f}" for value in medians.values()]
        best = max(medians["Pipe"], medians["Queue"])
        cells += [f"{medians['ring'] / medians['memcpy']:.2f}", f"{medians['ring'] / best:.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
