"""
What the header of a cache says that was made of others: what all of them say, and in its capture, of which it was made.

Looks at headers only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sklformat.cache.reader import Cache
from sklformat.checksums import fingerprint
from sklformat.errors import SettingsError
from sklformat.format import layout
from sklformat.format.captures import canonical_json
from sklformat.format.header import Header

_UNKNOWN = "0" * 32
# Of the text, its order and the draws from it; every other field is the same in all caches that are merged.
_OF_TEXT = ("corpus_fingerprint", "packing_seed", "order_algorithm", "order_version", "sampling_seed")
_PACKING, _FIRST = "packing", "first_sequence"
# What captures must agree in: of the teacher all but where it ran and its name, since its fingerprint is compared; of
# those who came later all but the cache that they looked at; of the packing what a student must be run like.
_SETTINGS: Mapping[str, frozenset[str]] = {
    "teacher": frozenset({"device", "name", "revision"}),
    "tokenizer": frozenset(),
    "sampler": frozenset(),
    "weighted": frozenset({"cache", "batch_size", "sequences_per_shard", "versions"}),
    "rescored": frozenset({"cache", "batch_size", "sequences_per_shard", "versions"}),
    "thinned": frozenset({"cache", "seed", "sequences_per_shard"}),
}
_OF_PACKING = ("answers", "bos", "isolated", "separator_id", "single", "special_tokens")


def merged_header(caches: Sequence[Cache], sequences_per_shard: int) -> tuple[Header, bool]:
    """
    Of a cache with the sequences of several.

    Args:
        caches: Two or more, in order.
        sequences_per_shard: Of what is written.

    Returns:
        The header, and whether the caches follow each other in one packed text.

    Raises:
        SettingsError: Two of them were made with other settings; shows both values.
        ValueError: Their captures leave no room in a header.
    """
    first = caches[0]
    ours = _settings(first.header)
    for other in caches[1:]:
        if differing := ours.differences(_settings(other.header)):
            raise SettingsError(
                f"{first.path} and {other.path} cannot be merged (the first's value != the second's): "
                f"{'; '.join(differing)}; merge what was captured alike, or give training both as a list"
            )
    headers = [cache.header for cache in caches]
    common = {name: _common([getattr(header, name) for header in headers]) for name in _OF_TEXT}
    fields = {name: value for name, value in common.items() if value is not None}
    fields = dict.fromkeys(set(_OF_TEXT) - {"corpus_fingerprint"}, 0) | fields
    fields |= {"corpus_fingerprint": _corpus([header.corpus_fingerprint for header in headers])}
    captures = [header.capture for header in headers]
    shared = _shared(captures)
    follow = _follow(caches)
    if follow:
        shared[_PACKING] = _shared([capture[_PACKING] for capture in captures]) | {
            _FIRST: captures[0][_PACKING][_FIRST]
        }
    elif isinstance(shared.get(_PACKING), dict):
        # No one text gives these sequences, so nothing may say how to cut it.
        shared[_PACKING] = {name: value for name, value in shared[_PACKING].items() if name != "separator_id"}
    parts = [
        {
            "cache": cache.fingerprint,
            "sequences": len(cache),
            **{name: getattr(cache.header, name) for name in _OF_TEXT if common[name] is None},
            "capture": _rest(cache.header.capture, shared),
        }
        for cache in caches
    ]
    return dataclasses.replace(first.header, **fields, capture=_said(shared, parts, sequences_per_shard)), follow


def sliced_header(cache: Cache, part: range, sequences_per_shard: int) -> Header:
    """Of a cache with some sequences of another, which are packed as they were."""
    capture = dict(cache.header.capture)
    packing = capture.get(_PACKING)
    if isinstance(packing, Mapping) and isinstance(packing.get(_FIRST), int):
        capture[_PACKING] = {**packing, _FIRST: packing[_FIRST] + cache.first_sequence + part.start}
    said = {
        "cache": cache.fingerprint,
        "sequences": [part.start, part.stop],
        "sequences_per_shard": sequences_per_shard,
    }
    return dataclasses.replace(cache.header, capture={**capture, "sliced": said})


def thinned_header(cache: Cache, rounds: int, seed: int, sequences_per_shard: int) -> Header:
    """
    Of a cache with fewer of the draws of another.

    Raises:
        SettingsError: Its records are no counts, or of no more rounds.
    """
    header = cache.header
    if header.kind != "counts":
        raise SettingsError(
            f"{cache.path}: its records are {header.kind}, and only counts are draws that can be taken away; capture "
            "it again with fewer rounds"
        )
    if rounds >= header.rounds:
        raise SettingsError(
            f"{cache.path}: has {header.rounds} rounds, asked for are {rounds}; give fewer, or capture it with more"
        )
    said = {
        "cache": cache.fingerprint,
        "rounds": header.rounds,
        "sampler": header.sampler,
        "seed": seed,
        "sequences_per_shard": sequences_per_shard,
    }
    return dataclasses.replace(
        header,
        rounds=rounds,
        # Some of n independent draws are independent draws; of systematic ones they are neither.
        sampler="thinned" if header.sampler == "systematic" else header.sampler,
        profile=None,
        capture={**header.capture, "thinned": said},
    )


def _settings(header: Header) -> Header:
    """A header without what may differ between caches that are merged."""
    capture = {
        name: {key: part for key, part in value.items() if key not in _SETTINGS[name]}
        if isinstance(value, Mapping)
        else value
        for name, value in header.capture.items()
        if name in _SETTINGS
    }
    packing = header.capture.get(_PACKING)
    if isinstance(packing, Mapping):
        capture[_PACKING] = {name: packing[name] for name in _OF_PACKING if name in packing}
    cleared: dict[str, Any] = dict.fromkeys(_OF_TEXT, 0) | {"corpus_fingerprint": _UNKNOWN}
    return dataclasses.replace(header, capture=capture, **cleared)


def _common(values: list[Any]) -> Any:
    """The value that all have; None: they differ."""
    return values[0] if all(value == values[0] for value in values) else None


def _corpus(digits: list[str]) -> str:
    """Of one text its fingerprint, of several one of theirs in order; unknown where one is."""
    if len(set(digits)) == 1:
        return digits[0]
    return _UNKNOWN if _UNKNOWN in digits else fingerprint(canonical_json({"corpora": digits}))


def _shared(captures: list[Mapping[str, Any]]) -> dict[str, Any]:
    """What all captures say, objects part by part."""
    shared: dict[str, Any] = {}
    for name, value in captures[0].items():
        values = [capture.get(name) for capture in captures]
        if all(other == value for other in values):
            shared[name] = value
        elif all(isinstance(other, Mapping) for other in values) and (inner := _shared(values)):  # type: ignore[arg-type]
            shared[name] = inner
    return shared


def _rest(capture: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What a capture says beyond what all of them do."""
    rest: dict[str, Any] = {}
    for name, value in capture.items():
        ours = shared.get(name)
        if isinstance(value, Mapping) and isinstance(ours, Mapping):
            rest |= {name: inner} if (inner := _rest(value, ours)) else {}
        elif name not in shared or value != ours:
            rest[name] = value
    return rest


def _follow(caches: Sequence[Cache]) -> bool:
    """Whether each cache begins in the same packed text where the one before it ends."""
    headers = [cache.header for cache in caches]
    if headers[0].corpus_fingerprint == _UNKNOWN:
        return False
    if any(_common([getattr(header, name) for header in headers]) is None for name in _OF_TEXT[:-1]):
        return False
    packings = [header.capture.get(_PACKING) for header in headers]
    if not all(isinstance(packing, Mapping) and isinstance(packing.get(_FIRST), int) for packing in packings):
        return False
    firsts = [packing[_FIRST] for packing in packings]  # type: ignore[index]
    return all(after == before + len(cache) for cache, before, after in zip(caches, firsts, firsts[1:], strict=False))


def _said(shared: dict[str, Any], parts: list[dict[str, Any]], sequences_per_shard: int) -> dict[str, Any]:
    """The capture, with what each part says for itself as far as a header has room, else a digest of that."""
    merged: dict[str, Any] = {"caches": len(parts), "sequences_per_shard": sequences_per_shard, "parts": parts}
    capture = {**shared, "merged": merged}
    if len(canonical_json(capture)) > layout.MAX_CAPTURE_SIZE:
        digest = fingerprint(canonical_json({"parts": merged.pop("parts")}))
        capture["merged"] = merged | {"digest": digest}
    return capture
