"""
The cache that is written: begun, resumed or found finished, with the token store of its sources beside it.

What is half-written is ``.partial``; sources are read only.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sklformat.cache.contents import UNFINISHED_NAME, unmark_unfinished
from sklformat.cache.manifest import MANIFEST_NAME, has_manifest
from sklformat.cache.reader import Cache
from sklformat.cache.sharding import CacheWriter, other_settings
from sklformat.capture.plan import check_shards
from sklformat.files.directories import published, refuse_foreign
from sklformat.files.disk import LOCK_NAME, locked_directory
from sklformat.files.places import Place, is_url
from sklformat.format.header import Header

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, sequences done, and sequences in total."""
Fill = Callable[[CacheWriter, int], None]
"""Appends what is missing from the sequence of this number on."""

_TOKENS = "tokens"  # where sklformat cache leaves those that it made from text
_OWN = re.compile(
    rf"shard-\d{{5,}}\.skl(\.partial)?|{re.escape(LOCK_NAME)}|{re.escape(UNFINISHED_NAME)}"
    rf"|\.?{re.escape(MANIFEST_NAME)}(\.tmp)?|{_TOKENS}(\.partial)?"
)


@dataclass(frozen=True, kw_only=True)
class Made:
    """
    What ``merge``, ``slice`` or ``subsample`` made.

    Attributes:
        destination: The cache.
        fingerprint: Identity of its content.
        sequences, positions, records: In it.
        sequences_made: Sequences that this run wrote; the others were there.
        positions_per_second: Positions that this run wrote per second; 0 where there were none.
        says: Sentences: what became of token stores, and of the sampler.
    """

    destination: Path
    fingerprint: str
    sequences: int
    positions: int
    records: int
    sequences_made: int
    positions_per_second: float
    says: tuple[str, ...]

    def __str__(self) -> str:
        made = f"{self.sequences_made} made now at {self.positions_per_second:,.0f} positions/s"
        head = (
            f"{self.destination}: {self.sequences} sequences, {self.positions:,} positions, {self.records:,} records "
            f"({made if self.sequences_made else 'all there already'})"
        )
        return "\n".join([head, *(f"  {sentence}" for sentence in self.says)])


def open_source(path: str) -> Cache:
    """
    A cache to read from.

    Raises:
        ValueError: It holds no sequence.
        FormatError, FileNotFoundError: As ``skl.open``.
    """
    cache = Cache(path if is_url(path) else Path(path))
    if not len(cache):
        raise ValueError(f"{path}: the cache holds no sequence, so nothing can be taken from it")
    return cache


def shard_size(cache: Cache, asked: int | None) -> int:
    """Sequences of one file: as asked for, or as the first of a cache has."""
    first = int(cache.starts[1]) if cache.starts.size > 1 else len(cache)
    return asked or max(first, 1)


def write_output(
    out: Path,
    header: Header,
    sources: Sequence[Cache],
    count: int,
    *,
    sequences_per_shard: int,
    fill: Fill,
    store: Path | None,
    says: Sequence[str] = (),
) -> Made:
    """
    Write what earlier runs have not left of a cache, then its token store and its manifest.

    Args:
        out: Its directory.
        header: Of all shards; says what it is made of.
        sources: What it is made of.
        count: Sequences that it will have.
        sequences_per_shard: Of every shard but the last.
        fill: Appends the sequences.
        store: Token store to copy.
        says: What to tell of it.

    Raises:
        SettingsError: ``out`` holds something else; shows both values.
        InUseError: Another process writes there.
        ValueError: ``out`` is, or lies in, one of the sources; or there would be too many shards.
        FormatError: A source, or what is there, is damaged.
        OSError: The system's own.
    """
    _check_apart(out, [cache.path for cache in sources])
    _check_place(out)
    check_shards(count, sequences_per_shard)
    if has_manifest(out):
        with locked_directory(out):
            _check_same(out, header)
            unmark_unfinished(out)  # what a crash left that came after the manifest
            return _sum_up(out, 0, 0.0, says)
    begin = time.perf_counter()
    with CacheWriter(out, header=header, sequences_per_shard=sequences_per_shard) as writer:
        there = len(writer)
        fill(writer, there)
        assert len(writer) == count
        if store is not None and not (out / _TOKENS).exists():
            with published(out / _TOKENS) as partial:
                shutil.copytree(store, partial, dirs_exist_ok=True, copy_function=shutil.copyfile)
    return _sum_up(out, count - there, time.perf_counter() - begin, says)


def store_of(cache: Cache) -> Path | None:
    """The token store beside a cache of this machine, where there is one."""
    if isinstance(cache.path, Path) and (store := cache.path / _TOKENS).is_dir():
        return store
    return None


def copy_sequences(writer: CacheWriter, cache: Cache, part: range, tell: Callable[[int], None]) -> None:
    """Append sequences of a cache as they are stored; ``tell`` is called with how many of them are done."""
    done = 0
    while done < len(part):
        shard, number = cache.find(part[done])
        end = min(len(shard), number + len(part) - done)
        for group in shard.groups(range(number, end), _TOLD_BYTES):
            writer.copy(shard, group)
            done += len(group)
            tell(done)


_TOLD_BYTES = 64 << 20


def _check_apart(out: Path, sources: Sequence[Place]) -> None:
    """Nothing is written into what is read."""
    for source in sources:
        if not isinstance(source, Path):
            continue
        is_inside = source.is_dir() and source.resolve() in out.resolve().parents
        if is_inside or out.resolve() == (source if source.is_dir() else source.parent).resolve():
            raise ValueError(f"{out}: lies in {source}, which is read; choose another directory")


def _check_place(out: Path) -> None:
    """A cache is begun where nothing is, or resumed."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: is no directory, and a cache is one; choose another place, or remove it first")
    if out.exists():
        refuse_foreign(out, [path.name for path in out.iterdir()], "cache", _OWN)


def _check_same(out: Path, header: Header) -> None:
    """A finished cache is the one that would be written."""
    with closing(Cache(out)) as cache:
        if differing := cache.header.differences(header):
            raise other_settings(out, differing)


def _sum_up(out: Path, made: int, seconds: float, says: Sequence[str]) -> Made:
    with closing(Cache(out)) as cache:
        per_shard = [shard.index.num_positions for shard in cache.shards()]
        written = sum(int(positions.sum(dtype="u8")) for positions in per_shard)
        return Made(
            destination=out,
            fingerprint=cache.fingerprint,
            sequences=len(cache),
            positions=written,
            records=cache.num_records,
            sequences_made=made,
            positions_per_second=written * made / len(cache) / seconds if made else 0.0,
            says=tuple(says),
        )
