"""
What a conversion reads: a cache, or a file of plain columns, as one stream of checked sequences.

Plain columns are read twice: once to check every value and to learn what a header must say, once to convert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sklformat.cache.reader import Cache
from sklformat.errors import CorruptError
from sklformat.format import layout
from sklformat.format.header import Header
from sklformat.interop.columns import in_row
from sklformat.interop.files import read_contents, read_rows
from sklformat.interop.plain import Item, check_row, position_sums

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, sequences done, and sequences in total where that is known."""

SHARD_SEQUENCES = 1024  # of a shard, where the source says nothing
_WHOLE = 5e-3  # a position whose weights sum to 1 within this was renormalised


class Source(Protocol):
    """
    A stream of sequences.

    Attributes:
        header: Settings that a cache of these sequences has.
        count: Number of sequences, >= 1.
        shard_sequences: Sequences in one file of the cache that this is, or came from.
        identity: Text that differs where the content differs.
        says: Sentences on what the values are.
    """

    header: Header
    count: int
    shard_sequences: int
    identity: str
    says: tuple[str, ...]

    def items(self, start: int = 0) -> Iterator[Item]:
        """The sequences from number ``start`` on."""
        ...


class CacheSource:
    """
    A cache or one of its shards.

    Args:
        path: A ``.skl`` file or a directory.
        tokens: A ``.npy`` array [sequences, seq_len + 1] of integers; for a cache that stores no tokens.

    Raises:
        FormatError, FileNotFoundError: As ``skl.open``.
        ValueError: The cache stores no tokens and none are given; ``tokens`` is no such array.
    """

    def __init__(self, path: Path, tokens: Path | None) -> None:
        self._cache = Cache(path)
        self.header = self._cache.header
        self.count = len(self._cache)
        if self.count == 0:
            raise ValueError(f"{path}: holds no sequence; nothing to convert")
        self._tokens = None if tokens is None else _load_tokens(tokens, self.count)
        if self._tokens is None and not self.header.store_tokens:
            raise ValueError(
                f"{path}: stores no tokens, and records are of no use without them; give them with --tokens FILE.npy"
            )
        self.shard_sequences = max(len(next(self._cache.shards())), 1)
        self.identity = self._cache.fingerprint
        self.says: tuple[str, ...] = (_kind_says(self.header),)

    def items(self, start: int = 0) -> Iterator[Item]:
        for i in range(start, self.count):
            sequence = self._cache[i]
            tokens = sequence.tokens
            if self._tokens is not None:
                tokens = self._tokens[i]
                self._cache.check_alignment(i, tokens)
            assert tokens is not None
            yield Item(tokens, sequence.targets, sequence.columns)


def _load_tokens(path: Path, count: int) -> NDArray[Any]:
    try:
        tokens: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a .npy array: {error}") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.dtype.kind not in "iu" or len(tokens) != count:
        raise ValueError(f"{path}: must be an integer array of {count} rows, one per sequence")
    return tokens


class ColumnsSource:
    """
    A file of plain columns.

    Args:
        path: The file.
        file_kind: "npz", "parquet" or "jsonl".
        kind: "counts" or "ratios", which column to read where the file holds both; None: the one that is there.
        vocab_size, rounds, sampler: What the file's note does not say; None: the note says it.
        drop_last_row: Sequences of L tokens have L rows; leave out the last.
        progress: Told how far the check is.

    Raises:
        FormatError: The file is damaged, or a value in it cannot be; names row and position.
        ValueError: A setting is missing or contradicts the file's note.
    """

    def __init__(
        self,
        path: Path,
        file_kind: str,
        *,
        kind: str | None,
        vocab_size: int | None,
        rounds: int | None,
        sampler: str | None,
        drop_last_row: bool,
        progress: Progress | None = None,
    ) -> None:
        self._path, self._file_kind, self._drop_last_row = path, file_kind, drop_last_row
        contents = read_contents(path, file_kind)
        self._values = _value_column(path, contents.names, kind)
        is_counts = self._values == "counts"
        note = None if contents.note is None else _Note(contents.note, path, self._values)
        if note is not None:
            for name, given in (("vocab_size", vocab_size), ("rounds", rounds), ("sampler", sampler)):
                check_agrees(path, name, given, getattr(note.header, name))
            base = note.header
        else:
            needed = {"--vocab-size": vocab_size, "--sampler": sampler} | ({"--rounds": rounds} if is_counts else {})
            if missing := [flag for flag, value in needed.items() if value is None]:
                raise ValueError(
                    f"{path}: does not say how its records were made; give {', '.join(missing)} "
                    "(--sampler topk for the most likely tokens: it marks the cache as biased)"
                )
            assert vocab_size is not None
            base = Header(
                vocab_size=vocab_size,
                seq_len=0,
                kind="counts" if is_counts else "ratios",
                rounds=rounds or 0,
                sampler=sampler,
                columns=tuple(name for name in layout.COLUMNS if name in contents.names),
            )
        self._trusted, self._columns = note is not None, base.columns
        self.header = base
        scan = self._scan(progress)
        self.count = scan.count
        if note is not None:
            if note.count != scan.count:
                raise CorruptError(f"its note tells of {note.count} sequences, it holds {scan.count}", path=path)
            self.shard_sequences = note.shard_sequences
        else:
            self.shard_sequences = SHARD_SEQUENCES
            provenance = {"from": file_kind, "name": path.name, "values": scan.values_are(base)}
            self.header = dataclasses.replace(
                base,
                seq_len=scan.seq_len,
                record_count_size=1 if scan.most_records <= 255 else 2,
                capture={"converted": provenance},
            )
        status = path.stat()
        self.identity = f"{status.st_size}:{status.st_mtime_ns}"
        self.says = (
            "row t describes token t + 1, given tokens 0..t" + ("; the last row is left out" if drop_last_row else ""),
            _kind_says(self.header),
            *scan.says(self.header),
        )

    def _scan(self, progress: Progress | None) -> _Scan:
        scan = _Scan()
        for item in self.items():
            scan.add(item)
            if progress is not None:
                progress("check", scan.count, None)
        return scan

    def items(self, start: int = 0) -> Iterator[Item]:
        rows = read_rows(self._path, self._file_kind, self._values, self._columns)
        for number, row in islice(enumerate(rows), start, None):
            with in_row(self._path, number):
                item = check_row(
                    row, self.header, self._values, drop_last_row=self._drop_last_row, trusted=self._trusted
                )
            yield item


class _Note:
    """The note that ``make_note`` made."""

    def __init__(self, note: Mapping[str, Any], path: Path, values: str) -> None:
        try:
            settings = dict(note["header"])
            settings["columns"] = tuple(settings["columns"])
            self.header = Header(**settings)
            self.count, self.shard_sequences = int(note["sequences"]), int(note["sequences_per_shard"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"not a note of sklformat: {error!r}", path=path, section="note") from None
        if self.shard_sequences < 1:
            raise CorruptError("sequences_per_shard is not positive", path=path, section="note")
        if (self.header.kind == "counts") != (values == "counts"):
            raise CorruptError(f"tells of kind {self.header.kind}, the file has {values}", path=path, section="note")


def make_note(header: Header, count: int, shard_sequences: int) -> dict[str, Any]:
    """The settings that a file of plain columns carries along, as JSON."""
    settings = {f.name: getattr(header, f.name) for f in dataclasses.fields(header)}
    place = ("shard_number", "first_sequence")
    return {
        "header": {name: value for name, value in settings.items() if name not in place},
        "sequences": count,
        "sequences_per_shard": shard_sequences,
    }


class _Scan:
    """What all rows of a file have in common."""

    def __init__(self) -> None:
        self.count = self.most_records = 0
        self._lengths: set[int] = set()
        self._sums: list[float] = [np.inf, -np.inf]
        self._weighted = self._total = 0.0

    @property
    def seq_len(self) -> int:
        return min(self._lengths) if len(self._lengths) == 1 else 0

    def add(self, item: Item) -> None:
        targets = item.targets
        self.count += 1
        if len(self._lengths) < 2:
            self._lengths.add(targets.num_positions)
        self.most_records = max(self.most_records, int(np.diff(targets.offsets).max(initial=0)))
        if targets.weights is not None and targets.num_records:
            sums = position_sums(targets.weights.astype(np.float64), targets.offsets)
            self._sums = [min(self._sums[0], sums.min()), max(self._sums[1], sums.max())]
            self._weighted, self._total = self._weighted + sums.size, self._total + sums.sum()

    @property
    def _whole(self) -> bool:
        return self._sums[0] > 1 - _WHOLE and self._sums[1] < 1 + _WHOLE

    def values_are(self, header: Header) -> str:
        """One word for a cache's provenance."""
        if header.kind == "counts":
            return "counts"
        return "renormalised" if self._whole else "log-probabilities"

    def says(self, header: Header) -> list[str]:
        """Whether weights are probabilities, or were renormalised over the ids that were kept."""
        if header.kind == "counts" or not self._weighted:
            return []
        low, high, mean = *self._sums, self._total / self._weighted
        if self._whole:
            unknown = "what the teacher gave to other tokens is unknown"
            return [f"the values were renormalised: each position's weights sum to 1, so {unknown}"]
        sums = f"a position's weights sum to {low:.3f} .. {high:.3f}, {mean:.3f} on average"
        return [f"the values are log-probabilities over the whole vocabulary: {sums}"]


def check_agrees(path: Path, name: str, given: object, known: object) -> None:
    """
    A flag must not contradict what the source says of itself.

    Raises:
        ValueError: It does; shows both values.
    """
    if given is not None and given != known:
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{path}: says {name} {known}, {flag} says {given}; leave {flag} out")


def _kind_says(header: Header) -> str:
    drawn = f"counts of {header.rounds} rounds" if header.kind == "counts" else "weights in 7-bit ratios"
    bias = "biased, the rest of the distribution is left out" if header.biased else "not known to be biased"
    bias = "unbiased" if header.sampler in layout.UNBIASED_SAMPLERS else bias
    return f"{drawn}, sampler {header.sampler}: {bias}"


def _value_column(path: Path, names: frozenset[str], kind: str | None) -> str:
    there = [name for name in ("counts", "logprobs") if name in names]
    if len(there) == 2 and kind is not None:
        return "counts" if kind == "counts" else "logprobs"
    if len(there) != 1 or not {"input_ids", "token_ids"} <= names:
        problem = "holds both counts and logprobs; choose with --kind" if len(there) == 2 else "lacks columns"
        raise ValueError(
            f"{path}: {problem}; needed are input_ids, token_ids and either counts or logprobs, "
            f"there are {', '.join(sorted(names)) or 'none'}"
        )
    return there[0]
