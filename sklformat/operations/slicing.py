"""``slice``: a cache of some sequences of another, their blocks copied as they are."""

from __future__ import annotations

from sklformat.cache.sharding import CacheWriter
from sklformat.operations.headers import sliced_header
from sklformat.operations.outputs import (
    Made,
    Progress,
    copy_sequences,
    open_source,
    shard_size,
    store_of,
    write_output,
)
from sklformat.settings.operations import SliceConfig


def slice_cache(config: SliceConfig, progress: Progress | None = None) -> Made:
    """
    Write some sequences of a cache that follow each other as a cache of their own, numbered from 0.

    Whatever stops it, run it again with the same settings: it resumes to the bytes of an undisturbed run. Payloads are
    checked and copied, not decoded.

    Args:
        config: Which sequences of which cache, and where to.
        progress: Told how far it is.

    Returns:
        What was made.

    Raises:
        ValueError: The cache has no such sequences, or ``out`` lies in it.
        SettingsError: ``out`` holds something else.
        InUseError: Another process writes into ``out``.
        FormatError, FileNotFoundError, RemoteError: The cache cannot be read.
        OSError: The system's own.
    """
    with open_source(config.cache) as cache:
        part = config.part(len(cache))
        per_shard = shard_size(cache, config.sequences_per_shard)

        def fill(writer: CacheWriter, there: int) -> None:
            def tell(done: int) -> None:
                if progress is not None:
                    progress("slice", there + done, len(part))

            copy_sequences(writer, cache, part[there:], tell)

        return write_output(
            config.out,
            sliced_header(cache, part, per_shard),
            [cache],
            len(part),
            sequences_per_shard=per_shard,
            fill=fill,
            store=store_of(cache),
        )
