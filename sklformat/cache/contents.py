"""
Which shards a cache has: by its manifest, or by the names in its directory.

SPEC.md sections 11 and 13.
"""

from __future__ import annotations

import contextlib
import dataclasses
from contextlib import closing
from pathlib import Path

from sklformat.cache.manifest import MANIFEST_NAME, has_manifest, read_manifest
from sklformat.cache.shard import Shard, describe
from sklformat.errors import CorruptError, MissingShardError, RemoteError, UnfinishedError, UnsupportedError
from sklformat.files import remote
from sklformat.files.copies import LocalCopies
from sklformat.files.disk import Disk
from sklformat.files.places import Place, join
from sklformat.files.regular import is_directory, list_directory
from sklformat.files.storage import Io
from sklformat.format import layout
from sklformat.format.header import Header
from sklformat.format.listing import Entry, check_contiguous, place_in_cache

UNFINISHED_NAME = f"capture.skl{layout.PARTIAL_SUFFIX}"
"""Of the mark of a cache that is still being written."""
PLAIN_SUFFIXES = {".npz": "npz", ".parquet": "parquet", ".jsonl": "jsonl"}
"""Endings of files of plain columns, which are no caches, and their kinds."""


def shard_path(directory: Path, number: int) -> Path:
    """Where shard ``number`` lies once it is sealed."""
    return directory / f"shard-{number:05d}.skl"


def partial_path(shard: Path) -> Path:
    """Where a shard lies until it is sealed."""
    return shard.with_name(shard.name + layout.PARTIAL_SUFFIX)


def shard_header(header: Header, number: int, first_sequence: int) -> Header:
    """The cache's settings with a shard's own place."""
    return dataclasses.replace(header, shard_number=number, first_sequence=first_sequence)


def mark_unfinished(directory: Path, says: bytes | None = None) -> None:
    """
    Make a directory recognisable as no whole cache until it has a manifest, also between two shards.

    The mark must be older than every seal, and go after the manifest came.  SPEC section 10.5.

    Args:
        directory: The directory.
        says: What stands in the mark, for people who ask how far it is; None: what is there, or nothing.
    """
    mark = directory / UNFINISHED_NAME
    if says is not None:
        mark.write_bytes(says)
    elif not mark.exists():
        mark.touch()
    Disk().sync_directory(directory)


def unmark_unfinished(directory: Path) -> None:
    """Remove the mark once the manifest is durable."""
    (directory / UNFINISHED_NAME).unlink(missing_ok=True)
    Disk().sync_directory(directory)


def list_shards(path: Place, io: Io = "auto", copies: LocalCopies | None = None) -> list[Entry]:
    """
    The shards of a cache in order: of a single file, of a manifest, or of a directory's ``.skl`` files.

    Args:
        path: File or directory, or the URL of one.
        io: As for ``Shard``.
        copies: As for ``Shard``.

    Raises:
        MissingShardError: Sequences are missing between shards, before the first, or behind the last where a shard is
            unfinished and no manifest says that it does not belong; or there is no shard at all; or a URL has no
            manifest.
        FormatError: A shard or the manifest is damaged.
    """
    if isinstance(path, str):
        if path.endswith(layout.SHARD_SUFFIX):
            return [_entry(path, io, copies)]
        try:
            return read_manifest(join(path, MANIFEST_NAME))
        except FileNotFoundError:
            raise _without_manifest(path) from None
    if not is_directory(path):
        if path.suffix in PLAIN_SUFFIXES:
            raise UnsupportedError("plain columns, not a cache; sklformat convert makes a cache of them", path=path)
        if is_partial(path):
            raise describe_unfinished(path)
        return [_entry(path, io, copies)]
    if not has_manifest(path):
        return scan_directory(path, io)
    entries = read_manifest(path / MANIFEST_NAME)
    _check_listed(entries, path)
    return entries


def shard_files(path: Path) -> list[Path]:
    """
    What a directory holds by the name of a shard, whatever it is.  SPEC section 11.

    Raises:
        UnreadableError: The directory cannot be read.
    """
    return [file for file in list_directory(path) if _is_shard(file.name)]


def remote_shards(url: str) -> list[str]:
    """
    The same of the directory at a URL: names, sorted.

    Raises:
        RemoteError: The store failed.
    """
    return [name for name in remote.list_names(url) if _is_shard(name)]


def _is_shard(name: str) -> bool:
    return name.endswith(layout.SHARD_SUFFIX) and name != layout.SHARD_SUFFIX


def partial_files(path: Path) -> list[Path]:
    """What a directory holds by the name of an unfinished shard, in order; the mark of an unfinished cache too."""
    return sorted(path.glob(f"*{layout.SHARD_SUFFIX}{layout.PARTIAL_SUFFIX}"))


def is_partial(path: Path) -> bool:
    """Whether a file is an unfinished shard by its name, and not the mark of an unfinished cache."""
    return path.name.endswith(f"{layout.SHARD_SUFFIX}{layout.PARTIAL_SUFFIX}") and path.name != UNFINISHED_NAME


def _check_listed(entries: list[Entry], path: Path) -> None:
    """A directory has the shards that its manifest lists, and no others."""
    found, listed = {file.name for file in shard_files(path)}, {entry.name for entry in entries}
    for entry in entries:
        if entry.name not in found:
            raise missing(entry)
    if unlisted := sorted(found - listed):
        raise CorruptError(
            f"the manifest does not list {unlisted[0]}, which lies beside it; move that file away, or remove the "
            "manifest to read all shards",
            path=path / MANIFEST_NAME,
        )


def missing(entry: Entry) -> MissingShardError:
    """That a listed shard is not there, named by its sequences."""
    return MissingShardError(
        f"sequences {entry.first_sequence}..{entry.first_sequence + entry.num_sequences - 1} are missing; "
        "put the shard back or capture it again",
        path=entry.path,
    )


def scan_directory(path: Path, io: Io = "auto") -> list[Entry]:
    """
    The sealed shards of a directory in order, read from the files themselves; what ``write_manifest`` takes.

    Raises:
        MissingShardError, FormatError: As ``list_shards``; CorruptError too where a shard belongs to another cache.
    """
    files = shard_files(path)
    if unfinished := find_unfinished(path):
        raise unfinished[0]
    if not files:
        raise no_shards(path)
    entries, first, other = [], None, None
    for file in files:
        with closing(Shard(file, io)) as shard:
            first = first or shard.header
            if other is None and first.cache_key != shard.header.cache_key:
                other = CorruptError(describe_stranger(files[0].name, first, shard.header), path=file)
            entries.append(describe(shard))
    if other is not None:
        raise other
    entries.sort(key=place_in_cache)
    check_contiguous(entries, path)
    return entries


def no_shards(path: Place) -> MissingShardError:
    """That a directory holds nothing by the name of a shard."""
    return MissingShardError("no .skl shards here: not a cache, or an empty one", path=path)


def describe_stranger(name: str, ours: Header, theirs: Header) -> str:
    """What is wrong with a shard that is of a different cache from the one called ``name``."""
    return f"belongs to a different cache from {name}: {'; '.join(ours.differences(theirs))}"


def find_unfinished(path: Path) -> list[UnfinishedError]:
    """One error for each ``.partial`` of a directory without manifest: its sequences belong to the cache, unsealed."""
    return [describe_unfinished(partial) for partial in partial_files(path)]


def describe_unfinished(partial: Path) -> UnfinishedError:
    """That a shard is not sealed."""
    return UnfinishedError(
        "the shard is unfinished, so this cache is incomplete; rerun the command that started it to finish it "
        "(sklformat recover says what it keeps), or move it away to read the sealed shards alone",
        path=partial,
    )


def describe_unlisted(url: str) -> UnfinishedError:
    """That shards behind a URL have no manifest."""
    return UnfinishedError(
        f"shards without {MANIFEST_NAME}, which comes last: the capture or conversion has not ended", path=url
    )


def _without_manifest(url: str) -> MissingShardError:
    """That a URL has no manifest: what writes there has not ended, or it is no cache; not every store can list."""
    with contextlib.suppress(RemoteError):
        if remote_shards(url):
            return describe_unlisted(url)
    return MissingShardError(
        f"no {MANIFEST_NAME} here, which a cache behind a URL needs; sklformat cache and convert write it last",
        path=url,
    )


def _entry(path: Place, io: Io, copies: LocalCopies | None) -> Entry:
    with closing(Shard(path, io, copies=copies)) as shard:
        return describe(shard)
