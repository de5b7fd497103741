"""
Write one shard so that nothing acknowledged is lost: append, flush, seal; resume what a crash left.

Bytes of a sequence come from ``block``; this module owns the order of writes, syncs and renames.  SPEC.md section 10.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike

from sklformat.cache.contents import partial_path
from sklformat.cache.recovery import Recovered, keep, scan
from sklformat.cache.shard import Shard
from sklformat.errors import FormatError, SettingsError, WriteError
from sklformat.files.disk import Disk, lock_named
from sklformat.format import layout
from sklformat.format.block import encode_block, layout_differences, renumber
from sklformat.format.header import Header
from sklformat.format.index import Index, pack_trailer
from sklformat.format.records import Sequence, SparseTargets

_COPIED_BYTES = 4 << 20  # at once: enough for one call to cost little, and small enough for a cache


class ShardWriter:
    """
    Append sequences to one shard; leaving the context seals it, an exception leaves ``<path>.partial``.

    Args:
        path: Name of the sealed shard, such as "shard-00000.skl"; must not exist.
        header: Settings of the shard.
        resume: Continue an existing ``.partial`` (its torn tail is cut), or begin where there is none.
        disk: The system calls; for tests.

    Attributes:
        recovered: What ``resume`` kept of a ``.partial``; None where the shard was started from scratch.

    Raises:
        FileExistsError: The sealed shard exists, or a ``.partial`` does and resume is False.
        InUseError: Another process is writing this shard.
        SettingsError: The ``.partial`` was made with other settings; both values are shown.
        CorruptError: The ``.partial`` is damaged in its header.
        OSError: The system's own, such as no space, with the file's name; the writer takes nothing more and keeps the
            ``.partial``.

    Source: SPEC section 10.
    """

    def __init__(self, path: Path | str, *, header: Header, resume: bool = False, disk: Disk | None = None) -> None:
        self.path = Path(path)
        self.partial = partial_path(self.path)
        self.header = header
        self._key = header.shard_key
        self._disk = disk or Disk()
        self._index = Index()
        self.recovered: Recovered | None = None
        self._failed = False
        self._fd = -1
        if self.path.exists():
            raise FileExistsError(f"{self.path}: is sealed already; choose another name, or remove it first")
        try:
            with self._named_failure():
                self._open(resume)
        except BaseException:
            self._close()
            raise

    def _open(self, resume: bool) -> None:
        try:
            self._fd = self._disk.create(self.partial)
        except FileExistsError:
            self._fd = self._disk.reopen(self.partial)
            lock_named(self._fd, self.partial)
            if not resume:
                raise FileExistsError(
                    f"{self.partial}: an unfinished shard is here; continue it with resume=True, or remove it first"
                ) from None
            prefix = scan(self._fd, self.partial)
            if (found := prefix.header) is not None:
                if os.pread(self._fd, layout.HEADER_SIZE, 0) != self.header.pack():
                    differing = "; ".join(found.differences(self.header)) or (
                        "another place in the cache"
                        if found != self.header
                        else "its version_minor or compatible_flags; finish it with the sklformat that began it"
                    )
                    raise SettingsError(f"{self.partial}: made with other settings: {differing}") from None
                self._index, self._end = prefix.index, prefix.end
                self.recovered = keep(self._fd, self.partial, prefix, self._disk)
                return
            self._disk.truncate(self._fd, 0)
        else:
            lock_named(self._fd, self.partial)
        # The header is durable before any block, so that a longer file always has one.
        self._disk.write(self._fd, self.header.pack(), 0)
        self._disk.sync(self._fd)
        self._disk.sync_directory(self.partial.parent)
        self._end = layout.HEADER_SIZE

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd < 0:
            return
        if kind is not None:
            self.close()
            return
        try:
            self.seal()
        finally:  # a failed seal lets go of the lock too, so that the shard can be resumed
            self._close()

    def __len__(self) -> int:
        """Number of sequences appended so far, those of a resumed ``.partial`` included."""
        return len(self._index)

    def alignment(self, number: int) -> int:
        """Alignment checksum of sequence ``number`` of the shard, 0-based; IndexError where there is none."""
        return self._index.alignment(number)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._end

    def append(self, tokens: ArrayLike, targets: SparseTargets, columns: Mapping[str, ArrayLike] | None = None) -> int:
        """
        Append one sequence; it is durable after the next ``flush``.

        Args:
            tokens: [T + 1] integer ids below vocab_size; they are kept where header.store_tokens says so, and the
                alignment checksum always is.
            targets: Records of T positions, of the header's kind.
            columns: An array for each of header.columns: document_start [T + 1] bool, record_logprob [nnz] beside
                targets.token_ids, the others [T].

        Returns:
            The sequence's 0-based index in the shard.

        Raises:
            ValueError: The sequence breaks a rule of the format; the writer stays usable.
            OSError: The system could not write; the writer is done and the ``.partial`` kept.
        """
        return self._append(tokens, targets, columns)

    def append_changed(
        self, sequence: Sequence, targets: SparseTargets, columns: Mapping[str, ArrayLike] | None = None
    ) -> int:
        """
        Append a sequence of a cache with other records; as ``append``, but its tokens need not be known.

        Args:
            sequence: As it was read; where no tokens are stored, its alignment checksum stands for them.
            targets: As for ``append``.
            columns: As for ``append``.
        """
        known = {} if sequence.tokens is not None else {"aligned": sequence.alignment}
        return self._append(sequence.tokens, targets, columns, **known)

    def _append(
        self,
        tokens: ArrayLike | None,
        targets: SparseTargets,
        columns: Mapping[str, ArrayLike] | None,
        **known: int,
    ) -> int:
        self._check_open()
        number = len(self._index)
        self._check_number(number)
        try:
            data, block = encode_block(self.header, self._key, number, tokens, targets, columns, **known)
        except ValueError as error:
            raise ValueError(f"{self.path}: sequence {number}: {error}") from error
        self._write(data)
        self._index.append(self._end - len(data), block)
        return number

    def copy(self, shard: Shard, numbers: range) -> None:
        """
        Append sequences of a sealed shard as they are stored there; they are durable after the next ``flush``.

        What proves their bytes there is checked, and made again for this shard; records are not decoded.

        Args:
            shard: Of the same layout.
            numbers: Sequences of it, of step 1.

        Raises:
            ValueError: The shard's blocks are laid out in another way; the writer stays usable.
            FormatError: A block of it is damaged; those before it are appended, and the writer stays usable.
            OSError: As ``append``.
        """
        self._check_open()
        if differing := layout_differences(shard.header, self.header):
            raise ValueError(
                f"{self.path}: blocks of {shard.path} are laid out in another way: {'; '.join(differing)}; read its "
                "sequences and append them"
            )
        if numbers:
            self._check_number(len(self._index) + len(numbers) - 1)
        for group in shard.groups(numbers, _COPIED_BYTES):
            data, lengths = shard.blocks(group)
            begins = np.cumsum(lengths) - lengths
            checksums = renumber(data, begins, lengths, len(self._index), self._key)
            begins += np.uint64(self._end)
            self._write(data.data)
            self._index.extend(begins, checksums, shard.index, slice(group.start, group.stop))

    def _check_number(self, number: int) -> None:
        """A shard and a cache have room for a sequence of this number in the shard."""
        if number >= layout.MAX_SEQUENCES - 1:
            raise ValueError(f"a shard holds fewer than {layout.MAX_SEQUENCES} sequences")
        if (global_number := self.header.first_sequence + number) >= 1 << 64:
            raise ValueError(f"{self.path}: sequence number {global_number} is beyond 2**64 - 1")

    def flush(self) -> None:
        """Make every appended sequence durable."""
        self._check_open()
        with self._named_failure():
            self._disk.sync(self._fd)

    def seal(self) -> None:
        """Write index and trailer, make them durable, and give the shard its name."""
        self._check_open()
        index = self._index.pack()
        trailer = pack_trailer(self.header, self._key, self._end, self._index, index)
        self._write(index)
        self._write(trailer)
        with self._named_failure():
            self._disk.truncate(self._fd, self._end)
            self._disk.sync(self._fd)
            self._disk.rename(self.partial, self.path)
        self._close()

    def close(self) -> None:
        """Let go without sealing; what was appended is made durable and the ``.partial`` stays."""
        if self._fd >= 0 and not self._failed:
            try:
                with self._named_failure():
                    self._disk.sync(self._fd)
            finally:
                self._close()
        self._close()

    def _write(self, data: bytes | memoryview) -> None:
        with self._named_failure():
            self._disk.write(self._fd, data, self._end)
        self._end += len(data)

    @contextmanager
    def _named_failure(self) -> Iterator[None]:
        """A system call that fails ends the writing; its error says of which file it is and what became of that."""
        try:
            yield
        except OSError as error:
            self._failed = True
            if error.errno is None or error.filename is not None or isinstance(error, FormatError):
                raise
            file = self.path if self.path.exists() else self.partial
            kind = WriteError if file.exists() else OSError
            raise kind(error.errno, error.strerror, str(file)) from error

    def _check_open(self) -> None:
        if self._fd < 0:
            raise closed(self.path)
        if self._failed:
            raise ValueError(f"{self.path}: a write failed earlier; open it again with resume=True")

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def closed(path: Path) -> ValueError:
    """That the writer of a shard or cache takes no more."""
    return ValueError(f"{path}: the writer is closed")
