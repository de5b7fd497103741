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
