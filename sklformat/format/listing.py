"""
What a manifest says: the shards of a cache in order, as JSON that proves itself.

Also the rule that shards follow each other without a gap.  SPEC.md section 11.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklformat.checksums import fingerprint, fingerprint_of
from sklformat.errors import CorruptError, MissingShardError, UnsupportedError
from sklformat.files.places import Place, beside, name_of
from sklformat.format import layout

_FORMAT, _VERSION = "sklformat cache", 1
MAX_SHARDS = layout.MAX_MANIFEST_SIZE // 256
"""Shards with names of up to 32 characters that fit into one manifest for certain."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One shard of a cache, by path or URL; the fingerprint is its root digest, 32 hexadecimal digits."""

    path: Place
    shard_number: int
    first_sequence: int
    num_sequences: int
    num_records: int
    size_bytes: int
    fingerprint: str

    @property
    def name(self) -> str:
        """Name of the file in its directory."""
        return name_of(self.path)


def cache_fingerprint(shards: Iterable[str]) -> str:
    """Fingerprint of a cache: XXH3-128 over its shards' fingerprints in order.  SPEC section 6.4."""
    return fingerprint_of(int(root, 16).to_bytes(16, "little") for root in shards)


def check_contiguous(entries: list[Entry], path: Place) -> None:
    """
    Shards of a directory start at sequence 0, follow each other and are numbered from 0.

    Raises:
        MissingShardError: A gap; names the range of sequences.
        CorruptError: Two shards hold the same sequences, or a shard's number is not its place.
    """
    expected = 0
    for place, entry in enumerate(entries):
        if entry.first_sequence > expected:
            raise MissingShardError(
                f"sequences {expected}..{entry.first_sequence - 1} are missing before {entry.name}; "
                "put the shard back or capture it again",
                path=path,
            )
        if entry.first_sequence < expected:
            raise CorruptError(
                f"{entry.name} begins at sequence {entry.first_sequence}, which an earlier shard holds already",
                path=path,
            )
        if entry.shard_number != place:
            raise CorruptError(
                f"{entry.name} has shard_number {entry.shard_number}, but it is number {place} of the cache; "
                "capture it with its own number",
                path=path,
            )
        expected += entry.num_sequences


def place_in_cache(entry: Entry) -> tuple[int, int]:
    """Sort key of the shards of a cache; an empty shard begins where the next one does.  SPEC section 11."""
    return entry.first_sequence, entry.shard_number


def pack_listing(entries: list[Entry], directory: Place) -> bytes:
    """
    The bytes of a manifest; ``entries`` are in order and without gaps.

    Raises:
        ValueError: Too many shards for one manifest; more than ``MAX_SHARDS`` may be.
        MissingShardError, CorruptError: As ``check_contiguous``.
    """
    check_contiguous(entries, directory)
    body: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "fingerprint": cache_fingerprint(entry.fingerprint for entry in entries),
        "shards": [
            {"name": entry.name} | {k: v for k, v in dataclasses.asdict(entry).items() if k != "path"}
            for entry in entries
        ],
    }
    body["digest"] = _digest(body)
    text = (json.dumps(body, indent=1, sort_keys=True) + "\n").encode("ascii")
    if len(text) > layout.MAX_MANIFEST_SIZE:
        raise ValueError(
            f"{directory}: {len(entries)} shards make a manifest of {len(text)} bytes, the format's limit is "
            f"{layout.MAX_MANIFEST_SIZE}; take more sequences per shard"
        )
    return text


def parse_listing(data: bytes, path: Place) -> list[Entry]:
    """
    Check the bytes of the manifest at ``path``; its shards lie beside it.

    Raises:
        UnsupportedError: Another format or a newer version.
        CorruptError: Not what SPEC section 11 says, or its digest differs.
        MissingShardError: Its shards leave a gap.
    """
    if len(data) > layout.MAX_MANIFEST_SIZE:
        raise _corrupt(path, f"larger than {layout.MAX_MANIFEST_SIZE} bytes")
    try:
        body = json.loads(data)
        _digest(body)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"not JSON: {error}") from error
    if not isinstance(body, dict) or body.get("format") != _FORMAT:
        raise UnsupportedError("not a manifest of a sklformat cache", path=path, section="manifest")
    if type(body.get("version")) is not int or body["version"] != _VERSION:
        raise UnsupportedError(
            f"manifest version {body.get('version')}, this library reads {_VERSION}; install a newer sklformat",
            path=path,
            section="manifest",
        )
    stored = body.pop("digest", None)
    if stored != _digest(body):
        raise _corrupt(path, f"digest {stored} stored, {_digest(body)} computed")
    if set(body) != {"format", "version", "fingerprint", "shards"}:
        raise _corrupt(path, f"has keys {sorted(body)}, must have digest, fingerprint, format, shards and version")
    shards = body["shards"]
    if not isinstance(shards, list) or not shards or not all(isinstance(shard, dict) for shard in shards):
        raise _corrupt(path, "lists no shards")
    entries = [_entry(shard, path) for shard in shards]
    check_contiguous(entries, path)
    if body["fingerprint"] != cache_fingerprint(entry.fingerprint for entry in entries):
        raise _corrupt(path, "fingerprint does not follow from the shards'")
    return entries


def _entry(shard: dict[str, Any], path: Place) -> Entry:
    names = {f.name for f in dataclasses.fields(Entry)} - {"path"} | {"name"}
    if set(shard) != names:
        raise _corrupt(path, f"a shard has fields {sorted(shard)}, must have {sorted(names)}")
    name, root = shard["name"], shard["fingerprint"]
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise _corrupt(path, f"shard name {name!r} is not a plain file name")
    if not isinstance(root, str) or len(root) != 32 or set(root) - set("0123456789abcdef"):
        raise _corrupt(path, f"fingerprint {root!r} of {name} is not 32 hexadecimal digits")
    numbers = {key: shard[key] for key in names - {"name", "fingerprint"}}
    if not all(type(value) is int and 0 <= value < 1 << 64 for value in numbers.values()):
        raise _corrupt(path, f"a number of {name} is not in 0..2**64 - 1")
    if numbers["num_sequences"] >= layout.MAX_SEQUENCES:
        raise _corrupt(
            path, f"{name} has {numbers['num_sequences']} sequences, the limit is {layout.MAX_SEQUENCES - 1}"
        )
    return Entry(path=beside(path, name), fingerprint=root, **numbers)


def _digest(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return fingerprint(canonical.encode("ascii"))


def _corrupt(path: Place, message: str) -> CorruptError:
    return CorruptError(f"{message}; remove it to open the shards without it", path=path, section="manifest")
