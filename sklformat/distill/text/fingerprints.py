"""
What proves that two runs speak of the same tokenizer, the same tokens, the same text: XXH3-128 of stated bytes.

Reads no files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sklformat.checksums import fingerprint, fingerprint_of
from sklformat.format.captures import canonical_json

_UNKNOWN = "0" * 32


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """
    XXH3-128 of what a tokenizer's ids mean: the id → token map in the order of ids, and the special ids.

    The bytes are canonical JSON, ``{"special":[id, …],"tokens":[[id,"token"], …]}``, both lists rising.

    Args:
        tokenizer: Anything with ``get_vocab()`` (token → id) and ``all_special_ids``, as transformers' tokenizers.

    Returns:
        32 hexadecimal digits. Equal maps give equal digits, wherever the tokenizer was loaded from.
    """
    tokens = sorted((int(token_id), token) for token, token_id in tokenizer.get_vocab().items())
    special = sorted({int(token_id) for token_id in tokenizer.all_special_ids})
    return fingerprint(canonical_json({"special": special, "tokens": tokens}))


def vocabulary_fingerprint(tokenizer: Any, num_ids: int) -> str:
    """
    XXH3-128 of what ids below a bound mean, and of nothing else: no roles, no ids above.

    The bytes are those of ``tokenizer_fingerprint`` without ``special``: ``{"tokens":[[id,"token"], …]}``. So a
    tokenizer that has more tokens behind, or another end-of-text token, gives the same digits.

    Args:
        tokenizer: Anything with ``get_vocab()``.
        num_ids: The bound.

    Returns:
        32 hexadecimal digits.
    """
    below = ((int(token_id), token) for token, token_id in tokenizer.get_vocab().items())
    return fingerprint(canonical_json({"tokens": sorted(pair for pair in below if pair[0] < num_ids)}))


@dataclass(frozen=True, slots=True)
class MadeBy:
    """
    What data says of the tokenizer that made it.

    Attributes:
        fingerprint: Its ``tokenizer_fingerprint``; zeros: unknown.
        num_ids: Every id of the data is below it.
        vocabulary: ``vocabulary_fingerprint`` of the ids below ``num_ids``; "": not said.
    """

    fingerprint: str
    num_ids: int
    vocabulary: str = ""

    @classmethod
    def of(cls, tokenizer: Any, num_ids: int) -> MadeBy:
        """What data made by a tokenizer would say."""
        return cls(tokenizer_fingerprint(tokenizer), num_ids, vocabulary_fingerprint(tokenizer, num_ids))

    def conflict(self, tokenizer: Any) -> str:
        """
        Why a tokenizer does not give these ids their meaning; "" where it does.

        The map from ids to tokens decides, up to ``num_ids``: roles (end of text, padding) and tokens behind may
        differ.  Where data does not say the map, roles and tokens behind are in the one fingerprint that it says.
        """
        own = tokenizer_fingerprint(tokenizer)
        if self.fingerprint in (_UNKNOWN, own):
            return ""
        both = f"(fingerprint {self.fingerprint}, here {own})"
        if not self.vocabulary:
            return (
                "ids mean other tokens here, or only roles (end of text, padding) differ: data made by an earlier "
                f"version does not say which {both}"
            )
        if vocabulary_fingerprint(tokenizer, self.num_ids) == self.vocabulary:
            return ""
        size = 1 + max(tokenizer.get_vocab().values())
        if size < self.num_ids:
            return f"that one has ids up to {self.num_ids - 1}, here they end at {size - 1} {both}"
        return f"ids below {self.num_ids} mean other tokens here {both}"


def document_fingerprint(tokens: ArrayLike) -> str:
    """XXH3-128 of one document's token ids, in [0, 2^32), as little-endian u32; whatever integer type holds them."""
    return fingerprint(np.ascontiguousarray(tokens, dtype="<u4").data)


def corpus_fingerprint(documents: Iterable[ArrayLike]) -> str:
    """
    Digest of tokenised documents in their order: ``joined`` of their ``document_fingerprint``.

    Args:
        documents: Token ids of each document, in [0, 2^32).

    Returns:
        32 hexadecimal digits.
    """
    return joined(document_fingerprint(tokens) for tokens in documents)


def text_fingerprint(document: tuple[str, str]) -> str:
    """Digest of one document's name and text: ``joined`` of the XXH3-128 of each, as UTF-8."""
    return joined(fingerprint(part.encode()) for part in document)


def joined(fingerprints: Iterable[str]) -> str:
    """XXH3-128 of fingerprints written one after the other as ASCII."""
    return fingerprint_of(digits.encode("ascii") for digits in fingerprints)
