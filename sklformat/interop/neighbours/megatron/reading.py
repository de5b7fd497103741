"""
The sequences of a directory of Megatron's, with the tokens that the user gives: none are in the tars.

All ranks of one member are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.format.columns import STARTS
from sklformat.interop.columns import Row, offsets_of
from sklformat.interop.neighbours.megatron.batches import (
    FILLER_ID,
    FILLER_LOGPROB,
    NO_RECORD,
    Batch,
    check_vocab,
    joined,
)
from sklformat.interop.neighbours.megatron.tars import TAR, Tars
from sklformat.interop.readings import Asked, Reading, Unreadable, refuse_flags, require
from sklformat.interop.tokens import check_no_more, next_tokens


def recognise(path: Path) -> str | None:
    """A directory with tars of these names."""
    return "megatron" if path.is_dir() and any(TAR.fullmatch(file.name) for file in path.iterdir()) else None


def read(path: Path, kind: str, asked: Asked) -> Reading:
    """
    As ``kinds.open_reading``.

    Raises:
        ValueError: --vocab-size or --tokens is missing, or the vocabulary is too large for 17 bits.
        CorruptError: A file is damaged, ranks or iterations are missing or there twice, or tars are of several runs.
        UnsupportedError: A later layout.
    """
    refuse_flags(path, kind, asked, ("vocab_size", "tokens"))
    require(path, vocab_size=asked.vocab_size, tokens=asked.tokens)
    assert asked.vocab_size is not None
    check_vocab(path, asked.vocab_size)
    tars = Tars(path)
    saver, reader = tars.meta.get("saver", {}), _Reader(tars, asked)
    says = [
        "row t describes token t + 1; where there are as many tokens as rows the last row is left out",
        f"the values are log-probabilities over the whole vocabulary, of the top {saver.get('k', 'k')}"
        + ("" if saver.get("p") is None else f", cut at top p {saver['p']}"),
        f"{tars.layout}; tokens go with {tars.unit} {tars.steps[0][0]} to {tars.steps[-1][1] - 1}, in that order",
    ]
    if tars.ranks[0] > 1:
        says.append(
            f"sequences are put together from {tars.ranks[0]} context-parallel ranks, as Megatron divides whole ones; "
            "packed ones (--sft) are divided by documents, which these files do not tell"
        )
    if tars.left_out:
        says.append(f"left out as replaced or unfinished: {', '.join(tars.left_out)}")
    return Reading(
        rows=reader.rows,
        values="logprobs",
        vocab_size=asked.vocab_size,
        sampler="topk" if saver.get("p") is None else "topp",
        columns=(STARTS,) if reader.has_documents else (),
        provenance={
            "layout": tars.layout,
            tars.unit: [tars.steps[0][0], tars.steps[-1][1]],
            "data_parallel": tars.ranks[1],
            "context_parallel": tars.ranks[0],
            "temperature": 1,
            **{name: tars.meta[name] for name in ("hash", "identifiers", "saver") if name in tars.meta},
        },
        says=tuple(says),
        renormalised=False,
    )


class _Reader:
    """The sequences, with the tokens that the user gives."""

    def __init__(self, tars: Tars, asked: Asked) -> None:
        assert asked.tokens is not None
        self._tars, self._tokens = tars, asked.tokens
        self._counts: dict[int, int] = {}  # sequences of each step, as far as they are known
        first = tars.load(0)
        self.has_documents = first[0][0][0].documents is not None

    def rows(self, start: int) -> Iterator[Row | Unreadable]:
        tokens = self._tokens.rows(start)
        number = start
        for step in range(len(self._tars.steps)):
            count = self._counts.get(step)
            if count is not None and count <= start:
                start -= count
                continue
            loaded = self._tars.load(step)
            places = [
                (m, dp, i)
                for m in range(len(loaded[0][0]))
                for dp in range(len(loaded[0]))
                for i in range(loaded[0][dp][m].values.shape[1])
            ]
            self._counts[step] = len(places)
            for m, dp, i in places[start:]:
                ids = next_tokens(tokens, self._tars.path, number)
                try:
                    row: Row | Unreadable = self._row(ids, [ranks[dp][m] for ranks in loaded], i)
                except ValueError as error:
                    row = Unreadable(str(error))
                yield row
                number += 1
            start = max(start - len(places), 0)
        check_no_more(tokens, self._tars.path)

    def _row(self, tokens: NDArray[Any], ranks: Sequence[Batch], number: int) -> Row:
        if any(number >= rank.values.shape[1] for rank in ranks):
            raise ValueError("context-parallel ranks differ in sequences")
        pairs = [rank.sequence(number) for rank in ranks]
        values = joined([logs for logs, _ in pairs], FILLER_LOGPROB)
        ids = joined([ids for _, ids in pairs], FILLER_ID)
        rows = len(values)
        if tokens.size not in (rows, rows + 1):
            raise ValueError(f"{tokens.size} tokens for {rows} rows; give the {rows + 1} that Megatron's data set has")
        columns = {}
        if self.has_documents:
            columns[STARTS] = _starts(ranks[0].documents, number, rows, tokens.size)
        if tokens.size == rows:
            values, ids = values[:-1], ids[:-1]
        there = ~(values < NO_RECORD)  # so that NaN stays, and is found
        return Row(tokens, ids[there], values[there].astype(np.float64), offsets_of(there.sum(1)), columns)


def _starts(documents: NDArray[Any] | None, number: int, rows: int, length: int) -> NDArray[np.bool_]:
    """Where documents begin, of ``length`` tokens with ``rows`` rows."""
    if documents is None:
        raise ValueError("cu_seqlens_padded is missing, which the first sequences have")
    bounds = documents[number].astype(np.int64)
    if bounds.size < 2 or bounds[0] != 0 or bounds[-1] != rows or (np.diff(bounds) < 0).any():
        raise ValueError(f"cu_seqlens_padded does not rise from 0 to {rows}")
    starts = np.zeros(length, np.bool_)
    starts[bounds[bounds < rows]] = True
    return starts
