"""The settings of ``sklformat inspect``, ``verify``, ``recover`` and ``check``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what a cache holds: settings, sizes, where it comes from, whether it is biased. Reads headers only."""

    path: str
    """Cache directory, or one .skl shard, or the URL of either."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check every byte of a cache. Damage is listed, one line each, and the exit status is then 3."""

    path: str
    """Cache directory, or one .skl shard."""


@dataclass(frozen=True, kw_only=True)
class RecoverConfig:
    """Keep the whole sequences of an unfinished shard and cut its torn tail. Sealed shards are never changed."""

    path: Path
    """.skl.partial file, or a directory: every unfinished shard in it."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Prove that a cache was captured on exactly the tokens to be trained on: every sequence, before the first step."""

    path: str
    """Cache directory, or one .skl shard, or the URL of either."""

    tokens: Path = field(metadata={"flag": "tokens"})
    """The tokens: a .npy array [sequences, seq_len + 1], an mmap-ninja store of such sequences, or the token store that
    sklformat cache wrote, which is packed again as the cache says."""
