"""The settings of ``sklformat merge``, ``slice`` and ``subsample``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sklformat.settings.limits import check_least, is_part, part_of


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """
    Join caches into one: the sequences of the first, then those of the next, and so on. No record is decoded.

    All must be of one teacher, tokenizer, sampler and number of rounds; their texts may differ. If stopped, the same command resumes it.
    """  # noqa: E501

    caches: tuple[str, ...]
    """Caches, two or more: directories, .skl shards, or URLs of either."""

    out: Path = field(metadata={"flag": "out"})
    """Cache to write, a directory. One that a stopped run left is resumed."""

    sequences_per_shard: int | None = None
    """Sequences in one file. None: as in the first cache."""

    def __post_init__(self) -> None:
        check_least(self, 1, "sequences_per_shard")
        if len(self.caches) < 2:
            raise ValueError(f"a merge takes two caches or more, got {len(self.caches)}")


@dataclass(frozen=True, kw_only=True)
class SliceConfig:
    """Make a cache of some sequences of another that follow each other. If stopped, the same command resumes it."""

    cache: str
    """Cache directory, or one .skl shard, or the URL of either."""

    sequences: str
    """The sequences A:B, from A to before B; without A from the first, without B to the last."""

    out: Path = field(metadata={"flag": "out"})
    """Cache to write, a directory. One that a stopped run left is resumed."""

    sequences_per_shard: int | None = None
    """Sequences in one file. None: as in the cache."""

    def __post_init__(self) -> None:
        check_least(self, 1, "sequences_per_shard")
        if not is_part(self.sequences):
            raise ValueError(f"the sequences to keep must be A:B, such as 900:1000, got {self.sequences!r}")

    def part(self, available: int) -> range:
        """
        The sequences that are meant, of so many.

        Raises:
            ValueError: There are none, or not so many.
        """
        found = part_of(self.sequences, available)
        if found is None:
            raise ValueError(
                f"{self.cache}: sequences {self.sequences} of {available}; give A:B with 0 <= A < B <= {available}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class SubsampleConfig:
    """
    Make a cache with fewer rounds of another: of each position's draws some are kept, each with the same chance.

    The mean of the records stays what it was. If stopped, the same command resumes it.
    """

    cache: str
    """Cache directory of kind counts, or one .skl shard, or the URL of either."""

    rounds: int = field(metadata={"flag": "rounds"})
    """Draws to keep of each position, fewer than the cache has."""

    out: Path = field(metadata={"flag": "out"})
    """Cache to write, a directory. One that a stopped run left is resumed."""

    seed: int = 0
    """Seed of the choice. With the same seed fewer rounds keep some of the draws that more rounds keep."""

    sequences_per_shard: int | None = None
    """Sequences in one file. None: as in the cache."""

    def __post_init__(self) -> None:
        check_least(self, 1, "sequences_per_shard", "rounds")
        check_least(self, 0, "seed")
        if self.seed >= 1 << 64:
            raise ValueError(f"seed must be below 2**64, got {self.seed}")
