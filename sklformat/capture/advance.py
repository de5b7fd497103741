"""
How far a capture is: what its directory holds so far, by the headers and lengths of files.

Changes nothing and takes no lock, so that it may look while others write.  SPEC.md section 10.
"""

from __future__ import annotations

import contextlib
import json
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sklformat.cache.contents import UNFINISHED_NAME, is_partial, partial_files, remote_shards, shard_files
from sklformat.cache.manifest import has_manifest
from sklformat.cache.recovery import count_blocks
from sklformat.cache.shard import Shard, describe
from sklformat.files.copies import LocalCopies
from sklformat.files.places import Place, url_of
from sklformat.files.regular import is_directory
from sklformat.format.header import Header

_GOAL, _BEFORE = "num_sequences", "sequences_there"


@dataclass(frozen=True, slots=True)
class Advance:
    """
    What there is of a cache that is not whole.

    Attributes:
        place: Its directory, or the URL of it, or one shard that is not sealed.
        header: Settings of any of its shards; None: none was begun.
        shards: Sealed ones.
        sealed: Sequences in these.
        partials: Name and whole sequences of each shard that is not sealed.
        size_bytes: Of all of them.
        goal: Sequences that the cache will have; None: nobody said.
        begun: When the run began that wrote here last, seconds since the epoch; None: nobody said.
        before: Sequences that were there then; None: nobody said.
        written: When a shard was written last, seconds since the epoch; None: none was begun.
    """

    place: Place
    header: Header | None
    shards: int
    sealed: int
    partials: tuple[tuple[str, int], ...]
    size_bytes: int
    goal: int | None
    begun: float | None
    before: int | None
    written: float | None

    @property
    def sequences(self) -> int:
        """Whole sequences, sealed or not."""
        return self.sealed + sum(count for _, count in self.partials)

    @property
    def per_second(self) -> float | None:
        """Sequences per second from when the run began to what was written last; None: files do not tell."""
        if self.begun is None or self.before is None or self.written is None:
            return None
        seconds, made = self.written - self.begun, self.sequences - self.before
        return made / seconds if seconds > 0 and made > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Time that the sequences to come take at that rate; None: files do not tell."""
        if self.goal is None or self.per_second is None:
            return None
        return max(self.goal - self.sequences, 0) / self.per_second


def is_unfinished(path: Path) -> bool:
    """Whether a path is a directory of a cache that is still to be finished, or an unsealed shard.  SPEC section 11."""
    if not path.exists():
        return False
    if not is_directory(path):
        return is_partial(path)
    return not has_manifest(path) and bool(partial_files(path))


def find_advance(place: Place) -> Advance:
    """
    Look at what there is of a capture that has not ended.

    Args:
        place: Its directory, the URL where its sealed shards go, or one shard that is not sealed.

    Raises:
        FormatError: A sealed shard here is damaged.
        RemoteError: The store behind a URL failed.
        OSError: The system's own.
    """
    if isinstance(place, str):
        return _find_uploaded(place)
    if not is_directory(place):
        return _find_here(place, [], [place], None)
    return _find_here(place, shard_files(place), partial_files(place), place / UNFINISHED_NAME)


def _find_uploaded(url: str) -> Advance:
    """By the sealed shards alone: the others are where they are written."""
    copies, headers, sizes, sealed = LocalCopies(), [], [], 0
    for name in remote_shards(url):
        with closing(Shard(url_of(url, name), copies=copies)) as shard:
            headers.append(shard.header)
            sizes.append(describe(shard).size_bytes)
            sealed += len(shard)
    return Advance(
        place=url,
        header=headers[0] if headers else None,
        shards=len(headers),
        sealed=sealed,
        partials=(),
        size_bytes=sum(sizes),
        goal=None,
        begun=None,
        before=None,
        written=None,
    )


def _find_here(place: Path, shards: list[Path], unsealed: list[Path], mark: Path | None) -> Advance:
    header: Header | None = None
    files, sealed, partials = [], [], []
    for path in shards:
        with contextlib.suppress(FileNotFoundError), closing(Shard(path)) as shard:  # it was uploaded meanwhile
            files.append(path.stat())
            header = header or shard.header
            sealed.append(len(shard))
    for path in unsealed:
        if path.name != UNFINISHED_NAME:
            with contextlib.suppress(FileNotFoundError):  # it was sealed meanwhile
                of, count = count_blocks(path)
                files.append(path.stat())
                header = header or of
                partials.append((path.name, count))
    goal, before, begun = (None, None, None) if mark is None else _read_mark(mark)
    return Advance(
        place=place,
        header=header,
        shards=len(sealed),
        sealed=sum(sealed),
        partials=tuple(partials),
        size_bytes=sum(facts.st_size for facts in files),
        goal=goal,
        begun=begun,
        before=before,
        written=max((facts.st_mtime for facts in files), default=None),
    )


def find_goal(directory: Path) -> int | None:
    """Sequences that a cache will have which is being written into a directory; None: nobody said."""
    return _read_mark(directory / UNFINISHED_NAME)[0]


def describe_goal(directory: Path, num_sequences: int, *, uploads: bool) -> bytes:
    """
    What a capture writes into the mark of its directory when it begins, for ``find_advance``.

    Args:
        directory: Of the cache.
        num_sequences: That it will have.
        uploads: Sealed shards leave the directory, so that what is there does not tell how far the capture is.
    """
    there = {} if uploads else {_BEFORE: find_advance(directory).sequences}
    return json.dumps({_GOAL: num_sequences, **there}).encode()


def _read_mark(path: Path) -> tuple[int | None, int | None, float | None]:
    """Goal, what was there, and when; a mark may say nothing, and a crash may have torn what it says."""
    try:
        with path.open("rb") as file:
            said, begun = json.loads(file.read(1 << 12)), os.fstat(file.fileno()).st_mtime
    except (OSError, ValueError):
        return None, None, None
    values = [said.get(name) if isinstance(said, dict) else None for name in (_GOAL, _BEFORE)]
    goal, before = (value if type(value) is int and value >= 0 else None for value in values)
    return goal, before, begun
