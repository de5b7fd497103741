"""
Whether caches go together: what would make one student learn two things at once, or ids that mean other tokens; and
whether one of isolated documents says where these begin.

Looks at headers only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from sklformat.cache.reader import Cache
from sklformat.distill.loader.contents import is_isolated
from sklformat.errors import SettingsError
from sklformat.format.columns import STARTS

_UNKNOWN = "0" * 32


def check_together(caches: Sequence[Cache]) -> None:
    """
    Refuse caches that no student can learn from at once.

    Raises:
        SettingsError: Two of them are the same, or differ in vocabulary or tokenizer, in whether documents are
            isolated, or in whether their records leave out part of the teacher's distribution; says both values.
    """
    for one, other in itertools.combinations(caches, 2):
        for fault_of in (_copies, _vocabularies, _samplers, _documents):
            _refuse(one, other, fault_of(one, other))


def check_same_ids(one: Cache, other: Cache) -> None:
    """
    Refuse two caches whose ids mean other tokens, as where one student learns from one and is measured on the other.

    Raises:
        SettingsError: They differ in vocabulary or tokenizer; says both values.
    """
    _refuse(one, other, _vocabularies(one, other))


def _refuse(one: Cache, other: Cache, fault: str) -> None:
    if fault:
        raise SettingsError(f"{one.path} and {other.path} do not go together: {fault}")


def check_borders(cache: Cache) -> None:
    """
    Make sure that documents which did not see each other can be kept apart.

    Raises:
        SettingsError: The cache does not say where they begin.
    """
    if is_isolated(cache) and STARTS not in cache.header.columns:
        raise SettingsError(
            f"{cache.path}: made with isolated documents, but without the column {STARTS}, which says where they "
            "begin; capture it with --isolate-documents, which stores the column"
        )


def _copies(one: Cache, other: Cache) -> str:
    if one.fingerprint != other.fingerprint:
        return ""
    return (
        f"they are the same cache, fingerprint {one.fingerprint}, and would count twice; give it once, and a weight if "
        "it is to count more"
    )


def _vocabularies(one: Cache, other: Cache) -> str:
    ours, theirs = one.header.vocab_size, other.header.vocab_size
    if ours != theirs:
        return f"vocab_size {ours} and {theirs}; make both with the same tokenizer and a vocabulary of the same size"
    digits, others = one.header.tokenizer_fingerprint, other.header.tokenizer_fingerprint
    if digits == others or _UNKNOWN in (digits, others):
        return ""
    # The map from ids to tokens decides, where both say it: roles such as end of text may differ.
    if _map(one) == _map(other) != "":
        return ""
    return f"tokenizer fingerprints {digits} and {others}; make both with the same tokenizer"


def _map(cache: Cache) -> str:
    said = cache.header.capture.get("tokenizer")
    vocabulary = said.get("vocabulary") if isinstance(said, dict) else None
    return vocabulary if isinstance(vocabulary, str) else ""


def _samplers(one: Cache, other: Cache) -> str:
    if one.header.biased == other.header.biased:
        return ""
    return (
        f"samplers {one.header.sampler} and {other.header.sampler}, of which one leaves out part of the teacher's "
        "distribution and the other does not, so that no method fits both; make both with one of them"
    )


def _documents(one: Cache, other: Cache) -> str:
    isolated = [is_isolated(cache) for cache in (one, other)]
    if isolated[0] != isolated[1]:
        return (
            f"documents isolated: {isolated[0]} and {isolated[1]}; a student is run in one of the two ways, so capture "
            "both with or both without --isolate-documents"
        )
    has = [STARTS in cache.header.columns for cache in (one, other)]
    if isolated[0] and has[0] != has[1]:
        return f"column {STARTS}: {has[0]} and {has[1]}; capture both with --isolate-documents, which stores the column"
    return ""
