"""
Where the sealed shards of a capture lie: in the directory they are written in, or at a URL they are uploaded to.

Looks at headers, indexes and trailers, not at records.  Nothing at a URL is believed that its bytes do not say, a
listing least: of some stores it lags behind, and shows what is gone, or not yet what has come.
"""

from __future__ import annotations

import queue
import threading
from contextlib import closing
from pathlib import Path

from sklformat.cache.manifest import MANIFEST_NAME, write_manifest
from sklformat.cache.shard import Shard, describe
from sklformat.errors import FormatError
from sklformat.files import remote
from sklformat.files.places import directory_of, name_of, url_of
from sklformat.format import layout
from sklformat.format.block import locate
from sklformat.format.header import Header, parse_header
from sklformat.format.index import parse_index, parse_trailer
from sklformat.format.listing import Entry

_WAITING_SHARDS = 2  # sealed and not uploaded; more would fill the disk silently


class Target:
    """
    Sealed shards of one cache.

    Args:
        directory: Where shards are written.
        url: Where they go once they are sealed, or None: they stay.
    """

    def __init__(self, directory: Path, url: str | None = None) -> None:
        self._directory, self._url = directory, url
        self._uploaded: set[str] | None = None

    def find(self, name: str, *, unlisted: bool = True) -> tuple[Header, Entry] | None:
        """
        Header and description of a sealed shard, or None where it is not in its final place.

        Args:
            name: Of the shard.
            unlisted: Whether a shard that the store's listing does not show is asked for by its name, one request.

        Raises:
            FormatError: What is there is damaged.
            RemoteError: The store failed.
        """
        if self._url is not None:
            if self._uploaded is None:
                self._uploaded = set(remote.list_names(self._url))
            if not unlisted and name not in self._uploaded:
                return None
            try:
                return _describe_remote(url_of(self._url, name))
            except FileNotFoundError:  # also of a name that is listed still
                return None
        path = self._directory / name
        if not path.exists():
            return None
        with closing(Shard(path)) as shard:
            return shard.header, describe(shard)

    def has(self, name: str) -> bool:
        """
        Whether a file is there, whatever a listing shows.

        Raises:
            RemoteError: The store failed.
        """
        return (self._directory / name).exists() if self._url is None else remote.exists(url_of(self._url, name))

    def names(self) -> list[str]:
        """Names of all files there; of a store, as its listing shows them."""
        if self._url is not None:
            return remote.list_names(self._url)
        return sorted(path.name for path in self._directory.iterdir())

    def place(self, name: str) -> str:
        """Where a shard lies, for messages."""
        return str(self._directory / name) if self._url is None else url_of(self._url, name)

    def publish(self, entries: list[Entry]) -> None:
        """
        Write the manifest, and upload it last: it says that the cache is whole.  Nothing uploaded stays here.

        Raises:
            RemoteError: The store failed; the manifest's copy here is kept.
        """
        write_manifest(self._directory, entries)
        if self._url is not None:
            manifest = self._directory / MANIFEST_NAME
            remote.upload(manifest, url_of(self._url, MANIFEST_NAME))
            for name in (*(entry.name for entry in entries), MANIFEST_NAME):
                (self._directory / name).unlink(missing_ok=True)


def _describe_remote(url: str) -> tuple[Header, Entry]:
    """
    What a shard's header, index and trailer say of it; all have checksums, and the size must follow from them.

    Its blocks were read back when they were uploaded; a run that was killed before that left its shard here as well.
    """
    try:
        size = remote.size(url)
        first = remote.read_range(url, 0, min(size, layout.HEADER_SIZE))
        header = parse_header(first)
        start = max(size - layout.TRAILER_SIZE, 0)
        trailer = parse_trailer(remote.read_range(url, start, size - start), header.shard_key, size)
        packed = remote.read_range(url, trailer.index_offset, trailer.index_size)
        parse_index(packed, trailer, first, header, header.shard_key)
    except FormatError as error:
        error.message += "; remove it there, and run the capture again to recreate it"
        raise locate(error, path=url) from None
    return header, Entry(
        directory_of(url),
        name_of(url),
        shard_number=header.shard_number,
        first_sequence=header.first_sequence,
        num_sequences=trailer.num_sequences,
        num_records=trailer.num_records,
        size_bytes=size,
        fingerprint=trailer.root,
    )


class Uploader:
    """
    Verify sealed shards and upload them, one after the other, in a thread; an uploaded shard is removed here.

    Args:
        url: The directory to upload to.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._shards: queue.Queue[Path | None] = queue.Queue(_WAITING_SHARDS)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self._thread.start()

    def put(self, shard: Path) -> None:
        """
        Have a sealed shard uploaded; waits while too many others are.

        Raises:
            RemoteError, FormatError, OSError: An earlier upload failed; that shard and this one are kept here.
        """
        self.check()
        self._shards.put(shard)

    def check(self) -> None:
        """Raise what an upload failed with, if one did."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """
        Wait until everything is uploaded.

        Raises:
            RemoteError, FormatError, OSError: As ``put``.
        """
        self._shards.put(None)
        self._thread.join()
        self.check()

    def _run(self) -> None:
        while (shard := self._shards.get()) is not None:
            if self._error is None:
                try:
                    _check_all(shard)
                    remote.upload(shard, url_of(self._url, shard.name))
                    shard.unlink()
                except Exception as error:  # noqa: BLE001  it is raised where the shards come from
                    self._error = error


def _check_all(path: Path) -> None:
    """Decode every sequence of a sealed shard, as a reader would."""
    with closing(Shard(path)) as shard:
        for number in range(len(shard)):
            shard[number]  # raises what is wrong with it
