"""
What a manifest says: the shards of a cache in order, as JSON that proves itself.

Also the rule that shards follow each other without a gap.  SPEC.md section 11.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sklformat.checksums import fingerprint_of
from sklformat.errors import CorruptError, FormatError, MissingShardError, UnsupportedError, describe_bad_json
from sklformat.files.places import Place, join
from sklformat.format import layout

_FORMAT, _VERSION = "sklformat cache", 1
_NUMBERS = ("first_sequence", "num_records", "num_sequences", "shard_number", "size_bytes")
# A manifest has one form, so that reading it needs no more of JSON than these lines, and no more memory than they say.
_HEX, _NUMBER = '"([0-9a-f]{32})"', "(0|[1-9][0-9]{0,19})"
_STRING = r'("(?:[^"\\\x00-\x1f\x7f-\xff]|\\["\\bfnrt]|\\u[0-9a-f]{4})*")'
_VALUES = {"name": _STRING, "fingerprint": _HEX} | dict.fromkeys(_NUMBERS, _NUMBER)
_HEAD = re.compile(
    f'{{\n "digest": {_HEX},\n "fingerprint": {_HEX},\n "format": "{_FORMAT}",\n "shards": \\[\n'.encode()
)
_LINES = ",\n".join(f'   "{key}": {_VALUES[key]}' for key in sorted(_VALUES))
_SHARD = re.compile(f"  {{\n{_LINES}\n  }}(,|)\n".encode())
_TAIL = re.compile(rb' \],\n "version": (0|[1-9][0-9]{0,8})\n}\n')
_EXPLAINED_SIZE = 1 << 20  # bytes of a manifest whose fault is found by a parser of all JSON
_BAD_IN_NAME = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Entry:
    """
    One shard of a cache.

    Attributes:
        directory: Path or URL of the directory that the shard lies in.
        name: Name of its file.
        shard_number, first_sequence, num_sequences, num_records, size_bytes: As the shard itself says.
        fingerprint: Its root digest, 32 hexadecimal digits.
    """

    directory: Place
    name: str
    shard_number: int
    first_sequence: int
    num_sequences: int
    num_records: int
    size_bytes: int
    fingerprint: str

    @property
    def path(self) -> Place:
        """Path or URL of the shard."""
        return join(self.directory, self.name)

    def differences(self, expected: Entry) -> list[str]:
        """One "name is ours, theirs expected" for each attribute that differs."""
        return [
            f"{f.name} is {getattr(self, f.name)}, {getattr(expected, f.name)} expected"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != getattr(expected, f.name)
        ]


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
            twin = next((other for other in entries[:place] if other.fingerprint == entry.fingerprint), None)
            raise CorruptError(
                f"{entry.name} begins at sequence {entry.first_sequence}, which an earlier shard holds already"
                if twin is None
                else f"{entry.name} is a copy of {twin.name}; remove one of them",
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
        ValueError: Too many shards for one manifest, more than ``layout.MAX_SHARDS``; or a name that none may have.
        MissingShardError, CorruptError: As ``check_contiguous``.
    """
    check_contiguous(entries, directory)
    if len(entries) > layout.MAX_SHARDS:
        raise ValueError(
            f"{directory}: {len(entries)} shards, a manifest lists at most {layout.MAX_SHARDS}; take more sequences "
            "per shard"
        )
    for entry in entries:
        if fault := _name_fault(entry.name):
            raise ValueError(f"{directory}: shard name {entry.name!r} {fault}; rename the file")
    fingerprint = cache_fingerprint(entry.fingerprint for entry in entries)
    body = {
        "digest": _digest(entries, fingerprint),
        "fingerprint": fingerprint,
        "format": _FORMAT,
        "shards": [_values(entry) for entry in entries],
        "version": _VERSION,
    }
    text = (json.dumps(body, indent=1, sort_keys=True) + "\n").encode("ascii")
    if len(text) > layout.MAX_MANIFEST_SIZE:
        raise ValueError(
            f"{directory}: a manifest of {len(text)} bytes, the format's limit is {layout.MAX_MANIFEST_SIZE}; take "
            "shorter names, or more sequences per shard"
        )
    return text


def parse_listing(data: bytes, directory: Place, path: Place) -> list[Entry]:
    """
    Check the bytes of the manifest at ``path``, which lists shards of ``directory``.

    Raises:
        UnsupportedError: Another format or a newer version.
        CorruptError: Not what SPEC section 11 says, or its digest differs.
        MissingShardError: Its shards leave a gap.
    """
    if len(data) > layout.MAX_MANIFEST_SIZE:
        raise _corrupt(path, f"larger than {layout.MAX_MANIFEST_SIZE} bytes")
    entries: list[Entry] = []
    head, more = _HEAD.match(data), True
    if head is None:
        raise _fault(data, 0, path)
    place = head.end()
    while more:
        match = _SHARD.match(data, place)
        if match is None or len(entries) == layout.MAX_SHARDS:
            raise _fault(data, place, path)
        entry = _entry(match, directory, path)
        if isinstance(entry, CorruptError):
            fault = _fault(data, place, path)
            raise fault if isinstance(fault, UnsupportedError) else entry
        entries.append(entry)
        place, more = match.end(), match[8] == b","
    tail = _TAIL.fullmatch(data, place)
    if tail is None or int(tail[1]) != _VERSION:
        raise _fault(data, place, path)
    digest, fingerprint = head[1].decode(), head[2].decode()
    if (computed := _digest(entries, fingerprint)) != digest:
        raise _corrupt(path, f"digest {digest} stored, {computed} computed")
    check_contiguous(entries, path)
    if len({entry.name for entry in entries}) < len(entries):
        raise _corrupt(path, "lists a shard twice")
    if fingerprint != cache_fingerprint(entry.fingerprint for entry in entries):
        raise _corrupt(path, "fingerprint does not follow from the shards'")
    return entries


def _entry(match: re.Match[bytes], directory: Place, path: Place) -> Entry | CorruptError:
    """A shard of a manifest, or what is wrong with it."""
    root, first, stored, *rest = (group.decode() for group in match.groups()[:-1])
    records, sequences, number, size = map(int, rest)
    name = json.loads(stored)
    if json.dumps(name) != stored:
        return _corrupt(path, f"shard name {stored} is not in canonical form")
    if fault := _name_fault(name):
        return _bad_name(path, name, fault)
    numbers = {"first_sequence": int(first), "num_records": records, "shard_number": number, "size_bytes": size}
    if max(numbers.values()) >= 1 << 64:
        return _bad_number(path, name)
    if sequences >= layout.MAX_SEQUENCES:
        return _corrupt(path, f"{name} has {sequences} sequences, the limit is {layout.MAX_SEQUENCES - 1}")
    return Entry(directory, name, fingerprint=root, num_sequences=sequences, **numbers)


def _name_fault(name: str) -> str | None:
    """What is wrong with the name of a shard, or None."""
    if _BAD_IN_NAME.search(name) or not name.endswith(layout.SHARD_SUFFIX) or name == layout.SHARD_SUFFIX:
        return f"is not a plain file name that ends in {layout.SHARD_SUFFIX}"
    if (size := len(name.encode())) > layout.MAX_NAME_SIZE:
        return f"has {size} bytes, the limit is {layout.MAX_NAME_SIZE}"
    return None


def _values(entry: Entry) -> dict[str, Any]:
    return {key: getattr(entry, key) for key in sorted(_VALUES)}


def _digest(entries: list[Entry], fingerprint: str) -> str:
    """XXH3-128 over the canonical JSON of the manifest without its digest, made shard by shard."""

    def pieces() -> Iterator[bytes]:
        yield f'{{"fingerprint":"{fingerprint}","format":"{_FORMAT}","shards":['.encode()
        for place, entry in enumerate(entries):
            text = json.dumps(_values(entry), separators=(",", ":"))
            yield ("," * (place > 0) + text).encode()
        yield f'],"version":{_VERSION}}}'.encode()

    return fingerprint_of(pieces())


def _fault(data: bytes, place: int, path: Place) -> FormatError:
    """What is wrong with a manifest that does not have its form from byte ``place`` on."""
    form = _corrupt(path, f"is not written as SPEC section 11 says, from byte {place} on")
    if len(data) > _EXPLAINED_SIZE:
        tail = _TAIL.search(data, len(data) - 64)
        return form if tail is None or int(tail[1]) == _VERSION else _other_version(int(tail[1]), path)
    try:
        body = json.loads(data.decode("utf-8"))  # as bytes it might be of another encoding
    except (ValueError, RecursionError) as error:
        return _corrupt(path, describe_bad_json(error))
    if not isinstance(body, dict) or body.get("format") != _FORMAT:
        return UnsupportedError("not a manifest of a sklformat cache", path=path, section="manifest")
    if type(body.get("version")) is not int or body["version"] != _VERSION:
        return _other_version(body.get("version"), path)
    keys = {"digest", "fingerprint", "format", "shards", "version"}
    if set(body) != keys:
        return _corrupt(path, f"has keys {sorted(body)}, must have {sorted(keys)}")
    shards = body["shards"]
    if not isinstance(shards, list) or not shards or not all(isinstance(shard, dict) for shard in shards):
        return _corrupt(path, "lists no shards")
    return next((fault for shard in shards if (fault := _shard_fault(shard, path))), form)


def _shard_fault(shard: dict[str, Any], path: Place) -> CorruptError | None:
    if set(shard) != set(_VALUES):
        return _corrupt(path, f"a shard has fields {sorted(shard)}, must have {sorted(_VALUES)}")
    name, root = shard["name"], shard["fingerprint"]
    if not isinstance(name, str) or (fault := _name_fault(name)):
        return _bad_name(path, name, fault if isinstance(name, str) else "is no string")
    if not isinstance(root, str) or len(root) != 32 or set(root) - set("0123456789abcdef"):
        return _corrupt(path, f"fingerprint {root!r} of {name} is not 32 lower-case hexadecimal digits")
    if not all(type(shard[key]) is int and 0 <= shard[key] < 1 << 64 for key in _NUMBERS):
        return _bad_number(path, name)
    return None


def _bad_name(path: Place, name: object, fault: str | None) -> CorruptError:
    return _corrupt(path, f"shard name {name!r} {fault}")


def _bad_number(path: Place, name: str) -> CorruptError:
    return _corrupt(path, f"a number of {name} is not in 0..2**64 - 1")


def _other_version(version: object, path: Place) -> UnsupportedError:
    return UnsupportedError(
        f"manifest version {version}, this library reads {_VERSION}; install a newer sklformat",
        path=path,
        section="manifest",
    )


def _corrupt(path: Place, message: str) -> CorruptError:
    return CorruptError(f"{message}; remove it to open the shards without it", path=path, section="manifest")
