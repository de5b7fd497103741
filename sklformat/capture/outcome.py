"""What a capture did, in the words of its user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sklformat.format.listing import Entry, cache_fingerprint


@dataclass(frozen=True, kw_only=True)
class Cached:
    """
    What ``sklformat cache`` did.

    Attributes:
        directory: The cache, or its URL.
        fingerprint: Identity of its content.
        sequences: Sequences in it.
        sequences_made: Sequences that this run added; the others were there.
        positions: Positions in it that are learnt from; those that predict what is no answer are not.
        unique_tokens: Records per position, mean.
        bytes_per_position: Bytes on disk per position, tokens and checksums included.
        seconds: Time this run took, teacher's loading not included; of several ranks, the longest.
        positions_per_second: Positions that this run added per second, all ranks together; 0 where there were none.
        waited_share: Share of the time in which the teachers waited for their writers.
    """

    directory: Path | str
    fingerprint: str
    sequences: int
    sequences_made: int
    positions: int
    unique_tokens: float
    bytes_per_position: float
    seconds: float
    positions_per_second: float
    waited_share: float

    def __str__(self) -> str:
        made = (
            f"{self.sequences_made} made now at {self.positions_per_second:,.0f} positions/s, "
            f"{self.waited_share:.1%} of the time spent waiting for the writer"
            if self.sequences_made
            else "all there already"
        )
        return (
            f"{self.directory}: {self.sequences} sequences, {self.positions:,} positions "
            f"({made}); {self.unique_tokens:.2f} unique tokens and {self.bytes_per_position:.1f} bytes per position"
        )


@dataclass(frozen=True, kw_only=True)
class Contributed:
    """
    What one rank did of a run whose ranks never meet, where others have not ended.

    Attributes:
        directory: The cache, or its URL.
        run: Name of the run.
        rank, world_size: This process among its ranks.
        sequences: Sequences of this rank, which are all there.
        sequences_made: Of these, those that it added now.
        positions_per_second: Positions that it added per second; 0 where there were none.
        unsealed_shards: Shards that are not sealed.
        waits_for: Ranks whose work these are.
    """

    directory: Path | str
    run: str
    rank: int
    world_size: int
    sequences: int
    sequences_made: int
    positions_per_second: float
    unsealed_shards: int
    waits_for: tuple[int, ...]

    def __str__(self) -> str:
        made = f"{self.sequences_made} made now at {self.positions_per_second:,.0f} positions/s"
        return (
            f"{self.directory}: rank {self.rank} of {self.world_size} is done with its {self.sequences} sequences "
            f"({made if self.sequences_made else 'all there already'}); {self.unsealed_shards} shards of the ranks "
            f"{', '.join(map(str, self.waits_for))} are not sealed, the rank that ends last writes the manifest"
        )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """
    A cache whose manifest was written after all ranks had ended.

    Attributes:
        directory: The cache, or its URL.
        fingerprint: Identity of its content.
        sequences: Sequences in it.
        shards: Shards in it.
    """

    directory: Path | str
    fingerprint: str
    sequences: int
    shards: int

    def __str__(self) -> str:
        return f"{self.directory}: {self.sequences} sequences in {self.shards} shards, all there"

    @classmethod
    def of(cls, place: Path | str, entries: Sequence[Entry]) -> Finished:
        """What a manifest says."""
        return cls(
            directory=place,
            fingerprint=cache_fingerprint(entry.fingerprint for entry in entries),
            sequences=sum(entry.num_sequences for entry in entries),
            shards=len(entries),
        )


def sum_up(
    place: Path | str, entries: Sequence[Entry], positions: int, parts: Sequence[tuple[int, int, float, float]]
) -> Cached:
    """
    What all ranks did together.

    Args:
        place: The cache, or its URL.
        entries: Of the manifest.
        positions: Positions in the cache that are learnt from.
        parts: Of each rank: sequences and positions that it added, seconds that it took, seconds that it waited.
    """
    made, seconds = sum(part[0] for part in parts), max(part[2] for part in parts)
    return Cached(
        directory=place,
        fingerprint=cache_fingerprint(entry.fingerprint for entry in entries),
        sequences=sum(entry.num_sequences for entry in entries),
        sequences_made=made,
        positions=positions,
        unique_tokens=sum(entry.num_records for entry in entries) / positions,
        bytes_per_position=sum(entry.size_bytes for entry in entries) / positions,
        seconds=seconds,
        positions_per_second=sum(part[1] for part in parts) / seconds,
        waited_share=sum(part[3] for part in parts) / sum(part[2] for part in parts) if made else 0.0,
    )
