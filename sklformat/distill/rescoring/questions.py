"""
The sequences of a cache as another teacher is asked about them: tokens, and ids at each position.

Knows no teacher.
Shape letters: T positions, nnz records of a sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat.cache.reader import Cache
from sklformat.cache.tokens import Tokens, TokenSource
from sklformat.distill.loader.conflicts import check_borders
from sklformat.distill.loader.contents import is_isolated
from sklformat.distill.text.fingerprints import MadeBy
from sklformat.distill.text.packing import places_of
from sklformat.distill.text.singles import packed_as
from sklformat.errors import SettingsError
from sklformat.files.places import is_url
from sklformat.files.regular import check_exists
from sklformat.format.columns import STARTS
from sklformat.format.records import Sequence

_OWN_TOKENS = "tokens"  # where sklformat cache leaves those that it made from text


class Question(NamedTuple):
    """
    What a teacher is asked of one sequence.

    Attributes:
        number: Of the sequence.
        sequence: What the cache holds of it.
        tokens: [T + 1].
        position_ids: [T], each input's place in its document, where documents do not see each other; else None.
        offsets: [T + 1]; position p is asked about token_ids[offsets[p] : offsets[p + 1]].
        token_ids: [nnz], below the vocabulary's size.
    """

    number: int
    sequence: Sequence
    tokens: NDArray[np.uint32]
    position_ids: NDArray[np.int64] | None
    offsets: NDArray[np.int64]
    token_ids: NDArray[np.uint32]

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Which positions are asked about anything, [T]."""
        return np.diff(self.offsets) > 0


class Questions:
    """
    A cache and its tokens, which are proven to be those that it was captured on.

    Args:
        path: The cache, or its URL.
        tokens: Where its tokens are, if it stores none; None: in its own directory.

    Attributes:
        cache: The cache.
        isolated: Whether its documents did not see each other.

    Raises:
        SettingsError: It stores no tokens and none are given; it holds isolated documents and does not say where they
            begin; or as ``packed_as``.
        ValueError: It holds no sequence; or the tokens are no array of sequences.
        FormatError, FileNotFoundError: Cache or tokens cannot be read.
    """

    def __init__(self, path: str, tokens: Path | None) -> None:
        self.cache = Cache(path if is_url(path) else Path(path))
        if not len(self.cache):
            raise ValueError(f"{path}: the cache holds no sequence, so there is nothing to score again")
        check_borders(self.cache)
        self.isolated = is_isolated(self.cache)
        self._tokens = self._open(tokens)

    def _open(self, given: Path | None) -> Tokens | None:
        cache, path = self.cache, given
        if given is None:
            if cache.header.store_tokens:
                return None
            path = cache.path / _OWN_TOKENS if isinstance(cache.path, Path) else None
        else:
            check_exists(given)
        source: TokenSource | None = None
        if path is not None and path.suffix == ".npy":
            source = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path is not None and path.is_dir():
            source = packed_as(path, cache.header)
        if source is None:
            raise SettingsError(
                f"{cache.path}: stores no tokens, and "
                + (f"{given} is neither a .npy array, nor an mmap-ninja store, nor a token store" if given else "none")
                + " lie beside it" * (given is None)
                + "; give those that it was captured on (--tokens)"
            )
        return Tokens(source)

    def check_ids(self, tokenizer: Any, width: int, teacher: str) -> None:
        """
        Make sure that a teacher knows the ids that it is asked about, and no more.

        Args:
            tokenizer: The teacher's.
            width: Ids that teacher and tokenizer have in common.
            teacher: Its name, for the message.

        Raises:
            SettingsError: It does not; says both values.
        """
        header = self.cache.header
        said = header.capture.get("tokenizer")
        vocabulary = said.get("vocabulary") if isinstance(said, dict) else None
        if conflict := MadeBy(header.tokenizer_fingerprint, header.vocab_size, vocabulary or "").conflict(tokenizer):
            raise SettingsError(
                f"{self.cache.path}: made by a different tokenizer from that of {teacher}: {conflict}; a teacher can "
                "only be asked about ids that it knows"
            )
        if width != header.vocab_size:
            raise SettingsError(
                f"{self.cache.path}: vocab_size {header.vocab_size}, and {teacher} has {width} ids in common with its "
                "tokenizer; probabilities over other ids cannot be compared, take a teacher of the same vocabulary"
            )

    def read(self, number: int) -> Question:
        """
        What is asked of a sequence.

        Raises:
            AlignmentError: The records are not about the tokens that were given.
            IndexError, FormatError, ValueError: As ``cache[i]`` and ``Tokens``.
        """
        sequence = self.cache[number]
        tokens = sequence.tokens
        if self._tokens is not None:
            given = self._tokens[self.cache.first_sequence + number]
            self.cache.check_alignment(number, given)
            tokens = given.astype(np.uint32)
        assert tokens is not None
        places = places_of(sequence.columns[STARTS][:-1]) if self.isolated else None
        return Question(number, sequence, tokens, places, sequence.targets.offsets, sequence.targets.token_ids)

    @property
    def longest(self) -> int:
        """Positions of the longest sequence."""
        return max(int(shard.index.num_positions.max(initial=1)) for shard in self.cache.shards())

    @property
    def sequences_per_shard(self) -> int:
        """As many as the first shard has."""
        return int(self.cache.starts[1]) if self.cache.starts.size > 1 else len(self.cache)
