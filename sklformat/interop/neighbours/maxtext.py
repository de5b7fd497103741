"""
MaxText's teacher outputs: ArrayRecord files of ``tf.train.Example``, one packed sequence in each record.

A record has ``inputs`` [L], ``top_k_indices`` and ``top_k_logits`` [L * k], raw logits without a normaliser; and, from
some writers, ``targets`` and the documents' numbers.  Row t describes ``targets[t]``: inside a document the next input.
Records are read one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError
from sklformat.format.columns import STARTS
from sklformat.interop.columns import Row, check_size, in_row, no_sequence
from sklformat.interop.readings import Asked, Reading, Unreadable, blank, log_softmax, refuse_flags, require, starts_of
from sklformat.interop.tables.examples import read_example

KIND = "maxtext"
_NAME = re.compile(r"teacher_top_k_part_(\d+)_host_(\d+)\.array_record")
_NEEDED = {"inputs": "iu", "top_k_indices": "iu", "top_k_logits": "f"}
_SEGMENTS = "inputs_segmentation"  # 0 is padding
_OPTIONAL = (_SEGMENTS, "targets", "targets_segmentation")


def recognise(path: Path) -> str | None:
    """The kind of a directory that has files of these names, or of such a file."""
    names = path.iterdir() if path.is_dir() else [path]
    return KIND if any(_NAME.fullmatch(file.name) for file in names) else None


def read(path: Path, kind: str, asked: Asked) -> Reading:
    """
    The sequences of a file, or of a directory's files by part and host.

    Raises:
        CorruptError: Files are missing or damaged.
        ValueError: The user must give the vocabulary's size.
        ModuleNotFoundError: array_record is missing.
        OSError: The system's own.
    """
    refuse_flags(path, kind, asked, ("vocab_size",))
    require(path, vocab_size=asked.vocab_size)
    assert asked.vocab_size is not None
    files = _find_files(path)
    with in_row(path, 0):
        first = next(_examples(files, 0), None)
        if first is None:
            raise no_sequence(path)
        k = _k_of(read_example(first))
        documents = _SEGMENTS in read_example(first)
    end = "; the last row of a document has no records" if documents else ""
    return Reading(
        rows=lambda start: _rows(files, k, start, documents=documents),
        values="logprobs",
        vocab_size=asked.vocab_size,
        sampler="topk",
        columns=(STARTS,) if documents else (),
        provenance={"temperature": 1, "k": k, "tail": "unknown"},
        says=(
            f"row t describes targets[t], which is token t + 1{end}",
            "the values are logits without a normaliser, normalised over the ids that are there",
            *(() if documents else ("where documents and padding are is not known",)),
        ),
        renormalised=True,
    )


def _find_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = {}
    for file in path.iterdir():
        if match := _NAME.fullmatch(file.name):
            found[int(match[1]), int(match[2])] = file
    if not found:
        raise CorruptError("holds no file named teacher_top_k_part_*_host_*.array_record", path=path)
    parts, hosts = (max(places) + 1 for places in zip(*found, strict=True))
    for part in range(parts):
        for host in range(hosts):
            if (part, host) not in found:
                raise CorruptError(
                    f"has no part {part} of host {host}; copy all files, or convert them one at a time", path=path
                )
    return [found[place] for place in sorted(found)]


def _examples(files: list[Path], start: int) -> Iterator[bytes]:
    from sklformat.interop.tables import array_records  # noqa: PLC0415  loads array_record, an extra

    for file in files:
        with array_records.opened(file) as records:
            for number in range(start, len(records)):
                yield records.read(number, number + 1)[0]
            start = max(start - len(records), 0)


def _rows(files: list[Path], k: int, start: int, *, documents: bool) -> Iterator[Row | Unreadable]:
    for record in _examples(files, start):
        yield _row(record, k, documents=documents)


def _k_of(example: Mapping[str, NDArray[Any]]) -> int:
    """Entries of each position, once the lists fit each other."""
    for name, kinds in _NEEDED.items():
        if name not in example or example[name].dtype.kind not in kinds or not example[name].size:
            raise ValueError(f"has no list {name} of {'numbers' if kinds == 'f' else 'integers'}")
    length, entries = example["inputs"].size, example["top_k_logits"].size
    if entries % length or example["top_k_indices"].size != entries:
        raise ValueError(
            f"has {entries} top_k_logits and {example['top_k_indices'].size} top_k_indices for {length} inputs"
        )
    return entries // length


def _row(record: bytes, k: int, *, documents: bool) -> Row | Unreadable:
    try:
        return _aligned(_checked(read_example(record), k, documents=documents), k)
    except ValueError as error:
        return Unreadable(str(error))


def _checked(example: Mapping[str, NDArray[Any]], k: int, *, documents: bool) -> Mapping[str, NDArray[Any]]:
    """The lists of a record, which fit each other and those of the first record."""
    if (own := _k_of(example)) != k:
        raise ValueError(f"has {own} entries for each position, the first sequence has {k}")
    if documents != (_SEGMENTS in example):
        raise ValueError(f"{_SEGMENTS} is in some sequences only")
    for name in _OPTIONAL:
        if name in example:
            check_size(name, example[name], example["inputs"].size, "inputs")
    return example


def _aligned(example: Mapping[str, NDArray[Any]], k: int) -> Row:
    """Rows as they describe the next token: without padding, and without records where a document ends."""
    inputs = example["inputs"]
    segments = example.get(_SEGMENTS, np.ones(inputs.size, np.int64))
    if not segments.any():
        raise ValueError("is nothing but padding")
    length = int(np.flatnonzero(segments)[-1]) + 1
    inputs, segments = inputs[:length], segments[:length]
    ends = np.zeros(length, np.bool_)  # where the next input is no target
    ends[:-1] = segments[1:] != segments[:-1]
    ends |= segments == 0
    rows, tokens = length - 1, inputs
    if "targets" in example:
        targets = example["targets"][:length]
        real = example.get("targets_segmentation", np.ones(length, np.int64))[:length] != 0
        others = real[:-1] & ~ends[:-1] & (targets[:-1] != inputs[1:])
        if others.any():
            t = int(np.argmax(others))
            raise ValueError(
                f"position {t}: the target is {targets[t]}, but the next input of its document {inputs[t + 1]}"
            )
        ends |= ~real
        if not ends[-1]:  # the target of the last input is in the file, though no input
            rows, tokens = length, np.append(inputs, targets[-1])
            segments = np.append(segments, segments[-1])
    if rows < 1:
        raise ValueError("has a single token")
    offsets = np.arange(rows + 1, dtype=np.int64) * k
    ids, logits = example["top_k_indices"][: rows * k], example["top_k_logits"][: rows * k]
    columns = {STARTS: starts_of(segments)} if _SEGMENTS in example else {}
    return blank(Row(tokens, ids, log_softmax(logits, offsets), offsets, columns), ends[:rows])
