"""What a conversion reads: a cache, or files of another system, as one stream of checked sequences."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sklformat.cache.reader import Cache
from sklformat.errors import CorruptError
from sklformat.format import layout
from sklformat.format.header import Header, is_unbiased
from sklformat.interop.checks import Dropped, Item, check_row, position_sums
from sklformat.interop.columns import in_row, no_sequence
from sklformat.interop.notes import Note
from sklformat.interop.readings import Reading, Unreadable
from sklformat.interop.tokens import TokenFile, check_no_more, next_tokens

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, sequences done, and sequences in total where that is known."""

SHARD_SEQUENCES = 1024  # of a shard, where the source says nothing
_PLACES = (0, 1, 2)  # of tokens that row t may be about, from t
_NEXT = 1  # the place that is right
_ENOUGH, _CLEAR = 50, 0.2  # positions, and the share of them, that say more than chance
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
        tokens: Those of each sequence; for a cache that stores none.

    Raises:
        FormatError, FileNotFoundError: As ``skl.open``.
        ValueError: The cache stores no tokens and none are given; ``tokens`` is no such array.
    """

    def __init__(self, path: Path, tokens: TokenFile | None) -> None:
        self._cache = Cache(path)
        self.header = self._cache.header
        self.count = len(self._cache)
        if self.count == 0:
            raise ValueError(f"{path}: holds no sequence; nothing to convert")
        self._path, self._tokens = path, tokens
        if self._tokens is None and not self.header.store_tokens:
            raise ValueError(
                f"{path}: stores no tokens, and records are of no use without them; give them with --tokens FILE"
            )
        if tokens is not None:
            tokens.check_count(self.count)
        self.shard_sequences = max(len(next(self._cache.shards())), 1)
        self.identity = self._cache.fingerprint
        self.says: tuple[str, ...] = (_kind_says(self.header),)

    def items(self, start: int = 0) -> Iterator[Item]:
        given = None if self._tokens is None else self._tokens.rows(start)
        for i in range(start, self.count):
            sequence = self._cache[i]
            tokens = sequence.tokens
            if given is not None:
                tokens = next_tokens(given, self._path, i)
                self._cache.check_alignment(i, tokens)
            assert tokens is not None
            yield Item(tokens, sequence.targets, sequence.columns)
        if given is not None:
            check_no_more(given, self._path)


class RowsSource:
    """
    Rows that a reader gives, each checked.

    They are read twice: once to check every value and to learn what a header must say, once to convert.

    Args:
        path: What is read.
        file_kind: Its kind, for the header.
        reading: What the reader found.
        on_bad_row: "refuse" or "drop", what to do with records, or a sequence, that cannot be.
        note: What a cache that was written here said of itself; then nothing of it may differ.
        progress: Told how far the check is.

    Raises:
        FormatError: The file is damaged, or a value in it cannot be; names row and position.
        ValueError: A setting contradicts the file's note.
    """

    def __init__(
        self,
        path: Path,
        file_kind: str,
        reading: Reading,
        *,
        on_bad_row: str = "refuse",
        note: Note | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._path, self._reading, self._trusted = path, reading, note is not None
        self._dropped = Dropped() if on_bad_row == "drop" else None
        base = Header(
            vocab_size=reading.vocab_size,
            seq_len=0,
            kind="counts" if reading.values == "counts" else "ratios",
            rounds=reading.rounds,
            sampler=reading.sampler,
            columns=reading.columns,
        )
        self.header = base if note is None else note.header
        scan = _Scan()
        for item in self.items():
            scan.add(item)
            if progress is not None:
                progress("check", scan.count, None)
        self.count, left_out = scan.count, [] if self._dropped is None else [str(self._dropped)]
        if self.count == 0:
            raise no_sequence(path) if not left_out else CorruptError(f"no sequence is left; {left_out[0]}", path=path)
        if note is None:
            _check_drawn(path, base, scan)
        if note is not None:
            if note.count != scan.count:
                raise CorruptError(f"its note tells of {note.count} sequences, it holds {scan.count}", path=path)
            self.shard_sequences = note.shard_sequences
        else:
            self.shard_sequences = SHARD_SEQUENCES
            provenance: dict[str, Any] = {"from": file_kind, "name": path.name, "values": self._values_are(scan)}
            provenance |= scan.facts(base)
            provenance |= {"source": dict(reading.provenance)} if reading.provenance else {}
            if self._dropped is not None:
                provenance["dropped"] = self._dropped.totals()
            self.header = dataclasses.replace(
                base,
                seq_len=scan.seq_len,
                record_count_size=1 if scan.most_records <= 255 else 2,
                capture={"converted": provenance},
            )
        self.identity = identity_of(path)
        shifted = [] if note is not None else scan.shifted()
        renormalised = scan.says(base) if reading.renormalised is None else []
        self.says = (*reading.says, _kind_says(self.header), *renormalised, *shifted, *left_out)

    def _values_are(self, scan: _Scan) -> str:
        """One word for a cache's provenance."""
        if self._reading.values == "counts":
            return "counts"
        whole = scan.whole if self._reading.renormalised is None else self._reading.renormalised
        return "renormalised" if whole else "log-probabilities"

    def items(self, start: int = 0) -> Iterator[Item]:
        """Where nothing may be dropped the reader begins at ``start``, else what is left is counted from the first."""
        begin = start if self._dropped is None else 0
        kept = 0
        for number, row in enumerate(self._reading.rows(begin), begin):
            try:
                with in_row(self._path, number):
                    if isinstance(row, Unreadable):
                        raise ValueError(row.reason)  # noqa: TRY004  told as any other
                    item = check_row(
                        row, self.header, self._reading.values, trusted=self._trusted, dropped=self._dropped
                    )
            except CorruptError as error:
                if self._dropped is None:
                    raise
                self._dropped.add_sequence(str(error))
                continue
            kept += 1
            if self._dropped is None or kept > start:
                yield item


def _check_drawn(path: Path, header: Header, scan: _Scan) -> None:
    """
    Weights of draws are count / rounds, so each position's sum to 1; those of the most likely ids do not.

    Raises:
        ValueError: The user says that the records were drawn, and they were not.
    """
    if header.kind == "ratios" and header.sampler in layout.UNBIASED_SAMPLERS and not scan.whole:
        raise ValueError(
            f"{path}: --sampler {header.sampler}, but weights of a position sum to {scan.sums[0]:.3f} .. "
            f"{scan.sums[1]:.3f}, those of draws to 1; give --sampler topk or topp if they are the most likely ids"
        )


def identity_of(path: Path) -> str:
    """Text that differs where a file, or the files of a directory, differ in name, size or time of change."""
    files = [path] if not path.is_dir() else sorted(file for file in path.rglob("*") if file.is_file())
    parts = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    text = "\n".join(f"{name}:{status.st_size}:{status.st_mtime_ns}" for name, status in parts)
    return hashlib.sha256(text.encode()).hexdigest()


class _Scan:
    """What all rows of a source have in common."""

    def __init__(self) -> None:
        self.count = self.most_records = 0
        self._lengths: set[int] = set()
        self.sums: list[float] = [np.inf, -np.inf]
        self._weighted = self._total = 0.0
        self._followed = 0
        self._hits = np.zeros(len(_PLACES), np.int64)

    @property
    def seq_len(self) -> int:
        return min(self._lengths) if len(self._lengths) == 1 else 0

    def add(self, item: Item) -> None:
        targets = item.targets
        self.count += 1
        if len(self._lengths) < 2:
            self._lengths.add(targets.num_positions)
        self.most_records = max(self.most_records, int(np.diff(targets.offsets).max(initial=0)))
        if targets.num_positions > 2 and targets.num_records:
            self._look(item)
        if targets.weights is not None and targets.num_records:
            sums = position_sums(targets.weights.astype(np.float64), targets.offsets)
            self.sums = [min(self.sums[0], sums.min()), max(self.sums[1], sums.max())]
            self._weighted, self._total = self._weighted + sums.size, self._total + sums.sum()

    def _look(self, item: Item) -> None:
        """Count the positions [1, T - 1) that have the token before, at and after the right place among their ids."""
        offsets = item.targets.offsets[1:-1]
        counts = np.diff(offsets)
        ids = item.targets.token_ids[offsets[0] : offsets[-1]]
        self._followed += int((counts > 0).sum())
        for number, place in enumerate(_PLACES):
            tokens = item.tokens[1 + place : 1 + place + counts.size]
            self._hits[number] += (ids == np.repeat(tokens, counts)).sum()

    def shifted(self) -> list[str]:
        """That rows seem to describe a token that is not the next, which a teacher's most likely ids tell."""
        best = int(np.argmax(self._hits))
        if self._followed < _ENOUGH or self._hits[best] - self._hits[_NEXT] < _CLEAR * self._followed:
            return []
        there, other = (f"{self._hits[number] / self._followed:.0%}" for number in (_NEXT, best))
        token = f"t + {_PLACES[best]}" if _PLACES[best] else "t"
        says = f"token t + 1 is among the ids of row t at {there} of the positions, token {token} at {other}"
        return [f"look at the rows before you train: {says}; the rows seem to be one place off"]

    @property
    def whole(self) -> bool:
        """Whether the weights of each position sum to 1."""
        return self.sums[0] > 1 - _WHOLE and self.sums[1] < 1 + _WHOLE

    def facts(self, header: Header) -> dict[str, Any]:
        """For a cache's provenance: the most records of a position, and the mean of what its weights sum to."""
        if header.kind == "counts" or not self._weighted:
            return {}
        return {"most_records": self.most_records, "mass": round(self._total / self._weighted, 4)}

    def says(self, header: Header) -> list[str]:
        """Whether weights are probabilities, or were renormalised over the ids that were kept."""
        if header.kind == "counts" or not self._weighted:
            return []
        low, high, mean = *self.sums, self._total / self._weighted
        if self.whole:
            unknown = "what the teacher gave to other tokens is unknown"
            return [f"the values were renormalised: each position's weights sum to 1, so {unknown}"]
        sums = f"a position's weights sum to {low:.3f} .. {high:.3f}, {mean:.3f} on average"
        return [f"the values are parts of a distribution over the whole vocabulary: {sums}"]


def _kind_says(header: Header) -> str:
    drawn = f"counts of {header.rounds} rounds" if header.kind == "counts" else "weights in 7-bit ratios"
    bias = "biased, the rest of the distribution is left out" if header.biased else "not known to be biased"
    if is_unbiased(header.sampler, header.proposal_temperature, header.capture):
        bias = "unbiased"
    elif header.sampler in layout.UNBIASED_SAMPLERS:
        bias = "importance weights, divided by their sum or cut, which biases them a little"
    return f"{drawn}, sampler {header.sampler}: {bias}"
