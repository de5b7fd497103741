"""
What there is to count of a cache: all of it, or what a capture that has not ended has so far, proven by checksums.

Knows which sequences there are and where their payloads lie; counts nothing.  SPEC.md section 10.
"""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sklformat.cache.contents import (
    UNFINISHED_NAME,
    describe_stranger,
    partial_files,
    partial_path,
    remote_shards,
    shard_files,
)
from sklformat.cache.reader import Cache
from sklformat.cache.recovery import scan
from sklformat.cache.shard import Shard, describe
from sklformat.capture.advance import find_goal, is_unfinished
from sklformat.errors import CorruptError, TruncatedError, UnfinishedError
from sklformat.files.copies import LocalCopies
from sklformat.files.places import Place, is_url, name_of, url_of
from sklformat.files.regular import is_directory
from sklformat.files.storage import ReadFile
from sklformat.format import layout
from sklformat.format.header import Header
from sklformat.native import address_of


class Rows(NamedTuple):
    """Payloads of B sequences: addresses, bytes with padding, positions and records, and what keeps the memory."""

    sources: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    num_positions: NDArray[np.uint32]
    num_records: NDArray[np.uint32]
    memory: object


class Holdings(Protocol):
    """
    Sequences that can be read.

    Attributes:
        path: Of the cache.
        header: Settings of its shards.
        fingerprint: Of the cache; None: it is not whole.
        size_bytes: Of its shards, without a torn tail.
        num_positions: [sequences] uint32.
        num_records: [sequences] uint32.
        alignments: [sequences] uint64, alignment checksums.
        advance: What is said of a cache that is not whole, for JSON.
    """

    path: Place
    header: Header
    fingerprint: str | None
    size_bytes: int
    num_positions: NDArray[np.uint32]
    num_records: NDArray[np.uint32]
    alignments: NDArray[np.uint64]
    advance: dict[str, Any]

    def rows(self, numbers: NDArray[np.int64]) -> Rows:
        """Payloads of sequences, their checksums checked."""
        ...

    def check(self, number: int) -> None:
        """Decode one sequence as readers do, whose errors name file, block and byte."""
        ...

    def close(self) -> None:
        """Let go of every file."""
        ...


def hold(path: str) -> Holdings:
    """
    Open a cache, or what there is of one whose capture has not ended: its directory, the URL of it, or an unsealed
    shard; takes no lock.

    Raises:
        FormatError, FileNotFoundError: As ``skl.open``.
        UnfinishedError: The capture has written nothing yet.
    """
    if not is_url(path):
        return Begun(Path(path)) if is_unfinished(Path(path)) else Whole(Cache(Path(path)))
    try:
        return Whole(Cache(path))
    except UnfinishedError:  # shards are there, and no manifest
        return Begun(path.rstrip("/"))


class Whole:
    """A cache that is whole."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.path, self.header, self.size_bytes = cache.path, cache.header, cache.size_bytes
        self.fingerprint: str | None = cache.fingerprint
        indexes = [shard.index for shard in cache.shards()]
        self.num_positions = np.concatenate([index.num_positions for index in indexes])
        self.num_records = np.concatenate([index.num_records for index in indexes])
        self.alignments = np.concatenate([index.alignment for index in indexes])
        self.advance: dict[str, Any] = {}

    def rows(self, numbers: NDArray[np.int64]) -> Rows:
        found = self._cache.payloads(numbers)
        return Rows(found.sources, found.sizes, found.num_positions, found.num_records, found)

    def check(self, number: int) -> None:
        _ = self._cache[number]

    def close(self) -> None:
        self._cache.close()


class Unsealed:
    """The valid prefix of an unsealed shard, by its file, which a writer may seal or append to meanwhile."""

    def __init__(self, file: ReadFile) -> None:
        self._file, self.path, prefix = file, file.path, scan(file.fileno(), file.path)
        self.header, self.index, self.size = prefix.header, prefix.index.columns(), prefix.end
        self._ends = np.append(self.index["offset"][1:], np.uint64(prefix.end))

    def payloads(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64], object]:
        """Addresses and sizes in bytes, and what keeps the memory; ``scan`` has checked them."""
        skipped = np.uint64(layout.BLOCK_HEADER_SIZE)
        begins = self.index["offset"][numbers] + skipped
        sizes = self._ends[numbers] - begins
        at = np.cumsum(sizes) - sizes
        memory = np.empty(int(sizes.sum()), np.uint8)
        for begin, start, size in zip(begins.tolist(), at.tolist(), sizes.tolist(), strict=True):
            with memory[start : start + size].data as out:
                self._file.read_into(begin, out)
        return at + np.uint64(address_of(memory.data)), sizes, memory


class Begun:
    """What there is of a capture that has not ended: sealed shards, and whole sequences of the others."""

    fingerprint: str | None = None

    def __init__(self, place: Place) -> None:
        self.path: Place = place
        sealed, unsealed = _find_parts(place)
        self._parts: list[Place | Unsealed] = [*sealed, *unsealed]
        self._copies = LocalCopies() if isinstance(place, str) else None
        self._opened: tuple[Place, Shard] | None = None
        headers, sizes = [], []
        indexes: list[tuple[NDArray[Any], ...]] = []
        for path in sealed:
            with closing(Shard(path, copies=self._copies)) as shard:
                headers.append((path, shard.header))
                index = shard.index
                indexes.append((index.num_positions, index.num_records, index.alignment))
                sizes.append(describe(shard).size_bytes)
        for part in unsealed:
            headers += [(part.path, part.header)] if part.header is not None else []
            indexes.append(tuple(part.index[name] for name in ("num_positions", "num_records", "alignment")))
            sizes.append(part.size)
        if not headers:
            raise UnfinishedError("the capture has written no sequence yet; look again later", path=place)
        first, header = headers[0]
        for path, other in headers:
            if other.cache_key != header.cache_key:
                raise CorruptError(describe_stranger(name_of(first), header, other), path=path)
        self.header = dataclasses.replace(header, shard_number=0, first_sequence=0)
        self.size_bytes = sum(sizes)
        columns = [np.concatenate(column) for column in zip(*indexes, strict=True)]
        self.num_positions, self.num_records, self.alignments = columns
        self._starts = np.cumsum([0, *(lengths.size for lengths, *_ in indexes)])
        self.advance: dict[str, Any] = {
            "unfinished": True,
            "num_sequences": find_goal(place) if isinstance(place, Path) else None,
            "sequences_sealed": int(self._starts[len(sealed)]),
            "unsealed": {part.path.name: int(part.index["offset"].size) for part in unsealed},
        }

    def rows(self, numbers: NDArray[np.int64]) -> Rows:
        places = np.searchsorted(self._starts, numbers, side="right") - 1
        sources, sizes = np.zeros(numbers.size, np.uint64), np.zeros(numbers.size, np.uint64)
        memories = []
        for place in np.unique(places).tolist():
            mine = places == place
            sources[mine], sizes[mine], memory = self._part(place).payloads(numbers[mine] - self._starts[place])
            memories.append(memory)
        return Rows(sources, sizes, self.num_positions[numbers], self.num_records[numbers], memories)

    def check(self, number: int) -> None:
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        part = self._part(place)
        if isinstance(part, Shard):
            _ = part[number - int(self._starts[place])]

    def _part(self, place: int) -> Shard | Unsealed:
        """One that is sealed is opened when its turn comes: a capture may have more than a process may open."""
        part = self._parts[place]
        if isinstance(part, Unsealed):
            return part
        if self._opened is None or self._opened[0] != part:
            self.close()
            self._opened = part, Shard(part, copies=self._copies)
        return self._opened[1]

    def close(self) -> None:
        if self._opened is not None:
            self._opened[1].close()


def _find_parts(place: Place) -> tuple[list[Place], list[Unsealed]]:
    """The sealed shards, and the others: behind a URL there are none, and an unsealed shard is one by itself."""
    if isinstance(place, str):
        return [url_of(place, name) for name in remote_shards(place)], []
    if not is_directory(place):
        return [], _unsealed([place])
    unsealed = _unsealed(partial_files(place))  # first: one that is sealed meanwhile is found as a shard
    sealed = shard_files(place)
    names = {partial_path(path).name for path in sealed}
    return [*sealed], [part for part in unsealed if part.path.name not in names]


def _unsealed(paths: list[Path]) -> list[Unsealed]:
    found = []
    for path in paths:
        if path.name != UNFINISHED_NAME:
            try:
                file = ReadFile(path)
            except (FileNotFoundError, TruncatedError):  # sealed meanwhile, or nothing is in it yet
                continue
            found.append(Unsealed(file))
    return found
