"""
What a capture still has to do: which shards of its directory are not sealed, and how far each one is.

Looks at headers and lengths only; recovers torn tails, writes nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from sklformat.cache.contents import partial_files, partial_path, shard_header, shard_path
from sklformat.cache.recovery import recover
from sklformat.cache.sharding import other_settings
from sklformat.capture.destinations import Target
from sklformat.errors import CorruptError, FormatError, MissingShardError, SettingsError, TruncatedError
from sklformat.files.storage import read_start
from sklformat.format import layout
from sklformat.format.header import Header, parse_header
from sklformat.format.listing import Entry

_SHARD_NAME = re.compile(r"shard-(\d{5,})\.skl(\.partial)?")
_LAGGING = 16
"""Shards that a store's listing may lack behind one that is there: asked for by their names, as few as that may be."""


@dataclass(frozen=True, slots=True)
class ShardWork:
    """
    One shard that is not sealed.

    Attributes:
        number: Its place in the cache.
        first_sequence: Global number of its first sequence.
        num_sequences: How many it will hold.
        next_sequence: Global number of the first sequence still needed; all are there when it equals ``end``.
        cut: What could not be kept of its ``.partial``, and why, in words; None where all of it was.
        is_short: It is sealed with fewer sequences, which go into a ``.partial`` first (``unseal``).
    """

    number: int
    first_sequence: int
    num_sequences: int
    next_sequence: int
    cut: str | None = None
    is_short: bool = False

    @property
    def end(self) -> int:
        """Global number after its last sequence."""
        return self.first_sequence + self.num_sequences


def survey(
    directory: Path,
    header: Header,
    num_sequences: int,
    sequences_per_shard: int,
    *,
    url: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    grows: bool = False,
) -> list[ShardWork]:
    """
    The shards that are not in their final place, in order; of each ``.partial`` the valid prefix is kept, the torn tail
    cut.

    Args:
        directory: Exists, and is held by the caller.
        header: Settings of the cache.
        num_sequences: Of the whole cache; the last shard may be shorter.
        sequences_per_shard: Of every other shard.
        url: Where sealed shards go, if they do not stay; one that is sealed here only has to be uploaded.
        rank: Of the caller; shard k is the work of rank k mod world_size, and of no other. Rank 0 looks at the settings
            of all shards, so that it finds before the others write whether they belong here.
        world_size: Number of ranks.
        grows: Whether a shard may be sealed with fewer sequences, as the last one of a shorter cache; where there is no
            ``url``, since a sealed one there is replaced only by the manifest's leave.

    Raises:
        SettingsError: A shard here was made with other settings, another length, or lies beyond the last one; the
            message shows both values.
        InUseError: Another process writes one of the shards.
        FormatError: A shard here is damaged.
        RemoteError: The store behind ``url`` failed.
    """
    target, works = Target(directory, url), []
    for somewhere in (target, Target(directory)) if url is not None else (target,):
        _check_numbers(somewhere, num_sequences, sequences_per_shard)
    absent = 0  # places since the last shard that is there
    for place in places_of(num_sequences, sequences_per_shard):
        is_own = place.number % world_size == rank
        if not is_own and rank != 0:
            continue
        path, cut, is_short = shard_path(directory, place.number), None, False
        if url is not None and path.exists():
            _check_found(Target(directory), header, place)
            kept = place.num_sequences
        elif entry := _check_found(target, header, place, grows=grows and url is None, unlisted=absent < _LAGGING):
            kept, is_short, absent = entry.num_sequences, True, 0
            if kept == place.num_sequences:
                continue
        else:
            absent += 1
            _check_partial(path, header, place)
            kept, cut = _kept(path, place) if is_own else (0, None)
        if is_own:
            next_sequence = place.first_sequence + kept
            works.append(dataclasses.replace(place, next_sequence=next_sequence, cut=cut, is_short=is_short))
    return works


def sealed_entries(target: Target, header: Header, num_sequences: int, sequences_per_shard: int) -> list[Entry]:
    """
    What the manifest says of a complete cache, read from its shards.

    Raises:
        MissingShardError: A shard is not in its place.
        SettingsError, FormatError, RemoteError: As ``survey``.
    """
    entries = []
    for place in places_of(num_sequences, sequences_per_shard):
        entry = _check_found(target, header, place)
        if entry is None:
            path = target.place(_name_of(place))
            raise MissingShardError(
                f"sequences {place.first_sequence}..{place.end - 1} are missing; run the capture again to resume it",
                path=path,
            )
        entries.append(entry)
    return entries


def unsealed(target: Target, num_sequences: int, sequences_per_shard: int) -> list[int]:
    """
    Numbers of the shards that are not in their final place, by the names of all files there.

    A store's listing may lack the last ones: what it lacks is asked for by its name, until one is missing.

    Raises:
        RemoteError: The store failed.
    """
    there = set(target.names())
    names = {place.number: _name_of(place) for place in places_of(num_sequences, sequences_per_shard)}
    return list(itertools.dropwhile(lambda n: target.has(names[n]), (n for n in names if names[n] not in there)))


def find_header(directory: Path, url: str | None = None) -> Header | None:
    """
    Settings of a cache that was begun, from any of its shards, sealed or not; None where there is none.

    Raises:
        FormatError, RemoteError: As ``survey``.
    """
    for target in (Target(directory), Target(directory, url)):  # what is sealed here may be half uploaded there
        for name in (*target.names(), shard_path(Path(), 0).name):  # the first, where a store does not list it yet
            is_sealed = _SHARD_NAME.fullmatch(name) and not name.endswith(layout.PARTIAL_SUFFIX)
            if is_sealed and (found := target.find(name)) is not None:
                return found[0]
    for partial in filter(lambda path: _SHARD_NAME.fullmatch(path.name), partial_files(directory)):
        with contextlib.suppress(CorruptError, TruncatedError):  # never synced: it holds nothing
            return parse_header(read_start(partial, layout.HEADER_SIZE))
    return None


def check_shards(num_sequences: int, sequences_per_shard: int) -> None:
    """
    A manifest has room for the shards of a cache.

    Raises:
        ValueError: It has not; shows both numbers.
    """
    if -(-num_sequences // sequences_per_shard) > layout.MAX_SHARDS:
        raise ValueError(
            f"{num_sequences} sequences in shards of {sequences_per_shard} make more than {layout.MAX_SHARDS} "
            "shards, the most that one manifest lists; take more sequences_per_shard"
        )


def places_of(num_sequences: int, sequences_per_shard: int) -> list[ShardWork]:
    """Every shard of a cache, with nothing in it."""
    starts = range(0, num_sequences, sequences_per_shard)
    return [
        ShardWork(number, first, min(sequences_per_shard, num_sequences - first), first)
        for number, first in enumerate(starts)
    ]


def _check_numbers(target: Target, num_sequences: int, sequences_per_shard: int) -> None:
    count = -(-num_sequences // sequences_per_shard)
    for name in target.names():
        match = _SHARD_NAME.fullmatch(name)
        if match and int(match[1]) >= count:
            raise SettingsError(
                f"{target.place(name)}: num_sequences {num_sequences} and sequences_per_shard {sequences_per_shard} "
                f"make {count} shards, this is number {int(match[1])}; choose another directory, or remove it"
            )


def _name_of(place: ShardWork) -> str:
    return shard_path(Path(), place.number).name


def _check_found(
    target: Target, header: Header, place: ShardWork, *, grows: bool = False, unlisted: bool = True
) -> Entry | None:
    """The sealed shard of a place, if it is there; it must be the one that belongs there, or the beginning of it."""
    name = _name_of(place)
    found = target.find(name, unlisted=unlisted)
    if found is None:
        return None
    _check_settings(target.place(name), found[0], shard_header(header, place.number, place.first_sequence))
    missing = place.num_sequences - found[1].num_sequences
    if missing < 0 or (missing and not grows):
        raise SettingsError(
            f"{target.place(name)}: holds {found[1].num_sequences} sequences, this capture asks for "
            f"{place.num_sequences}; give the same num_sequences and sequences_per_shard, or choose another directory"
        )
    return found[1]


def _check_partial(path: Path, header: Header, place: ShardWork) -> None:
    """The settings of a place's ``.partial``, if it has one."""
    partial = partial_path(path)
    if not partial.exists():
        return
    head = read_start(partial, layout.HEADER_SIZE)
    with contextlib.suppress(FormatError):  # recover knows whether a crash explains it
        _check_settings(partial, parse_header(head), shard_header(header, place.number, place.first_sequence))


def _kept(path: Path, place: ShardWork) -> tuple[int, str | None]:
    """How many sequences the place's ``.partial`` keeps, and what it does not, in words."""
    partial = partial_path(path)
    if not partial.exists():
        return 0, None
    recovered = recover(path)
    if recovered.sequences > place.num_sequences:
        raise SettingsError(
            f"{partial}: holds {recovered.sequences} sequences already, this capture asks for {place.num_sequences}; "
            "give the same sequences_per_shard, or choose another directory"
        )
    return recovered.sequences, None if recovered.cause is None else str(recovered)


def _check_settings(path: Path | str, found: Header, expected: Header) -> None:
    if found == expected:
        return
    differing = found.differences(expected)
    if found.first_sequence != expected.first_sequence or found.shard_number != expected.shard_number:
        differing.append(
            f"place: shard {found.shard_number} from sequence {found.first_sequence} != "
            f"shard {expected.shard_number} from sequence {expected.first_sequence} (sequences_per_shard)"
        )
    raise other_settings(path, differing)
