"""
What proves that two runs speak of the same tokenizer, the same tokens, the same text: XXH3-128 of stated bytes.

Reads no files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sklformat.checksums import fingerprint, fingerprint_of


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """
    XXH3-128 of what a tokenizer's ids mean: the id → token map in the order of ids, and the special ids.

    The bytes are JSON in ASCII without spaces: ``{"special":[id, …],"tokens":[[id,"token"], …]}``, both lists rising.

    Args:
        tokenizer: Anything with ``get_vocab()`` (token → id) and ``all_special_ids``, as transformers' tokenizers.

    Returns:
        32 hexadecimal digits. Equal maps give equal digits, wherever the tokenizer was loaded from.
    """
    tokens = sorted((int(token_id), token) for token, token_id in tokenizer.get_vocab().items())
    special = sorted({int(token_id) for token_id in tokenizer.all_special_ids})
    canonical = json.dumps({"special": special, "tokens": tokens}, ensure_ascii=True, separators=(",", ":"))
    return fingerprint(canonical.encode("ascii"))


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
