"""Rows of .jsonl, a line each, and of .json, an array of them; one row in memory at a time."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from sklformat.errors import describe_bad_json

MAX_ROW_CHARS = 1 << 25
"""Characters of the JSON of one row; as Python's objects they take some 30 times as many bytes at worst."""

_SPACE = re.compile(r"[ \t\n\r]*")


def read_lines(pieces: Iterable[str]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """
    Rows of JSON lines; blank lines are left out, and counted.

    Args:
        pieces: Of the text.

    Yields:
        Number from 0, place, and fields of each row.

    Raises:
        ValueError: A line that is no JSON object, or too long; it is named.
    """
    for number, line in _lines(pieces):
        if not line or line.isspace():
            continue
        place = f"line {number + 1}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(describe_bad_json(error, place)) from None
        yield number, place, _checked(row, place)


def read_array(pieces: Iterable[str]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """
    Rows of one JSON array; a file that begins with an object instead has a row per line.

    Args, Yields:
        As ``read_lines``.

    Raises:
        ValueError: Neither of the two; a row that is no JSON object, or too long; it is named.
    """
    reader = _Reader(pieces)
    if reader.next_char() == "{":
        yield from _read_objects(reader.rest())
        return
    if reader.next_char() == "":
        return
    if reader.take() != "[":
        raise ValueError("is no array of rows, such as [{…}, {…}], and has no row per line")
    for number in itertools.count():
        if reader.next_char() == "]" and number == 0:
            reader.take()
            break
        place = f"row {number}"
        yield number, place, _checked(reader.value(place), place)
        after = reader.take()
        if after == "]":
            break
        if after != ",":
            raise ValueError(f"{place} is followed by {after!r}, must be ',' or ']'" if after else _CUT_SHORT)
    if reader.next_char():
        raise ValueError("has more behind its array of rows")


_CUT_SHORT = "ends before its array of rows does"


def _read_objects(pieces: Iterable[str]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    first = True
    try:
        for row in read_lines(pieces):
            first = False
            yield row
    except ValueError as error:
        if first:
            raise ValueError(f"is one object, must be an array of rows, or have a row per line ({error})") from None
        raise


def _checked(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is {kind_of(row)}, must be an object with fields")  # noqa: TRY004  the data is wrong, not the call
    return row


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    kinds = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, dict) else f"of type {type(value).__name__}")


def _lines(pieces: Iterable[str]) -> Iterator[tuple[int, str]]:
    number, held, length = 0, list[str](), 0
    for piece in pieces:
        first, *others = piece.split("\n")
        held.append(first)
        length += len(first)
        if length > MAX_ROW_CHARS:
            raise _too_long(f"line {number + 1}")
        if others:
            yield number, "".join(held)
            yield from enumerate(others[:-1], number + 1)
            number += len(others)
            held, length = [others[-1]], len(others[-1])
    if length:
        yield number, "".join(held)


def _too_long(place: str) -> ValueError:
    return ValueError(f"{place} has more than {MAX_ROW_CHARS:,} characters, which is the limit of a row")


class _Reader:
    """JSON values of a text that comes in pieces."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)
        self._text, self._at = "", 0
        self._decoder = json.JSONDecoder()

    def next_char(self) -> str:
        """The next character that is no space, left where it is; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow(1):
                return ""

    def take(self) -> str:
        """The same, taken."""
        char = self.next_char()
        self._at += 1
        return char

    def value(self, place: str) -> Any:
        """The next value; an object is decoded once all of it is there."""
        char = self.next_char()
        if char != "{":  # nothing else is a row, and only an object says where it ends
            if not char:
                raise ValueError(_CUT_SHORT)
            raise ValueError(f"{place} begins with {char!r}, must be an object with fields")
        while True:
            length = len(self._text) - self._at
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value  # noqa: TRY300
            except (ValueError, RecursionError) as error:
                if length > MAX_ROW_CHARS:
                    raise _too_long(place) from None
                if isinstance(error, RecursionError) or not self._grow(length):  # at least doubled, hence few rounds
                    raise ValueError(describe_bad_json(error, place)) from None

    def rest(self) -> Iterator[str]:
        """What was not taken yet, in pieces."""
        yield self._text[self._at :]
        yield from self._pieces

    def _grow(self, least: int) -> bool:
        """Read at least this many characters more, or to the end; whether there were any."""
        parts = [self._text[self._at :]]
        more = 0
        while more < least and (piece := next(self._pieces, "")):
            parts.append(piece)
            more += len(piece)
        self._text, self._at = "".join(parts), 0
        return more > 0
