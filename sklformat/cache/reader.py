"""
Read a cache: one sealed shard or a directory of them, here or behind a URL, as one sequence of sequences.

The shards themselves are read by ``shard``; this module knows which there are.  SPEC.md sections 11 and 13.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sklformat.cache.contents import describe_stranger, list_shards, missing
from sklformat.cache.misalignment import likely_cause
from sklformat.cache.payloads import Payloads
from sklformat.cache.shard import Shard, describe, no_sequence
from sklformat.checksums import alignment
from sklformat.errors import (
    AlignmentError,
    CorruptError,
    SklError,
)
from sklformat.files.copies import LocalCopies
from sklformat.files.places import Place, is_url
from sklformat.files.regular import is_directory
from sklformat.files.storage import Io
from sklformat.format import layout
from sklformat.format.header import Header
from sklformat.format.listing import Entry, cache_fingerprint
from sklformat.format.records import Sequence

MAX_OPEN_SHARDS = 64
"""The most that are open at once, of a cache that has more: half of them kept for whoever comes next, the others
because up to four batches in the making read from an eighth each.  A batch of more shards copies its blocks at once."""


class Cache:
    """
    A sequence of sequences: one shard, or a directory of shards in the order of their first sequence.

    Made by ``skl.open``.  ``cache[i]`` counts from 0; i is the global sequence number, except for a single shard opened
    by itself, where ``first_sequence`` says what 0 stands for.  Safe to pickle (it opens again), to fork, and to read
    from several threads.
    """

    def __init__(self, path: Place, io: Io = "auto", copies: LocalCopies | None = None) -> None:
        self.path: Place
        if isinstance(path, str) and is_url(path):
            self.path = path.rstrip("/")
            self._directory = not self.path.endswith(layout.SHARD_SUFFIX)
        else:
            self.path = Path(path)
            try:
                self._directory = is_directory(self.path)
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{self.path}: no such file or directory; a cache is a directory of {layout.SHARD_SUFFIX} shards"
                ) from None
        self.io: Io = io
        self.copies = LocalCopies() if copies is None and isinstance(self.path, str) else copies
        self._open_shards: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._entries = list_shards(self.path, io, self.copies)
        first = self._shard(0)
        self.header: Header = dataclasses.replace(first.header, shard_number=0, first_sequence=0)
        self.first_sequence = first.header.first_sequence
        self.fingerprint = cache_fingerprint(entry.fingerprint for entry in self._entries)
        self._starts = np.array([entry.first_sequence - self.first_sequence for entry in self._entries], np.int64)
        self._length = int(self._starts[-1]) + self._entries[-1].num_sequences

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        header = self.header
        drawn = f" of {header.rounds} rounds" if header.rounds else ""
        return (
            f"<Cache {str(self.path)!r}: {len(self):,} sequences of {header.seq_len or 'any number of'} positions, "
            f"{self.num_records:,} records, {header.kind}{drawn} ({header.sampler}), vocab_size {header.vocab_size:,}, "
            f"fingerprint {self.fingerprint}>"
        )

    def __getitem__(self, i: int) -> Sequence:
        """
        Sequence i, decoded and checked.

        Raises:
            IndexError: There is no sequence i.
            FormatError: Its shard or block is damaged; names file, byte offset and sequence.
            ValueError: The cache is closed.
        """
        shard, number = self.find(i)
        return shard[number]

    def __iter__(self) -> Iterator[Sequence]:
        return (self[i] for i in range(len(self)))

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> tuple[Place, Io, LocalCopies | None]:
        return self.path, self.io, self.copies

    def __setstate__(self, state: tuple[Place, Io, LocalCopies | None]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def find(self, i: int) -> tuple[Shard, int]:
        """
        The shard that holds sequence i, and its number there.

        Raises:
            IndexError: There is no sequence i.
        """
        if not -len(self) <= i < len(self):
            raise no_sequence(self.path, i, len(self))
        i %= len(self)
        place = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._shard(place), i - int(self._starts[place])

    def check_alignment(
        self, i: int, tokens: ArrayLike, given: Callable[[int], NDArray[np.integer[Any]]] | None = None
    ) -> None:
        """
        Prove that sequence i was captured on exactly these tokens.

        Args:
            i: Sequence, counted as in ``cache[i]``.
            tokens: [T + 1] integer token ids.
            given: Other sequences of where the tokens come from, counted as i; they make the likely cause likelier.

        Raises:
            AlignmentError: It was not; names the sequence, both checksums and the likely cause.
            ValueError: The tokens are no 1-D integers in [0, 2**32); names the sequence.

        Source: SPEC section 6.3.
        """
        shard, number = self.find(i)
        i, stored = i % len(self), int(shard.index.alignment[number])
        try:
            computed = alignment(tokens)
        except ValueError as error:
            raise ValueError(f"{self.path}: sequence {i}: {error}") from None
        if stored != computed:
            length = int(shard.index.num_positions[number]) + 1
            try:
                cause = likely_cause(self, i, np.asarray(tokens).astype(np.int64), length, given)
            except (SklError, OSError) as error:  # its neighbours cannot be read: no reason to hide what is known
                cause = f"of a cause that could not be looked for: {error}"
            raise AlignmentError(
                f"{self.path}: sequence {i}: alignment checksum {stored:#018x} stored, {computed:#018x} computed from "
                f"the tokens given ({cause}); pack the tokens with the cache's tokenizer, corpus, seed and seq_len",
                sequence_index=i,
            )

    def alignment_of(self, i: int) -> int:
        """Alignment checksum of sequence i.  SPEC section 6.3."""
        shard, number = self.find(i)
        return int(shard.index.alignment[number])

    def alignments(self) -> NDArray[np.uint64]:
        """Alignment checksums of all sequences, in order."""
        return np.concatenate([self._shard(place).index.alignment for place in range(len(self._entries))])

    def tokens_of(self, i: int) -> NDArray[np.uint32] | None:
        """Tokens of sequence i, [T + 1], or None where none are stored."""
        return self[i].tokens

    def find_alignment(self, value: int, near: int) -> int | None:
        """A sequence with this alignment checksum, in the shard of sequence ``near`` or next to it; None: none."""
        place = int(np.searchsorted(self._starts, near, side="right")) - 1
        for other in (place, place - 1, place + 1):
            if 0 <= other < len(self._entries):
                same = np.flatnonzero(self._shard(other).index.alignment == np.uint64(value))
                if same.size:
                    return int(self._starts[other] + same[0])
        return None

    def payloads(self, numbers: NDArray[np.int64], into: Payloads | None = None) -> Payloads:
        """
        The payloads of sequences, proven by their checksums.

        What lies in them, records and tokens, is the decoder's to check: ``Payloads.decode`` does.

        Args:
            numbers: [B]; -1 stands for an empty row, or one that is not of this cache.
            into: Where they go, payloads of B rows that may hold those of other caches; None: payloads of their own.

        Raises:
            IndexError, FormatError: As ``cache[i]``.
        """
        listed = numbers.tolist()  # of few numbers Python's own min and max are quicker
        if listed and not -1 <= min(listed) <= max(listed) < len(self):
            raise IndexError(f"{self.path}: sequences {min(listed)}..{max(listed)} of {len(self)}")
        found = Payloads(numbers.size) if into is None else into
        places = np.searchsorted(self._starts, numbers, side="right") - 1  # of empty rows: -1
        distinct = dict.fromkeys(place for place in places.tolist() if place >= 0)
        for place in distinct:
            mine = np.flatnonzero(places == place)
            self.fill(found, mine, place, numbers[mine], len(distinct))
        return found

    def fill(
        self, found: Payloads, rows: NDArray[np.int64], place: int, numbers: NDArray[np.int64], num_shards: int
    ) -> None:
        """
        Put sequences of one shard into rows of payloads, which may hold those of other caches too.

        Args:
            found: Where they go.
            rows: [k].
            place: Which shard, as in ``starts``.
            numbers: [k] sequences of it, counted as in ``cache[i]``.
            num_shards: How many shards the payloads are of.

        Raises:
            FormatError: As ``cache[i]``.
        """
        copied = len(self._entries) > MAX_OPEN_SHARDS and num_shards > MAX_OPEN_SHARDS // 8
        found.fill(rows, self._shard(place), numbers - self._starts[place], copied=copied)

    @property
    def starts(self) -> NDArray[np.int64]:
        """[shards]: the first sequence of each, counted as in ``cache[i]``."""
        return self._starts

    @property
    def fingerprints(self) -> list[str]:
        """Fingerprint of each shard, in order."""
        return [entry.fingerprint for entry in self._entries]

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(entry.size_bytes for entry in self._entries)

    @property
    def num_records(self) -> int:
        """(id, code) pairs of all sequences."""
        return sum(entry.num_records for entry in self._entries)

    def shards(self) -> Iterator[Shard]:
        """Every shard in turn, opened and checked against the first."""
        return (self._shard(place) for place in range(len(self._entries)))

    def close(self) -> None:
        """Let go of every open shard; nothing can be read afterwards."""
        self._keep_own_list()
        with self._lock:
            self._closed = True
            while self._open_shards:
                self._open_shards.popitem()[1].close()

    def _keep_own_list(self) -> None:
        """After a fork: the maps are shared, but each process has its own list, and a lock that nobody else holds."""
        if self._pid != os.getpid():
            self._open_shards, self._lock = OrderedDict(self._open_shards), threading.Lock()
            self._pid = os.getpid()

    def _shard(self, place: int) -> Shard:
        self._keep_own_list()
        with self._lock:
            return self._open_shard(place)

    def _open_shard(self, place: int) -> Shard:
        if self._closed:
            raise ValueError(f"{self.path}: the cache is closed; open it again")
        shard = self._open_shards.get(place)
        if shard is None:
            entry = self._entries[place]
            if isinstance(entry.path, Path) and not os.path.lexists(entry.path):
                raise missing(entry)
            try:
                shard = Shard(entry.path, self.io, copies=self.copies, entry=entry)
            except FileNotFoundError:
                if isinstance(entry.path, Path):
                    raise  # it went just now
                raise missing(entry) from None
            self._check_belongs(shard, entry)
            self._open_shards[place] = shard
            kept = len(self._entries) if len(self._entries) <= MAX_OPEN_SHARDS else MAX_OPEN_SHARDS // 2
            if len(self._open_shards) > kept:
                self._open_shards.popitem(last=False)  # closed once nobody reads from it any more
        else:
            self._open_shards.move_to_end(place)
        return shard

    def _check_belongs(self, shard: Shard, entry: Entry) -> None:
        if faults := describe(shard).differences(entry):
            shard.close()
            raise CorruptError(
                f"{'; '.join(faults)}; the file was replaced, or the manifest is of another cache", path=shard.path
            )
        if hasattr(self, "header") and self.header.cache_key != shard.header.cache_key:
            shard.close()
            fault = describe_stranger(self._entries[0].name, self.header, shard.header)
            raise CorruptError(fault, path=shard.path)


def open_cache(path: Path | str, io: Io = "auto", copies: LocalCopies | None = None) -> Cache:
    """
    Open one sealed shard, or a directory of them with or without its manifest.

    Args:
        path: A ``.skl`` file or a cache directory, or the URL of a ``.skl`` file or of a directory with a manifest
            (``s3://…``; needs the extra ``remote``).
        io: How local files are read.  "mmap" maps them, which is fast, but a file that is cut short meanwhile, or a
            disk that fails, then kills the process.  "pread" reads them, and every such thing is an error that can be
            caught.  "auto": mmap on local file systems, pread on network and unknown ones.
        copies: Where pieces of remote files are kept, and how many; None: a ``LocalCopies`` with its defaults.

    Raises:
        FileNotFoundError: Nothing is there.
        MissingShardError: A range of sequences is missing, or a shard is unfinished; it is named.
        CorruptError, TruncatedError, UnsupportedError: Damage or another version; names file and byte offset.
        RemoteError: The store behind a URL failed.

    Source: SPEC section 11.
    """
    return Cache(path, io, copies)
