"""
The teacher's side of a capture: hand sequences over and carry on; a process of its own writes them to disk.

Knows no teacher and no sampler, and imports no torch; ``scribe`` is the other side.  For Linux.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import ArrayLike

from sklformat.cache.contents import UNFINISHED_NAME, mark_unfinished, shard_path, unmark_unfinished
from sklformat.cache.manifest import remove_manifest
from sklformat.cache.recovery import unseal
from sklformat.capture.advance import describe_goal
from sklformat.capture.destinations import Target
from sklformat.capture.frames import Setup, merge_draws, pack_draws, pack_targets
from sklformat.capture.memory import check_room
from sklformat.capture.plan import ShardWork, check_shards, places_of, sealed_entries, survey
from sklformat.capture.ring import Ring
from sklformat.errors import CaptureError, InUseError, RingClosedError
from sklformat.files.disk import let_go, shared_directory
from sklformat.format.header import Header
from sklformat.format.listing import Entry
from sklformat.format.records import SparseTargets

__all__ = ["Capture", "ShardWork", "merge_draws"]

_WRITER_LOCK = ".writer.lock"
_TAKEOVER_SECONDS = 60.0
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from sklformat.capture.scribe import main
sys.exit(main(sys.argv[2:]))
"""


class Capture:
    """
    Write a cache of shards while the teacher runs; resume where an interrupted capture ended.

    A context: entering takes the directory and starts the writer process; leaving waits until everything is on disk
    and, when every shard is sealed, writes the manifest.  An exception leaves the shard begun as ``.partial``,
    durable.  Use one thread.

    Several teachers capture one cache together, each in a process of its own, a rank: shard k is the work of rank
    k mod world_size, whatever it was in an earlier run.  All give the same arguments; when all have left, one of them
    calls ``finish``.

    Args:
        directory: Of the cache; made if it is missing.
        header: Settings of all shards; shard_number and first_sequence are set for each.
        num_sequences: Of the whole cache, >= 1; more than a finished cache has extend it.
        sequences_per_shard: >= 1; the last shard may hold fewer.
        ring_bytes: Room between teacher and writer, at least one sequence; memory that is taken at once.
        checkpoint_bytes, checkpoint_seconds: How much may be lost at most when both processes die: after this many
            bytes, or this many seconds, what was written is made durable.
        url: Where sealed shards go once they are verified, and the manifest after them; ``directory`` then holds what
            is not there yet.
        rank, world_size: This process among those that capture this cache, 0 <= rank < world_size.
        run: Name of the run that all its ranks share and no other run has; needed where there are several.
        apart: Ranks start and end each at its own time; one that starts again waits for its own writer process of
            before, and never for another rank's.

    Raises:
        ValueError: A number out of range.
        InUseError: On entering: another run has the directory, or another process one of this rank's shards.
        SettingsError: On entering: shards here were made with other settings; the message shows both values.
        FormatError: On entering: a shard here is damaged.
        UnsupportedError: On entering: this is not Linux.
        RemoteError: On entering: the store behind ``url`` failed.
        CaptureError: On leaving, or from a push: the writer process failed; the message is its own.

    Attributes:
        entries: What the manifest says of each shard, once it is written; empty before.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        header: Header,
        num_sequences: int,
        sequences_per_shard: int,
        ring_bytes: int = 64 << 20,
        checkpoint_bytes: int = 256 << 20,
        checkpoint_seconds: float = 30.0,
        url: str | None = None,
        rank: int = 0,
        world_size: int = 1,
        run: str | None = None,
        apart: bool = False,
    ) -> None:
        for name, value in (
            ("num_sequences", num_sequences),
            ("sequences_per_shard", sequences_per_shard),
            ("ring_bytes", ring_bytes),
            ("checkpoint_bytes", checkpoint_bytes),
            ("checkpoint_seconds", checkpoint_seconds),
        ):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        check_shards(num_sequences, sequences_per_shard)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..world_size - 1, got {rank} of {world_size}")
        if world_size > 1 and run is None:
            raise ValueError(f"world_size {world_size} needs the name of the run, which all its ranks share")
        self.directory = Path(directory)
        self.header = header
        self.num_sequences = operator.index(num_sequences)
        self.sequences_per_shard = operator.index(sequences_per_shard)
        self._ring_bytes = operator.index(ring_bytes)
        self._checkpoints = checkpoint_bytes, checkpoint_seconds
        self._url, self._rank, self._world_size = url, rank, world_size
        self._run = run or secrets.token_hex(8)
        self._apart = apart
        self._works: list[ShardWork] = []
        self._todo: dict[int, ShardWork] = {}
        self._sealed_before = 0
        self._expected: tuple[int, ShardWork] | None = None
        self._ring: Ring | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._error: str | None = None
        self._held = contextlib.ExitStack()
        self.entries: list[Entry] = []

    def __enter__(self) -> Capture:
        with contextlib.ExitStack() as held:
            held.enter_context(shared_directory(self.directory, self._run))
            writer_locks = held.enter_context(self._after_old_writers())
            self._works = survey(
                self.directory,
                self.header,
                self.num_sequences,
                self.sequences_per_shard,
                url=self._url,
                rank=self._rank,
                world_size=self._world_size,
                grows=True,
            )
            if not self._works:
                self._sealed_before = self.num_sequences
            self._todo = {work.next_sequence: work for work in self._works if work.next_sequence < work.end}
            if self._works:
                check_room(self._ring_bytes, "ring_bytes")
                self._mark()
                self._begin_to_grow()
                self._ring = held.enter_context(Ring.create(self._ring_bytes))
                self._process = self._start(self._ring, writer_locks)
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            if self._process is not None and self._ring is not None:
                self._ring.finish()
                status = self._process.wait()
                if kind is not None and not issubclass(kind, KeyboardInterrupt):
                    return  # the error that is on its way came first
                if status != 0 or self._error is not None:
                    raise self._failure()
            if kind is None and self._world_size == 1 and self.durable == self.num_sequences:
                self._publish()  # the last seal made it so

    def _mark(self) -> None:
        """Mark the directory as unfinished; the first rank, or who comes first, says there how far it is to go."""
        says = None
        if self._rank == 0 or not (self.directory / UNFINISHED_NAME).exists():
            says = describe_goal(self.directory, self.num_sequences, uploads=self._url is not None)
        mark_unfinished(self.directory, says)

    def _begin_to_grow(self) -> None:
        """Take back the manifest of a cache that is to become longer, and open its last shard if that is not full."""
        if self._url is None:
            remove_manifest(self.directory)
        for work in self._works:
            if work.is_short:
                unseal(shard_path(self.directory, work.number))

    def finish(self) -> list[Entry]:
        """
        Check that every shard of every rank is sealed, and write the manifest; for one rank, when all have left.

        Returns:
            What the manifest says of each shard.

        Raises:
            MissingShardError: A shard is not sealed; names its sequences.
            InUseError: Another run has taken the directory.
            SettingsError, FormatError, RemoteError: As on entering.
        """
        with shared_directory(self.directory, self._run):
            return self._publish()

    def _publish(self) -> list[Entry]:
        target = Target(self.directory, self._url)
        entries = sealed_entries(target, self.header, self.num_sequences, self.sequences_per_shard)
        target.publish(entries)
        self.entries = entries
        self.unmark()
        return entries

    def unmark(self) -> None:
        """Remove the mark of an unfinished capture; done in every directory of the run, once the manifest is there."""
        unmark_unfinished(self.directory)

    def shards(self) -> Iterator[ShardWork]:
        """Shards that still need sequences, in order; push those from ``next_sequence`` on, then go to the next."""
        yield from (work for work in self._works if work.next_sequence < work.end)

    def push(
        self,
        sequence: int,
        tokens: ArrayLike,
        targets: SparseTargets,
        columns: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """
        Hand over one sequence with its (id, count) or (id, weight) pairs; copied once, written by the writer process.

        Args:
            sequence: Global number: the one after the last push, or ``next_sequence`` of a shard that has not begun.
            tokens: [T + 1] integer token ids.
            targets: Records of T positions, of the header's kind.
            columns: As ``ShardWriter.append``: record_logprob [nnz] beside targets.token_ids.

        Raises:
            ValueError: Another sequence is due, shapes or kinds disagree, or the sequence is larger than the ring.
            CaptureError: The writer process failed or died; records that break a rule of the format are reported so.
        """
        self._check_due(sequence)
        self._send(sequence, *pack_targets(self.header, tokens, targets, columns))

    def push_draws(
        self,
        sequence: int,
        tokens: ArrayLike,
        draws: ArrayLike,
        columns: Mapping[str, ArrayLike] | None = None,
        counted: ArrayLike | None = None,
    ) -> None:
        """
        Hand over one sequence with its sorted draws; the writer process counts them.

        Args:
            sequence: As in ``push``.
            tokens: [T + 1] integer token ids.
            draws: [K, header.rounds] token ids of the K positions that count, each row ascending; uint32 or int32 are
                not converted.
            columns: An array for each of header.columns: document_start [T + 1] bool, record_logprob [K, rounds]
                beside the draws, the others [T], 0 where a position does not count.
            counted: Which positions get records, [T] bool; None: all, K = T.

        Raises:
            ValueError, CaptureError: As ``push``; rows that are not sorted are reported by the writer process.
        """
        self._check_due(sequence)
        self._send(sequence, *pack_draws(self.header, tokens, draws, columns, counted))

    @property
    def num_own_sequences(self) -> int:
        """Sequences in all shards of this rank, those that are there already included."""
        places = places_of(self.num_sequences, self.sequences_per_shard)[self._rank :: self._world_size]
        return sum(place.num_sequences for place in places)

    @property
    def wait_seconds(self) -> float:
        """Time this side has waited because the ring was full."""
        return 0.0 if self._ring is None else self._ring.wait_seconds

    @property
    def durable(self) -> int:
        """Every sequence of this rank below this global number is on disk, whatever happens to both processes."""
        return self._sealed_before if self._ring is None else self._ring.durable

    @contextlib.contextmanager
    def _after_old_writers(self) -> Iterator[list[int]]:
        """
        Wait until the writer processes of an interrupted run have ended, and hold their place.

        Their teachers are dead, else the directory would be held; they only write what their rings still held.
        """
        runs = {_WRITER_LOCK: self._run}
        if self._apart:
            runs[f".writer-{self._rank:05d}.lock"] = secrets.token_hex(8)
        with contextlib.ExitStack() as held:
            try:
                locks = [
                    held.enter_context(
                        shared_directory(self.directory, run, name=name, patience=_TAKEOVER_SECONDS, inherited=True)
                    )
                    for name, run in runs.items()
                ]
            except InUseError:
                raise InUseError(
                    f"{self.directory}: the writer process of an interrupted capture is still writing; "
                    "wait for it, or end it"
                ) from None
            try:
                yield locks
            finally:
                if self._process is None or self._process.returncode is not None:
                    for lock, name in zip(locks, runs, strict=True):
                        let_go(lock, self.directory / name)

    def _start(self, ring: Ring, writer_locks: list[int]) -> subprocess.Popen[bytes]:
        """
        A fresh interpreter with this one's module path: nothing of the teacher's process is copied or run again.

        A session of its own: the terminal's Ctrl-C is the teacher's to handle, after which the writer finishes.
        """
        if not sys.executable:
            raise CaptureError(
                "the writer process cannot be started: this Python does not know its own program (sys.executable is "
                "empty); set sys.executable to a python that has sklformat"
            )
        descriptors = ring.peer_descriptors
        path = [entry for entry in sys.path if isinstance(entry, str)]  # no import looks at any other
        process = subprocess.Popen(  # noqa: S603  our own interpreter and code
            [sys.executable, "-c", _START, json.dumps(path), *map(str, descriptors)],
            stdin=subprocess.PIPE,
            pass_fds=[*descriptors, *writer_locks],
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        ring.close_peer()
        setup = Setup(self.directory, self.header, self._works, self.num_sequences, *self._checkpoints, self._url)
        assert process.stdin is not None
        # A writer that is dead already shows at the next push or on leaving.
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(setup.pack())
        return process

    def _check_due(self, sequence: int) -> None:
        if self._error is not None:
            raise CaptureError(self._error)
        if self._expected is not None and sequence == self._expected[0]:
            return
        if self._expected is None and sequence in self._todo:
            return
        due = [self._expected[0]] if self._expected is not None else list(self._todo)
        raise ValueError(
            f"sequence {sequence} pushed, "
            + (f"{due[0]} is due; a shard's sequences come in order" if due else "but no shard needs more sequences")
        )

    def _send(self, sequence: int, kind: int, parts: list[Any]) -> None:
        assert self._ring is not None
        try:
            self._ring.push(*parts, type=kind, tag=sequence)
        except RingClosedError:
            raise self._failure() from None
        work = self._todo.pop(sequence) if self._expected is None else self._expected[1]
        self._expected = (sequence + 1, work) if sequence + 1 < work.end else None

    def _failure(self) -> CaptureError:
        """What the writer process said, or how it ended."""
        assert self._ring is not None
        assert self._process is not None
        if self._error is None:
            message, status = self._ring.last_words(), self._process.wait()
            if not message:
                how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
                message = f"{self.directory}: the writer process {how}"
            self._error = f"{message}; sequences below {self.durable} are safe, run the capture again to resume it"
        return CaptureError(self._error)
