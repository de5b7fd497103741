"""
The manifest of a cache as a file: written whole or not at all, read and checked.

``format.listing`` knows what it says.  SPEC.md section 11.
"""

from __future__ import annotations

from pathlib import Path

from sklformat.files.disk import write_atomically
from sklformat.files.places import Place
from sklformat.files.storage import read_whole, size_of
from sklformat.format.listing import Entry, check_size, pack_listing, parse_listing

MANIFEST_NAME = "manifest.json"


def write_manifest(directory: Path, entries: list[Entry]) -> None:
    """
    Replace a cache's manifest atomically and durably; ``entries`` are in order and without gaps.

    Raises:
        ValueError, MissingShardError, CorruptError: As ``pack_listing``.
    """
    write_atomically(directory / MANIFEST_NAME, pack_listing(entries, directory))


def read_manifest(path: Place) -> list[Entry]:
    """
    Read and check a manifest; its shards lie beside it.

    Raises:
        FileNotFoundError: There is none.
        RemoteError: The store behind a URL failed.
        UnsupportedError, CorruptError, MissingShardError: As ``parse_listing``.
    """
    check_size(size_of(path), path)  # before anything of it is read
    return parse_listing(read_whole(path), path)
