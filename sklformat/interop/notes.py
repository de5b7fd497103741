"""The note in plain columns that were written from a cache: its settings, so that all of it comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sklformat.errors import CorruptError
from sklformat.format.header import Header
from sklformat.interop.columns import Row, in_row
from sklformat.interop.named import plain_row, value_column
from sklformat.interop.readings import Asked, Reading, Values
from sklformat.interop.tables.files import Table


class Note:
    """
    The note that ``make_note`` made.

    Attributes:
        header: Settings of the cache.
        count: Its sequences.
        shard_sequences: Of one file of it.

    Raises:
        CorruptError: It is none, or says something else than the file's columns ``values``.
    """

    def __init__(self, note: Mapping[str, Any], path: Path, values: Values) -> None:
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


def read_noted(path: Path, table: Table, asked: Asked) -> tuple[Reading, Note]:
    """
    The sequences of a table that was written from a cache, and its note.

    Raises:
        ValueError: What the user says contradicts the note.
        CorruptError: The note is damaged, or a row.
    """
    assert table.note is not None
    values = value_column(path, table.names, asked.kind, has_tokens=False)
    note = Note(table.note, path, values)
    header = note.header
    for name in ("vocab_size", "rounds", "sampler"):
        check_agrees(path, name, getattr(asked, name), getattr(header, name))
    for name, given in (("--convention", asked.convention), ("--values", asked.values), ("--tokens", asked.tokens)):
        if given is not None:
            raise ValueError(f"{path}: was written from a cache and says itself what it holds; leave out {name}")
    if asked.drop_last_row:
        raise ValueError(f"{path}: was written from a cache, whose last row is a real one; leave out --drop-last-row")
    names = ["input_ids", "token_ids", values, *header.columns]

    def rows(start: int) -> Iterator[Row]:
        for number, cells in enumerate(table.rows(names, start), start):
            with in_row(path, number):
                row = plain_row(cells, values)
            yield row

    assert header.sampler is not None
    reading = Reading(
        rows=rows,
        values=values,
        vocab_size=header.vocab_size,
        sampler=header.sampler,
        rounds=header.rounds,
        columns=header.columns,
        says=("row t describes token t + 1, given tokens 0..t",),
    )
    return reading, note


def check_agrees(path: Path, name: str, given: object, known: object) -> None:
    """
    A flag must not contradict what the source says of itself.

    Raises:
        ValueError: It does; shows both values.
    """
    if given is not None and given != known:
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{path}: says {name} {known}, {flag} says {given}; leave {flag} out")
