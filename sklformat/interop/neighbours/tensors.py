"""
Stacked tensors: Whittle's batches in torch files, and NeMo Automodel's cache for EAGLE-3 in safetensors files.

Whittle: ``logits/logits_batch_*.pt`` with the tokens of B sequences and logits [B, T, K or V], beside them
``indices/indices_batch_*.pt``; one batch is read at a time, mapped.

Automodel: ``manifest.json`` and ``shard-*.safetensors``, mapped. Ids, distributions and masks lie one place to the
left of where the teacher had them: the first token of a sequence is nowhere, the last one there is none, and the last
row is not about anything.  Ids of records are numbers of a smaller vocabulary, which the manifest lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError, UnsupportedError, describe_bad_json
from sklformat.interop.columns import Row, offsets_of
from sklformat.interop.notes import check_agrees
from sklformat.interop.readings import Asked, Reading, Unreadable, log_softmax, refuse_flags, require
from sklformat.interop.tables.pickles import read_torch
from sklformat.interop.tables.safetensors import open_arrays

_BATCH = re.compile(r"logits_batch_(\d+)\.pt")
_SHARD = re.compile(r"shard-\d{6}\.safetensors")
_AUTOMODEL_VERSION = 2


def recognise(path: Path) -> str | None:
    """A directory with files of these names."""
    if (path / "logits").is_dir() and any(_BATCH.fullmatch(file.name) for file in (path / "logits").iterdir()):
        return "whittle"
    if (path / "manifest.json").is_file() and any(_SHARD.fullmatch(file.name) for file in path.iterdir()):
        return "automodel"
    return None


def read(path: Path, kind: str, asked: Asked) -> Reading:
    """
    As ``kinds.open_reading``.

    Raises:
        ValueError: A flag is missing, or contradicts the files.
        CorruptError: A file is damaged or missing.
        UnsupportedError: A later version.
    """
    refuse_flags(path, kind, asked, ("vocab_size", "k"))
    return _read_whittle(path, asked) if kind == "whittle" else _read_automodel(path, asked)


def _check_whole(path: Path, asked: Asked, width: int | None) -> None:
    """--k says how much of whole distributions is kept, and is for these alone."""
    if width is None:
        refuse_flags(path, "top-k records", asked, ("vocab_size",))
        return
    require(path, k=asked.k)
    if asked.k is not None and asked.k > width:
        raise ValueError(f"{path}: --k is {asked.k}, its distributions have {width} values")


def _top(values: NDArray[Any], k: int) -> NDArray[np.int64]:
    """Where the k largest of each row [T, V] are: [T, k]."""
    return np.argpartition(values, values.shape[1] - k, axis=1)[:, values.shape[1] - k :]


class _Batch(NamedTuple):
    """Tokens [B, T], logits [B, T, K or V], ids [B, T, K] or None."""

    tokens: NDArray[Any]
    logits: NDArray[Any]
    ids: NDArray[Any] | None
    number: int


class _Batches:
    """Whittle's files, in the order of their numbers."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, list[Path]()
        found = (
            (int(name[1]), file) for file in (path / "logits").glob("*.pt") if (name := _BATCH.fullmatch(file.name))
        )
        for place, (number, file) in enumerate(sorted(found)):
            if number != place:
                raise CorruptError(f"file {place} is missing before it; copy all of logits and indices", path=file)
            self.files.append(file)
        if not self.files:
            raise CorruptError("holds no logits/logits_batch_*.pt", path=path)
        self.has_ids = (path / "indices").is_dir()

    def load(self, place: int) -> _Batch:
        path = self.files[place]
        content = read_torch(path)
        try:
            batch = _Batch(content["input_ids"], content["logits"], None, int(content["batch_idx"]))
            if batch.tokens.ndim != 2 or batch.logits.ndim != 3 or batch.tokens.shape != batch.logits.shape[:2]:
                raise ValueError(  # noqa: TRY301
                    f"input_ids of shape {batch.tokens.shape}, logits of shape {batch.logits.shape}"
                )
            if self.has_ids:
                path = self.path / "indices" / path.name.replace("logits", "indices")
                if not path.exists():
                    raise CorruptError("is missing; copy all of logits and indices", path=path)
                beside = read_torch(path)
                if int(beside["batch_idx"]) != batch.number or beside["indices"].shape != batch.logits.shape:
                    raise ValueError(  # noqa: TRY301
                        f"batch {beside['batch_idx']} of shape {beside['indices'].shape}, its logits are batch "
                        f"{batch.number} of shape {batch.logits.shape}"
                    )
                batch = batch._replace(ids=beside["indices"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptError(f"not what Whittle writes: {error}", path=path) from None
        return batch


def _read_whittle(path: Path, asked: Asked) -> Reading:
    batches = _Batches(path)
    first, last = batches.load(0), batches.load(len(batches.files) - 1)
    width = first.logits.shape[2]
    meta_path = path / "metadata.pt"
    meta = read_torch(meta_path) if meta_path.exists() else {}
    _check_whole(path, asked, None if batches.has_ids else width)
    if batches.has_ids:
        require(path, vocab_size=asked.vocab_size)
    else:
        check_agrees(path, "vocab_size", asked.vocab_size, width)
    vocab_size = asked.vocab_size if batches.has_ids else width
    assert vocab_size is not None

    def row(batch: _Batch, number: int) -> Row:
        tokens, logits = batch.tokens[number], batch.logits[number, :-1].astype(np.float64)
        if batch.ids is not None:
            ids = batch.ids[number, :-1]
            offsets = np.arange(len(ids) + 1, dtype=np.int64) * width
            values = log_softmax(logits.reshape(-1), offsets)
        else:
            assert asked.k is not None
            if logits.shape[1] != width:
                raise ValueError(f"logits of {logits.shape[1]} ids, others have {width}")
            ids = _top(logits, asked.k)
            offsets = np.arange(len(ids) + 1, dtype=np.int64) * asked.k
            largest = logits.max(axis=1, keepdims=True)
            with np.errstate(invalid="ignore"):  # of what is not finite, which a check refuses
                sums = largest + np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
                values = np.take_along_axis(logits - sums, ids, 1).reshape(-1)
        return Row(tokens, ids.reshape(-1), values, offsets)

    def rows(start: int) -> Iterator[Row | Unreadable]:
        before = -1
        for place in range(len(batches.files)):
            batch = batches.load(place)
            if batch.number <= before:
                raise CorruptError(f"is batch {batch.number}, behind batch {before}", path=batches.files[place])
            before = batch.number
            for i in range(start, len(batch.tokens)):
                yield _tried(partial(row, batch), i)
            start = max(start - len(batch.tokens), 0)

    whole = "over the whole vocabulary" if not batches.has_ids else "over the ids that are there"
    return Reading(
        rows=rows,
        values="logprobs",
        vocab_size=vocab_size,
        sampler="topk",
        provenance={
            "temperature": 1,
            "k": width if batches.has_ids else asked.k,
            "batches": [first.number, last.number],
            "saved": len(batches.files),
            "metadata": {name: value for name, value in meta.items() if isinstance(value, (str, int, float))},
        },
        says=(
            "row t describes token t + 1; the last row of each sequence, about the token behind it, is left out",
            f"the values are logits, normalised {whole}",
            f"{len(batches.files)} batches were saved, those from {first.number} to {last.number} were seen",
        ),
        renormalised=batches.has_ids,
    )


def _tried(row: Callable[[int], Row], number: int) -> Row | Unreadable:
    try:
        return row(number)
    except ValueError as error:
        return Unreadable(str(error))


def _read_automodel(path: Path, asked: Asked) -> Reading:
    manifest = path / "manifest.json"
    if not manifest.exists():
        raise CorruptError("has no manifest.json; copy all of the cache", path=path)
    try:
        content = json.loads(manifest.read_bytes())
        version = content["format_version"]
        selected = np.array(content["selected_token_ids"], np.int64)
        count, per_shard = int(content["num_samples"]), int(content["shard_size"])
        if selected.ndim != 1 or not selected.size or count < 1 or per_shard < 1:
            raise ValueError("selected_token_ids, num_samples or shard_size is empty")  # noqa: TRY301
    except json.JSONDecodeError as error:
        raise CorruptError(describe_bad_json(error), path=manifest) from None
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CorruptError(f"no manifest of Automodel: {error!r}", path=manifest) from None
    if version != _AUTOMODEL_VERSION:
        raise UnsupportedError(f"format_version {version}; known is {_AUTOMODEL_VERSION}", path=manifest)
    require(path, vocab_size=asked.vocab_size)
    assert asked.vocab_size is not None
    shards = [path / f"shard-{number:06d}.safetensors" for number in range(-(-count // per_shard))]
    sizes = [min(per_shard, count - number * per_shard) for number in range(len(shards))]
    first = _open_shard(shards[0], sizes[0])
    dense = "target_probs" in first
    _check_whole(path, asked, selected.size if dense else None)

    def rows(start: int) -> Iterator[Row | Unreadable]:
        for shard, size in zip(shards, sizes, strict=True):
            if start < size:
                arrays = _open_shard(shard, size)
                for i in range(start, size):
                    yield _tried(partial(_shifted_row, arrays, selected, asked.k), i)
            start = max(start - size, 0)

    k = asked.k if dense else first["target_probs_values"].shape[2]
    settings = {name: value for name, value in content.items() if isinstance(value, (str, int, float))}
    return Reading(
        rows=rows,
        values="logprobs",
        vocab_size=asked.vocab_size,
        sampler="topk",
        provenance={"temperature": 1, "k": k, "draft_vocab_size": selected.size, "manifest": settings},
        says=(
            "row t describes token t + 1; the teacher saw one token more before the first, which is in no file",
            f"the values are probabilities over the {selected.size} ids of the draft model's vocabulary alone",
            "positions where the teacher's first choice is none of these, or that are masked, have no records",
        ),
        renormalised=True,
    )


def _open_shard(path: Path, size: int) -> dict[str, Any]:
    if not path.exists():
        raise CorruptError("is missing; copy all shards", path=path)
    arrays: dict[str, Any] = open_arrays(path)
    dense = "target_probs" in arrays
    wanted = {"input_ids": 2, "attention_mask": 2, "position_mask": 3}
    wanted |= {"target_probs": 3} if dense else {"target_probs_values": 3, "target_probs_indices": 3}
    shapes = {name: arrays[name].shape if name in arrays else None for name in wanted}
    length = None if not shapes["input_ids"] else shapes["input_ids"][1:2]
    for name, axes in wanted.items():
        shape = shapes[name]
        if shape is None or len(shape) != axes or shape[0] != size or shape[1:2] != length:
            raise CorruptError(
                f"{name} has shape {shape}, {size} samples and input_ids {shapes['input_ids']}", path=path
            )
    if not dense and shapes["target_probs_values"] != shapes["target_probs_indices"]:
        raise CorruptError("target_probs_values and target_probs_indices differ in shape", path=path)
    return arrays


def _shifted_row(arrays: dict[str, Any], selected: NDArray[np.int64], k: int | None, number: int) -> Row:
    """A sequence up to its last real token; there is none at the last place."""
    real = np.flatnonzero(arrays["attention_mask"][number][:-1])
    if real.size < 2:
        raise ValueError("fewer than two of its tokens are no padding")
    begin, end = int(real[0]), int(real[-1])
    rows = np.s_[begin:end]
    if "target_probs" in arrays:
        assert k is not None
        probs = arrays["target_probs"][number][rows]
        ids = _top(probs, k)
        probs = np.take_along_axis(probs, ids, 1)
    else:
        probs, ids = (arrays[f"target_probs_{name}"][number][rows] for name in ("values", "indices"))
    there = arrays["position_mask"][number][rows].reshape(-1, 1).astype(bool) & (probs != 0)
    ids = ids[there]
    strange = np.flatnonzero((ids < 0) | (ids >= selected.size))
    if strange.size:
        raise ValueError(f"id {ids[strange[0]]} is none of the {selected.size} in selected_token_ids")
    tokens = arrays["input_ids"][number][begin : end + 1]
    with np.errstate(invalid="ignore"):  # of what is below 0, which a check refuses
        values = np.log(probs[there].astype(np.float64))
    return Row(tokens, selected[ids], values, offsets_of(there.sum(axis=1)))
