"""
Kinds that are lines of JSON, one sequence in each: NeMo-Aligner's, slime's and EasyDistill's.

* nemo-aligner: ``tokens``, ``labels`` and ``loss_mask`` [T], ``topk_token_ids`` and ``topk_logits`` [T][k], and
  ``log_sum_exp_logits`` [T]; row t is about ``labels[t]``.
* slime: a first line of metadata; then ``tokens`` of prompt and response, and ``teacher_top_k_ids`` and
  ``teacher_top_k_logprobs`` of the response's ``response_length`` tokens, each row about its own token, of which
  ``teacher_log_probs`` may be there.
* easydistill: a list of {id: probability} of each token of a response; the tokens come from the user, and each must be
  among the ids of its row.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError, describe_bad_json
from sklformat.interop.columns import Row, check_parallel, check_size, offsets_of
from sklformat.interop.readings import Asked, Reading, Unreadable, blank, refuse_flags, require
from sklformat.interop.tables.cells import list_cell
from sklformat.interop.tables.files import find_parts
from sklformat.interop.tables.jsonl import parse_object
from sklformat.interop.tokens import TokenFile, check_no_more, next_tokens

_NEMO = {"tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", "log_sum_exp_logits"}
_METADATA = "__metadata__"
_FIRST_LINE_BYTES = 1 << 26


def recognise(path: Path) -> str | None:
    """The kind that the first line of a file, or of a directory's first file, is of."""
    try:
        first = find_parts(path, "jsonl")[0]
        if first.suffix not in (".jsonl", ".json"):
            return None
        with first.open("rb") as file:
            line = json.loads(file.readline(_FIRST_LINE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(line, dict) and {_METADATA, "distillation_type"} <= line.keys():
        return "slime"
    if isinstance(line, dict) and line.keys() >= _NEMO:
        return "nemo-aligner"
    rows = isinstance(line, list) and len(line) > 0 and all(isinstance(row, dict) and row for row in line)
    certain = rows and all(name.isdecimal() and type(prob) in (int, float) for name, prob in line[0].items())
    return "easydistill" if certain else None


def read(path: Path, kind: str, asked: Asked) -> Reading:
    """
    The sequences of a file, or of a directory's files in the order of the numbers in their names.

    Raises:
        CorruptError: slime's metadata is missing or damaged.
        ValueError: The user must give the vocabulary's size, and EasyDistill's tokens; slime's file holds no
            distributions.
        OSError: The system's own.
    """
    refuse_flags(path, kind, asked, ("vocab_size", *(["tokens"] if kind == "easydistill" else [])))
    require(path, vocab_size=asked.vocab_size)
    assert asked.vocab_size is not None
    parts = find_parts(path, "jsonl")
    return {"nemo-aligner": _read_nemo, "slime": _read_slime, "easydistill": _read_easydistill}[kind](
        path, parts, asked
    )


def _read_nemo(path: Path, parts: tuple[Path, ...], asked: Asked) -> Reading:
    assert asked.vocab_size is not None
    return Reading(
        rows=lambda start: _rows(path, parts, start, _nemo_row),
        values="logprobs",
        vocab_size=asked.vocab_size,
        sampler="topk",
        provenance={"temperature": 1, "tail": "known"},
        says=(
            "row t describes labels[t], which is token t + 1; where loss_mask is 0 there are no records",
            "tokens behind the last one that loss_mask counts are left out, as padding",
            "the values are logits less log_sum_exp_logits, the normaliser of the whole vocabulary",
        ),
    )


def _nemo_row(line: Any) -> Row:
    tokens, labels = _ids(line, "tokens"), _ids(line, "labels")
    mask, lse = _flat(line, "loss_mask"), _flat(line, "log_sum_exp_logits")
    ids, values, offsets = _lists(line, "topk_token_ids", "topk_logits")
    for name, array in (("labels", labels), ("loss_mask", mask), ("log_sum_exp_logits", lse)):
        check_size(name, array, tokens.size, "tokens")
    if offsets.size - 1 != tokens.size:
        raise ValueError(f"topk_token_ids has {offsets.size - 1} rows for {tokens.size} tokens")
    if not (mask != 0).any():
        raise ValueError("loss_mask leaves no position")
    end = int(np.flatnonzero(mask)[-1]) + 1
    masked = mask[:end] == 0
    wrong = ~masked[:-1] & (labels[: end - 1] != tokens[1:end])
    if wrong.any():
        t = int(np.argmax(wrong))
        raise ValueError(f"position {t}: labels has {labels[t]}, but the token that comes next is {tokens[t + 1]}")
    values = values.astype(np.float64) - np.repeat(lse.astype(np.float64), np.diff(offsets))
    records = int(offsets[end])
    row = Row(np.append(tokens[:end], labels[end - 1]), ids[:records], values[:records], offsets[: end + 1])
    return blank(row, masked)


def _read_slime(path: Path, parts: tuple[Path, ...], asked: Asked) -> Reading:
    assert asked.vocab_size is not None
    known = {_slime_metadata(part) for part in parts}
    if len(known) > 1:
        raise CorruptError(f"its files have different top_k: {', '.join(map(str, sorted(known)))}", path=path)
    (k,) = known
    labelled = b'"teacher_log_probs"' in next(_lines(parts[0], 1), ("", b""))[1]
    return Reading(
        rows=lambda start: _rows(path, parts, start, functools.partial(_slime_row, k=k, labelled=labelled), heads=1),
        values="logprobs",
        vocab_size=asked.vocab_size,
        sampler="topk",
        columns=("label_logprob",) if labelled else (),
        provenance={"k": k, "tail": "known"},
        says=(
            "row r describes token r of the response, given all before it; the prompt's positions have no records",
            "the values are log-probabilities over the whole vocabulary",
            *(("teacher_log_probs are kept as label_logprob",) if labelled else ()),
        ),
    )


def _slime_metadata(path: Path) -> int:
    with path.open("rb") as file:
        found = parse_object(file.readline(_FIRST_LINE_BYTES), path, "line 1")
    if not found.get(_METADATA):
        raise CorruptError("does not begin with a line of metadata, which says how rows were made", path=path)
    if (kind := found.get("distillation_type")) != "top_k":
        raise ValueError(f"{path}: is of distillation_type {kind!r}, which holds no distributions; only top_k does")
    k = found.get("top_k")
    if type(k) is not int or k < 1:
        raise CorruptError(f"top_k is {k!r}, must be a number of ids", path=path, section="line 1")
    return k


def _slime_row(line: Any, k: int, *, labelled: bool) -> Row:
    tokens = _ids(line, "tokens")
    ids, values, offsets = _lists(line, "teacher_top_k_ids", "teacher_top_k_logprobs")
    rows, prompt = offsets.size - 1, tokens.size - (offsets.size - 1)
    if line.get("response_length") != rows:
        raise ValueError(f"has {rows} rows for a response_length of {line.get('response_length')}")
    if prompt < 1:
        raise ValueError(f"has {tokens.size} tokens for a response of {rows} behind a prompt")
    if rows and (np.diff(offsets) != k).any():
        r = int(np.argmax(np.diff(offsets) != k))
        raise ValueError(f"row {r} of the response has {offsets[r + 1] - offsets[r]} ids, not {k}, the top_k")
    columns = {}
    if labelled:
        label_logprob = _flat(line, "teacher_log_probs")
        check_size("teacher_log_probs", label_logprob, rows, "rows")
        columns["label_logprob"] = np.concatenate([np.zeros(prompt - 1), label_logprob])
    return Row(tokens, ids, values, np.concatenate([np.zeros(prompt - 1, np.int64), offsets]), columns)


def _read_easydistill(path: Path, parts: tuple[Path, ...], asked: Asked) -> Reading:
    assert asked.vocab_size is not None
    if asked.tokens is None:
        raise ValueError(
            f"{path}: says nothing of the text; give the tokens of each prompt and the response that these rows came "
            "with, to the row's last token, with --tokens"
        )
    return Reading(
        rows=lambda start: _rows(path, parts, start, _easydistill_row, tokens=asked.tokens),
        values="logprobs",
        vocab_size=asked.vocab_size,
        sampler="topk",
        provenance={"tail": "known"},
        says=(
            "row r describes token r of the response, which ends the sequence, and has it among its ids",
            "the prompt's positions have no records",
            "the values are probabilities",
        ),
    )


def _easydistill_row(line: Any, tokens: NDArray[Any]) -> Row:
    if not isinstance(line, list) or not line or not all(isinstance(row, dict) for row in line):
        raise ValueError("is no list of objects, one for each token of a response")
    try:
        ids = np.array([int(name) for row in line for name in row], np.int64)
        probs = np.array([float(prob) for row in line for prob in row.values()])
    except (ValueError, TypeError, OverflowError):
        raise ValueError("has ids or probabilities that are no numbers") from None
    offsets = offsets_of([len(row) for row in line])
    prompt = tokens.size - len(line)
    if prompt < 1:
        raise ValueError(f"has {len(line)} rows, --tokens gives prompt and response {tokens.size} tokens in total")
    rows = np.repeat(np.arange(len(line)), np.diff(offsets))
    there = np.zeros(len(line), np.bool_)
    there[rows[ids == tokens[prompt:][rows]]] = True
    if not there.all():
        r = int(np.argmin(there))
        raise ValueError(
            f"row {r} does not have {tokens[prompt + r]}, which --tokens gives; rows belong to the answer that was "
            "generated with them, to its last token"
        )
    with np.errstate(divide="ignore", invalid="ignore"):  # of 0 and less, which a check refuses
        values = np.log(probs)
    return Row(tokens, ids, values, np.concatenate([np.zeros(prompt - 1, np.int64), offsets]))


def _rows(
    path: Path,
    parts: tuple[Path, ...],
    start: int,
    row_of: Callable[..., Row],
    *,
    heads: int = 0,
    tokens: TokenFile | None = None,
) -> Iterator[Row | Unreadable]:
    """Rows of the lines of all files but the first ``heads`` of each, from number ``start`` on, and of their tokens."""
    given = None if tokens is None else tokens.rows(start)
    lines = itertools.chain.from_iterable(_lines(part, heads) for part in parts)
    for number, (place, line) in enumerate(itertools.islice(lines, start, None), start):
        more = () if given is None else (next_tokens(given, path, number),)
        yield _row(row_of, place, line, *more)
    if given is not None:
        check_no_more(given, path)


def _row(row_of: Callable[..., Row], place: str, line: bytes, *more: NDArray[Any]) -> Row | Unreadable:
    try:
        return row_of(_parsed(line), *more)
    except ValueError as error:
        return Unreadable(f"{place}: {error}")


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(describe_bad_json(error)) from None


def _lines(path: Path, heads: int) -> Iterator[tuple[str, bytes]]:
    """The lines of a file that are not empty, each with the place where it stands."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number > heads and line.strip():
                yield f"{path.name} line {number}", line


def _field(line: Any, name: str) -> Any:
    if not isinstance(line, dict) or not isinstance(line.get(name), list):
        raise ValueError(f"has no list {name}")  # noqa: TRY004  of a file, not of an argument
    return line[name]


def _flat(line: Any, name: str) -> NDArray[Any]:
    return list_cell(_field(line, name), name).flat(name)


def _ids(line: Any, name: str) -> NDArray[Any]:
    return _integers(_flat(line, name), name)


def _integers(array: NDArray[Any], name: str) -> NDArray[Any]:
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} has {array.dtype.name} in place of ids")
    return array if array.size else array.astype(np.int64)


def _lists(line: Any, ids: str, values: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
    """Ids [nnz], values [nnz] and offsets [T + 1] of two lists of lists."""
    flat_ids, offsets = list_cell(_field(line, ids), ids).ragged(ids)
    flat_values, others = list_cell(_field(line, values), values).ragged(values)
    check_parallel(offsets, others, values)
    return _integers(flat_ids, ids), flat_values, offsets
