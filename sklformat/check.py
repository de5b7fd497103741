"""
A whole cache checked against the tokens to be trained on, before training: ``sklformat check``.

Reads the indexes of the shards and the tokens, no records.  SPEC.md section 6.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sklformat.cache.reader import Cache
from sklformat.cache.tokens import Tokens, TokenSource
from sklformat.checksums import alignment
from sklformat.errors import AlignmentError, UnsupportedError
from sklformat.files.regular import check_exists
from sklformat.format.header import Header
from sklformat.settings.inspection import CheckConfig

Progress = Callable[[str, int, "int | None"], None]
"""Called with what is being done, the sequences done so far and in total."""

_EVERY = 1024  # sequences between two words of progress


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was proven: this many sequences of the cache are those of the tokens, which may have more."""

    path: str
    tokens: Path
    sequences: int
    available: int

    def __str__(self) -> str:
        return f"{self.path}: all {self.sequences:,} sequences are those of {self.tokens}, which has {self.available:,}"


def check(config: CheckConfig, progress: Progress) -> Checked:
    """
    Check a cache against tokens on disk.

    Raises:
        AlignmentError: At the first sequence that was captured on other tokens; names it and the likely cause.
        SettingsError: A token store whose BOS stands elsewhere than the cache's.
        UnsupportedError: The tokens are in a form that is not known here.
        FileNotFoundError, FormatError, ValueError: Cache or tokens cannot be read.
    """
    check_exists(config.tokens)
    with Cache(config.path) as cache:
        source = _open_tokens(config.tokens, cache.header)
        check_tokens(cache, source, progress)
        return Checked(
            path=config.path, tokens=config.tokens, sequences=len(cache), available=Tokens(source).num_sequences or 0
        )


def check_tokens(cache: Cache, source: TokenSource, progress: Progress | None = None) -> None:
    """
    Prove for every sequence of a cache that it was captured on the tokens of ``source``.

    Args:
        cache: An open cache.
        source: What ``SparseLogitDataset`` takes as ``tokens``.
        progress: Told how far it is.

    Raises:
        AlignmentError: At the first sequence that was not, or where the source ends before the cache.
        ValueError: The source gives no tokens; names the sequence.
        FormatError: A shard is damaged.
    """
    tokens, first, done = Tokens(source), cache.first_sequence, 0
    available = tokens.num_sequences
    for shard in cache.shards():
        for stored in shard.index.alignment.tolist():
            if available is not None and first + done >= available:
                raise AlignmentError(
                    f"{cache.path}: {available} sequences of tokens given, the cache reaches to sequence "
                    f"{first + len(cache) - 1}; the {available} are right: pack all of the text",
                    sequence_index=done,
                )
            given = tokens[first + done]
            try:
                is_aligned = alignment(given) == stored
            except ValueError as error:
                raise ValueError(f"sequence {first + done} of the tokens: {error}") from None
            if not is_aligned:
                cache.check_alignment(done, given, lambda i: tokens[first + i])
            done += 1
            if progress is not None and (done % _EVERY == 0 or done == len(cache)):
                progress("check", done, len(cache))


def _open_tokens(path: Path, header: Header) -> TokenSource:
    if path.suffix == ".npy":
        array: TokenSource = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    if path.is_dir():
        from sklformat.distill.text import singles  # noqa: PLC0415  needs the extra of training

        store = singles.packed_as(path, header)
        if store is not None:
            return store
    raise UnsupportedError(
        "neither a .npy array, nor an mmap-ninja store, nor a token store; sklformat.check.check_tokens takes what "
        "Python can read",
        path=path,
    )
