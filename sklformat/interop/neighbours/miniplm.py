"""
The cache of MiniPLM's sparse KD fork: draws, the largest probabilities or both, of shards of packed sequences.

Its first form is npz with arrays of Python objects, which are read whole, shard by shard, without running what they
say; its last is HDF5 with flat arrays and offsets, read some sequences at a time.  Neither has the tokens.  A sequence
whose batch failed is missing from an npz, whose indices tell which; tokens are matched by these, never by their place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError
from sklformat.interop.columns import Row, offsets_of
from sklformat.interop.notes import check_agrees
from sklformat.interop.readings import Asked, Reading, Unreadable, refuse_flags, require, select
from sklformat.interop.tables.jsonl import parse_object
from sklformat.interop.tables.npz import checked_offsets
from sklformat.interop.tables.pickles import read_npy
from sklformat.interop.tokens import check_no_more, next_tokens
from sklformat.sampler import MAX_COUNT_ROUNDS

KIND = "miniplm"
_METADATA = "metadata.json"
_NAME = re.compile(r".*_(\d+)\.(h5|hdf5|npz)")
_BATCH_RECORDS = 1 << 20  # read at once from HDF5
_BATCH_POSITIONS = 1 << 16

Part = Literal["sparse", "topk"]


class _Shard(NamedTuple):
    path: Path
    size: int | None  # sequences, with those that are missing; None: nobody says


class _Contents(NamedTuple):
    """What all shards have in common."""

    part: Part
    number: int  # draws of each position, or k


def recognise(path: Path) -> str | None:
    """The kind of a directory with metadata of shards, or of an npz with the arrays that these have."""
    with contextlib.suppress(CorruptError, OSError, zipfile.BadZipFile):
        if path.is_dir() and (path / _METADATA).is_file():
            found = parse_object((path / _METADATA).read_bytes(), path / _METADATA, "metadata")
            return KIND if {"method", "shard_sizes", "shard_offsets"} <= found.keys() else None
        if path.suffix == ".npz" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = set(archive.namelist())
            return KIND if {"method.npy", "seq_lens.npy", "local_indices.npy"} <= names else None
    return None


def read(path: Path, kind: str, asked: Asked) -> Reading:
    """
    The sequences of a directory, or of one shard; ``asked.tokens`` has those of all, also of the missing ones.

    Raises:
        CorruptError: The metadata is damaged, or a shard is missing.
        ValueError: The user must give the tokens or say more, or contradicts the files.
        ModuleNotFoundError: HDF5 without h5py.
        OSError: The system's own.
    """
    refuse_flags(path, kind, asked, ("vocab_size", "rounds", "sampler", "tokens"))
    metadata, shards = _find_shards(path)
    vocab_size = metadata.get("vocab_size")
    if vocab_size is None:
        require(path, vocab_size=asked.vocab_size)
        vocab_size = asked.vocab_size
    if type(vocab_size) is not int or vocab_size < 1:
        raise CorruptError(f"cannot have the vocab_size {vocab_size!r}", path=path / _METADATA)
    check_agrees(path, "vocab_size", asked.vocab_size, vocab_size)
    if asked.tokens is None:
        raise ValueError(
            f"{path}: has no token ids; give those that the teacher saw, and one more, of each sequence with --tokens"
        )
    if (counts := [shard.size for shard in shards]) and None not in counts:
        asked.tokens.check_count(sum(count or 0 for count in counts))
    contents = _contents(shards[0].path, asked.kind)
    is_draws = contents.part == "sparse"
    sampler = "multinomial" if is_draws else "topk"
    check_agrees(path, "sampler", asked.sampler, sampler)
    check_agrees(path, "rounds", asked.rounds, contents.number if is_draws else 0)
    says = [
        "row t describes token t + 1, given tokens 0..t",
        "the values are how often each id was drawn"
        if is_draws
        else "the values are probabilities over the whole vocabulary in 16 bits; those that are 0 there are left out",
    ]
    return Reading(
        rows=lambda start: _rows(path, shards, contents, asked, start),
        values="counts" if is_draws and contents.number <= MAX_COUNT_ROUNDS else "logprobs",
        vocab_size=vocab_size,
        sampler=sampler,
        rounds=contents.number if is_draws else 0,
        provenance={
            "temperature": 1,
            "tail": "sampled" if is_draws else "known",
            **({} if is_draws else {"k": contents.number}),
            **{name: metadata[name] for name in ("teacher_model", "max_length") if name in metadata},
        },
        says=tuple(says),
        renormalised=False if is_draws else None,
    )


def _find_shards(path: Path) -> tuple[dict[str, Any], list[_Shard]]:
    """The metadata, and the shards in the order of their numbers, of HDF5 where a shard is there twice."""
    if not path.is_dir():
        return {}, [_Shard(path, None)]
    file = path / _METADATA
    if not file.is_file():
        raise CorruptError("has no metadata.json: it is not all of a cache; give one of its files", path=path)
    metadata = parse_object(file.read_bytes(), file, "metadata")
    sizes = metadata.get("shard_sizes")
    if not isinstance(sizes, list) or not sizes or not all(type(size) is int and size >= 0 for size in sizes):
        raise CorruptError("shard_sizes is no list of sizes", path=file)
    found = dict[int, Path]()
    for name in sorted(path.iterdir(), key=lambda one: one.suffix != ".npz"):
        if match := _NAME.fullmatch(name.name):
            found[int(match[1])] = name
    if len(found) != len(sizes):
        raise CorruptError(
            f"holds {len(found)} shards, metadata.json tells of {len(sizes)}; copy all of them, or convert each alone",
            path=path,
        )
    return metadata, [_Shard(found[number], size) for number, size in zip(sorted(found), sizes, strict=True)]


def _contents(path: Path, kind: str | None) -> _Contents:
    """What is to be read of shards like this one."""
    with _opened(path) as shard:
        there: list[Part] = shard.parts()
        if len(there) == 2 and kind is None:
            raise ValueError(
                f"{path}: has both draws and the largest probabilities; choose with --kind counts or ratios"
            )
        part = there[0] if len(there) == 1 or kind == "counts" else there[1]
        number = shard.number(part)
    if not 1 <= number <= 65535:
        raise CorruptError(f"cannot have {number} {'draws' if part == 'sparse' else 'probabilities'}", path=path)
    return _Contents(part, number)


def _rows(
    path: Path, shards: list[_Shard], contents: _Contents, asked: Asked, start: int
) -> Iterator[Row | Unreadable]:
    assert asked.tokens is not None
    tokens = asked.tokens.rows(start)
    first = 0
    for shard in shards:
        if shard.size is not None and first + shard.size <= start:
            first += shard.size
            continue
        with _opened(shard.path) as opened:
            if contents.part not in opened.parts() or opened.number(contents.part) != contents.number:
                raise CorruptError(
                    "was made with another method, k or number of draws than the first shard", path=shard.path
                )
            indices = opened.indices(contents, shard.size)
            count = int(indices[-1]) + 1 if shard.size is None else shard.size
            begin = max(start - first, 0)
            stored = opened.rows(contents, int(np.searchsorted(indices, begin)))
            there = set(indices.tolist())
            for number in range(begin, count):
                ids = next_tokens(tokens, path, first + number)
                if number in there:
                    yield _row(next(stored), ids, contents)
                else:
                    yield Unreadable(f"{shard.path.name} has no records of sequence {number}: its batch had failed")
        first += count
    check_no_more(tokens, path)


class _Stored(NamedTuple):
    """The records of a sequence as they are stored: ids and counts or probabilities [nnz], offsets [T + 1]."""

    ids: NDArray[Any]
    values: NDArray[Any]
    offsets: NDArray[np.int64]
    prefix: NDArray[Any] | None = None  # the first ids of its tokens


def _row(stored: _Stored | Unreadable, tokens: NDArray[Any], contents: _Contents) -> Row | Unreadable:
    if isinstance(stored, Unreadable):
        return stored
    if stored.prefix is not None:
        prefix = stored.prefix[stored.prefix >= 0]
        if prefix.size > tokens.size or (tokens[: prefix.size] != prefix).any():
            return Unreadable("begins with other tokens in the cache than in --tokens; give those of this data")
    row = Row(tokens, stored.ids, stored.values, stored.offsets)
    if contents.part == "topk":
        row = select(row, row.values != 0)
        with np.errstate(invalid="ignore"):  # of what is below 0, which a check refuses
            return dataclasses.replace(row, values=np.log(row.values.astype(np.float64)))
    if contents.number <= MAX_COUNT_ROUNDS:
        return row
    sums = np.diff(np.concatenate([[0], np.cumsum(row.values, dtype=np.int64)])[row.offsets])
    if (sums != contents.number).any():
        place = int(np.argmax(sums != contents.number))
        return Unreadable(f"position {place}: {sums[place]} draws are left of {contents.number}")
    with np.errstate(divide="ignore"):
        return dataclasses.replace(row, values=np.log(row.values / contents.number))


def _opened(path: Path) -> contextlib.AbstractContextManager[_Npz | _Hdf5]:
    return _opened_npz(path) if path.suffix == ".npz" else _opened_hdf5(path)


@contextlib.contextmanager
def _opened_npz(path: Path) -> Iterator[_Npz]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield _Npz(archive, path)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise CorruptError(f"npz of objects: {error}", path=path) from None


class _Npz:
    """A shard of Python objects."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive, self._path = archive, path
        self._method = str(self._read("method")[()])

    def parts(self) -> list[Part]:
        known: Mapping[str, list[Part]] = {"random": ["sparse"], "topk": ["topk"], "both": ["sparse", "topk"]}
        if self._method not in known:
            raise CorruptError(f"method is {self._method!r}; topk, random and both are known here", path=self._path)
        return known[self._method]

    def number(self, part: Part) -> int:
        name = {"sparse": "num_samples", "topk": "k"}[part]
        found = self._read(f"{part}_{name}" if self._method == "both" else name)
        if found.ndim or found.dtype.kind not in "iu":
            raise CorruptError(f"{name} is no integer", path=self._path)
        return int(found)

    def indices(self, _: _Contents, count: int | None) -> NDArray[np.int64]:
        indices = self._read("local_indices")
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or not indices.size:
            raise CorruptError("local_indices is no list of numbers of sequences", path=self._path)
        end = count if count is not None else int(indices.max()) + 1
        if indices.min() < 0 or indices[-1] >= end or (np.diff(indices) <= 0).any():
            raise CorruptError(f"local_indices does not rise within {end} sequences", path=self._path)
        return indices.astype(np.int64)

    def rows(self, contents: _Contents, start: int) -> Iterator[_Stored | Unreadable]:
        is_draws = contents.part == "sparse"
        names = ["token_ids", "values", "seq_lens", *(["lengths"] * is_draws)]
        if self._method == "both":
            names = ["topk_token_ids", "topk_probs", "seq_lens"]
        if self._method == "both" and is_draws:
            names = ["sparse_token_ids", "sparse_counts", "seq_lens", "sparse_lengths"]
        arrays = [self._read(name) for name in names]
        count = self._read("local_indices").size
        for name, array in zip(names, arrays, strict=True):
            if not array.ndim or len(array) != count:
                raise CorruptError(f"{name} is not of {count} sequences", path=self._path)
        for i in range(start, count):
            yield _unpadded(*(array[i] for array in arrays))

    def _read(self, name: str) -> NDArray[Any]:
        try:
            return read_npy(io.BytesIO(self._archive.read(f"{name}.npy")), self._path)
        except KeyError:
            raise CorruptError(f"lacks the array {name}", path=self._path) from None


def _numbers(value: Any) -> NDArray[Any]:
    """An array of numbers, also where each was an object."""
    array = np.asarray(value)
    if array.dtype.hasobject:
        array = np.array(array.tolist())
    if array.dtype.kind not in "iuf":
        raise ValueError(f"needs numbers, has an array of {array.dtype}")
    return array


def _unpadded(ids: Any, values: Any, length: Any, lengths: Any = None) -> _Stored | Unreadable:
    """Records of arrays [T, U], of each position the first ``lengths``; the rest is padding."""
    try:
        ids, values, rows = _numbers(ids), _numbers(values), int(length)
        lengths = np.full(len(ids), ids.shape[-1]) if lengths is None else _numbers(lengths)
    except (ValueError, TypeError) as error:
        return Unreadable(str(error))
    if ids.ndim != 2 or ids.shape != values.shape or ids.dtype.kind == "f":
        return Unreadable(f"ids of shape {ids.shape} stand beside values of {values.shape}")
    if lengths.shape != (rows,) or len(ids) != rows:
        return Unreadable(f"has {len(ids)} rows of ids, {lengths.size} lengths, and {rows} rows by its own account")
    if lengths.dtype.kind == "f" or (lengths < 0).any() or (lengths > ids.shape[1]).any():
        return Unreadable(f"lengths are not in 0..{ids.shape[1]}, the ids that a row has")
    real = np.arange(ids.shape[1]) < lengths[:, None]
    return _Stored(ids[real], values[real], offsets_of(lengths))


@contextlib.contextmanager
def _opened_hdf5(path: Path) -> Iterator[_Hdf5]:
    from sklformat.interop.tables import hdf5  # noqa: PLC0415  loads h5py, an extra

    with hdf5.opened(path) as arrays:
        yield _Hdf5(arrays, path)


class _Hdf5:
    """A shard of flat arrays."""

    def __init__(self, arrays: Any, path: Path) -> None:
        self._arrays, self._path = arrays, path

    def parts(self) -> list[Part]:
        parts: list[Part] = ["sparse", "topk"]
        if there := [part for part in parts if part in self._arrays]:
            return there
        raise CorruptError("has neither sparse nor topk", path=self._path)

    def number(self, part: Part) -> int:
        return int(self._arrays.attribute(part, "num_samples" if part == "sparse" else "k"))

    def indices(self, contents: _Contents, count: int | None) -> NDArray[np.int64]:
        found = self._arrays.length(f"{contents.part}/seq_offsets", "iu") - 1
        if found < 1 or found != (found if count is None else count):
            raise CorruptError(
                f"holds {found} sequences, metadata.json says {count}; nothing in it tells which are missing, the npz "
                "of this run does",
                path=self._path,
            )
        return np.arange(found)

    def rows(self, contents: _Contents, start: int) -> Iterator[_Stored | Unreadable]:
        part = contents.part
        ids, values = f"{part}/token_ids_flat", f"{part}/{'counts_flat' if part == 'sparse' else 'probs_flat'}"
        size = self._arrays.length(ids, "iu")
        if self._arrays.length(values, "iu" if part == "sparse" else "f") != size:
            raise CorruptError(f"{values} is not as long as {ids}", path=self._path)
        # Offsets of sequences count positions of draws, but elements of the largest probabilities, k for a position.
        k = 1 if part == "sparse" else contents.number
        positions = size // k
        if part == "sparse":
            positions = self._arrays.length("sparse/token_offsets", "iu") - 1
        try:
            bounds = checked_offsets(self._arrays.read(f"{part}/seq_offsets"), positions * k, f"{part}/seq_offsets")
        except ValueError as error:
            raise CorruptError(f"offsets of sequences: {error}", path=self._path) from None
        if (bounds % k).any() or positions * k > size:
            raise CorruptError(f"topk/seq_offsets does not count {k} records for each position", path=self._path)
        bounds = bounds // k
        prefixes = self._arrays.read("signature/input_prefix") if "signature/input_prefix" in self._arrays else None
        step = min(_BATCH_POSITIONS, max(_BATCH_RECORDS // contents.number, 1))
        while start < bounds.size - 1:
            end = max(int(np.searchsorted(bounds, bounds[start] + step, side="right")) - 1, start + 1)
            first, last = int(bounds[start]), int(bounds[end])
            offsets = (
                np.arange(first, last + 1) * k if part == "topk" else self._draw_offsets(contents, first, last, size)
            )
            begin = int(offsets[0])
            batch_ids, batch_values = (self._arrays.read(name, begin, int(offsets[-1])) for name in (ids, values))
            for i in range(start, end):
                own = offsets[bounds[i] - first : bounds[i + 1] - first + 1]
                records = slice(int(own[0]) - begin, int(own[-1]) - begin)
                prefix = None if prefixes is None else prefixes[i]
                yield _Stored(batch_ids[records], batch_values[records], own - own[0], prefix)
            start = end

    def _draw_offsets(self, contents: _Contents, first: int, last: int, size: int) -> NDArray[np.int64]:
        """Where the records of positions ``first`` to ``last`` begin, among ``size``."""
        offsets = np.asarray(self._arrays.read("sparse/token_offsets", first, last + 1)).astype(np.int64)
        lengths = np.diff(offsets)
        if offsets[0] < 0 or offsets[-1] > size or (lengths < 0).any() or (lengths > contents.number).any():
            raise CorruptError(f"token_offsets from {first} on give a position more ids than draws", path=self._path)
        return offsets
