"""
What is in a cache and what is wrong with it, as plain data: inspect, verify.

Prints and draws nothing.  SPEC.md section 13 lists what is checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat import native
from sklformat.cache.contents import (
    describe_stranger,
    describe_unfinished,
    describe_unlisted,
    find_unfinished,
    is_partial,
    no_shards,
    remote_shards,
    shard_files,
)
from sklformat.cache.manifest import MANIFEST_NAME, has_manifest, read_manifest
from sklformat.cache.payloads import Payloads
from sklformat.cache.reader import Cache
from sklformat.cache.shard import Shard, describe
from sklformat.errors import FormatError, UnreadableError, UnsupportedError
from sklformat.files import remote
from sklformat.files.places import Place, is_url, join, url_of
from sklformat.files.regular import is_directory
from sklformat.files.storage import StreamedFile
from sklformat.format import layout
from sklformat.format.header import Header
from sklformat.format.listing import Entry, check_contiguous, place_in_cache

_REMAKE = "rerun the command that made the cache"
_ACTIONS = {
    "UnfinishedError": "rerun the command that started it to finish it",
    "MissingShardError": f"put the shard back, or remove manifest.json and {_REMAKE}",
    "UnsupportedError": "read it with the version of sklformat that wrote it, or move it away if it is no shard",
    "UnreadableError": "put a regular file in its place that this process can read",
}
_REPLACE = f"replace the file by a sound copy, or remove it and manifest.json, then {_REMAKE}"
_RELIST = f"remove manifest.json, then {_REMAKE}"
_MOVE_AWAY = "move the file away, or remove manifest.json to read all shards"
Progress = Callable[[int, int], None]
"""Called with (bytes checked so far, bytes in total)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """
    One damage that ``verify`` found.

    Attributes:
        path: The file.
        error: Name of the error that a reader raises, such as "CorruptError".
        message: What is wrong, with both values.
        action: What to do about it, a sentence without its full stop.
        offset: Byte offset in the file, or None.
        sequence: Index of the sequence in its shard, or None.
    """

    path: Place
    error: str
    message: str
    action: str
    offset: int | None = None
    sequence: int | None = None

    def __str__(self) -> str:
        place = [str(self.path)]
        place += [] if self.sequence is None else [f"sequence {self.sequence}"]
        place += [] if self.offset is None else [f"byte {self.offset}"]
        return ": ".join([*place, self.message])


def verify(path: Path | str, progress: Progress | None = None) -> list[Problem]:
    """
    Check every byte of a shard or cache: checksums, every record's rules, and that the shards belong together.

    An unfinished shard beside sealed ones is a problem too, unless a manifest says which shards the cache has.

    Args:
        path: A ``.skl`` file or a cache directory, or the URL of either.  Behind a URL the store's bytes are read, once
            and not through local copies; a few MiB of them are in memory at a time.
        progress: Told how far it is, in bytes.

    Returns:
        The problems found, each naming file, byte offset and sequence; empty: sound.

    Raises:
        FileNotFoundError: Nothing is there.
        MissingShardError: A directory without any shard.
        UnsupportedError: Every file here is of another format or version; one among shards is a problem like any other.
        RemoteError: The store behind a URL failed; nothing is said of the cache then.

    Source: SPEC section 13.
    """
    root: Place = path.rstrip("/") if isinstance(path, str) and is_url(path) else Path(path)
    found = _find_remote(root) if isinstance(root, str) else _find_here(root)
    files, unfinished = found.files, found.unfinished
    if not files:
        raise unfinished[0] if unfinished else no_shards(root)
    total, done = sum(files.values()), 0
    problems = [_problem(error, root) for error in unfinished]
    opened: list[tuple[Entry, Header]] = []
    refused: list[FormatError] = []
    for file, size in files.items():
        try:
            shard = _open(file, size)
        except FormatError as error:
            refused.append(error)
            problems.append(_problem(error, file))
        else:
            with closing(shard):
                arena = native.Arena()
                for numbers in _groups(shard):
                    if not _are_sound(shard, numbers, arena):
                        problems += _block_problems(shard, numbers)
                    if progress is not None:
                        progress(done + int(shard.index.offset[numbers[-1]]), total)
                opened.append((describe(shard), shard.header))
        done += size
        if progress is not None:
            progress(done, total)
    if not opened and all(isinstance(error, UnsupportedError) for error in refused):
        raise refused[0]  # nothing here is a shard that this version reads, so nothing is damaged
    if found.among:
        problems += _check_together(root, opened, found.listed)
    return problems


class _Found(NamedTuple):
    among: bool  # whether it is a directory
    listed: list[Entry] | FormatError | None  # by a manifest, which may be damaged; None: there is none
    files: dict[Place, int]  # and the bytes of each; 0 where opening it will say why there are none
    unfinished: Sequence[FormatError]


def _find_here(root: Path) -> _Found:
    if not is_directory(root):
        unsealed = is_partial(root)
        return _Found(
            among=False,
            listed=None,
            files={} if unsealed else {root: _size_of(root)},
            unfinished=[describe_unfinished(root)] if unsealed else [],
        )
    listed = _read_listed(root) if has_manifest(root) else None
    unfinished = find_unfinished(root) if listed is None else []
    files: dict[Place, int] = {file: _size_of(file) for file in shard_files(root)}
    return _Found(among=True, listed=listed, files=files, unfinished=unfinished)


def _find_remote(url: str) -> _Found:
    """As of a directory here; but what the store's listing shows is looked for, and so is what the manifest lists."""
    if url.endswith(layout.SHARD_SUFFIX):
        return _Found(among=False, listed=None, files={url: remote.size(url)}, unfinished=[])
    names, listed, files = set(remote_shards(url)), _read_listed(url), dict[Place, int]()
    if isinstance(listed, list):
        names |= {entry.name for entry in listed}
    for file in (url_of(url, name) for name in sorted(names)):
        with contextlib.suppress(FileNotFoundError):  # a listing that lags; what the manifest lists is missed later
            files[file] = remote.size(file)
    unfinished = [describe_unlisted(url)] if listed is None and files else []
    return _Found(among=True, listed=listed, files=files, unfinished=unfinished)


def _read_listed(root: Place) -> list[Entry] | FormatError | None:
    """What the manifest lists; the error that it raises, for when the shards are checked against it; None: none."""
    try:
        return read_manifest(join(root, MANIFEST_NAME))
    except FileNotFoundError:
        return None
    except FormatError as error:
        return error


def _open(file: Place, size: int) -> Shard:
    if isinstance(file, str):
        return Shard(file, file=StreamedFile(file, size))
    return Shard(file, "pread")  # a byte of a bad disk is then an error; in a mapping it ends the process


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _groups(shard: Shard) -> Iterator[NDArray[np.int64]]:
    """Sequences that follow each other, half a mebibyte at a time: their arrays stay in the caches."""
    pieces = shard.index.offset >> np.uint64(19)
    starts = np.flatnonzero(np.diff(pieces, prepend=np.uint64(0))) if len(shard) else np.zeros(0, np.int64)
    return (piece for piece in np.split(np.arange(len(shard)), starts) if piece.size)


def _are_sound(shard: Shard, numbers: NDArray[np.int64], arena: native.Arena) -> bool:
    """The quick check of many blocks: everything that ``verify`` checks, without naming what is wrong."""
    header, payloads = shard.header, Payloads(numbers.size)
    try:
        payloads.fill(np.arange(numbers.size), shard, numbers)
        for rows in _of_like_length(payloads.num_positions):
            some = payloads.select(rows)
            arrays = some.decode(header, None if header.token_size else some.no_tokens(header), arena=arena)
            _check_distinct(header, arrays.offsets, arrays.token_ids)
    except FormatError:
        return False
    return not header.columns or payloads.columns_are_sound(header)


def _of_like_length(lengths: NDArray[np.uint32]) -> Iterator[NDArray[np.int64]]:
    """Rows apart by length, within a factor of 4, since arrays are as wide as the longest of their rows."""
    classes = np.frexp(lengths)[1] // 2
    return (np.flatnonzero(classes == some) for some in np.unique(classes))


def _block_problems(shard: Shard, numbers: NDArray[np.int64]) -> list[Problem]:
    problems = []
    for number in numbers.tolist():
        try:
            targets = shard[number].targets
            _check_distinct(shard.header, targets.offsets, targets.token_ids)
        except FormatError as error:  # noqa: PERF203  each block is tried by itself
            problems.append(_problem(error, shard.path, number, int(shard.index.offset[number])))
    return problems


def _check_distinct(header: Header, offsets: NDArray[np.int64], token_ids: NDArray[np.uint32]) -> None:
    """The one rule that readers leave to a full verification.  SPEC section 13."""
    if header.kind == "ratios":
        native.check_distinct(offsets, token_ids)


def _check_together(
    root: Place, opened: list[tuple[Entry, Header]], listed: list[Entry] | FormatError | None
) -> list[Problem]:
    entries = sorted((entry for entry, _ in opened), key=place_in_cache)
    problems = [
        Problem(
            entry.path,
            "CorruptError",
            describe_stranger(opened[0][0].name, opened[0][1], header),
            "move the shards of one of the two caches to a directory of their own",
        )
        for entry, header in opened
        if header.cache_key != opened[0][1].cache_key
    ]
    try:
        check_contiguous(entries, root)
        if isinstance(listed, FormatError):
            raise listed
        problems += [] if listed is None else _check_listed(listed, entries)
    except FormatError as error:
        problems.append(_problem(error, root))
    return problems


def _check_listed(listed: list[Entry], found: list[Entry]) -> list[Problem]:
    by_path = {entry.path: entry for entry in found}
    problems = [
        Problem(
            entry.path,
            "MissingShardError",
            "the manifest lists it, but no sound shard is there",
            _ACTIONS["MissingShardError"],
        )
        for entry in listed
        if entry.path not in by_path
    ]
    problems += [
        Problem(entry.path, "CorruptError", f"by the manifest, {'; '.join(faults)}", _RELIST)
        for entry in listed
        if entry.path in by_path and (faults := by_path[entry.path].differences(entry))
    ]
    names = {entry.path for entry in listed}
    problems += [
        Problem(entry.path, "CorruptError", "the manifest does not list this shard", _MOVE_AWAY)
        for entry in found
        if entry.path not in names
    ]
    return problems


def _action(error: FormatError) -> str:
    if error.section == "manifest":
        return _RELIST
    if isinstance(error, UnreadableError) and error.offset is not None:  # a regular file on a disk that fails
        return _REPLACE
    return _ACTIONS.get(type(error).__name__, _REPLACE)


def _problem(error: FormatError, path: Place, sequence: int | None = None, offset: int | None = None) -> Problem:
    name = type(error).__name__
    return Problem(
        error.path or path,
        name,
        error.message if error.section is None else f"{error.section}: {error.message}",
        _action(error),
        error.offset if error.offset is not None else offset,
        error.sequence if error.sequence is not None else sequence,
    )


def inspect(path: Path | str) -> dict[str, Any]:
    """
    What a cache holds, from its headers and indexes only.

    Returns:
        JSON-ready: settings, number of shards, sequences, positions and records, bytes, bytes per position, mean number
        of unique tokens per position, fingerprint.

    Raises:
        FormatError, FileNotFoundError: As ``skl.open``.
    """
    with Cache(path) as cache:
        positions = sum(int(shard.index.num_positions.sum(dtype=np.uint64)) for shard in cache.shards())
        return {
            "path": str(cache.path),
            "fingerprint": cache.fingerprint,
            "shards": len(cache.fingerprints),
            "first_sequence": cache.first_sequence,
            "sequences": len(cache),
            "positions": positions,
            "records": cache.num_records,
            "bytes": cache.size_bytes,
            "bytes_per_position": cache.size_bytes / positions if positions else None,
            "unique_tokens_per_position": cache.num_records / positions if positions else None,
            "biased": cache.header.biased,
            "header": settings_of(cache.header),
        }


def settings_of(header: Header) -> dict[str, Any]:
    """What the header of a shard says of its cache, JSON-ready: all but the shard's own place."""
    names = (f.name for f in dataclasses.fields(header))
    return {name: getattr(header, name) for name in names if name not in ("shard_number", "first_sequence")}
