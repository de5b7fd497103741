"""The settings of ``sklformat convert``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sklformat.settings.limits import check_least

FileKind = Literal["auto", "skl", "npz", "parquet", "jsonl"]


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """
    Convert a cache, or a file of plain columns, to another of them.

    Plain columns are input_ids (L ids), token_ids (L - 1 lists of ids) and counts or logprobs (lists beside them).
    Counts become ratios with a small loss, which is stated; ratios become counts only where nothing is lost.
    """

    source: Path
    """Cache directory, .skl shard, or file of plain columns."""

    destination: Path
    """Cache directory or file to make; must not exist. A cache that a stopped run left is resumed."""

    from_: FileKind = field(default="auto", metadata={"flag": "from"})
    """What the source is. auto: a directory or .skl is skl, else by the name's end."""

    to: FileKind = "auto"
    """What to make. auto: by the name's end; skl, a cache directory, where it has none."""

    kind: Literal["counts", "ratios"] | None = None
    """Kind of records to make; plain columns hold counts, or logprobs for ratios. None: the source's kind."""

    profile: Literal["R24", "R24W", "R32"] | None = None
    """Record layout: 17-bit ids, 18-bit ids with at most 63 rounds, 24-bit ids. None: the source's, or the smallest."""

    drop_tokens: bool = False
    """Leave the tokens out of the cache, 2 or 3 bytes per position; training then needs them from elsewhere."""

    tokens: Path | None = None
    """.npy array [sequences, seq_len + 1] of token ids, for a source cache that stores no tokens."""

    sequences_per_shard: int | None = None
    """Sequences in one file of a cache. None: as in the source, or 1024."""

    vocab_size: int | None = None
    """Ids are below it; only for plain columns that do not come from sklformat."""

    rounds: int | None = None
    """Draws per position, the sum of its counts; only for plain columns that do not come from sklformat."""

    sampler: Literal["multinomial", "systematic", "topk", "topp", "thinned", "unknown"] | None = None
    """How records were taken; topk, topp: biased. Only for plain columns that do not come from sklformat."""

    drop_last_row: bool = False
    """Leave out the last row of records: for plain columns with as many rows as tokens."""

    def __post_init__(self) -> None:
        check_least(self, 1, "sequences_per_shard", "vocab_size", "rounds")
