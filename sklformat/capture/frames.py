"""
What the two processes of a capture say to each other: how a sequence lies in a frame of the ring.

A frame holds what the teacher made, not what the file will hold; both processes run the same version of this module.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sklformat import native
from sklformat.capture.plan import ShardWork
from sklformat.checksums import tokens_array
from sklformat.format.block import check_sizes
from sklformat.format.columns import RECORD_LOGPROB, STARTS, typed_columns
from sklformat.format.header import Header, parse_header
from sklformat.format.records import SparseTargets

# Number of positions, number of pairs or of rounds, number of columns, number of positions with draws; arrays follow,
# the widest type first, so that each lies on a multiple of its size.
_PREFIX = struct.Struct("<QQQQ32x")
_DRAWS, _COUNTS, _WEIGHTS = 1, 2, 3


@dataclass(frozen=True)
class Setup:
    """What the writer process needs to know before the first frame."""

    directory: Path
    header: Header
    works: list[ShardWork]
    num_sequences: int
    checkpoint_bytes: int
    checkpoint_seconds: float
    url: str | None

    def pack(self) -> bytes:
        """As JSON."""
        values = self.__dict__ | {
            "directory": str(self.directory),
            "header": self.header.pack().hex(),
            "works": [asdict(work) for work in self.works],
        }
        return json.dumps(values).encode()

    @classmethod
    def parse(cls, data: bytes) -> Setup:
        """What ``pack`` wrote."""
        values: dict[str, Any] = json.loads(data)
        values["directory"] = Path(values["directory"])
        values["header"] = parse_header(bytes.fromhex(values["header"]))
        values["works"] = [ShardWork(**work) for work in values["works"]]
        return cls(**values)


def merge_draws(draws: ArrayLike) -> SparseTargets:
    """
    Count equal draws: sorted draws become records of kind "counts".

    Args:
        draws: [T, rounds] token ids, each row ascending; rounds 1..127.

    Returns:
        Targets of T positions whose counts sum to rounds.

    Raises:
        ValueError: A row is not sorted (names the position), not a 2-D array of integers, or rounds out of range.
    """
    offsets, token_ids, counts = native.merge_draws(draws_array(draws))
    return SparseTargets.trusted(token_ids, counts, None, offsets)


def draws_array(draws: ArrayLike) -> NDArray[np.uint32]:
    """
    Draws [T, rounds] as contiguous uint32, without a copy where their type allows it.

    Raises:
        ValueError: Not a 2-D array of integers in [0, 2**32).
    """
    array = np.asarray(draws)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"draws must be integers [T, rounds], got shape {array.shape} of {array.dtype}")
    if array.dtype == np.int32:
        # A negative id reads as one above 2**31: no vocabulary is that wide, so that the writer refuses it.
        return np.ascontiguousarray(array).view(np.uint32)
    if array.dtype != np.uint32 and array.size and not 0 <= int(array.min()) <= int(array.max()) < 1 << 32:
        raise ValueError(f"draws must be in [0, 2**32), got values from {array.min()} to {array.max()}")
    return np.ascontiguousarray(array, np.uint32)


def pack_draws(
    header: Header,
    tokens: ArrayLike,
    draws: ArrayLike,
    columns: Mapping[str, ArrayLike] | None,
    counted: ArrayLike | None = None,
) -> tuple[int, list[Any]]:
    """
    A frame's type and parts for a sequence with its sorted draws.

    Args:
        header: Of the cache.
        tokens: [T + 1].
        draws: [K, rounds], of the positions that count.
        columns: By name; record_logprob [K, rounds].
        counted: [T] bool, K of them True; None: all.

    Raises:
        ValueError: Shapes disagree with each other or with the header.
    """
    if header.kind != "counts":
        raise ValueError(f"draws become counts, the header's kind is {header.kind!r}; push targets with weights")
    ids, array = tokens_array(tokens), draws_array(draws)
    drawn, rounds = array.shape
    if rounds != header.rounds:
        raise ValueError(f"{rounds} draws per position, the header's rounds is {header.rounds}")
    mask = np.ones(drawn, np.bool_) if counted is None else np.ascontiguousarray(counted)
    if mask.ndim != 1 or mask.dtype != np.bool_ or np.count_nonzero(mask) != drawn:
        raise ValueError(
            f"counted must be booleans [T], True at {drawn} positions as there are draws, got {mask.dtype} of shape "
            f"{mask.shape} with {np.count_nonzero(mask)}"
        )
    check_sizes(header, ids.size, mask.size)
    rows = _columns_parts(header, columns, mask.size, (drawn, rounds))
    masks = [mask.view(np.uint8)] if drawn < mask.size else []
    return _DRAWS, [_PREFIX.pack(mask.size, rounds, len(rows), drawn), array, ids, *rows, *masks]


def pack_targets(
    header: Header, tokens: ArrayLike, targets: SparseTargets, columns: Mapping[str, ArrayLike] | None
) -> tuple[int, list[Any]]:
    """
    A frame's type and parts for a sequence with its (id, count) or (id, weight) pairs.

    Raises:
        ValueError: Shapes or kind disagree with each other or with the header.
    """
    ids, positions = tokens_array(tokens), targets.num_positions
    kind = "counts" if targets.counts is not None else "ratios"
    if kind != header.kind:
        raise ValueError(f"the targets are of kind {kind!r}, the header's kind is {header.kind!r}")
    check_sizes(header, ids.size, positions)
    rows = _columns_parts(header, columns, positions, (targets.num_records,))
    parts = [_PREFIX.pack(positions, targets.num_records, len(rows), 0), targets.offsets, targets.token_ids, ids]
    if targets.counts is not None:
        return _COUNTS, [*parts, *rows, targets.counts]
    return _WEIGHTS, [*parts, targets.weights, *rows]


def _columns_parts(
    header: Header, columns: Mapping[str, ArrayLike] | None, positions: int, record_shape: tuple[int, ...]
) -> list[NDArray[Any]]:
    """Columns as a frame has them: float16 in the header's order, then document starts, a byte per token."""
    typed = typed_columns(header.columns, columns, positions, record_shape)
    return [values for name, values in typed.items() if name != STARTS] + [
        values.view(np.uint8) for name, values in typed.items() if name == STARTS
    ]


def unpack(
    header: Header, kind: int, payload: memoryview
) -> tuple[NDArray[np.uint32], SparseTargets, dict[str, NDArray[Any]]]:
    """
    Tokens, targets and columns of a frame, views into it where nothing had to be merged.

    Raises:
        ValueError: The draws are not sorted; names the position.
    """
    positions, size, num_columns, drawn = _PREFIX.unpack_from(payload)
    place = _PREFIX.size

    def take(count: int, dtype: type[np.generic]) -> NDArray[Any]:
        nonlocal place
        array = np.frombuffer(payload, dtype, count, place)
        place += array.nbytes
        return array

    def take_columns(num_values: int) -> dict[str, NDArray[Any]]:
        assert num_columns == len(header.columns)
        sizes = dict.fromkeys(header.columns, positions) | {RECORD_LOGPROB: num_values}
        columns = {name: take(sizes[name], np.float16) for name in header.columns if name != STARTS}
        return columns | ({STARTS: take(positions + 1, np.bool_)} if STARTS in header.columns else {})

    if kind == _DRAWS:
        draws = take(drawn * size, np.uint32).reshape(drawn, size)
        tokens = take(positions + 1, np.uint32)
        targets, columns = merge_draws(draws), take_columns(draws.size)
        if RECORD_LOGPROB in columns:  # of the first of equal draws
            assert targets.counts is not None
            before = np.cumsum(targets.counts, dtype=np.int64) - targets.counts
            columns[RECORD_LOGPROB] = columns[RECORD_LOGPROB][before]
        if drawn < positions:
            targets = _spread(targets, take(positions, np.bool_))
        return tokens, targets, columns
    offsets, token_ids = take(positions + 1, np.int64), take(size, np.uint32)
    tokens = take(positions + 1, np.uint32)
    if kind == _COUNTS:
        columns = take_columns(size)
        return tokens, SparseTargets(token_ids=token_ids, counts=take(size, np.uint8), offsets=offsets), columns
    assert kind == _WEIGHTS
    weights = take(size, np.float32)
    return tokens, SparseTargets(token_ids=token_ids, weights=weights, offsets=offsets), take_columns(size)


def _spread(targets: SparseTargets, counted: NDArray[np.bool_]) -> SparseTargets:
    """The targets of the positions that count, at their places among all of them."""
    offsets = np.zeros(counted.size + 1, np.int64)
    offsets[1:][counted] = np.diff(targets.offsets)
    np.cumsum(offsets, out=offsets)
    return SparseTargets.trusted(targets.token_ids, targets.counts, None, offsets)
