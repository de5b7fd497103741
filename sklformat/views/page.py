"""
A stretch of text with what teachers and students said of each token, as one file of HTML.

Needs no tokenizer and no model: what they say is handed in.  The page's own parts are page.html, page.css and page.js.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat.cache.reader import Cache, open_cache
from sklformat.errors import FormatError
from sklformat.format import records
from sklformat.format.captures import is_isolated
from sklformat.format.columns import LABEL_LOGPROB
from sklformat.format.header import Header
from sklformat.settings.inspection import ViewConfig

SCALE = 10_000
"""Probabilities are written as whole numbers of this part of one; those of counts as the counts."""
_ID_BITS = 32


class Rows(NamedTuple):
    """
    What a page has a row for at each of T positions: every id that a cache has a record of, and the label.

    The label comes first, where tokens are stored, then the other ids, rising.
    """

    sizes: NDArray[np.int64]
    """[T] number of rows of each position."""

    keys: NDArray[np.uint64]
    """[n] position, whether the id is not the label, id; rising."""

    @property
    def ids(self) -> NDArray[np.int64]:
        """[n] token ids."""
        return (self.keys & np.uint64((1 << _ID_BITS) - 1)).astype(np.int64)

    @property
    def positions(self) -> NDArray[np.int64]:
        """[n] positions, from 0."""
        return np.repeat(np.arange(self.sizes.size), self.sizes)

    @classmethod
    def of(cls, tokens: NDArray[np.uint32] | None, said: Iterable[records.Sequence | str]) -> Rows:
        """The rows of a sequence; none where nobody has anything to say of it."""
        targets = [one.targets for one in said if isinstance(one, records.Sequence)]
        count = targets[0].num_positions if targets else 0
        keys = [_keys(tokens, np.repeat(np.arange(count), np.diff(one.offsets)), one.token_ids) for one in targets]
        if tokens is not None:
            keys.append(_keys(tokens, np.arange(count), tokens[1:]))
        rows = np.unique(np.concatenate([np.zeros(0, np.uint64), *keys]))
        return cls(np.bincount((rows >> np.uint64(_ID_BITS + 1)).astype(np.int64), minlength=count), rows)


def _keys(
    tokens: NDArray[np.uint32] | None, positions: NDArray[np.int64], ids: NDArray[np.uint32]
) -> NDArray[np.uint64]:
    is_other = np.zeros(ids.size, np.uint64) if tokens is None else (ids != tokens[1:][positions]).astype(np.uint64)
    key: NDArray[np.uint64] = (positions.astype(np.uint64) << np.uint64(1) | is_other) << np.uint64(_ID_BITS)
    return key | ids.astype(np.uint64)


@dataclass(frozen=True)
class Stretch:
    """
    Some sequences of caches of the same tokens.

    Attributes:
        caches: Names of the caches.
        headers: Of the caches.
        available: Sequences of the first cache.
        numbers: Of the sequences, counted as in ``cache[i]``.
        tokens: Of each sequence, [T + 1]; None where no cache stores them.
        said: Of each sequence what each cache holds, or why it cannot be shown.
        rows: Of each sequence.
    """

    caches: list[str]
    headers: list[Header]
    available: int
    numbers: list[int] = field(default_factory=list)
    tokens: list[NDArray[np.uint32] | None] = field(default_factory=list)
    said: list[list[records.Sequence | str]] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)

    @property
    def is_isolated(self) -> bool:
        """Whether one of the teachers read documents apart."""
        return any(is_isolated(header.capture) for header in self.headers)

    def ids(self) -> list[int]:
        """Every token id that the page shows, once, rising."""
        parts = [tokens for tokens in self.tokens if tokens is not None] + [rows.ids for rows in self.rows]
        return [] if not parts else [int(token) for token in np.unique(np.concatenate(parts))]


def read_stretch(config: ViewConfig) -> Stretch:
    """
    Read the sequences that a page shows; a damaged or misaligned one is kept as what is wrong with it.

    Raises:
        ValueError: The first cache has no such sequence, or none at all.
        FormatError, OSError: A cache cannot be opened.
    """
    with ExitStack() as stack:
        caches = [stack.enter_context(open_cache(path)) for path in config.caches]
        if not len(caches[0]):
            raise ValueError(f"{config.caches[0]}: holds no sequence, so a page has nothing to show")
        if config.first >= len(caches[0]):
            raise ValueError(
                f"{config.caches[0]}: --first {config.first} is beyond its last sequence, {len(caches[0]) - 1}"
            )
        stretch = Stretch([str(path) for path in config.caches], [cache.header for cache in caches], len(caches[0]))
        shown = 0
        for number in range(config.first, len(caches[0])):
            said = _said(caches, number)
            stored = (one.tokens for one in said if isinstance(one, records.Sequence))
            tokens = next((tokens for tokens in stored if tokens is not None), None)
            rows = Rows.of(tokens, said)
            if stretch.numbers and shown + max(rows.sizes.size, 1) > config.positions:
                break
            shown += max(rows.sizes.size, 1)
            stretch.numbers.append(number)
            stretch.said.append(said)
            stretch.tokens.append(tokens)
            stretch.rows.append(rows)
        return stretch


def _said(caches: list[Cache], number: int) -> list[records.Sequence | str]:
    """What each cache holds of a sequence; words where it is damaged, missing or of other tokens than the first."""
    said: list[records.Sequence | str] = []
    for cache in caches:
        if number >= len(cache):
            said.append(f"sequence {number} is not here; this cache has {len(cache)}")
            continue
        try:
            one = cache[number]
            first = caches[0].alignment_of(number)
        except FormatError as error:
            said.append(f"damaged: {error}")
        else:
            other = f"misaligned: alignment checksum {one.alignment:#018x}, that of the first cache {first:#018x}"
            said.append(one if one.alignment == first else other)
    return said


def render(
    stretch: Stretch,
    texts: dict[int, str] | None = None,
    students: Sequence[str] = (),
    answers: Sequence[Sequence[NDArray[np.float32] | None]] = (),
) -> str:
    """
    The page.

    Args:
        stretch: What it shows.
        texts: Text of each token id; None: ids are shown.
        students: Names of the students.
        answers: Of each student and sequence, the probabilities of its rows [n]; None where there are no tokens.
    """
    parts = zip(stretch.numbers, stretch.tokens, stretch.said, stretch.rows, strict=True)
    counted = [header.rounds if header.kind == "counts" else 0 for header in stretch.headers]
    data = {
        "teachers": [
            {"name": name, "path": path, "drawn": rounds > 0, "scale": rounds or SCALE}
            for name, path, rounds in zip(short_names(stretch.caches), stretch.caches, counted, strict=True)
        ],
        "students": [
            {"name": name, "path": path, "scale": SCALE}
            for name, path in zip(short_names(students), students, strict=True)
        ],
        "texts": texts,
        "sequences": [
            {
                "number": number,
                "tokens": None if tokens is None else tokens.tolist(),
                "sizes": rows.sizes.tolist(),
                "ids": rows.ids.tolist(),
                "teachers": [{"fault": one} if isinstance(one, str) else _teacher(one, tokens, rows) for one in said],
                "students": [None if of[place] is None else _whole(of[place]) for of in answers],
            }
            for place, (number, tokens, said, rows) in enumerate(parts)
        ],
    }
    # In a script element only "<" can end the data; with it written as an escape no text of a corpus can.
    written = json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    page, css, js = _parts()
    for mark, part in {"POLICY": policy(), "/*CSS*/": css, "/*JS*/": js, "/*DATA*/": written}.items():
        page = page.replace(mark, part)
    return page


def policy() -> str:
    """The page's Content-Security-Policy: its own script and style, known by their digests, and nothing else."""
    css, js = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in _parts()[1:])
    own = f"script-src 'sha256-{js}'; style-src 'sha256-{css}'"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


@functools.cache
def _parts() -> tuple[str, str, str]:
    room = files("sklformat.views")
    page, css, js = (room.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    return page, css, js


def short_names(paths: Sequence[str]) -> list[str]:
    """What tells paths apart: without the folders that all begin with, and those that all end with; of one its end."""
    parts = [list(PurePath(path).parts) or [path] for path in paths]
    if len(set(paths)) < 2:
        return ["/".join(own[-2:] if own[-1] == "model" else own[-1:]) for own in parts]
    for end in (0, -1):
        while all(len(own) > 1 for own in parts) and len({own[end] for own in parts}) == 1:
            for own in parts:
                own.pop(end)
    return ["/".join(own) for own in parts]


def _teacher(one: records.Sequence, tokens: NDArray[np.uint32] | None, rows: Rows) -> dict[str, Any]:
    """Weight of each row, 0 where there is no record; confidence in the label and what no record has, where known."""
    targets, sizes = one.targets, np.diff(one.targets.offsets)
    positions = np.repeat(np.arange(sizes.size), sizes)
    weights = np.zeros(rows.keys.size, np.int64)
    places = np.searchsorted(rows.keys, _keys(tokens, positions, targets.token_ids))
    said: dict[str, Any] = {}
    if targets.counts is not None:
        weights[places] = targets.counts
    else:
        assert targets.weights is not None
        weights[places] = np.maximum(np.rint(targets.weights.astype(np.float64) * SCALE), 1)
        sums = np.bincount(positions, weights=targets.weights, minlength=sizes.size)
        said["rest"] = _whole(np.maximum(1 - sums, 0))
    label = one.columns.get(LABEL_LOGPROB)
    if label is not None:
        said["label"] = _whole(np.exp(label.astype(np.float64)))
    return {"weights": weights.tolist(), **said}


def _whole(probs: Any) -> list[int]:
    found: list[int] = np.rint(np.asarray(probs, np.float64) * SCALE).astype(np.int64).tolist()
    return found
