"""
llama.cpp's base logits (``llama-perplexity --kl-divergence-base``): whole distributions, from which records are drawn.

A file is a head, the tokens of all chunks, and rows of V log-probs in 16 bits, ``scale * q + least``, for the positions
in the second half of each chunk.  They reach 16 nats below the largest of the row; what is less is clipped to q = 0.
Chunks are mapped one at a time, so that memory depends on the vocabulary alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError
from sklformat.interop.columns import Row, offsets_of
from sklformat.interop.notes import check_agrees
from sklformat.interop.readings import Asked, Reading, Unreadable, refuse_flags, require
from sklformat.sampler import MAX_COUNT_ROUNDS, draw

KIND = "llama-cpp-kld"
_MAGIC = b"_logits_"
_HEAD_BYTES = len(_MAGIC) + 3 * 4
_SIDE_WORDS = 4  # of 16 bits in front of a row: two float32, scale and least
_STEPS = 65535
_CLIP_NATS = 16.0
_BLOCK_VALUES = 1 << 21  # log-probs worked on at once
_MAX_VOCAB = 1 << 24
_SUM_SLACK = 0.01  # 16 bits of 16 nats are off by 1.2e-4 at most, and errors cancel


def recognise(path: Path) -> str | None:
    """The kind of a file that begins as these do."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return KIND if file.read(len(_MAGIC)) == _MAGIC else None


def read(path: Path, kind: str, asked: Asked) -> Reading:
    """
    Records of each chunk, drawn by the sampler, rounds, k and seed that are asked for; chunk c by sequence number c.

    Raises:
        CorruptError: The head is none, or the file's size does not fit it.
        ValueError: The user must say how to draw, or contradicts the file.
        OSError: The system's own.
    """
    refuse_flags(path, kind, asked, ("vocab_size", "rounds", "sampler", "k", "seed"))
    require(path, sampler=asked.sampler)
    drawing = _drawing(path, asked)
    draw(np.zeros((1, 1), np.float32), **drawing, sequence=0)  # refuses here what it can't be asked for
    head = _read_head(path)
    check_agrees(path, "vocab_size", asked.vocab_size, head.vocab_size)
    is_top = drawing["sampler"] == "topk"
    is_counts = not is_top and drawing["rounds"] <= MAX_COUNT_ROUNDS
    clipped = "they are left out" if is_top else "they share what the others leave of 1"
    return Reading(
        rows=lambda start: _rows(path, head, drawing, start),
        values="counts" if is_counts else "logprobs",
        vocab_size=head.vocab_size,
        sampler=str(drawing["sampler"]),
        rounds=drawing.get("rounds", 0),
        provenance={
            "chunks": head.chunks,
            "tokens_per_chunk": head.chunk_tokens,
            "temperature": 1,
            **{name: value for name, value in drawing.items() if name != "sampler"},
        },
        says=(
            "the row of position t describes token t + 1; positions in the first half of each chunk have none",
            "the values are log-probabilities of the whole vocabulary in 16 bits, from which records were taken here",
            f"values {_CLIP_NATS:g} nats below the largest of their position are clipped, at most so much; {clipped}",
            "a model's token for the beginning of a text stood in place of each chunk's first, which the file keeps",
        ),
        renormalised=False,
    )


def _drawing(path: Path, asked: Asked) -> dict[str, Any]:
    """Arguments of ``draw``."""
    if asked.sampler == "topk":
        require(path, k=asked.k)
        if asked.rounds is not None or asked.seed is not None:
            raise ValueError(f"{path}: --sampler topk draws nothing; leave out --rounds and --seed")
        return {"sampler": "topk", "k": asked.k}
    if asked.sampler not in ("multinomial", "systematic"):
        raise ValueError(
            f"{path}: holds whole distributions; --sampler must be multinomial, systematic or topk, got {asked.sampler}"
        )
    require(path, rounds=asked.rounds)
    if asked.k is not None:
        raise ValueError(f"{path}: --k is for --sampler topk; --rounds says how often {asked.sampler} draws")
    return {"sampler": asked.sampler, "rounds": asked.rounds, "seed": asked.seed or 0}


class _Head(NamedTuple):
    chunk_tokens: int
    vocab_size: int
    chunks: int

    @property
    def first(self) -> int:
        """The first position of a chunk that has a row."""
        return self.chunk_tokens // 2

    @property
    def rows(self) -> int:
        return self.chunk_tokens - 1 - self.first

    @property
    def row_words(self) -> int:
        """Of 16 bits; an odd vocabulary has one of padding."""
        return 2 * ((self.vocab_size + 1) // 2) + _SIDE_WORDS

    @property
    def chunk_bytes(self) -> int:
        return 2 * self.rows * self.row_words

    @property
    def body(self) -> int:
        """Where rows begin in the file."""
        return _HEAD_BYTES + 4 * self.chunks * self.chunk_tokens

    @property
    def file_bytes(self) -> int:
        return self.body + self.chunks * self.chunk_bytes


def _read_head(path: Path) -> _Head:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if len(head) < _HEAD_BYTES or not head.startswith(_MAGIC):
        raise CorruptError(f"not a file of {KIND}: it does not begin with {_MAGIC.decode()} and three sizes", path=path)
    found = _Head(*np.frombuffer(head, "<i4", 3, len(_MAGIC)).tolist())
    if found.chunk_tokens < 3 or not 1 <= found.vocab_size <= _MAX_VOCAB or found.chunks < 1:
        raise CorruptError(
            f"cannot have chunks of {found.chunk_tokens} tokens, vocab_size {found.vocab_size} and {found.chunks} "
            "chunks",
            path=path,
            section="header",
        )
    size = path.stat().st_size
    if size < found.body or size > found.file_bytes:
        raise CorruptError(
            f"has {size} bytes, but {found.chunks} chunks of {found.chunk_tokens} tokens and vocab_size "
            f"{found.vocab_size} need {found.file_bytes}",
            path=path,
            section="header",
        )
    return found


def _rows(path: Path, head: _Head, drawing: dict[str, Any], start: int) -> Iterator[Row | Unreadable]:
    whole = (path.stat().st_size - head.body) // head.chunk_bytes
    for chunk in range(start, head.chunks):
        if chunk >= whole:
            yield Unreadable(f"the file ends before chunk {chunk} of {head.chunks} does: it was not written to its end")
            continue
        tokens = np.fromfile(path, "<i4", head.chunk_tokens, offset=_HEAD_BYTES + 4 * chunk * head.chunk_tokens)
        words = np.memmap(
            path,
            dtype="<u2",
            mode="r",
            offset=head.body + chunk * head.chunk_bytes,
            shape=(head.rows, head.row_words),
        )
        try:
            row: Row | Unreadable = _draw_chunk(tokens, words, head, drawing, chunk)
        except ValueError as error:
            row = Unreadable(str(error))
        yield row


def _draw_chunk(
    tokens: NDArray[Any], words: NDArray[np.uint16], head: _Head, drawing: dict[str, Any], chunk: int
) -> Row:
    ids, values, lengths = [], [], [np.zeros(head.first, np.int64)]
    step = max(_BLOCK_VALUES // head.vocab_size, 1)
    for begin in range(0, head.rows, step):
        position, block = head.first + begin, words[begin : begin + step]
        drawn = draw(_log_probs(block, head.vocab_size, position), **drawing, sequence=chunk, first_position=position)
        if drawn.counts is not None:
            numbers: NDArray[Any] = drawn.counts
        else:
            assert drawn.weights is not None
            numbers = np.log(drawn.weights.astype(np.float64))
        kept = np.ones(numbers.size, np.bool_)
        if drawing["sampler"] == "topk":  # clipped values have no order, which of them came along says nothing
            at = np.repeat(np.arange(len(block)), np.diff(drawn.offsets))
            kept = (block[at, _SIDE_WORDS + drawn.token_ids] > 0) | ~_clipped(_sides(block)[at, 0])
        ids.append(drawn.token_ids[kept])
        values.append(numbers[kept])
        lengths.append(np.diff(offsets_of(kept)[drawn.offsets]))
    return Row(tokens, np.concatenate(ids), np.concatenate(values), offsets_of(np.concatenate(lengths)))


def _sides(words: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Scale and least [n, 2] of each row."""
    return np.ascontiguousarray(words[:, :_SIDE_WORDS]).view("<f4").astype(np.float32)


def _clipped(scale: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether a row's values reach down to the clip."""
    return scale * _STEPS > _CLIP_NATS * 0.999


def _log_probs(words: NDArray[np.uint16], vocab_size: int, position: int) -> NDArray[np.float32]:
    """
    Log-probs [n, V] of rows of words, the first of them about ``position``.

    What is clipped shares what the others leave of 1, and is no more than the clip.

    Raises:
        ValueError: A row is no distribution; names its position.
    """
    sides = _sides(words)
    scale, least = sides[:, 0], sides[:, 1]
    bad = ~(np.isfinite(sides).all(1) & (scale >= 0) & (scale < _CLIP_NATS * 1.001 / _STEPS) & (least <= 0))
    if bad.any():
        place = int(np.argmax(bad))
        raise ValueError(f"position {position + place}: scale {scale[place]} and least {least[place]} cannot be")
    steps = words[:, _SIDE_WORDS : _SIDE_WORDS + vocab_size]
    logs = steps.astype(np.float32)
    logs *= scale[:, None]
    logs += least[:, None]
    floors = steps == 0
    number = floors.sum(1)
    with np.errstate(over="ignore", divide="ignore"):  # an infinite sum is refused, no rest is -inf
        at_floor = number * np.exp(least.astype(np.float64))
        above = np.exp(logs).sum(1, dtype=np.float64) - at_floor
        rest = np.log(np.maximum(1 - above, 0) / np.maximum(number, 1))
    wrong = ~((above <= 1 + _SUM_SLACK) & (above + at_floor >= 1 - _SUM_SLACK))
    if wrong.any():
        place = int(np.argmax(wrong))
        raise ValueError(
            f"position {position + place}: probabilities sum to {above[place] + at_floor[place]:.4g}, not 1"
        )
    floor = np.where(_clipped(scale), np.minimum(least, rest), least).astype(np.float32)
    np.copyto(logs, floor[:, None], where=floors)
    return logs
