"""
The manifest of a cache as a file: written whole or not at all, read and checked.

``format.listing`` knows what it says.  SPEC.md section 11.
"""

from __future__ import annotations

import os
from pathlib import Path

from sklformat.files.disk import Disk, write_atomically
from sklformat.files.places import Place, directory_of
from sklformat.files.storage import read_start
from sklformat.format import layout
from sklformat.format.listing import Entry, pack_listing, parse_listing

MANIFEST_NAME = "manifest.json"


def has_manifest(directory: Path) -> bool:
    """Say whether a directory has a manifest, be it one that cannot be read."""
    return os.path.lexists(directory / MANIFEST_NAME)


def write_manifest(directory: Path, entries: list[Entry]) -> None:
    """
    Replace a cache's manifest atomically and durably; ``entries`` are in order and without gaps.

    Raises:
        ValueError, MissingShardError, CorruptError: As ``pack_listing``.
    """
    write_atomically(directory / MANIFEST_NAME, pack_listing(entries, directory))


def remove_manifest(directory: Path) -> None:
    """Remove a cache's manifest, durably, before its shards become others; the cache is marked as unfinished first."""
    if has_manifest(directory):
        (directory / MANIFEST_NAME).unlink()
        Disk().sync_directory(directory)


def read_manifest(path: Place) -> list[Entry]:
    """
    Read and check a manifest; its shards lie beside it.

    Raises:
        FileNotFoundError: There is none.
        UnreadableError: What is there is no regular file, or cannot be read.
        RemoteError: The store behind a URL failed.
        UnsupportedError, CorruptError, MissingShardError: As ``parse_listing``.
    """
    return parse_listing(read_start(path, layout.MAX_MANIFEST_SIZE + 1), directory_of(path), path)
