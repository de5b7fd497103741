"""
What a capture still has to do: which shards of its directory are not sealed, and how far each one is.

Looks at headers and lengths only; recovers torn tails, writes nothing else.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from sklformat import layout
from sklformat.errors import FormatError, SettingsError
from sklformat.header import Header, parse_header
from sklformat.recovery import recover
from sklformat.shard import Shard

_SHARD_NAME = re.compile(r"shard-(\d{5,})\.skl(\.partial)?")


@dataclass(frozen=True, slots=True)
class ShardWork:
    """
    One shard that is not sealed.

    Attributes:
        number: Its place in the cache.
        first_sequence: Global number of its first sequence.
        num_sequences: How many it will hold.
        next_sequence: Global number of the first sequence still wanted; all are there when it equals ``end``.
    """

    number: int
    first_sequence: int
    num_sequences: int
    next_sequence: int

    @property
    def end(self) -> int:
        """Global number after its last sequence."""
        return self.first_sequence + self.num_sequences


def shard_path(directory: Path, number: int) -> Path:
    """Where shard ``number`` lies once it is sealed."""
    return directory / f"shard-{number:05d}.skl"


def shard_header(header: Header, number: int, first_sequence: int) -> Header:
    """The cache's settings with a shard's own place."""
    return dataclasses.replace(header, shard_number=number, first_sequence=first_sequence)


def survey(directory: Path, header: Header, num_sequences: int, sequences_per_shard: int) -> list[ShardWork]:
    """
    The shards that are not sealed, in order; the valid prefix of each ``.partial`` is kept, its torn tail cut.

    Args:
        directory: Exists, and is held by the caller.
        header: Settings of the cache.
        num_sequences: Of the whole cache; the last shard may be shorter.
        sequences_per_shard: Of every other shard.

    Raises:
        SettingsError: A shard here was made with other settings, another length, or lies beyond the last one; the
            message shows both values.
        FormatError: A shard here is damaged.
    """
    count = -(-num_sequences // sequences_per_shard)
    for path in sorted(directory.iterdir()):
        match = _SHARD_NAME.fullmatch(path.name)
        if match and int(match[1]) >= count:
            raise SettingsError(
                f"{path}: num_sequences {num_sequences} and sequences_per_shard {sequences_per_shard} make {count} "
                f"shards, this is number {int(match[1])}; choose another directory, or remove it"
            )
    works = []
    for number in range(count):
        first = number * sequences_per_shard
        length = min(sequences_per_shard, num_sequences - first)
        path = shard_path(directory, number)
        if path.exists():
            _check_sealed(path, shard_header(header, number, first), length)
        else:
            works.append(ShardWork(number, first, length, first + _kept(path, header, first, length)))
    return works


def _check_sealed(path: Path, expected: Header, length: int) -> None:
    shard = Shard(path)
    try:
        _check_settings(path, shard.header, expected)
        if len(shard) != length:
            raise SettingsError(
                f"{path}: holds {len(shard)} sequences, this capture asks for {length}; "
                "give the same num_sequences and sequences_per_shard, or choose another directory"
            )
    finally:
        shard.close()


def _kept(path: Path, header: Header, first: int, length: int) -> int:
    """How many sequences the shard's ``.partial`` keeps."""
    partial = path.with_name(path.name + layout.PARTIAL_SUFFIX)
    if not partial.exists():
        return 0
    with partial.open("rb") as file:
        head = file.read(layout.HEADER_SIZE)
    try:
        found = parse_header(head)
    except FormatError:
        pass  # recover knows whether a crash explains it
    else:
        number = int(_SHARD_NAME.fullmatch(path.name)[1])  # type: ignore[index]
        _check_settings(partial, found, shard_header(header, number, first))
    sequences = recover(path).sequences
    if sequences > length:
        raise SettingsError(
            f"{partial}: holds {sequences} sequences already, this capture asks for {length}; "
            "give the same sequences_per_shard, or choose another directory"
        )
    return sequences


def _check_settings(path: Path, found: Header, expected: Header) -> None:
    if found == expected:
        return
    differing = found.differences(expected)
    if found.first_sequence != expected.first_sequence or found.shard_number != expected.shard_number:
        differing.append(
            f"place: shard {found.shard_number} from sequence {found.first_sequence} != "
            f"shard {expected.shard_number} from sequence {expected.first_sequence} (sequences_per_shard)"
        )
    raise SettingsError(
        f"{path}: made with other settings (there != asked for): {'; '.join(differing)}; "
        "give the same settings, or choose another directory"
    )
