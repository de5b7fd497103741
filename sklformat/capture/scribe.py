"""
The writer process of a capture: frames from the ring in, sealed shards out.

Runs in an interpreter of its own, started by ``capture``; imports neither torch nor the teacher.  Ends when the
producer closed or died and every frame it completed is written.
"""

from __future__ import annotations

import sys
import time

from sklformat.cache.contents import shard_header, shard_path
from sklformat.cache.writer import ShardWriter
from sklformat.capture.destinations import Uploader
from sklformat.capture.frames import Setup, unpack
from sklformat.capture.plan import ShardWork
from sklformat.capture.ring import Frame, Ring
from sklformat.errors import RingClosedError, RingTimeoutError, SklError, WriteError


class Drain:
    """
    Take frames until the ring is closed and empty.

    Args:
        ring: The consumer's side.
        setup: What the producer sent.
    """

    def __init__(self, ring: Ring, setup: Setup) -> None:
        self._ring, self._setup = ring, setup
        self._durable = {work.number: work.next_sequence for work in setup.works}
        # Not of complete works: their ``next_sequence`` is the first of the next shard.
        self._beginnings = {work.next_sequence: work for work in setup.works if work.next_sequence < work.end}
        self._shard: ShardWriter | None = None
        self._work: ShardWork | None = None
        self._flushed_size, self._flushed_at = 0, 0.0
        self._uploader = None if setup.url is None else Uploader(setup.url)

    def run(self) -> None:
        """
        Write every frame, and upload what is sealed; an unfinished shard stays as ``.partial``, durable.

        Raises:
            SklError, ValueError, OSError: What stopped the writing; what was flushed before is safe.
        """
        try:
            for work in self._setup.works:
                if work.next_sequence == work.end:
                    self._finish(work)
            self._publish()
            while True:
                frame = self._next()
                if frame is None:
                    self._flush()
                else:
                    self._take(frame)
        except RingClosedError:
            pass
        finally:
            if self._shard is not None:
                self._shard.close()
        if self._work is not None:
            self._advance(self._work)
            self._publish()
        if self._uploader is not None:
            self._uploader.finish()

    def _finish(self, work: ShardWork) -> None:
        """Do what is left of a shard that has all its sequences: it was stopped before its seal, or its upload."""
        if self._uploader is not None and shard_path(self._setup.directory, work.number).exists():
            self._upload(work)
        else:
            self._open(work)
            self._seal()

    def _upload(self, work: ShardWork) -> None:
        if self._uploader is not None:
            self._uploader.put(shard_path(self._setup.directory, work.number))

    def _next(self) -> Frame | None:
        """None: a checkpoint is due."""
        try:
            return self._ring.pop(self._seconds_left())
        except RingTimeoutError:
            return None

    def _take(self, frame: Frame) -> None:
        if self._uploader is not None:
            self._uploader.check()
        if self._shard is None:
            self._open(self._beginnings[frame.tag])
        assert self._shard is not None
        assert self._work is not None
        assert frame.tag == self._work.first_sequence + len(self._shard)
        try:
            tokens, targets, columns = unpack(self._setup.header, frame.type, frame.payload)
            self._shard.append(tokens, targets, columns)
        except ValueError as error:
            raise ValueError(f"sequence {frame.tag}: {error}") from error
        if len(self._shard) == self._work.num_sequences:
            self._seal()
        elif self._shard.size - self._flushed_size >= self._setup.checkpoint_bytes or self._seconds_left() == 0:
            self._flush()

    def _open(self, work: ShardWork) -> None:
        header = shard_header(self._setup.header, work.number, work.first_sequence)
        self._shard = ShardWriter(shard_path(self._setup.directory, work.number), header=header, resume=True)
        self._work = work
        assert len(self._shard) == work.next_sequence - work.first_sequence
        self._flushed_size, self._flushed_at = self._shard.size, time.monotonic()

    def _seconds_left(self) -> float | None:
        """Until the next checkpoint; None: nothing waits for one."""
        if self._shard is None or self._shard.size == self._flushed_size:
            return None
        return max(0.0, self._flushed_at + self._setup.checkpoint_seconds - time.monotonic())

    def _flush(self) -> None:
        assert self._shard is not None
        assert self._work is not None
        self._shard.flush()
        self._flushed_size, self._flushed_at = self._shard.size, time.monotonic()
        self._advance(self._work)
        self._publish()

    def _seal(self) -> None:
        assert self._shard is not None
        assert self._work is not None
        self._shard.seal()
        work, self._shard, self._work = self._work, None, None
        self._durable[work.number] = work.end
        self._publish()
        self._upload(work)

    def _advance(self, work: ShardWork) -> None:
        assert self._shard is not None
        self._durable[work.number] = work.first_sequence + len(self._shard)

    def _publish(self) -> None:
        unfinished = (self._durable[work.number] for work in self._setup.works if self._durable[work.number] < work.end)
        self._ring.set_durable(min(unfinished, default=self._setup.num_sequences))


def main(arguments: list[str]) -> int:
    """
    Run the writer process: the ring's three descriptors as arguments, the setup on standard input.

    Returns:
        0, or 1 after telling the producer what went wrong.
    """
    setup = Setup.parse(sys.stdin.buffer.read())
    with Ring.attach(*map(int, arguments)) as ring:
        try:
            Drain(ring, setup).run()
        except WriteError as error:  # the teacher's side says what is safe, and what to do
            ring.report(f"{error.filename}: {error.strerror}")
            return 1
        except (SklError, ValueError, OSError) as error:
            ring.report(str(error) if str(setup.directory) in str(error) else f"{setup.directory}: {error}")
            return 1
    return 0
