"""
Why tokens are not those that records were captured on: the likely cause, found by trying the neighbours.

Knows neither files nor where tokens come from.  SPEC.md section 6.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sklformat.checksums import alignment

_Ids = NDArray[np.int64]
_FEW = 0.2  # share of tokens up to which a difference is one of the text, not of the whole packing


class Captured(Protocol):
    """What a cache knows of the tokens of its sequences, which are counted from 0."""

    def __len__(self) -> int: ...

    def alignment_of(self, i: int) -> int:
        """Alignment checksum of sequence i."""
        ...

    def tokens_of(self, i: int) -> NDArray[np.uint32] | None:
        """Tokens of sequence i, where they are stored."""
        ...

    def find_alignment(self, value: int, near: int) -> int | None:
        """A sequence with this checksum, in or next to the shard of sequence ``near``."""
        ...


def likely_cause(
    captured: Captured, i: int, tokens: _Ids, num_tokens: int, given: Callable[[int], NDArray[Any]] | None
) -> str:
    """
    Say why ``tokens`` are not those of sequence i.

    Args:
        captured: What the records belong to.
        i: Sequence, in [0, len(captured)).
        tokens: [L] integers in [0, 2**32).
        num_tokens: Tokens that sequence i was captured on.
        given: The other sequences of the same source, by number; may raise LookupError or ValueError.
    """
    if tokens.size != num_tokens:
        why = "; a sequence of seq_len positions has seq_len + 1 tokens" if tokens.size == num_tokens - 1 else ""
        return f"{tokens.size} tokens given, {num_tokens} captured{why}"

    def neighbour(number: int) -> _Ids | None:
        """The tokens that the source gives for another sequence, if it has it."""
        if given is None or not 0 <= number < len(captured):
            return None
        try:
            ids = np.asarray(given(number)).astype(np.int64)
        except (LookupError, ValueError):
            return None
        return ids if ((ids >= 0) & (ids < 1 << 32)).all() else None

    place = captured.find_alignment(alignment(tokens), i)
    if place is not None:
        return _displaced(captured, i, place, neighbour)
    stored = captured.tokens_of(i)
    if stored is not None:
        return _compared(tokens, stored.astype(np.int64))
    if any(_is_shifted(captured, number, neighbour) for number in (i, i + 1)):  # the first has none before it
        return "shifted by one token"
    return "another packing seed, tokenizer or corpus"


def _is_shifted(captured: Captured, i: int, neighbour: Callable[[int], _Ids | None]) -> bool:
    """Whether sequence i is what the source gives for it, moved by one token."""
    before, tokens, after = (neighbour(number) for number in (i - 1, i, i + 1))
    if tokens is None:
        return False
    # Sequences of a stream touch or share one token; what a shift pushed out stands at the neighbour's edge.
    edges = [] if before is None else [[before[-k], *tokens[:-1]] for k in (1, 2) if before.size >= k]
    edges += [] if after is None else [[*tokens[1:], after[k]] for k in (0, 1) if after.size > k]
    expected = captured.alignment_of(i)
    return any(alignment(np.array(edge)) == expected for edge in edges)


def _displaced(captured: Captured, i: int, place: int, neighbour: Callable[[int], _Ids | None]) -> str:
    """The tokens are another sequence's."""
    there, following = neighbour(place), neighbour(i + 1)
    if there is not None and alignment(there) == captured.alignment_of(i):
        return f"sequences {i} and {place} are swapped"
    where = f"they are sequence {place} of the cache"
    step = place + 1
    if following is not None and step < len(captured) and alignment(following) == captured.alignment_of(step):
        moved = abs(place - i)
        what = f"{moved} sequence{'s' * (moved > 1)}"
        return f"{where}: {what} dropped before it" if place > i else f"{where}: {what} too many before it"
    return f"{where}: another order or packing seed, or a shift"


def _compared(tokens: _Ids, stored: _Ids) -> str:
    """The tokens are no sequence's, and those captured are known."""
    if np.array_equal(tokens[1:], stored[:-1]) or np.array_equal(tokens[:-1], stored[1:]):
        return "shifted by one token"
    differing = np.flatnonzero(tokens != stored)
    at = int(differing[0])
    facts = (
        f"{differing.size} of {stored.size} tokens differ, the first at {at}: {stored[at]} captured, {tokens[at]} given"
    )
    if differing.size <= max(1, _FEW * stored.size):
        return f"{facts}; a changed text, or another version of the tokenizer"
    pairs = np.unique(np.stack([stored, tokens]), axis=1).shape[1]
    if pairs == np.unique(stored).size == np.unique(tokens).size < 0.8 * stored.size:
        return f"{facts}; the ids correspond one to one: another tokenizer for the same text"
    return f"{facts}; another packing seed, tokenizer or corpus"
