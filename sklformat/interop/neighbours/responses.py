"""
Answers of vLLM and SGLang, a JSON object per line, as their servers or a script wrote them.

Both describe token t in row t.  vLLM: ``prompt_logprobs``, and ``logprobs`` of generated tokens, as objects by token id
or flat lists.  SGLang: ``meta_info`` with ``input_top_logprobs`` and ``output_top_logprobs`` as triples (log-prob,
id, text), or flat arrays, in base64 or not.  Log-probs have the full normaliser; ids are the k most likely, and in
vLLM's also the token itself, which is left out where it is none of these.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat.interop.columns import Row, offsets_of
from sklformat.interop.readings import (
    PROBABILITIES,
    Asked,
    Reading,
    Unreadable,
    log_probs,
    refuse_flags,
    require,
    truncated_sampler,
)
from sklformat.interop.tables import jsonl
from sklformat.interop.tokens import check_no_more, next_tokens

_About = list[tuple[NDArray[np.int64], NDArray[np.float64]]]
"""Ids and values about each token of a part of a sequence."""
_ID_PREFIX = "token_id:"
_NOTHING = (np.zeros(0, np.int64), np.zeros(0))
_FLAT = "input_top_logprobs"


class _Said(NamedTuple):
    """About one token: ids, values, and places among the most likely, from 1 on, 0 where they are not said."""

    ids: NDArray[np.int64]
    values: NDArray[np.float64]
    ranks: NDArray[np.int64]


def recognise(path: Path) -> str | None:
    """``vllm`` or ``sglang`` where the first line is an answer of theirs with log-probs."""
    if path.is_dir() or path.suffix not in (".jsonl", ".json"):
        return None
    line = _unwrapped(jsonl.peek_line(path))
    if line.keys() >= {"input_ids", "token_ids"}:  # plain columns beside what a script kept of an answer
        return None
    meta = line.get("meta_info")
    if isinstance(meta, Mapping) and any("_top_logprobs" in name for name in meta):
        return "sglang"
    parts = [line, *_objects(line.get("choices")), *_objects(line.get("outputs"))]
    return "vllm" if any("prompt_logprobs" in part for part in parts) else None


def read(path: Path, kind: str, asked: Asked) -> Reading:
    """
    The sequences of a file of answers, prompt and generated tokens one after the other.

    Raises:
        ValueError: The user must say more, or says what the kind says itself.
    """
    refuse_flags(path, kind, asked, ("vocab_size", "sampler", "values", "tokens"))
    require(path, vocab_size=asked.vocab_size)
    assert asked.vocab_size is not None
    values = asked.values or "logprobs"
    first = _unwrapped(next(jsonl.read_lines(path)))
    named = {name: first.get(name) for name in ("model", "system_fingerprint")}
    read_line = _read_sglang if kind == "sglang" else _read_vllm

    def rows(start: int) -> Iterator[Row | Unreadable]:
        for number, row in enumerate(_rows(path, read_line, values, asked)):
            if number >= start:
                yield row

    return Reading(
        rows=rows,
        values="logprobs",
        vocab_size=asked.vocab_size,
        sampler=truncated_sampler(path, kind, asked),
        provenance={"engine": kind} | {name: value for name, value in named.items() if isinstance(value, str)},
        says=(
            "row t describes token t, given those before it; rows are moved to the token before",
            f"the values are {PROBABILITIES[values]}"
            + (", normalised over the ids that are there" if values == "logits" else ""),
        ),
        renormalised=True if values == "logits" else None,
    )


def _rows(path: Path, read_line: Any, values: str, asked: Asked) -> Iterator[Row | Unreadable]:
    tokens = None if asked.tokens is None else asked.tokens.rows()
    number = 0
    for line in jsonl.read_lines(path):
        try:
            answers = list(read_line(_unwrapped(line)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            said = str(error) if isinstance(error, ValueError) else f"is no answer with log-probs: {error!r}"
            answers = [Unreadable(said)]
        for answer in answers:
            given = None if tokens is None else next_tokens(tokens, path, number)
            number += 1
            if isinstance(answer, Unreadable):
                yield answer
                continue
            try:
                row = answer.row(given, values)
            except ValueError as error:
                yield Unreadable(str(error))
            else:
                yield row
    if tokens is not None:
        check_no_more(tokens, path)


class _Answer:
    """
    One sequence of an answer.

    Args:
        prompt: Ids, or None where the answer does not say them.
        about_prompt: What is said about the last tokens of the prompt, all of them or fewer.
        output: Ids of the generated tokens.
        about_output: What is said about each of them; empty: nothing.
        seen: Ids that the prompt must have, by their place in ``about_prompt``.
        may_be_zero: Whether an id that is seen as 0 may be another one.
    """

    def __init__(
        self,
        prompt: Sequence[int] | None,
        about_prompt: _About,
        output: Sequence[int],
        about_output: _About,
        seen: Mapping[int, int],
        *,
        may_be_zero: bool = False,
    ) -> None:
        self._prompt, self._about_prompt, self._output, self._about_output = prompt, about_prompt, output, about_output
        self._seen, self._may_be_zero = seen, may_be_zero

    def row(self, given: NDArray[Any] | None, values: str) -> Row:
        """
        About tokens 1 to L - 1, whose ids are those of the answer, or those given.

        Raises:
            ValueError: The parts do not fit together, or the prompt is not known.
        """
        tokens = self._tokens(given)
        about: _About = [_NOTHING] * tokens.size
        prompt_size = tokens.size - len(self._output)
        about_prompt = self._about_prompt
        if len(about_prompt) > prompt_size:
            raise ValueError(f"has log-probs of {len(about_prompt)} prompt tokens, the prompt has {prompt_size}")
        begin = prompt_size - len(about_prompt)
        about[begin:prompt_size] = about_prompt
        for place, seen in self._seen.items():
            if tokens[begin + place] != seen and not (self._may_be_zero and seen == 0):
                raise ValueError(f"its token {begin + place} is {seen}, the prompt's is {tokens[begin + place]}")
        if self._about_output:
            if len(self._about_output) != len(self._output):
                raise ValueError(
                    f"has ids of {len(self._output)} generated tokens, but log-probs of {len(self._about_output)}"
                )
            about[prompt_size:] = self._about_output
        about = about[1:]
        offsets = offsets_of([ids.size for ids, _ in about])
        ids = np.concatenate([ids for ids, _ in about]) if about else _NOTHING[0]
        flat = np.concatenate([flat for _, flat in about]) if about else _NOTHING[1]
        return Row(tokens, ids, log_probs(flat, offsets, values), offsets)

    def _tokens(self, given: NDArray[Any] | None) -> NDArray[np.int64]:
        output = np.asarray(self._output, np.int64)
        if given is None:
            if self._prompt is None:
                raise ValueError("does not say the ids of its prompt; give them with --tokens")
            return np.concatenate([np.asarray(self._prompt, np.int64), output])
        if self._prompt is not None and given[: len(self._prompt)].tolist() != list(self._prompt):
            raise ValueError("says other ids of its prompt than --tokens; give the tokens of these answers")
        at_end = given.size > output.size and (given[given.size - output.size :] == output).all()
        size = len(self._prompt) if self._prompt is not None else given.size - (output.size if at_end else 0)
        return np.concatenate([np.asarray(given[:size], np.int64), output])


def _unwrapped(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """An answer, out of the line of a batch's result file where it lies in one."""
    response = line.get("response")
    body = response.get("body") if isinstance(response, Mapping) else None
    return body if isinstance(body, Mapping) else line


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _read_vllm(line: Mapping[str, Any]) -> Iterator[_Answer]:
    parts = _objects(line.get("choices")) or _objects(line.get("outputs")) or [{}]
    for part in parts:
        # Of completions each choice has the prompt; of chats, and of the class RequestOutput, the whole answer.
        both = {**line, **{name: value for name, value in part.items() if value is not None}}
        said = _said(both.get("prompt_logprobs"))
        about_prompt = [_most_likely(row) for row in said]
        seen = {place: int(row.ids[0]) for place, row in enumerate(said) if row.ids.size}
        output = part.get("token_ids") or []
        about_output = _about_generated(part, output)
        if about_output and not output:
            raise ValueError("has log-probs of generated tokens, but not their ids; ask for return_token_ids")
        if not about_prompt and not about_output:
            raise ValueError("has no log-probs; ask for prompt_logprobs or logprobs")
        if about_prompt and about_prompt[0][0].size == 0:
            seen.pop(0, None)
        yield _Answer(both.get("prompt_token_ids"), about_prompt, output, about_output, seen)


def _about_generated(part: Mapping[str, Any], output: Sequence[int]) -> _About:
    """
    What a choice says about its tokens, in one form for completions, chats and RequestOutput.

    The endpoints name ids, and say no ranks: first comes the token itself, be it among the k most likely or not.
    """
    rows, are_named = part.get("logprobs"), False
    if isinstance(rows, Mapping) and "top_logprobs" in rows:
        rows, are_named = rows["top_logprobs"], True
    elif isinstance(rows, Mapping) and "content" in rows:
        tops = [one["top_logprobs"] for one in rows["content"] or []]
        rows, are_named = [{top["token"]: top["logprob"] for top in row} for row in tops], True
    said = _said(rows, are_named=are_named)
    about = [_most_likely(row) for row in said]
    for place, (row, token) in enumerate(zip(said, output, strict=False)):
        if row.ids.size and token not in row.ids:
            raise ValueError(
                f"has log-probs of the ids {', '.join(map(str, row.ids))}, and none of its generated token {place}, "
                f"which is {token}"
            )
        if are_named:
            about[place] = _without_last(row, token)
    return about


def _said(rows: Any, *, are_named: bool = False) -> list[_Said]:
    """What vLLM says about each token, in its order; whether keys would be texts if they were no ids."""
    if rows is None:
        return []
    if isinstance(rows, Mapping):
        return _flat_rows(rows)
    said = []
    for row in rows:
        ids, values, ranks = list[int](), list[float](), list[int]()
        for key, entry in (row or {}).items():
            is_full = isinstance(entry, Mapping)
            ids.append(_id_of(key, is_named=are_named))
            values.append(float(entry["logprob"] if is_full else entry))
            ranks.append(int((entry.get("rank") if is_full else None) or 0))
        said.append(_Said(np.array(ids, np.int64), np.array(values, np.float64), np.array(ranks, np.int64)))
    return said


def _flat_rows(flat: Mapping[str, Any]) -> list[_Said]:
    ids, values = np.array(flat["token_ids"], np.int64), np.array(flat["logprobs"], np.float64)
    ranks = np.array([rank or 0 for rank in flat["ranks"]], np.int64)
    if not ids.size == values.size == ranks.size:
        sizes = f"{ids.size} token_ids, {values.size} logprobs, {ranks.size} ranks"
        raise ValueError(f"has flat lists of different lengths: {sizes}")
    said = []
    for place, (begin, end) in enumerate(zip(flat["start_indices"], flat["end_indices"], strict=True)):
        if not 0 <= begin <= end <= ids.size:
            raise ValueError(f"token {place} has entries {begin} to {end} of {ids.size}")
        said.append(_Said(ids[begin:end], values[begin:end], ranks[begin:end]))
    return said


def _most_likely(row: _Said) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Without the token itself where it is none of the k most likely, and where it is there twice."""
    kept = row.ranks <= row.ids.size  # of k entries, or k and the token itself: those of rank 1 to their number
    ids, values = row.ids[kept], row.values[kept]
    first = np.sort(np.unique(ids, return_index=True)[1])
    return ids[first], values[first]


def _without_last(row: _Said, token: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of several ids without ranks, without the token itself where it is the least likely: it may be none of k."""
    kept = (row.ids != token) | (row.values > row.values.min(initial=np.inf)) | (row.ids.size == 1)
    return row.ids[kept], row.values[kept]


def _id_of(key: str, *, is_named: bool) -> int:
    digits = key.removeprefix(_ID_PREFIX)
    if not digits.isdecimal() or (is_named and digits == key):  # digits may be a text as well
        raise ValueError(
            f"names tokens by their text ({key!r}), which several may share; ask for return_tokens_as_token_ids"
        )
    return int(digits)


def _read_sglang(line: Mapping[str, Any]) -> Iterator[_Answer]:
    meta = line["meta_info"]
    seen = {
        place: int(entry[1])
        for place, entry in enumerate(meta.get("input_token_logprobs") or [])
        if entry[1] is not None
    }
    if any(name.startswith(f"{_FLAT}_") and "_flat" in name for name in meta):
        about_prompt = _flat_input(meta)
    else:
        about_prompt = _triples(meta.get(_FLAT))
    about_output = _triples(meta.get("output_top_logprobs"))
    if not about_prompt and not about_output:
        raise ValueError("has no log-probs; ask for return_logprob with top_logprobs_num")
    if seen and about_prompt and len(seen) != len(about_prompt):
        raise ValueError(f"has {len(seen)} input_token_logprobs and {len(about_prompt)} input_top_logprobs")
    prompt = line.get("input_ids")
    yield _Answer(
        prompt, about_prompt, line.get("output_ids") or [], about_output, seen if about_prompt else {}, may_be_zero=True
    )


def _triples(rows: Any) -> _About:
    return [
        (np.array([entry[1] for entry in row], np.int64), np.array([entry[0] for entry in row], np.float64))
        if row
        else _NOTHING
        for row in rows or []
    ]


def _flat_input(meta: Mapping[str, Any]) -> _About:
    rows, k = (int(size) for size in meta[f"{_FLAT}_shape"])
    before = int(meta.get(f"{_FLAT}_null_prefix") or 0)
    ids, values = _flat_array(meta, "idx", "int32"), _flat_array(meta, "val", "float32")
    # The number of rows counts those without values in one version of SGLang, and does not in another.
    covered = rows if ids.size == rows * k else rows - before
    if min(rows, k, before) < 0 or not ids.size == values.size == covered * k:
        raise ValueError(f"has {ids.size} ids and {values.size} log-probs in flat arrays of shape [{rows}, {k}]")
    pairs = zip(ids.reshape(covered, k).astype(np.int64), values.reshape(covered, k).astype(np.float64), strict=True)
    return [_NOTHING] * before + list(pairs)


def _flat_array(meta: Mapping[str, Any], name: str, dtype: str) -> NDArray[Any]:
    key = f"{_FLAT}_{name}_flat"
    if key in meta:
        return np.asarray(meta[key], dtype)
    told = str(meta.get(f"{key}_b64_dtype", dtype))
    if told not in ("float16", "float32", "float64", "int16", "int32", "int64"):
        raise ValueError(f"{key}_b64 has numbers of type {told!r}, which is not known here")
    try:
        data = base64.b64decode(meta[f"{key}_b64"], validate=True)
        return np.frombuffer(data, np.dtype(told).newbyteorder("<"))
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{key}_b64 is damaged: {error}") from None
