"""
``convert``: from a cache, plain columns or another system's files to one of these.

Says what the values are and what was lost; refuses what would be silently wrong.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.cache.contents import (
    PLAIN_SUFFIXES,
    mark_unfinished,
    partial_files,
    shard_header,
    shard_path,
    unmark_unfinished,
)
from sklformat.cache.manifest import MANIFEST_NAME, write_manifest
from sklformat.cache.report import inspect
from sklformat.cache.writer import ShardWriter
from sklformat.capture.destinations import Target
from sklformat.capture.plan import sealed_entries, survey
from sklformat.errors import CorruptError, SettingsError, describe_bad_json
from sklformat.files.disk import LOCK_NAME, Disk, lock, locked_directory, refuse_held, write_atomically
from sklformat.files.regular import check_exists
from sklformat.format.columns import follow_records
from sklformat.format.header import Header
from sklformat.format.records import SparseTargets
from sklformat.interop.columns import Row
from sklformat.interop.kinds import EXPORTS, WHOLE, find_kind, open_export, open_reading
from sklformat.interop.notes import check_agrees, make_note
from sklformat.interop.readings import Asked
from sklformat.interop.sources import CacheSource, Progress, RowsSource, Source, identity_of
from sklformat.interop.tables.exports import Export
from sklformat.interop.tables.files import ColumnsWriter, check_absent
from sklformat.interop.tokens import TokenFile
from sklformat.interop.transforms import RatioLoss, quantised, target_header, to_counts, to_ratios
from sklformat.settings.convert import ConvertConfig

_MARK = ".conversion.json"


@dataclass(frozen=True, kw_only=True)
class Converted:
    """
    What ``convert`` made.

    Attributes:
        destination: The cache directory or file.
        sequences, positions, records: In it.
        fingerprint: Of the cache; None for anything else.
        says: Sentences: the convention of rows, what the values are, whether they are biased, what was lost.
    """

    destination: Path
    sequences: int
    positions: int
    records: int
    fingerprint: str | None
    says: tuple[str, ...]

    def __str__(self) -> str:
        head = (
            f"{self.destination}: {self.sequences:,} sequences, {self.positions:,} positions, {self.records:,} records"
        )
        return "\n".join([head, *(f"  {sentence}" for sentence in self.says)])


def convert(config: ConvertConfig, progress: Progress | None = None) -> Converted:
    """
    Convert ``config.source`` into ``config.destination``.

    Counts survive every way there and back, byte for byte; ratio codes do too.

    Args:
        config: What to convert into what.
        progress: Told how far it is.

    Returns:
        What was made, and sentences that say what the values are and what was lost.

    Raises:
        FileExistsError: The destination exists.
        ValueError: A setting is missing, contradicts the source, or would lose what must not be lost.
        FormatError: The source is damaged, or a value in it cannot be; names row and position.
        SettingsError: The destination was begun by another conversion.
        InUseError: Another process writes the destination.
        ModuleNotFoundError: Parquet without pyarrow.
        OSError: The system's own.
    """
    from_kind, to_kind = _source_kind(config), _destination_kind(config)
    if config.source.is_dir() and config.source.resolve() in config.destination.resolve().parents:
        raise ValueError(f"{config.destination}: lies in the source; choose a destination outside of {config.source}")
    if to_kind == "skl":
        _check_idle(config.destination)
        _check_directory(config.destination)
    else:
        check_absent(config.destination)
    source = _open_source(config, from_kind, to_kind, progress)
    has_tokens = from_kind != "skl" or source.header.store_tokens or config.tokens is not None
    header = target_header(
        source.header,
        kind=config.kind,
        profile=config.profile,
        drop_tokens=config.drop_tokens,
        has_tokens=has_tokens,
    )
    stream = _Stream(source, header, progress, coded=to_kind not in EXPORTS)
    if source.header.kind == "ratios" and header.kind == "counts":
        for _ in stream.take(0, source.count, "check"):  # refuse before anything is written
            pass
    says = [*source.says]
    if to_kind == "skl":
        _write_cache(config, stream)
        if not header.store_tokens:
            says.append("tokens are left out; training needs them from where they were packed")
        facts = inspect(config.destination)
        numbers = {name: facts[name] for name in ("sequences", "positions", "records")}
        fingerprint = facts["fingerprint"]
    elif to_kind in EXPORTS:
        numbers, lost = _write_export(config, to_kind, stream)
        fingerprint = None
        says += lost
    else:
        numbers, fingerprint = _write_columns(config, to_kind, stream), None
    if stream.loss is not None:
        says.append(str(stream.loss))
    return Converted(destination=config.destination, fingerprint=fingerprint, says=tuple(says), **numbers)


def _source_kind(config: ConvertConfig) -> str:
    check_exists(config.source)
    return find_kind(config.source) if config.from_ == "auto" else config.from_


def _destination_kind(config: ConvertConfig) -> str:
    path = config.destination
    if config.to != "auto":
        kind: str = config.to
    elif path.suffix in PLAIN_SUFFIXES:
        kind = PLAIN_SUFFIXES[path.suffix]
    elif not path.suffix:
        kind = "skl"
    elif path.suffix == ".skl":
        raise ValueError(f"{path}: a conversion makes a directory of shards; give it a name without .skl")
    else:
        raise ValueError(f"{path}: the name does not say what to make; give --to skl, npz, parquet or jsonl")
    settings = {"--profile": config.profile, "--sequences-per-shard": config.sequences_per_shard}
    unused = [flag for flag, value in settings.items() if value is not None]
    unused += ["--drop-tokens"] if config.drop_tokens else []
    if kind != "skl" and unused:
        raise ValueError(f"{', '.join(unused)}: for a cache only, {path} is to be {kind}")
    if kind in EXPORTS and config.kind is not None:
        raise ValueError(f"--kind: {kind} has log-probabilities; leave it out")
    return kind


def _open_source(config: ConvertConfig, kind: str, to_kind: str, progress: Progress | None) -> Source:
    tokens = None if config.tokens is None else TokenFile(config.tokens)
    if kind == "skl":
        foreign = {
            "--k": config.k is not None and to_kind not in EXPORTS,
            "--seed": config.seed is not None,
            "--drop-last-row": config.drop_last_row,
            "--convention": config.convention,
            "--values": config.values,
            "--columns": config.columns,
            "--codec": config.codec,
            "--on-bad-row drop": config.on_bad_row != "refuse",
        }
        if unused := [flag for flag, given in foreign.items() if given]:
            raise ValueError(f"{', '.join(unused)}: for files of other systems; a cache says itself what it holds")
        source = CacheSource(config.source, tokens)
        for name in ("vocab_size", "rounds", "sampler"):
            check_agrees(config.source, name, getattr(config, name), getattr(source.header, name))
        return source
    asked = Asked(
        vocab_size=config.vocab_size,
        rounds=config.rounds,
        sampler=config.sampler,
        k=config.k if to_kind not in EXPORTS or kind in WHOLE else None,
        seed=config.seed,
        kind=config.kind,
        convention=config.convention,
        values=config.values,
        columns=dict(pair.split("=", 1) for pair in config.columns),
        codec=config.codec,
        tokens=tokens,
        drop_last_row=config.drop_last_row,
    )
    reading, note = open_reading(config.source, kind, asked)
    return RowsSource(config.source, kind, reading, on_bad_row=config.on_bad_row, note=note, progress=progress)


class _Stream:
    """The source's sequences as the destination holds them; ``coded``: ratios in 7-bit codes, else as they are."""

    def __init__(self, source: Source, header: Header, progress: Progress | None, *, coded: bool = True) -> None:
        self.source, self.header, self._progress, self._coded = source, header, progress, coded
        self.loss = RatioLoss() if header.kind == "ratios" and coded else None
        self._items, self._next = source.items(0), 0

    def take(self, start: int, count: int, doing: str = "convert") -> Iterator[tuple[Any, SparseTargets, Any]]:
        """
        Tokens, records of the destination's kind and columns of ``count`` sequences.

        Continuing where the last call ended reads nothing twice.
        """
        if start != self._next:
            self._items, self._next = self.source.items(start), start
        for item in islice(self._items, count):
            try:
                targets = self._converted(item.targets)
            except ValueError as error:
                raise ValueError(f"sequence {self._next}: {error}") from None
            before, after = item.targets, targets
            columns = follow_records(item.columns, (before.offsets, before.token_ids), (after.offsets, after.token_ids))
            yield item.tokens, targets, columns
            self._next += 1
            if self._progress is not None:
                self._progress(doing, self._next, self.source.count)

    def finish(self) -> None:
        """
        Make sure that the source, and what was given with it, ends here.

        Raises:
            ValueError: More tokens than sequences were given.
        """
        for _ in self._items:
            raise AssertionError("a source gave more sequences than it has")

    def _converted(self, targets: SparseTargets) -> SparseTargets:
        old = self.source.header
        if not self._coded:
            return targets
        if self.header.kind == "counts":
            return targets if old.kind == "counts" else to_counts(targets, old)
        if old.kind == "counts":
            targets = to_ratios(targets, old.rounds)
        assert self.loss is not None
        coded = quantised(targets, self.header.scale_log2)
        self.loss.add(targets, coded)
        return coded


def _check_directory(directory: Path) -> None:
    """A cache is begun where nothing is, or resumed where a conversion was stopped."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory}: is a file; choose another destination, or remove it first")
    names = {path.name for path in directory.iterdir()} - {LOCK_NAME}
    if names and (_MARK not in names or MANIFEST_NAME in names):
        there = MANIFEST_NAME if MANIFEST_NAME in names else min(names)
        raise FileExistsError(
            f"{directory}: exists already ({there} is there); choose another destination, or remove it first"
        )


def _check_idle(directory: Path) -> None:
    """What another process is writing must not be called a leftover that one may remove."""
    refuse_held(directory)
    for partial in partial_files(directory):
        with contextlib.suppress(FileNotFoundError), partial.open("rb") as file:  # sealed since it was listed
            lock(file.fileno(), partial)


def _write_cache(config: ConvertConfig, stream: _Stream) -> None:
    directory, source, header = config.destination, stream.source, stream.header
    per_shard = config.sequences_per_shard or source.shard_sequences
    mark = directory / _MARK
    begun = {"source": source.identity, "cache_key": header.cache_key, "sequences_per_shard": per_shard}
    begun |= _said(config)
    with locked_directory(directory):
        _check_directory(directory)
        if mark.exists():
            _check_begun(mark, begun)
        else:
            write_atomically(mark, json.dumps(begun).encode())
        mark_unfinished(directory)  # between two shards it would look like a smaller cache
        for work in survey(directory, header, source.count, per_shard):
            placed = shard_header(header, work.number, work.first_sequence)
            with ShardWriter(shard_path(directory, work.number), header=placed, resume=True) as writer:
                for tokens, targets, columns in stream.take(work.next_sequence, work.end - work.next_sequence):
                    writer.append(tokens, targets, columns)
        stream.finish()
        entries = sealed_entries(Target(directory), header, source.count, per_shard)
        write_manifest(directory, entries)
        unmark_unfinished(directory)
        mark.unlink()
        Disk().sync_directory(directory)


def _said(config: ConvertConfig) -> dict[str, Any]:
    """What the rows depend on besides the source: the flags that say how to read it, and the files that they name."""
    names = ("convention", "values", "drop_last_row", "on_bad_row", "seed")
    said = {name: getattr(config, name) for name in names} | {"columns": sorted(config.columns)}
    return said | {
        name: None if path is None else identity_of(path)
        for name, path in (("tokens", config.tokens), ("codec", config.codec))
    }


def _check_begun(mark: Path, begun: dict[str, Any]) -> None:
    try:
        found = json.loads(mark.read_bytes())
    except ValueError as error:
        raise CorruptError(f"{describe_bad_json(error)}; remove the directory and convert again", path=mark) from None
    if found != begun:
        raise SettingsError(
            f"{mark.parent}: was begun by a conversion with another source or other settings; resume with those, "
            "remove it, or choose another destination"
        )


def _write_columns(config: ConvertConfig, kind: str, stream: _Stream) -> dict[str, int]:
    header, source = stream.header, stream.source
    values = "counts" if header.kind == "counts" else "logprobs"
    note = make_note(header, source.count, source.shard_sequences)
    numbers = _Numbers()
    with ColumnsWriter(config.destination, kind, values, header.columns, note) as writer:
        for tokens, targets, columns in stream.take(0, source.count):
            flat = targets.counts if targets.counts is not None else _log_probs(targets, header)
            writer.append(Row(tokens, targets.token_ids, flat, targets.offsets, columns))
            numbers.add(targets)
        stream.finish()
    return dict(numbers)


def _write_export(config: ConvertConfig, kind: str, stream: _Stream) -> tuple[dict[str, int], list[str]]:
    """What was written, and sentences on what was lost."""
    header, count = stream.header, stream.source.count
    k = config.k
    if k is None:
        counts = (np.diff(targets.offsets).max(initial=0) for _, targets, _ in stream.take(0, count, "check"))
        k = max(int(max(counts)), 1)
    numbers = _Numbers()
    with open_export(config.destination, kind, Export(header=header, count=count, k=k)) as writer:
        for tokens, targets, columns in stream.take(0, count):
            writer.append(Row(tokens, targets.token_ids, _log_probs(targets, header), targets.offsets, columns))
            numbers.add(targets)
        stream.finish()
    says = [*writer.says]
    if header.kind == "counts":
        says.append(f"counts are written as log-probabilities, log(count / {header.rounds})")
    if header.columns:
        says.append(f"lost: {', '.join(header.columns)}, for which {kind} has no place")
    return dict(numbers), says


def _log_probs(targets: SparseTargets, header: Header) -> NDArray[np.float64]:
    if targets.counts is not None:
        return np.log(targets.counts / header.rounds)
    assert targets.weights is not None
    return np.log(targets.weights.astype(np.float64))


class _Numbers(Counter[str]):
    """How much was written."""

    def add(self, targets: SparseTargets) -> None:
        self["sequences"] += 1
        self["positions"] += targets.num_positions
        self["records"] += targets.num_records
