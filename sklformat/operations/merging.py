"""
``merge``: several caches as one, their blocks copied as they are.

Refuses what one header cannot say.
"""

from __future__ import annotations

from contextlib import ExitStack

from sklformat.cache.sharding import CacheWriter
from sklformat.errors import SettingsError
from sklformat.operations.headers import merged_header
from sklformat.operations.outputs import (
    Made,
    Progress,
    copy_sequences,
    open_source,
    shard_size,
    store_of,
    write_output,
)
from sklformat.settings.operations import MergeConfig


def merge_caches(config: MergeConfig, progress: Progress | None = None) -> Made:
    """
    Write the sequences of several caches, one cache after the other, as one.

    Whatever stops it, run it again with the same settings: it resumes to the bytes of an undisturbed run. Payloads are
    checked and copied, not decoded.

    Args:
        config: Which caches, and where to.
        progress: Told how far it is.

    Returns:
        What was made.

    Raises:
        SettingsError: The caches were made with other settings, with both values; one is given twice; ``out`` holds
            something else.
        InUseError: Another process writes into ``out``.
        ValueError: A cache holds no sequence, or ``out`` lies in one.
        FormatError, FileNotFoundError, RemoteError: A cache cannot be read.
        OSError: The system's own.
    """
    with ExitStack() as opened:
        caches = [opened.enter_context(open_source(path)) for path in config.caches]
        _check_distinct([cache.fingerprint for cache in caches], config.caches)
        per_shard = shard_size(caches[0], config.sequences_per_shard)
        header, follow = merged_header(caches, per_shard)
        stores = [store for cache in caches if (store := store_of(cache)) is not None]
        says = []
        if stores and not follow:
            says.append("token stores are of one text each and stay with their caches; the sequences hold the tokens")
        count = sum(map(len, caches))

        def fill(writer: CacheWriter, there: int) -> None:
            start = 0
            for cache in caches:
                first = max(there - start, 0)
                if first < len(cache):
                    begun = start + first

                    def tell(done: int, begun: int = begun) -> None:
                        if progress is not None:
                            progress("merge", begun + done, count)

                    copy_sequences(writer, cache, range(first, len(cache)), tell)
                start += len(cache)

        return write_output(
            config.out,
            header,
            caches,
            count,
            sequences_per_shard=per_shard,
            fill=fill,
            store=stores[0] if stores and follow else None,
            says=says,
        )


def _check_distinct(fingerprints: list[str], paths: tuple[str, ...]) -> None:
    for place, digits in enumerate(fingerprints):
        if digits in fingerprints[:place]:
            raise SettingsError(
                f"{paths[fingerprints.index(digits)]} and {paths[place]} are one cache ({digits}), whose sequences "
                "would come twice; give each once (training weighs caches of a list)"
            )
