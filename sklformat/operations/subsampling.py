"""``subsample``: a cache with fewer rounds, by draws of another that are kept."""

from __future__ import annotations

from sklformat.cache.sharding import CacheWriter
from sklformat.format.columns import follow_records
from sklformat.operations.headers import thinned_header
from sklformat.operations.outputs import Made, Progress, open_source, shard_size, store_of, write_output
from sklformat.operations.thinning import thin
from sklformat.settings.operations import SubsampleConfig


def subsample_cache(config: SubsampleConfig, progress: Progress | None = None) -> Made:
    """
    Write a cache with fewer of the draws of another; columns stay, record_logprob with its records.

    Whatever stops it, run it again with the same settings: it resumes to the bytes of an undisturbed run. Which draws
    are kept depends on seed, sequence and position alone, not on shards.

    Args:
        config: How many draws of which cache, and where to.
        progress: Told how far it is.

    Returns:
        What was made.

    Raises:
        SettingsError: The cache's records are no counts, or of no more rounds; ``out`` holds something else.
        InUseError: Another process writes into ``out``.
        ValueError: The cache holds no sequence, or ``out`` lies in it.
        FormatError, FileNotFoundError, RemoteError: The cache cannot be read.
        OSError: The system's own.

    Source: docs/operations.md, Thinning.
    """
    with open_source(config.cache) as cache:
        per_shard = shard_size(cache, config.sequences_per_shard)
        header = thinned_header(cache, config.rounds, config.seed, per_shard)
        says = [f"{config.rounds} of {cache.header.rounds} rounds kept, sampler {header.sampler}"]

        def fill(writer: CacheWriter, there: int) -> None:
            for number in range(there, len(cache)):
                sequence = cache[number]
                before = sequence.targets
                after = thin(before, config.rounds, seed=config.seed, sequence=cache.first_sequence + number)
                columns = follow_records(
                    sequence.columns, (before.offsets, before.token_ids), (after.offsets, after.token_ids)
                )
                writer.append_changed(sequence, after, columns)
                if progress is not None:
                    progress("subsample", number + 1, len(cache))

        return write_output(
            config.out,
            header,
            [cache],
            len(cache),
            sequences_per_shard=per_shard,
            fill=fill,
            store=store_of(cache),
            says=says,
        )
