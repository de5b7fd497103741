"""
A stretch of text with what teachers and a student said of each token, as one file of HTML.

Needs no tokenizer and no model: what they say is handed in.  The page's own parts are page.html, page.css and page.js.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.cache.reader import Cache, open_cache
from sklformat.errors import FormatError
from sklformat.format.captures import is_isolated
from sklformat.format.columns import LABEL_LOGPROB
from sklformat.format.records import Sequence
from sklformat.settings.inspection import ViewConfig

_DIGITS = 4


@dataclass(frozen=True)
class Stretch:
    """
    Some sequences of caches of the same tokens.

    Attributes:
        caches: Names of the caches.
        numbers: Of the sequences, counted as in ``cache[i]``.
        tokens: Of each sequence, [T + 1]; None where no cache stores them.
        said: Of each sequence what each cache holds, or why it cannot be shown.
        rounds: Of each cache; 0 for kind ratios.
        tokenizer: Fingerprint that the first cache has of its tokenizer.
        vocab_size: Of the first cache.
        is_isolated: Whether the teachers read documents apart.
    """

    caches: list[str]
    rounds: list[int]
    tokenizer: str
    vocab_size: int
    is_isolated: bool
    numbers: list[int] = field(default_factory=list)
    tokens: list[NDArray[np.uint32] | None] = field(default_factory=list)
    said: list[list[Sequence | str]] = field(default_factory=list)

    def ids(self) -> list[int]:
        """Every token id that the page shows, once, rising."""
        parts = [tokens for tokens in self.tokens if tokens is not None]
        parts += [one.targets.token_ids for row in self.said for one in row if isinstance(one, Sequence)]
        return [] if not parts else [int(token) for token in np.unique(np.concatenate(parts))]


def read_stretch(config: ViewConfig) -> Stretch:
    """
    Read the sequences that a page shows; a damaged or misaligned one is kept as what is wrong with it.

    Raises:
        ValueError: The first cache has no such sequence.
        FormatError, OSError: A cache cannot be opened.
    """
    with ExitStack() as stack:
        caches = [stack.enter_context(open_cache(path)) for path in config.caches]
        header = caches[0].header
        if config.first >= len(caches[0]):
            raise ValueError(f"{config.caches[0]}: first is sequence {config.first} of {len(caches[0])}; give less")
        stretch = Stretch(
            [str(path) for path in config.caches],
            [cache.header.rounds for cache in caches],
            header.tokenizer_fingerprint,
            header.vocab_size,
            any(is_isolated(cache.header.capture) for cache in caches),
        )
        shown = 0
        for number in range(config.first, len(caches[0])):
            said = _said(caches, number)
            positions = max((one.targets.num_positions for one in said if isinstance(one, Sequence)), default=1)
            if stretch.numbers and shown + positions > config.positions:
                break
            shown += positions
            stretch.numbers.append(number)
            stretch.said.append(said)
            stored = (one.tokens for one in said if isinstance(one, Sequence))
            stretch.tokens.append(next((tokens for tokens in stored if tokens is not None), None))
        return stretch


def _said(caches: list[Cache], number: int) -> list[Sequence | str]:
    """What each cache holds of a sequence; words where it is damaged, missing or of other tokens than the first."""
    said: list[Sequence | str] = []
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
    student: str | None = None,
    answers: Iterable[tuple[NDArray[np.float32], list[NDArray[np.float32] | None]] | None] = (),
) -> str:
    """
    The page.

    Args:
        stretch: What it shows.
        texts: Text of each token id; None: ids are shown.
        student: Name of the student; None: none is shown.
        answers: Of each sequence the student's probability of each label [T], and of each cache's records [nnz].
    """
    of_students = list(answers) or [None] * len(stretch.numbers)
    parts = zip(stretch.numbers, stretch.tokens, stretch.said, of_students, strict=True)
    data = {
        "caches": stretch.caches,
        "texts": texts,
        "student": student,
        "sequences": [
            {
                "number": number,
                "tokens": None if tokens is None else tokens.tolist(),
                "said": [
                    {"fault": one} if isinstance(one, str) else _columns(one, tokens, rounds)
                    for one, rounds in zip(said, stretch.rounds, strict=True)
                ],
                "student": None if answer is None else _answer(*answer),
            }
            for number, tokens, said, answer in parts
        ],
    }
    # In a script element only "<" can end the data; with it written as an escape no text of a corpus can.
    written = json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    room = files("sklformat.views")
    page, css, js = (room.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    return page.replace("/*CSS*/", css).replace("/*JS*/", js).replace("/*DATA*/", written)


def _columns(one: Sequence, tokens: NDArray[np.uint32] | None, rounds: int) -> dict[str, Any]:
    targets = one.targets
    weights = targets.counts / np.float32(rounds) if targets.counts is not None else targets.weights
    sizes = np.diff(targets.offsets)
    sums = np.bincount(np.repeat(np.arange(sizes.size), sizes), weights=weights, minlength=sizes.size)
    label = one.columns.get(LABEL_LOGPROB)
    confidence: NDArray[Any] | None = None
    if label is not None:
        confidence = np.exp(label.astype(np.float64))
    elif tokens is not None:
        is_label = targets.token_ids == np.repeat(tokens[1:], sizes)
        which = np.repeat(np.arange(sizes.size), sizes)[is_label]
        confidence = np.bincount(which, weights=weights[is_label], minlength=sizes.size)  # type: ignore[index]
    is_said = sizes > 0
    return {
        "exact": label is not None,
        "label": None
        if confidence is None
        else [value if has else None for value, has in zip(_rounded(confidence), is_said.tolist(), strict=True)],
        "sizes": sizes.tolist(),
        "ids": targets.token_ids.tolist(),
        "weights": _rounded(weights),
        "rest": _rounded(np.maximum(1 - sums, 0) * is_said),
    }


def _answer(label: NDArray[np.float32], records: list[NDArray[np.float32] | None]) -> dict[str, Any]:
    return {"label": _rounded(label), "records": [None if one is None else _rounded(one) for one in records]}


def _rounded(values: Any) -> list[float]:
    """Numbers as short as a page needs them."""
    return [round(value, _DIGITS) for value in np.asarray(values, np.float64).tolist()]
