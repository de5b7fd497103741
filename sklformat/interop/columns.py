"""
Plain columns in npz, Parquet and JSONL: the files that home-made scripts write and read.

One row is one sequence of L tokens with T rows of records:

* ``input_ids``: L ids; ``token_ids``: T lists of ids; and, parallel to these, ``counts`` (integers that sum to the
  number of rounds) or ``logprobs`` (natural logarithms).  An empty list: no record at this position.
* optionally ``label_logprob`` and ``entropy``: T numbers, in nats; ``document_start``: L booleans, true where a
  document begins; ``record_logprob``: T lists parallel to ``token_ids``, the teacher's natural log-probs of these ids.

Parquet: these are the columns, of lists and lists of lists.  JSONL: one JSON object per line with these keys.
npz: flat arrays, nothing pickled, so that lists need offsets:

* ``input_ids`` of all sequences one after the other; those of sequence s are
  ``input_ids[sequence_offsets[s]:sequence_offsets[s + 1]]``, with ``sequence_offsets`` int64 [S + 1];
* ``token_ids``, ``counts`` or ``logprobs``, and ``record_logprob`` of all positions; those of position i, counted over
  all sequences, are ``token_ids[position_offsets[i]:position_offsets[i + 1]]``; each sequence has one position less
  than tokens.

Files written here also carry a note, a JSON object with the settings of the cache they came from: the key
``sklformat`` of Parquet's schema, the array ``sklformat`` of an npz, a file ``<name>.sklformat.json`` beside a JSONL.
Other programs may ignore it.  JSONL and Parquet are read and written sequence by sequence; an npz is read whole.

``tables`` reads and writes these files, ``named`` those that name their columns otherwise; ``checks`` checks values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError
from sklformat.format import layout
from sklformat.format.columns import STARTS

NOTE = "sklformat"
TYPES = {
    "input_ids": np.int32,
    "token_ids": np.int32,
    "counts": np.uint8,
    "logprobs": np.float64,
    **dict.fromkeys(layout.COLUMNS, np.float32),
    STARTS: np.bool_,
}


@dataclass(frozen=True, slots=True)
class Row:
    """
    One sequence in plain columns.

    Attributes:
        input_ids: [L] integers.
        token_ids: [nnz] integers.
        values: [nnz] counts (integers) or natural log-probs (floats).
        offsets: [T + 1] int64, records of each position; from 0 to nnz.
        columns: Optional columns by name: document_start [L] booleans or 0 and 1, record_logprob [nnz] floats, the
            others [T] floats, in nats.
    """

    input_ids: NDArray[Any]
    token_ids: NDArray[Any]
    values: NDArray[Any]
    offsets: NDArray[np.int64]
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@contextlib.contextmanager
def in_row(path: Path, number: int) -> Iterator[None]:
    """Say of a ValueError in which row of which file it is."""
    try:
        yield
    except ValueError as error:
        raise CorruptError(str(error), path=path, section="row", sequence=number) from None


def typed(array: NDArray[Any], name: str) -> NDArray[Any]:
    """
    A column's values, once it is sure that they are a list of numbers, of integers where the column has integers.

    Raises:
        ValueError: They are not.
    """
    kind = np.dtype(TYPES[name]).kind
    kinds, what = {"b": ("biu", "booleans"), "f": ("iuf", "numbers")}.get(kind, ("iu", "integers"))
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        raise ValueError(f"{name} holds something other than {what}")
    return array if array.size else array.astype(TYPES[name])


def no_sequence(path: Path) -> CorruptError:
    """That a file of plain columns has no row."""
    return CorruptError("holds no sequence", path=path)


def check_size(name: str, values: NDArray[Any], size: int, what: str) -> None:
    """
    A column has a value for each of ``size`` tokens, positions, or whatever it stands beside.

    Raises:
        ValueError: It has more or fewer.
    """
    if values.size != size:
        raise ValueError(f"{name} has {values.size} values for {size} {what}")


def offsets_of(lengths: Any) -> NDArray[np.int64]:
    """Prefix sums from 0: [n] lengths become [n + 1] offsets."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def check_parallel(offsets: NDArray[np.int64], others: NDArray[np.int64], name: str) -> None:
    """
    ``token_ids`` and the column beside it have lists of the same lengths, given as offsets [T + 1] each.

    Raises:
        ValueError: They do not; names the position.
    """
    if offsets.size != others.size:
        raise ValueError(f"token_ids has {offsets.size - 1} rows, {name} has {others.size - 1}")
    if (offsets != others).any():
        place = int(np.argmax(offsets != others)) - 1
        ids, values = (int(each[place + 1] - each[place]) for each in (offsets, others))
        raise ValueError(f"position {place}: {ids} token_ids, but {values} {name}")
