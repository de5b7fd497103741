"""
One sealed shard, mapped or read; every byte is checked before it is believed.

Nothing that leaves this module looks into a mapping, but for addresses that C reads from.  SPEC.md section 13.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sklformat.checksums import fingerprint
from sklformat.errors import CorruptError, FormatError
from sklformat.files import remote
from sklformat.files.copies import LocalCopies
from sklformat.files.places import Place, directory_of, is_url, name_of
from sklformat.files.storage import Io, OpenFile, RemoteFile, empty, open_file
from sklformat.format import layout
from sklformat.format.block import BlockHeader, check_payload, decode_body, find_unsound, locate, parse_block_header
from sklformat.format.header import Header, parse_header
from sklformat.format.index import SealedIndex, Trailer, expected_headers, parse_index, parse_trailer, payload_sizes
from sklformat.format.listing import Entry
from sklformat.format.records import Sequence
from sklformat.native import address_of


class Shard:
    """
    One sealed shard; its header, trailer and index are checked on opening, blocks when touched.

    Args:
        path: The file, or its URL.
        io: How it is read: "mmap", "pread", or "auto", which maps it on local file systems.  A mapped block is checked
            when it is touched for the first time, one that is read each time.  A URL is read by ranges: "auto".
        copies: Where pieces of remote files are kept; None: a ``LocalCopies`` with its defaults.
        entry: What the cache's manifest says of it, if there is one; saves asking where a URL's file ends.
        file: It, open already; None: it is opened here.

    Raises:
        FormatError: Its children, as ``parse_header``, ``parse_trailer`` and ``parse_index`` say.
        RemoteError: The store behind a URL failed.
        OSError: The system's own.
    """

    header: Header
    trailer: Trailer
    index: SealedIndex

    def __init__(
        self,
        path: Place,
        io: Io = "auto",
        *,
        copies: LocalCopies | None = None,
        entry: Entry | None = None,
        file: OpenFile | None = None,
    ) -> None:
        self.path: Place
        self._file: OpenFile | None
        if file is not None:
            self.path, self._file = path, file
        elif isinstance(path, str) and is_url(path):
            self.path, self._file = path, _open_remote(path, io, copies or LocalCopies(), entry)
        else:
            self.path = Path(path)
            self._file = open_file(self.path, io)
        self._checked = np.zeros(0, np.bool_)
        try:
            try:
                self._open(self._file)
            except FormatError:
                if not self._file.forget():
                    raise
                self._open(self._file)
        except FormatError as error:
            self.close()
            raise locate(error, path=self.path) from None
        except BaseException:
            self.close()
            raise

    def _open(self, file: OpenFile) -> None:
        first = _bytes(file, 0, min(file.size, layout.HEADER_SIZE))
        self.header = parse_header(first)
        self.key = self.header.shard_key
        at = max(file.size - layout.TRAILER_SIZE, 0)
        self.trailer = parse_trailer(_bytes(file, at, file.size - at), self.key, file.size)
        with file.read(self.trailer.index_offset, self.trailer.index_size) as packed:
            self.index = parse_index(packed, self.trailer, first, self.header, self.key)
        self._checked = np.zeros(len(self.index), np.bool_)
        self._payload_sizes = payload_sizes(self.header, self.index.num_positions, self.index.num_records)
        self._ends = np.append(self.index.offset[1:], np.uint64(self.trailer.index_offset))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fingerprint(self) -> str:
        """The root digest: identity of the shard's whole content.  SPEC section 6.4."""
        return self.index.root

    def __getitem__(self, number: int) -> Sequence:
        """
        Decode sequence ``number`` of this shard.

        Raises:
            IndexError: There is no such sequence.
            CorruptError, UnsupportedError: Its block is damaged or of a newer kind.
            ValueError: The shard is closed.
        """
        if not 0 <= number < len(self):
            raise no_sequence(self.path, number, len(self))
        try:
            return self._sequence(number)
        except FormatError:
            if not self._opened().forget():
                raise
        return self._sequence(number)

    def _sequence(self, number: int) -> Sequence:
        file = self._opened()
        offset = int(self.index.offset[number])
        try:
            with file.read(offset, int(self._ends[number]) - offset) as whole:
                return self._decoded(number, whole, first=file.address is None or not self._checked[number])
        except FormatError as error:
            raise locate(error, path=self.path, section="block", sequence=number, offset=offset) from None
        finally:
            del file  # an error's traceback would keep it open

    def _decoded(self, number: int, whole: memoryview, *, first: bool) -> Sequence:
        """Check and decode the bytes of a block, the payload's checksum if they are looked at for the first time."""
        block = self._header_of(number, whole)
        body = check_payload(whole, block, self.key) if first else whole[layout.BLOCK_HEADER_SIZE : block.size]
        with body:
            self._checked[number] = True
            return decode_body(self.header, block, body)

    def _header_of(self, number: int, whole: memoryview) -> BlockHeader:
        index = self.index
        with whole[: layout.BLOCK_HEADER_SIZE] as head:
            block = parse_block_header(head, self.header, self.key, number)
        expected = (
            int(index.alignment[number]),
            int(index.block_checksum[number]),
            int(index.num_positions[number]),
            int(index.num_records[number]),
        )
        if (block.alignment, block.block_checksum, block.num_positions, block.num_records) != expected:
            raise CorruptError("the block's header contradicts the index")
        return block

    def payloads(
        self, numbers: NDArray[np.int64], *, copied: bool = False
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64], object]:
        """
        Addresses and sizes in bytes of checked payloads with their padding, for C.

        Headers and payloads are checked: of a mapped shard when they are touched for the first time, else always;
        records and tokens are the decoder's to check.

        Args:
            numbers: Sequences of this shard.
            copied: Copy them out of a mapping as well, so that the shard need not stay open for them.

        Returns:
            Addresses, sizes, and what keeps the memory there for as long as it is referenced.

        Raises:
            FormatError: As ``shard[number]``.
        """
        begins = self.index.offset[numbers]
        lengths = self._ends[numbers] - begins
        skipped = np.uint64(layout.BLOCK_HEADER_SIZE)
        file = self._opened()
        try:
            if copied or file.address is None:
                memory, at = self._read_blocks(file, numbers, begins, lengths)
                return at + skipped, lengths - skipped, memory
            new = ~self._checked[numbers]
            if new.any():
                with file.read(0, file.size) as whole:
                    self._check(numbers[new], whole, begins[new], lengths[new])
                self._checked[numbers] = True
            return begins + np.uint64(file.address) + skipped, lengths - skipped, file
        finally:
            del file  # as above

    def blocks(self, numbers: range) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """
        Copies of whole blocks that follow each other, with their headers and padding, checked as ``payloads``.

        Args:
            numbers: Sequences of this shard, of step 1, at least one.

        Returns:
            Their bytes, one after the other, and [n] uint64, how many each has.

        Raises:
            FormatError: As ``shard[number]``.
        """
        rows = np.arange(numbers.start, numbers.stop)
        begins = self.index.offset[rows]
        lengths = self._ends[rows] - begins
        return self._read_blocks(self._opened(), rows, begins, lengths)[0], lengths

    def groups(self, numbers: range, most_bytes: int) -> Iterator[range]:
        """The same sequences in groups whose blocks have at most ``most_bytes`` together, or of one sequence."""
        first = numbers.start
        while first < numbers.stop:
            limit = self.index.offset[first] + np.uint64(most_bytes)
            end = max(first + 1, int(np.searchsorted(self._ends, limit, side="right")))
            yield range(first, min(end, numbers.stop))
            first = end

    def _read_blocks(
        self, file: OpenFile, numbers: NDArray[np.int64], begins: NDArray[np.uint64], lengths: NDArray[np.uint64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """Blocks in memory of their own and the address of each, checked; those that lie together in one read."""
        order = np.argsort(begins, kind="stable")
        starts = np.zeros(numbers.size, np.uint64)
        starts[order[1:]] = np.cumsum(lengths[order])[:-1]
        memory = np.empty(int(lengths.sum()), np.uint8)
        cuts = np.flatnonzero(begins[order[:-1]] + lengths[order[:-1]] != begins[order[1:]]) + 1
        runs = [(int(run[0]), int(run[-1])) for run in np.split(order, cuts)]
        spans = [(int(begins[first]), int(begins[last] + lengths[last] - begins[first])) for first, last in runs]
        places = [int(starts[first]) for first, _ in runs]
        _fill(file, memory, places, spans)
        del file
        try:
            self._check(numbers, memory.data, starts, lengths)
        except FormatError:
            if not self._opened().forget():
                raise
            _fill(self._opened(), memory, places, spans)
            self._check(numbers, memory.data, starts, lengths)
        return memory, starts + np.uint64(address_of(memory.data))

    def _check(
        self, numbers: NDArray[np.int64], data: memoryview, begins: NDArray[np.uint64], lengths: NDArray[np.uint64]
    ) -> None:
        """
        Check headers and payloads of blocks against the index; what is wrong is then named by the full check.

        Args:
            numbers: [n] blocks of this shard.
            data: Memory that they are in.
            begins: [n] where in it each begins.
            lengths: [n] their bytes.
        """
        # The index proves the header, and the header its payload.
        expected = expected_headers(self.index, self._payload_sizes, numbers)
        unsound = find_unsound(data, begins, lengths, expected, self.key)
        if unsound is None:
            return
        number, begin = int(numbers[unsound]), int(begins[unsound])
        offset = int(self.index.offset[number])
        try:
            with data[begin : begin + int(lengths[unsound])] as whole:
                check_payload(whole, self._header_of(number, whole), self.key).release()
            raise CorruptError("a fault that the full check does not find")
        except FormatError as error:
            raise locate(error, path=self.path, section="block", sequence=number, offset=offset) from None

    def _opened(self) -> OpenFile:
        if self._file is None:
            raise ValueError(f"{self.path}: the shard is closed; open it again")
        return self._file

    def close(self) -> None:
        """Let go of the file, which stays open for what is being read; the shard is unusable afterwards."""
        self._file = None


def describe(shard: Shard) -> Entry:
    """What a manifest says of a shard."""
    return Entry(
        directory_of(shard.path),
        name_of(shard.path),
        shard_number=shard.header.shard_number,
        first_sequence=shard.header.first_sequence,
        num_sequences=len(shard),
        num_records=shard.trailer.num_records,
        size_bytes=shard.trailer.index_offset + shard.trailer.index_size + layout.TRAILER_SIZE,
        fingerprint=shard.fingerprint,
    )


def no_sequence(path: Place, number: int, count: int) -> IndexError:
    """That a shard or cache of ``count`` sequences has none of this number."""
    return IndexError(f"{path}: sequence {number} of {count}")


def _fill(file: OpenFile, memory: NDArray[np.uint8], places: list[int], spans: list[tuple[int, int]]) -> None:
    """Read (offset, length) spans of a file to places in memory."""
    file.prepare(spans)
    for place, (offset, length) in zip(places, spans, strict=True):
        with memory[place : place + length].data as out:
            file.read_into(offset, out)


def _bytes(file: OpenFile, offset: int, length: int) -> bytes:
    with file.read(offset, length) as view:
        return bytes(view)


def _open_remote(url: str, io: Io, copies: LocalCopies, entry: Entry | None) -> RemoteFile:
    if io != "auto":
        raise ValueError(f"{url}: a URL is read by ranges, io must be auto, got {io!r}")
    if entry is not None:
        return RemoteFile(url, entry.size_bytes, entry.fingerprint, copies)
    size = remote.size(url)
    if size == 0:
        raise empty(url)
    # The end of a shard holds the digest of all of it, so that local copies of another shard are not taken for it.
    end = min(size, layout.TRAILER_SIZE)
    return RemoteFile(url, size, fingerprint(remote.read_range(url, size - end, end)), copies)
