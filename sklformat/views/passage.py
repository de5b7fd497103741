"""
One sequence of a cache, token by token, for a terminal: what the teacher said of the token that follows each.

Needs no tokenizer: the text of tokens is handed in.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Any

import numpy as np

from sklformat.cache.reader import open_cache
from sklformat.errors import FormatError
from sklformat.format.columns import ENTROPY, LABEL_LOGPROB, RECORD_LOGPROB, STARTS
from sklformat.format.header import Header
from sklformat.format.records import Sequence
from sklformat.settings.inspection import InspectConfig
from sklformat.views.characters import columns, is_writable, padded, visible
from sklformat.views.overview import counted

NARROWEST, WIDEST = 80, 120
NO_TOKENIZER = "no tokenizer is at hand; --tokenizer takes one"
_MOST = 16  # records shown of one position; the label's comes too
_TOGETHER = 3  # positions without records in a row that are shown as text
_LINES = 4  # of that text
_FINE, _PLAIN = ("●", "…", "─"), ("*", "~", "-")
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Passage:
    """
    Some positions of one sequence.

    Attributes:
        path: The cache.
        number: Of the sequence, counted as in ``cache[i]``.
        count: Sequences in the cache.
        part: The positions.
        sequence: All of it.
        header: Settings of the cache.
    """

    path: str
    number: int
    count: int
    part: range
    sequence: Sequence
    header: Header

    @property
    def teacher(self) -> tuple[str, str] | None:
        """Name and revision of the teacher on the hub; None: the header names none."""
        said = self.header.capture.get("teacher")
        name, revision = (said.get("name"), said.get("revision")) if isinstance(said, dict) else (None, None)
        return (name, str(revision or "main")) if isinstance(name, str) else None

    def ids(self) -> list[int]:
        """Every token id of these positions, once, rising."""
        targets, tokens = self.sequence.targets, self.sequence.tokens
        parts = [targets.token_ids[targets.offsets[self.part.start] : targets.offsets[self.part.stop]]]
        parts += [] if tokens is None else [tokens[self.part.start : self.part.stop + 1]]
        return [int(token) for token in np.unique(np.concatenate(parts))]


def read_passage(config: InspectConfig) -> Passage:
    """
    Read what ``inspect --sequence`` shows.

    Raises:
        ValueError: The cache has no such sequence, or the sequence no such positions; shows both values.
        FormatError, OSError: The cache cannot be opened, or the sequence is damaged; it is named.
    """
    number = config.sequence
    assert number is not None
    with open_cache(config.path) as cache:
        if number >= len(cache):
            there = f"has {len(cache)}, numbered from 0" if len(cache) else "holds no sequence"
            raise ValueError(f"{config.path}: sequence {number} is asked for, and the cache {there}")
        try:
            sequence = cache[number]
        except FormatError as error:
            error.message += f"; it is sequence {number} of the cache, sklformat verify lists all that is damaged"
            raise
        part = config.part(sequence.targets.num_positions)
        return Passage(str(config.path), number, len(cache), part, sequence, cache.header)


def facts_of(passage: Passage, texts: dict[int, str] | None = None, tokenizer: str = "") -> dict[str, Any]:
    """
    What the page says, for JSON.

    Args:
        passage: What it shows.
        texts: Text of each token id; None: ids are shown.
        tokenizer: Which one made these texts; without them, why there are none.
    """
    header, targets = passage.header, passage.sequence.targets
    return {
        "path": passage.path,
        "sequence": passage.number,
        "sequences": passage.count,
        "num_positions": targets.num_positions,
        "positions": [passage.part.start, passage.part.stop],
        "kind": header.kind,
        "rounds": header.rounds,
        "sampler": header.sampler,
        "tokenizer": tokenizer if texts is not None else None,
        "ids_since": None if texts is not None else tokenizer,
        "tokens_stored": passage.sequence.tokens is not None,
        "rows": [_row(passage, t, texts) for t in passage.part],
    }


def _row(passage: Passage, t: int, texts: dict[int, str] | None) -> dict[str, Any]:
    """One position: its token, the label, and the records, the heaviest first."""

    def token(token_id: int) -> dict[str, Any]:
        return {"id": token_id} | ({} if texts is None else {"text": texts[token_id]})

    one, header = passage.sequence, passage.header
    targets, said = one.targets, one.columns
    begin, end = int(targets.offsets[t]), int(targets.offsets[t + 1])
    ids = targets.token_ids[begin:end].tolist()
    counts = None if targets.counts is None else targets.counts[begin:end].tolist()
    weights = [count / header.rounds for count in counts] if counts else _short(targets.weights, begin, end)
    exact = np.exp(said[RECORD_LOGPROB][begin:end].astype(np.float64)).tolist() if RECORD_LOGPROB in said else None
    records = [
        token(token_id)
        | ({"count": counts[i]} if counts else {})
        | {"weight": weights[i]}
        | ({"probability": _float(exact[i])} if exact else {})
        for i, token_id in enumerate(ids)
    ]
    row: dict[str, Any] = {"position": t}
    if one.tokens is not None:
        row |= {"token": token(int(one.tokens[t])), "label": token(int(one.tokens[t + 1]))}
    if STARTS in said:
        row["document_start"] = bool(said[STARTS][t])
    if ids:
        row |= {"label_probability": _float(np.exp(float(said[LABEL_LOGPROB][t])))} if LABEL_LOGPROB in said else {}
        row |= {"entropy": _float(said[ENTROPY][t])} if ENTROPY in said else {}
        # What was drawn stands for everything; of a head that was kept, the rest is what was not.
        row |= {} if header.rounds else {"rest": _float(max(1 - sum(weights), 0))}
    return row | {"records": sorted(records, key=lambda record: -record["weight"])}


def _short(weights: Any, begin: int, end: int) -> list[float]:
    return [] if weights is None else [_float(weight) for weight in weights[begin:end]]


def _float(value: Any) -> float:
    """A number without the digits that float16 and float32 do not have."""
    return float(f"{float(value):.6g}")


def page(facts: dict[str, Any], width: int = NARROWEST, encoding: str = "utf-8") -> str:
    """
    The page.

    Args:
        facts: As ``facts_of`` gives them.
        width: Columns of the terminal; 80 to 120 are used.
        encoding: What the terminal takes; other characters are escaped.
    """
    return _Page(facts, min(max(width, NARROWEST), WIDEST), encoding).text()


class _Page:
    def __init__(self, facts: dict[str, Any], width: int, encoding: str) -> None:
        self._facts, self._width, self._encoding = facts, width, encoding
        self._fine = is_writable("".join(_FINE) + _EIGHTHS, encoding)
        self._dot, self._more, self._rule = _FINE if self._fine else _PLAIN
        self._places = max(len(str(facts["positions"][1])), 3)
        self._token = (width - 46) // 2
        self._exact = any("probability" in record for row in facts["rows"] for record in row["records"])
        self._bars = 8 if self._exact else 16  # columns of a share of 1; beside shares that the teacher gave, fewer
        self._follows = width - self._places - self._token - 31

    def text(self) -> str:
        lines = [*self._head(), "", *self._table(), *self._foot()]
        return "".join(f"{line.rstrip()}\n" for line in lines)

    def _visible(self, text: str) -> str:
        return visible(text, self._encoding)

    def _head(self) -> list[str]:
        facts, (begin, end) = self._facts, self._facts["positions"]
        drawn = (
            f"{counted(facts['rounds'], 'round')}, {facts['sampler']}"
            if facts["rounds"]
            else f"sampler {facts['sampler']}"
        )
        words = [
            f"{self._visible(facts['path'])}: sequence {facts['sequence']:,} of {facts['sequences']:,}",
            f"positions {begin:,} to {end - 1:,} of {facts['num_positions']:,}",
            f"{facts['kind']} ({drawn})",
        ]
        notes = [f"{self._dot} marks the token that did follow."] if facts["tokens_stored"] else []
        if not facts["tokens_stored"]:
            notes.append("The cache stores no tokens: neither they are shown nor which one did follow.")
        if facts["tokenizer"] is not None:
            notes.append(f"Text by the tokenizer {self._visible(facts['tokenizer'])}.")
        elif facts["ids_since"]:
            notes.append(f"Tokens are shown by their ids: {self._visible(facts['ids_since'])}.")
        rows = facts["rows"]
        if self._exact or any("label_probability" in row for row in rows):
            notes.append("p is what the teacher gave exactly.")
        notes += ["Entropy is in nats."] * any("entropy" in row for row in rows)
        return [*self._filled(", ".join(words)), *self._filled(" ".join(notes))]

    def _filled(self, text: str) -> list[str]:
        return textwrap.wrap(text, self._width, break_on_hyphens=False)

    def _foot(self) -> list[str]:
        (_, end), of = self._facts["positions"], self._facts["num_positions"]
        if end == of:
            return []
        behind = min(of, end + end - self._facts["positions"][0])
        follow = f"{counted(of - end, 'position')} follow{'s' * (of - end == 1)}"
        return ["", f"{follow}; the next: --positions {end}:{behind}"]

    def _table(self) -> Iterator[str]:
        yield self._line("pos", "token", "share", f"{'p':>6}" if self._exact else "", "", "what follows")
        for has_none, rows in groupby(self._facts["rows"], key=lambda row: not row["records"]):
            together = list(rows)
            if has_none and len(together) >= _TOGETHER:
                yield from self._without(together)
                continue
            for row in together:
                yield from self._position(row)

    def _line(self, position: str, token: str, share: str, bar: str, mark: str, follows: str) -> str:
        start = f"{position:>{self._places}}  {padded(token, self._token, self._more)}  {share:>6}  {bar:<16} {mark:1} "
        return start + padded(follows, self._width - columns(start), self._more)

    def _without(self, rows: list[dict[str, Any]]) -> Iterator[str]:
        """Positions in a row that have no record, as text: a prompt, or what isolated documents do not predict."""
        first, last = rows[0]["position"], rows[-1]["position"]
        indent = " " * (self._places + 2)
        yield f"{first:>{self._places}}  to {last}: no records"
        if "token" not in rows[0]:
            return
        is_text = "text" in rows[0]["token"]
        said = [self._visible(row["token"]["text"]) if is_text else f"{row['token']['id']} " for row in rows]
        room, lines = self._width - len(indent) - 2, [""]
        for piece in said:
            for c in piece:
                if columns(lines[-1] + c) > room:
                    lines.append("")
                lines[-1] += c
            if len(lines) > _LINES:
                break
        shown = lines[:_LINES]
        if len(lines) > _LINES:
            shown[-1] = padded(shown[-1], room - 1, self._more) + self._more
        yield from (f"{indent}  {line}" for line in shown)

    def _position(self, row: dict[str, Any]) -> Iterator[str]:
        if row.get("document_start"):
            yield f"{'':>{self._places}}  {self._rule * 2} new document {self._rule * 2}"
        left = [self._name(row["token"])] if "token" in row else [""]
        if "entropy" in row:
            left.append(f"  entropy {row['entropy']:.2f}")
        if "label_probability" in row:
            left.append(f"  p of {self._dot} {_share(row['label_probability'])}")
        right = list(self._records(row))
        for number, (token, said) in enumerate(zip_longest(left, right, fillvalue=None)):
            position = str(row["position"]) if number == 0 else ""
            yield self._line(position, token or "", *(said or ("", "", "", "")))

    def _records(self, row: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
        """Share, bar, mark and text of each line beside a token."""
        label = row["label"]["id"] if "label" in row else None
        if not row["records"]:
            yield "", "", self._dot if label is not None else "", self._said(row, "no record")
            return
        folded: list[float] = []
        for place, record in enumerate(row["records"]):
            if place >= _MOST and record["id"] != label:
                folded.append(record["weight"])
                continue
            bar = self._bar(record["weight"])
            if "probability" in record:
                bar = f"{_share(record['probability']):>6} {bar}"
            yield _share(record["weight"]), bar, self._mark(record["id"] == label), self._name(record)
        if folded:
            yield _share(sum(folded)), self._beside(sum(folded)), "", f"{len(folded)} more together (--json)"
        if row.get("rest", 0) >= 5e-4:
            yield _share(row["rest"]), self._beside(row["rest"]), "", "the rest: all other tokens"
        if label is not None and all(record["id"] != label for record in row["records"]):
            yield "-", "", self._dot, self._said(row, "not among them")

    def _said(self, row: dict[str, Any], why: str) -> str:
        if "label" not in row:
            return why
        name, room = self._name(row["label"]), self._follows - len(why) - 2
        return f"{name if columns(name) <= room else padded(name, room, self._more)}  {why}"

    def _mark(self, is_label: bool) -> str:
        return self._dot if is_label else ""

    def _name(self, token: dict[str, Any]) -> str:
        return f'"{self._visible(token["text"])}"' if "text" in token else str(token["id"])

    def _beside(self, share: float) -> str:
        """The bar of a share that has no one probability."""
        return f"{'':>6} {self._bar(share)}" if self._exact else self._bar(share)

    def _bar(self, share: float) -> str:
        """An importance weight may be more than 1, and is not drawn longer."""
        eighths = round(min(share, 1) * self._bars * 8)
        if not self._fine:
            return "#" * round(eighths / 8)
        return _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _share(value: float) -> str:
    """Three digits behind the point; what is less than they can say, as a power of ten."""
    return f"{value:.3f}" if value >= 5e-4 or value == 0 else f"{value:.0e}"
