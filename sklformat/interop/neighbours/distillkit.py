"""
DistillKit's sequences, one per row of Parquet, Arrow or JSONL, with row t about token t + 1: ``--from`` one of

* distillkit: ``compressed_logprobs`` and ``bytepacked_indices``, bytes of each position, which a codec file explains;
  written as Parquet, or packed and saved by ``datasets``, where ``attention_mask`` is the number of each document;
* open-instruct: the same, beside ``messages`` or ``text``, which are not read;
* distillkit-legacy: ``packed_indices``, ``exact_values`` and ``coeffs``, explained by a codec file too;
* distillkit-raw: ``token_ids`` and ``top_values`` as they are.  This form is written, too.

Where there are as many rows as tokens, the last, about a token that is not there, is left out.
"""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError, SklError
from sklformat.files.yaml import read_settings
from sklformat.format.columns import STARTS
from sklformat.interop.columns import Row, check_parallel, typed
from sklformat.interop.neighbours.polynomials import Codec, LegacyCodec
from sklformat.interop.readings import (
    PROBABILITIES,
    Asked,
    Reading,
    Unreadable,
    log_probs,
    refuse_flags,
    require,
    truncated_sampler,
    within_documents,
    without_fillers,
    without_last_row,
)
from sklformat.interop.tables.cells import Cell, Columns, array_cell
from sklformat.interop.tables.exports import Evened, EvenTable, Export, Exporter
from sklformat.interop.tables.files import Table, open_table, table_kind

_COMPRESSED = ("compressed_logprobs", "bytepacked_indices")
_COLUMNS = {
    "distillkit": _COMPRESSED,
    "open-instruct": _COMPRESSED,
    "distillkit-legacy": ("packed_indices", "exact_values", "coeffs"),
    "distillkit-raw": ("token_ids", "top_values"),
}
_TAKES = {
    "distillkit": ("codec",),
    "open-instruct": ("codec",),
    "distillkit-legacy": ("codec", "values"),
    "distillkit-raw": ("values",),
}
_CODEC_FILES = ("compression_config.yaml", "compression_config.yml", "compression_config.json")
_DOCUMENTS = "attention_mask"
_Decoded = tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]
"""Ids [nnz], values [nnz] and offsets [T + 1]."""


def recognise(path: Path) -> str | None:
    """The kind whose columns the files have; the raw form only where nothing says that its values may be others."""
    try:
        if path.is_dir() and (path / "dataset_dict.json").exists():
            kinds = {recognise(split) for split in path.iterdir() if split.is_dir()}
            return kinds.pop() if len(kinds) == 1 else None
        kind = table_kind(path)
        names = set() if kind is None or kind == "npz" else open_table(path, kind).names
    except (OSError, ValueError, SklError, ImportError):
        return None
    if not names >= {"input_ids"} or "normalized_logits" in names:
        return None
    found = [kind for kind, needed in _COLUMNS.items() if names >= set(needed)]
    if len(found) == 2:  # with one codec
        return "open-instruct" if names & {"messages", "text"} else "distillkit"
    return found[0] if found else None


def read(path: Path, kind: str, asked: Asked) -> Reading:
    """
    The sequences of a kind of this module.

    Raises:
        ValueError: The user must say more, or says what the kind says itself; the files are of another kind.
        CorruptError: Files are missing, or a row is damaged.
    """
    refuse_flags(path, kind, asked, ("vocab_size", "sampler", *_TAKES[kind]))
    if path.is_dir() and (path / "dataset_dict.json").exists():
        splits = sorted(split.name for split in path.iterdir() if split.is_dir())
        raise ValueError(f"{path}: holds the splits {', '.join(splits)}; give the directory of one of them")
    table_of = table_kind(path)
    if table_of is None:
        raise ValueError(f"{path}: {kind} is read from Parquet, Arrow or JSONL files; it is or holds none of these")
    table = open_table(path, table_of)
    if missing := [name for name in ("input_ids", *_COLUMNS[kind]) if name not in table.names]:
        there = ", ".join(sorted(table.names))
        raise ValueError(f"{path}: is no {kind}, it has no column {missing[0]}; there are {there}")
    _check_parts(path, table)
    form = _FORMS[kind](path, kind, asked)
    names = ["input_ids", *_COLUMNS[kind]]
    names += [_DOCUMENTS] if _DOCUMENTS in table.names else []

    def rows(start: int) -> Iterator[Row | Unreadable]:
        for cells in table.rows(names, start):
            yield _read_row(cells, form)

    borders = "; the last row of a document has no token to be about" if _DOCUMENTS in table.names else ""
    return Reading(
        rows=rows,
        values="logprobs",
        vocab_size=form.vocab_size,
        sampler=truncated_sampler(path, kind, asked),
        columns=(STARTS,) if _DOCUMENTS in table.names else (),
        provenance=form.provenance,
        says=(f"row t describes token t + 1{borders}", *form.says, _TEMPERATURE),
        renormalised=True if form.values == "logits" else None,
    )


def _read_row(cells: Mapping[str, Any], form: _Form) -> Row | Unreadable:
    try:
        return _row(cells, form)
    except ValueError as error:
        return Unreadable(str(error))


def _row(cells: Mapping[str, Any], form: _Form) -> Row:
    numbers = {name: cell for name, cell in cells.items() if isinstance(cell, Cell)}
    if missing := [name for name in cells if name not in numbers]:
        raise ValueError(f"{missing[0]} holds text or objects, not lists of numbers")
    ids, values, offsets = form.decode(numbers)
    row = Row(typed(numbers["input_ids"].flat("input_ids"), "input_ids"), ids, values, offsets)
    if offsets.size - 1 == row.input_ids.size:
        row = without_last_row(row)
    if form.values == "logprobs":
        row = without_fillers(row)
    row = Row(row.input_ids, row.token_ids, log_probs(row.values, row.offsets, form.values), row.offsets)
    if _DOCUMENTS in numbers and row.offsets.size == row.input_ids.size:
        row = within_documents(row, numbers[_DOCUMENTS].flat(_DOCUMENTS))
    return row


_TEMPERATURE = "the files do not say the temperature; DistillKit captures at 1"


class _Form(ABC):
    """
    How rows of a kind are decoded.

    Attributes:
        vocab_size: Ids are below it.
        values: What they decode to, a key of ``PROBABILITIES``.
        provenance, says: As ``Reading``.
    """

    vocab_size: int
    values: str = "logprobs"
    provenance: Mapping[str, Any]
    says: tuple[str, ...]

    @abstractmethod
    def decode(self, cells: Mapping[str, Cell]) -> _Decoded:
        """The records of a row."""


class _Raw(_Form):
    """Ids and values as they are."""

    def __init__(self, path: Path, kind: str, asked: Asked) -> None:  # noqa: ARG002  as the others
        require(path, vocab_size=asked.vocab_size)
        assert asked.vocab_size is not None
        self.vocab_size, self.values = asked.vocab_size, asked.values or "logprobs"
        self.provenance = {"system": "distillkit"}
        rest = ", normalised over the ids that are there" if self.values == "logits" else ""
        self.says = (f"the values are {PROBABILITIES[self.values]}{rest}",)

    def decode(self, cells: Mapping[str, Cell]) -> _Decoded:
        ids, offsets = cells["token_ids"].ragged("token_ids")
        values, others = cells["top_values"].ragged("top_values")
        check_parallel(offsets, others, "top_values")
        return typed(ids, "token_ids"), typed(values, "logprobs"), offsets


class _Compressed(_Form):
    """Values and ids in bytes, by a codec."""

    def __init__(self, path: Path, kind: str, asked: Asked) -> None:
        file, settings = _codec_settings(path, asked.codec, "logprob_compressor")
        with _in_codec(file):
            self._codec = codec = Codec(settings)
        if asked.vocab_size is None:
            raise ValueError(
                f"{path}: its codec says d = {codec.size}, for which DistillKit takes one more than the tokenizer has; "
                "give the teacher's --vocab-size"
            )
        if asked.vocab_size > 1 << codec.bits:
            raise ValueError(
                f"{path}: --vocab-size {asked.vocab_size} has ids beyond the {codec.bits} bits of its codec, d = "
                f"{codec.size}, which cut them; they can't be told from others"
            )
        self.vocab_size = asked.vocab_size
        curve = codec.k - codec.exact_k
        self.provenance = {"system": kind, "k": codec.k, "exact": codec.exact_k, "approximate": curve, "d": codec.size}
        by = f"; {curve} of them, the least likely, are approximate, from the codec's curve" if curve else ""
        self.says = (f"the values are log-probabilities of the {codec.k} most likely tokens{by}",)

    def decode(self, cells: Mapping[str, Cell]) -> _Decoded:
        codec = self._codec
        values, ids = (
            _table(cells[name], name, size, "bytes", np.uint8)
            for name, size in zip(_COMPRESSED, (codec.value_bytes, codec.id_bytes), strict=True)
        )
        return _flat(codec.decode_ids(ids), codec.decode_values(values))


class _Legacy(_Form):
    """Exact values and coefficients as numbers, ids in words, by a codec of the first release."""

    def __init__(self, path: Path, kind: str, asked: Asked) -> None:
        file, settings = _codec_settings(path, asked.codec, "legacy_logit_compression")
        with _in_codec(file):
            self._codec = codec = LegacyCodec(settings)
        if asked.values is None:
            raise ValueError(
                f"{path}: {kind} may hold log-probs or logits less their mean, and does not say which; give --values "
                "logprobs (captured with vLLM) or --values logits"
            )
        if asked.vocab_size is not None and asked.vocab_size != codec.size:
            raise ValueError(
                f"{path}: --vocab-size {asked.vocab_size}, its codec says vocab_size {codec.size}; leave the flag out"
            )
        self.vocab_size, self.values = codec.size, asked.values
        curve = codec.k - codec.exact_k
        self.provenance = {"system": kind, "k": codec.k, "exact": codec.exact_k, "approximate": curve}
        rest = ", normalised over the ids that are there" if self.values == "logits" else ""
        self.says = (f"the values are {PROBABILITIES[self.values]}{rest}; {curve} of {codec.k} are approximate",)

    def decode(self, cells: Mapping[str, Cell]) -> _Decoded:
        codec = self._codec
        words = _table(cells["packed_indices"], "packed_indices", codec.words, "words", np.uint64)
        exact = _table(cells["exact_values"], "exact_values", codec.exact_k, "values", np.float64)
        terms = _table(cells["coeffs"], "coeffs", codec.terms if codec.exact_k < codec.k else 0, "terms", np.float64)
        if not len(words) == len(exact) == len(terms):
            raise ValueError(f"packed_indices has {len(words)} rows, exact_values {len(exact)} and coeffs {len(terms)}")
        return _flat(codec.decode_ids(words), codec.decode_values(exact, terms))


_FORMS: dict[str, Callable[[Path, str, Asked], _Form]] = {
    "distillkit": _Compressed,
    "open-instruct": _Compressed,
    "distillkit-legacy": _Legacy,
    "distillkit-raw": _Raw,
}


def _table(cell: Cell, name: str, size: int, what: str, dtype: Any) -> NDArray[Any]:
    """Numbers [T, size] of a list of lists."""
    values, offsets = cell.ragged(name)
    lengths = np.diff(offsets)
    if (lengths != size).any():
        place = int(np.argmax(lengths != size))
        raise ValueError(
            f"position {place}: {name} has {lengths[place]} {what}, the codec takes {size}; it is another file's codec"
        )
    if dtype is np.uint8 and values.dtype != np.uint8 and values.size and (values.min() < 0 or values.max() > 255):
        raise ValueError(f"{name} holds something other than bytes")
    return values.astype(dtype, copy=False).reshape(lengths.size, size)


def _flat(ids: NDArray[Any], values: NDArray[Any]) -> _Decoded:
    if len(ids) != len(values):
        raise ValueError(f"there are {len(ids)} rows of ids and {len(values)} rows of values")
    return ids.reshape(-1), values.reshape(-1), np.arange(len(ids) + 1, dtype=np.int64) * ids.shape[1]


def _codec_settings(path: Path, given: Path | None, name: str) -> tuple[Path, Mapping[str, Any]]:
    """The codec's file and its settings; a trainer's YAML has them under ``teacher``, and a name."""
    place = path if path.is_dir() else path.parent
    files = [given] if given is not None else [place / each for each in _CODEC_FILES if (place / each).exists()]
    if not files:
        raise ValueError(
            f"{path}: a codec file says how its values are packed, and no {_CODEC_FILES[0]} is beside it; give --codec "
            f"FILE, that or the trainer's YAML with teacher.{name}"
        )
    settings = read_settings(files[0])
    for key in ("teacher", name):
        if isinstance(settings, Mapping) and isinstance(settings.get(key), Mapping):
            settings = settings[key]
    if not isinstance(settings, Mapping):
        raise CorruptError("not a file of settings by name", path=files[0])
    return files[0], settings


@contextlib.contextmanager
def _in_codec(file: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CorruptError(str(error), path=file, section="codec") from None


def _check_parts(path: Path, table: Table) -> None:
    """A directory has all of its files, as far as their names, or the state that ``datasets`` saves, tell."""
    if not path.is_dir():
        return
    names = {part.name for part in table.parts}
    wanted = set[str]()
    if (path / "state.json").exists():
        state = read_settings(path / "state.json")
        files = state.get("_data_files") if isinstance(state, Mapping) else None
        wanted = {str(file["filename"]) for file in files or () if isinstance(file, Mapping) and "filename" in file}
    for name in sorted(names):
        if of := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", name):
            width = len(of[2])
            wanted |= {f"{of[1]}{i:0{width}}-of-{of[3]}{of[4]}" for i in range(min(int(of[3]), 1_000_000))}
    numbers = sorted(int(found[1]) for name in names if (found := re.fullmatch(r"data_(\d+)\.parquet", name)))
    wanted |= {f"data_{i}.parquet" for i in range(numbers[-1])} if numbers and numbers[-1] < 1_000_000 else set()
    if missing := sorted(wanted - names):
        raise CorruptError(f"{missing[0]} is missing; copy the whole directory", path=path)


def open_export(path: Path, kind: str, export: Export) -> Exporter:  # noqa: ARG001  of all kinds
    """Raw rows: as ``kinds.open_export``."""
    return _RawTable(path, export)


class _RawTable(EvenTable):
    """
    ``token_ids`` and ``top_values`` [L][k] beside ``input_ids``, which ``prepacked: true`` takes as they are.

    DistillKit leaves row t out where ``labels[t]`` is negative, not labels[t + 1]: so it is where row t has no record.
    """

    COLUMNS: ClassVar[Columns] = {
        "input_ids": (np.int64, 1),
        "labels": (np.int64, 1),
        "token_ids": (np.int64, 2),
        "top_values": (np.float32, 2),
    }

    def cells(self, tokens: NDArray[Any], evened: Evened) -> dict[str, Cell]:
        return {
            "input_ids": Cell(tokens),
            "labels": Cell(np.where(evened.real.any(1), tokens.astype(np.int64), -100)),
            "token_ids": array_cell(evened.token_ids),
            "top_values": array_cell(evened.logprobs),
        }

    @property
    def says(self) -> list[str]:
        row = "row t describes token t + 1; the last row and those without a record have label -100"
        return [row, *super().says]
