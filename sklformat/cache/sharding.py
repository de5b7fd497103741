"""
Write a cache of many shards: numbered, resumed where a crash left it, and listed in a manifest at the end.

One process writes; ``capture`` is for teachers that must not wait for it.  SPEC.md sections 10.5 and 11.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType

from numpy.typing import ArrayLike

from sklformat.cache.contents import (
    UNFINISHED_NAME,
    mark_unfinished,
    partial_files,
    partial_path,
    shard_files,
    shard_header,
    shard_path,
    unmark_unfinished,
)
from sklformat.cache.manifest import MANIFEST_NAME, has_manifest, write_manifest
from sklformat.cache.shard import Shard, describe
from sklformat.cache.writer import ShardWriter, closed
from sklformat.errors import SettingsError
from sklformat.files.disk import locked_directory
from sklformat.format.header import Header
from sklformat.format.listing import Entry, check_contiguous, place_in_cache
from sklformat.format.records import Sequence, SparseTargets


class CacheWriter:
    """
    Append sequences to a cache; leaving the context seals the last shard and writes the manifest.

    Given the directory of a run that was stopped, it resumes: ``len(writer)`` sequences are there, and the next one to
    append is the one of that number; a program that begins with the first one again gets a ``UserWarning``.  An
    exception leaves the directory to be resumed.

    Args:
        directory: Of the cache; made if it is missing.
        header: Settings of all shards, with shard_number and first_sequence 0.
        sequences_per_shard: After so many a shard is sealed and the next one begun, >= 1.

    Raises:
        FileExistsError: The directory holds a finished cache.
        InUseError: Another process writes here.
        SettingsError: What is here was made with other settings, or by something else; both values are shown.
        FormatError: A shard here is damaged.
        ValueError: A wrong argument.
        OSError: The system's own.
    """

    def __init__(self, directory: Path | str, *, header: Header, sequences_per_shard: int = 1024) -> None:
        if sequences_per_shard < 1:
            raise ValueError(f"sequences_per_shard must be >= 1, got {sequences_per_shard}")
        if header.shard_number or header.first_sequence:
            raise ValueError(
                "header is of all shards: shard_number and first_sequence must be 0, got "
                f"{header.shard_number} and {header.first_sequence}"
            )
        self.directory = Path(directory)
        self.header = header
        self.sequences_per_shard = sequences_per_shard
        self._writer: ShardWriter | None = None
        self._beginning: int | None = None  # alignment checksum of sequence 0 of a resumed cache, until one is appended
        with ExitStack() as held:
            held.enter_context(locked_directory(self.directory))
            if has_manifest(self.directory):
                unmark_unfinished(self.directory)  # what a crash left that came after the manifest
                raise FileExistsError(
                    f"{self.directory}: holds a finished cache ({MANIFEST_NAME}); choose another directory"
                )
            self._entries = self._sealed()
            self._num_sealed = sum(entry.num_sequences for entry in self._entries)
            self._check_partials()
            mark_unfinished(self.directory)
            if self._partial().exists():
                self._writer = self._begin()
            if self._beginning is None and self._writer is not None and len(self._writer):
                self._beginning = self._writer.alignment(0)
            if self._writer is not None:  # a run may have been killed between its last sequence and the seal
                self._seal_if_full(self._writer)
            self._held = held.pop_all()
        self._open = True

    def _sealed(self) -> list[Entry]:
        """The sealed shards that are here, which must be of this cache and follow each other."""
        entries = []
        for path in shard_files(self.directory):
            with closing(Shard(path)) as shard:
                if differing := shard.header.differences(self.header):
                    raise other_settings(path, differing)
                entries.append(describe(shard))
                if len(shard) and shard.header.first_sequence == 0:
                    self._beginning = int(shard.index.alignment[0])
        entries.sort(key=place_in_cache)
        check_contiguous(entries, self.directory)
        return entries

    def _check_partials(self) -> None:
        """One shard at most is unfinished: the one after those that are sealed."""
        for path in partial_files(self.directory):
            if path not in (self._partial(), self.directory / UNFINISHED_NAME):
                raise SettingsError(
                    f"{path}: is not the next shard, {self._partial().name}; another program began it: finish it with "
                    "that, or choose another directory"
                )

    def _partial(self) -> Path:
        return partial_path(shard_path(self.directory, len(self._entries)))

    def _begin(self) -> ShardWriter:
        number = len(self._entries)
        header = shard_header(self.header, number, self._num_sealed)
        return ShardWriter(shard_path(self.directory, number), header=header, resume=True)

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._open:
            return
        self._open = False
        with self._held:
            if kind is None:
                self._finish()
            elif self._writer is not None:
                self._writer.close()

    def _finish(self) -> None:
        if self._writer is None and not self._entries:
            self._writer = self._begin()  # a cache has a shard, if only an empty one
        if self._writer is not None:
            self._seal(self._writer)
        write_manifest(self.directory, self._entries)
        unmark_unfinished(self.directory)

    def _seal_if_full(self, writer: ShardWriter) -> None:
        if len(writer) >= self.sequences_per_shard:
            self._seal(writer)

    def _seal(self, writer: ShardWriter) -> None:
        with writer:
            pass
        self._writer = None
        with closing(Shard(writer.path)) as shard:
            self._entries.append(describe(shard))
        self._num_sealed += self._entries[-1].num_sequences

    def __len__(self) -> int:
        """Number of sequences in the cache so far, those of an earlier run included."""
        return self._num_sealed + (0 if self._writer is None else len(self._writer))

    def append(self, tokens: ArrayLike, targets: SparseTargets, columns: Mapping[str, ArrayLike] | None = None) -> int:
        """
        Append one sequence; it is durable after the next ``flush``, or once its shard is full.

        Args:
            tokens: [T + 1] integer ids below vocab_size.
            targets: Records of T positions, of the header's kind.
            columns: As ``ShardWriter.append``.

        Returns:
            The sequence's number in the cache.

        Raises:
            ValueError: The sequence breaks a rule of the format, or the writer is closed.
            OSError: The system could not write; leave the context and resume.
        """
        self._check_open()
        if self._writer is None:
            self._writer = self._begin()
        place = self._writer.append(tokens, targets, columns)
        number = self._num_sealed + place
        if self._beginning == self._writer.alignment(place):
            warnings.warn(
                f"{self.directory}: the cache was resumed with {number} sequences, and the first one appended now is "
                "sequence 0 again; begin with number len(writer), or sequences are stored twice",
                stacklevel=2,
            )
        self._beginning = None
        self._seal_if_full(self._writer)
        return number

    def append_changed(
        self, sequence: Sequence, targets: SparseTargets, columns: Mapping[str, ArrayLike] | None = None
    ) -> None:
        """Append a sequence of a cache with other records, as ``ShardWriter.append_changed`` does."""
        self._check_open()
        if self._writer is None:
            self._writer = self._begin()
        self._writer.append_changed(sequence, targets, columns)
        self._seal_if_full(self._writer)

    def copy(self, shard: Shard, numbers: range) -> None:
        """
        Append sequences of a sealed shard as they are stored there, as ``ShardWriter.copy`` does.

        Args:
            shard: Of the same layout.
            numbers: Sequences of it, of step 1.

        Raises:
            ValueError: The shard's blocks are laid out in another way, or the writer is closed.
            FormatError, OSError: As ``ShardWriter.copy``.
        """
        self._check_open()
        first = numbers.start
        while first < numbers.stop:
            if self._writer is None:
                self._writer = self._begin()
            end = min(numbers.stop, first + self.sequences_per_shard - len(self._writer))
            self._writer.copy(shard, range(first, end))
            self._seal_if_full(self._writer)
            first = end

    def flush(self) -> None:
        """Make every appended sequence durable."""
        self._check_open()
        if self._writer is not None:
            self._writer.flush()

    def _check_open(self) -> None:
        if not self._open:
            raise closed(self.directory)


def other_settings(path: Path | str, differing: list[str]) -> SettingsError:
    """That a shard or capture is here which was made with other settings than are asked for."""
    is_other_text = any(line.startswith("corpus_fingerprint: ") for line in differing)
    joined = "; other text is another cache: sklformat merge joins both, or training takes them as a list"
    return SettingsError(
        f"{path}: made with other settings (there != asked for): {'; '.join(differing)}; give the same settings, or "
        f"choose another directory{joined * is_other_text}"
    )
