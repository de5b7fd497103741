"""
Many sequences at once: from the bytes of their shards to the arrays of a training step, every row checked.

SPEC.md section 13.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sklformat import native
from sklformat.cache.shard import Shard
from sklformat.checksums import alignments
from sklformat.errors import FormatError
from sklformat.files.places import Place
from sklformat.format.block import block_shape, locate, misaligned
from sklformat.format.header import Header
from sklformat.native import Arena, BatchArrays, RowError


class Payloads:
    """
    The payloads of B sequences, perhaps of several shards, on their way to one batch; keeps their memory.

    Attributes:
        sources: [B] uint64 addresses, 0 for an empty row.
        sizes: [B] uint64 bytes, padding included.
        num_positions: [B] uint32, 0 for an empty row.
        num_records: [B] uint32.
        alignment: [B] uint64 alignment checksums.
    """

    def __init__(self, rows: int) -> None:
        self.sources, self.sizes = np.zeros(rows, np.uint64), np.zeros(rows, np.uint64)
        self.num_positions, self.num_records = np.zeros(rows, np.uint32), np.zeros(rows, np.uint32)
        self.alignment = np.zeros(rows, np.uint64)
        self._memory: list[object] = []
        self._places: list[tuple[Place, NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]] = []

    def fill(self, rows: NDArray[np.int64], shard: Shard, numbers: NDArray[np.int64], *, copied: bool = False) -> None:
        """Put sequences of one shard into rows; ``copied``: so that the shard need not stay open."""
        index = shard.index
        self.sources[rows], self.sizes[rows], memory = shard.payloads(numbers, copied=copied)
        self._memory.append(memory)
        self.num_positions[rows], self.num_records[rows] = index.num_positions[numbers], index.num_records[numbers]
        self.alignment[rows] = index.alignment[numbers]
        self._places.append((shard.path, rows, numbers, index.offset[numbers]))

    def select(self, rows: NDArray[np.int64]) -> Payloads:
        """Some of the rows, by themselves."""
        some = Payloads(rows.size)
        some.sources, some.sizes, some.alignment = self.sources[rows], self.sizes[rows], self.alignment[rows]
        some.num_positions, some.num_records = self.num_positions[rows], self.num_records[rows]
        some._memory = self._memory
        places = np.full(self.sources.size, -1)
        places[rows] = np.arange(rows.size)
        some._places = [(path, places[at], numbers, offsets) for path, at, numbers, offsets in self._places]
        return some

    def decode(
        self,
        header: Header,
        tokens: NDArray[np.uint32] | None = None,
        ignored_label: int = -100,
        arena: Arena | None = None,
        *,
        starts: bool = False,
        packed: bool = False,
    ) -> BatchArrays:
        """
        Decode every row and check it: records, tokens, and that the tokens give the alignment checksums.

        Args:
            header: Of the shards.
            tokens: [B, T + 1] tokens of the rows, checked already, instead of the stored ones.
            ignored_label: Label where there is none.
            arena: As for ``native.decode_batch``.
            starts: Whether document starts and positions are wanted, of shards that store them.
            packed: Leave the records as they are stored, unchecked; the rest is decoded and checked.

        Returns:
            Arrays of B rows and T positions, T as ``row_positions`` says.

        Raises:
            FormatError: A row is damaged; names file, block and byte.
            ValueError: A token given is not below vocab_size; names the row.
        """
        try:
            arrays = native.decode_batch(
                block_shape(header, 0, 0),
                header.scale_log2,
                self.sources,
                self.sizes,
                self.num_positions,
                self.num_records,
                tokens,
                self.row_positions(header),
                ignored_label,
                arena,
                starts=starts,
                packed=packed,
            )
        except RowError as error:
            if isinstance(error.__cause__, FormatError):
                raise self._located(error.row, error.__cause__) from None
            raise ValueError(f"row {error.row} of the batch: {error.__cause__}") from None
        if tokens is None:
            self._check_tokens(arrays)
        return arrays

    def origins(self) -> list[tuple[Place, int, int] | None]:
        """Of each row the file, its block there and the block's byte; None of an empty row."""
        found: list[tuple[Place, int, int] | None] = [None] * self.sources.size
        for path, rows, numbers, offsets in self._places:
            for row, number, offset in zip(rows.tolist(), numbers.tolist(), offsets.tolist(), strict=True):
                if row >= 0:
                    found[row] = path, number, offset
        return found

    def columns_are_sound(self, header: Header) -> bool:
        """Whether the optional columns of every row hold what the format allows; decoding does not look at them."""
        shape = block_shape(header, 0, 0)
        return native.columns_are_sound(shape, self.sources, self.sizes, self.num_positions, self.num_records)

    def no_tokens(self, header: Header) -> NDArray[np.uint32]:
        """Tokens to decode with where the shards store none and only the records matter."""
        return np.zeros((self.sources.size, self.row_positions(header) + 1), np.uint32)

    def row_positions(self, header: Header) -> int:
        """T of the batch: seq_len, or the longest row's; at least 1, also where every row is empty."""
        return header.seq_len or int(self.num_positions.max(initial=1))

    def _check_tokens(self, arrays: BatchArrays) -> None:
        """The stored tokens give the alignment checksums."""
        given = alignments(arrays.tokens, self.num_positions)
        wrong = (given != self.alignment) & (self.num_positions > 0)
        if wrong.any():
            row = int(wrong.argmax())
            raise self._located(row, misaligned(int(self.alignment[row]), int(given[row])))

    def _located(self, row: int, error: FormatError) -> FormatError:
        """Say of which file, block and byte a fault in a row is."""
        for path, rows, numbers, offsets in self._places:
            for at in np.flatnonzero(rows == row).tolist():
                locate(error, path=path, section="block", sequence=int(numbers[at]), offset=int(offsets[at]))
        return error
