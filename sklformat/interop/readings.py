"""
What a reader of files of another system is asked for, what it gives, and arithmetic on its rows.

A reader gives rows that describe the next token, whatever its files do: it shifts them, empties the positions that a
mask leaves out, removes padding, and turns values into natural log-probs.  ``checks`` then looks at every value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sklformat.format import layout
from sklformat.format.columns import RECORD_LOGPROB, STARTS
from sklformat.interop.columns import Row, check_size, offsets_of
from sklformat.interop.tokens import TokenFile

Values = Literal["counts", "logprobs"]
NO_PROBABILITY = -500.0
"""Log-probs below it are no teacher's: systems fill up with -inf, or -1000 and less, where they have no record."""
PROBABILITIES = {"logprobs": "log-probabilities", "probs": "probabilities", "logits": "logits"}
"""What values of a file may be, by their name on the command line."""
_HOW_MADE = "does not say how its records were made"
_WANTING = {
    "tokens": "holds no token ids",
    "codec": "does not say how its values are packed",
    "vocab_size": "does not say how many ids the teacher has",
    "k": "holds whole distributions",
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """
    What the user says of a source; None: nothing.

    Attributes:
        vocab_size, rounds, sampler: Of the cache.
        k, seed: Of draws from a source that holds whole distributions.
        kind: "counts" or "ratios", where the source holds both.
        convention: "next": row t describes token t + 1; "own": token t.
        values: A key of ``PROBABILITIES``.
        columns: Name in the source by our name; a name may end in [i], the list i of each position.
        codec: File that says how values are packed.
        tokens: Ids of each sequence, from another file.
        drop_last_row: Sequences of L tokens have L rows; leave out the last.
    """

    vocab_size: int | None = None
    rounds: int | None = None
    sampler: str | None = None
    k: int | None = None
    seed: int | None = None
    kind: str | None = None
    convention: str | None = None
    values: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    codec: Path | None = None
    tokens: TokenFile | None = None
    drop_last_row: bool = False


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A sequence that is in the source but can't be read, and why."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """
    What a source holds.

    Attributes:
        rows: Its sequences from a number on, in an order that is always the same.
        values: What ``Row.values`` are: "counts", which sum to ``rounds``, or natural "logprobs".
        vocab_size: Ids are below it.
        sampler: A sampler of the format; topk or topp: biased.
        rounds: 0 for logprobs.
        columns: Optional columns that every row has.
        provenance: What the source says of itself, as JSON: teacher, temperature, k; kept in the header.
        says: Sentences: which token a row describes, what a value is, what is known of the rest.
        renormalised: Whether each position's weights were made to sum to 1 by the source or its reader; None: unknown,
            the sums tell.
        tokens_given: Whether the tokens came from ``Asked.tokens``.
    """

    rows: Callable[[int], Iterator[Row | Unreadable]]
    values: Values
    vocab_size: int
    sampler: str
    rounds: int = 0
    columns: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    renormalised: bool | None = None


def require(path: Path, **settings: object) -> None:
    """
    The user must have said these.

    Raises:
        ValueError: Some are None; names the flags.
    """
    missing = {name: _WANTING.get(name, _HOW_MADE) for name, value in settings.items() if value is None}
    if missing:
        wants = " and ".join(dict.fromkeys(missing.values()))
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ValueError(f"{path}: {wants}; give {flags}")


def truncated_sampler(path: Path, kind: str, asked: Asked) -> str:
    """
    The sampler of records that are the most likely ids of each position, whatever they are used for.

    Raises:
        ValueError: The user says that they were drawn.
    """
    if asked.sampler in layout.UNBIASED_SAMPLERS:
        raise ValueError(
            f"{path}: {kind} holds the most likely ids of each position, which are no draws of {asked.sampler}; leave "
            "out --sampler, or give --sampler topk or topp"
        )
    return asked.sampler or "topk"


def refuse_flags(path: Path, kind: str, asked: Asked, takes: Collection[str]) -> None:
    """
    Of the flags that describe a source, a kind takes those that its files leave open.

    Args:
        path: The source.
        kind: Its kind.
        asked: What the user said.
        takes: Names in ``Asked`` that mean something for this kind; ``kind`` always does, it is about the cache.

    Raises:
        ValueError: Another one was given; names the flags.
    """
    others = {f.name: getattr(asked, f.name) for f in fields(asked) if f.name not in ("kind", *takes)}
    given = [
        "--" + name.replace("_", "-")
        for name, value in others.items()
        if value not in (None, {}) and value is not False
    ]
    if given:
        raise ValueError(f"{path}: {', '.join(given)}: of no use for {kind}; leave it out")


def select(row: Row, records: NDArray[np.bool_]) -> Row:
    """A row without the records [nnz] that are False."""
    if records.all():
        return row
    columns = dict(row.columns)
    if RECORD_LOGPROB in columns:
        columns[RECORD_LOGPROB] = columns[RECORD_LOGPROB][records]
    offsets = offsets_of(records)[row.offsets]
    return Row(row.input_ids, row.token_ids[records], row.values[records], offsets, columns)


def without_fillers(row: Row) -> Row:
    """A row without the records whose log-prob says that they are none; NaN stays, for a check to see."""
    with np.errstate(invalid="ignore"):
        return select(row, ~(row.values < NO_PROBABILITY))


def blank(row: Row, positions: NDArray[np.bool_]) -> Row:
    """A row without records, and so without numbers about them, at the positions [T] that are True."""
    if not positions.any():
        return row
    row = select(row, np.repeat(~positions, np.diff(row.offsets)))
    columns = {
        name: values if name in (STARTS, RECORD_LOGPROB) else np.where(positions, 0, values)
        for name, values in row.columns.items()
    }
    return Row(row.input_ids, row.token_ids, row.values, row.offsets, columns)


def without_last_row(row: Row) -> Row:
    """
    Of L tokens with L rows the first L - 1 rows; the last is about a token behind the sequence.

    Raises:
        ValueError: There are not as many rows as tokens.
    """
    tokens, rows = row.input_ids.size, row.offsets.size - 1
    if rows != tokens:
        raise ValueError(f"{tokens} tokens and {rows} rows: there is no last row too many; leave out --drop-last-row")
    end = int(row.offsets[-2])
    ends = {STARTS: tokens, RECORD_LOGPROB: end}
    columns = {name: values[: ends.get(name, rows - 1)] for name, values in row.columns.items()}
    return Row(row.input_ids, row.token_ids[:end], row.values[:end], row.offsets[:-1], columns)


def without_first_row(row: Row) -> Row:
    """
    Of L tokens with a row about each the L - 1 rows about tokens 1 to L - 1: the convention "own".

    Raises:
        ValueError: There are not as many rows as tokens.
    """
    tokens, rows = row.input_ids.size, row.offsets.size - 1
    if rows != tokens:
        raise ValueError(
            f"{tokens} tokens and {rows} rows: where row t describes token t there is one row for each token"
        )
    begin = int(row.offsets[1])
    begins = {STARTS: 0, RECORD_LOGPROB: begin}
    columns = {name: values[begins.get(name, 1) :] for name, values in row.columns.items()}
    return Row(row.input_ids, row.token_ids[begin:], row.values[begin:], row.offsets[1:] - begin, columns)


def log_softmax(values: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Natural log-probs over the records of each position, of logits [nnz] with offsets [T + 1]; NaN stays NaN."""
    logits = values.astype(np.float64)
    if not logits.size:
        return logits
    lengths = np.diff(offsets)
    starts = offsets[:-1][lengths > 0]
    lengths = lengths[lengths > 0]
    with np.errstate(invalid="ignore"):  # of an infinite logit, which a check refuses
        logits -= np.repeat(np.maximum.reduceat(logits, starts), lengths)
        logits -= np.repeat(np.log(np.add.reduceat(np.exp(logits), starts)), lengths)
    return logits


def log_probs(values: NDArray[Any], offsets: NDArray[np.int64], kind: str) -> NDArray[np.float64]:
    """Natural log-probs [nnz] of values of a kind of ``PROBABILITIES``; logits are normalised over their position."""
    if kind == "logits":
        return log_softmax(values, offsets)
    if kind == "probs":
        with np.errstate(divide="ignore", invalid="ignore"):  # of 0 and less, which a check refuses
            return np.log(values.astype(np.float64))
    return values.astype(np.float64)


def within_documents(row: Row, documents: NDArray[Any]) -> Row:
    """
    A row with the numbers [L] of its tokens' documents kept as borders, 0 for padding.

    A position has no records where the next token is of a different document, or padding.

    Raises:
        ValueError: There are not as many numbers as tokens.
    """
    check_size("attention_mask", documents, row.input_ids.size, "tokens")
    outside = (documents[1:] != documents[:-1]) | (documents[1:] == 0)
    row = blank(row, outside)
    return replace(row, columns={**row.columns, STARTS: starts_of(documents)})


def starts_of(segments: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a document begins, of the number [L] of each token's document."""
    starts = np.ones(segments.size, np.bool_)
    starts[1:] = segments[1:] != segments[:-1]
    return starts
