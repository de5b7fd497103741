"""
eullm's teacher cache: npz shards of flat arrays with offsets, and a manifest.

Of each position the K largest raw logits are there in bfloat16, with the logarithm of the sum of exp over the whole
vocabulary at some temperatures.  One shard is in memory at a time; names of sequences, which are pickled, are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError
from sklformat.interop.columns import Row
from sklformat.interop.notes import check_agrees
from sklformat.interop.readings import Asked, Reading, Unreadable, refuse_flags
from sklformat.interop.tables.jsonl import parse_object
from sklformat.interop.tables.npz import checked_offsets, opened

KIND = "eullm"
_MANIFEST = "manifest.json"
_MEMBERS = ("offsets", "token_offsets", "token_ids", "topk_ids", "topk_logits", "logz")
_SHAPES = {
    "token_ids": (1, "iu"),
    "topk_ids": (2, "iu"),
    "topk_logits": (2, "u"),
    "logz": (2, "f"),
}  # of the arrays that offsets lead into: number of axes, and kinds of type
_BF16_STEP = 2.0**-8  # the largest relative error of a bfloat16


def recognise(path: Path) -> str | None:
    """The kind of a directory whose manifest has eullm's keys."""
    manifest = path / _MANIFEST
    if not path.is_dir() or not manifest.is_file():
        return None
    try:
        found = parse_object(manifest.read_bytes(), manifest, "manifest")
    except CorruptError:
        return None
    provenance = found.get("provenance")
    return KIND if isinstance(provenance, dict) and {"top_k", "temperatures"} <= provenance.keys() else None


def read(path: Path, kind: str, asked: Asked) -> Reading:
    """
    The sequences of a directory, at temperature 1, or the first if the cache has not this one.

    Raises:
        CorruptError: The manifest is damaged, or a shard that it names is missing.
        ValueError: The user contradicts the manifest.
        OSError: The system's own.
    """
    refuse_flags(path, kind, asked, ("vocab_size",))
    manifest = _read_manifest(path)
    provenance = manifest["provenance"]
    check_agrees(path, "vocab_size", asked.vocab_size, provenance["vocab_size"])
    temperatures = [float(number) for number in provenance["temperatures"]]
    temperature = 1.0 if 1.0 in temperatures else temperatures[0]
    place = temperatures.index(temperature)
    kept = ("teacher_model", "teacher_adapter", "teacher_precision", "tokenizer_fingerprint", "git_commit")
    return Reading(
        rows=lambda start: _rows(path, manifest, place, temperature, start),
        values="logprobs",
        vocab_size=provenance["vocab_size"],
        sampler="topk",
        provenance={
            "temperature": temperature,
            "k": provenance["top_k"],
            "tail": "known",
            **{name: provenance[name] for name in kept if provenance.get(name) is not None},
        },
        says=(
            "row t describes token t + 1, given tokens 0..t",
            f"the values are bfloat16 logits less the whole vocabulary's normaliser, at temperature {temperature:g}",
            "where rounding makes a position's sum more than 1 it is scaled to 1",
        ),
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / _MANIFEST
    if not file.is_file():
        raise CorruptError("has no manifest.json: its writer was stopped before the end; finish the run", path=path)
    manifest = parse_object(file.read_bytes(), file, "manifest")
    if manifest.get("format_version") != 1:
        raise CorruptError(f"has format_version {manifest.get('format_version')!r}; 1 is known here", path=file)
    provenance, shards = manifest.get("provenance"), manifest.get("shards")
    if not isinstance(provenance, dict) or not isinstance(shards, list):
        raise CorruptError("lacks provenance or shards", path=file)
    for name in ("vocab_size", "top_k"):
        if type(provenance.get(name)) is not int or provenance[name] < 1:
            raise CorruptError(f"{name} is {provenance.get(name)!r}, must be a positive integer", path=file)
    temperatures = provenance.get("temperatures")
    if not isinstance(temperatures, list) or not temperatures or not all(_is_positive(one) for one in temperatures):
        raise CorruptError(f"temperatures are {temperatures!r}, must be positive numbers", path=file)
    for name in shards:
        if not isinstance(name, str) or Path(name).name != name:
            raise CorruptError(f"names a shard {name!r}, which is no file of this directory", path=file)
        if not (path / name).is_file():
            raise CorruptError(f"names {name}, which is missing; copy the whole directory", path=file)
    return manifest


def _is_positive(number: Any) -> bool:
    return isinstance(number, int | float) and 0 < number < float("inf")


def _rows(
    path: Path, manifest: Mapping[str, Any], place: int, temperature: float, start: int
) -> Iterator[Row | Unreadable]:
    number = 0
    for name in manifest["shards"]:
        shard = _read_shard(path / name, manifest["provenance"])
        count = shard["offsets"].size - 1
        for i in range(max(start - number, 0), count):
            yield _row(shard, i, place, temperature)
        number += count
    if number != manifest.get("n_sequences", number):
        raise CorruptError(
            f"tells of {manifest['n_sequences']} sequences, its shards hold {number}", path=path / _MANIFEST
        )


def _read_shard(path: Path, provenance: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    with opened(path) as file:
        if missing := [name for name in _MEMBERS if name not in file.files]:
            raise CorruptError(f"has no {missing[0]} among its arrays", path=path)
        shard = {name: file[name] for name in _MEMBERS}
        for name, (axes, kinds) in _SHAPES.items():
            if shard[name].ndim != axes or shard[name].dtype.kind not in kinds:
                raise CorruptError(f"{name} has {shard[name].ndim} axes of {shard[name].dtype}", path=path)
        positions, k = shard["topk_ids"].shape
        wanted = {
            "topk_ids": (positions, provenance["top_k"]),
            "topk_logits": (positions, k),
            "logz": (positions, len(provenance["temperatures"])),
        }
        for name, shape in wanted.items():
            if shard[name].shape != shape:
                raise CorruptError(f"{name} has shape {shard[name].shape}, the manifest makes it {shape}", path=path)
        if shard["topk_logits"].dtype.itemsize != 2:
            raise CorruptError(f"topk_logits is {shard['topk_logits'].dtype}, must be the bits of bfloat16", path=path)
        shard["offsets"] = checked_offsets(shard["offsets"], positions, "offsets")
        shard["token_offsets"] = checked_offsets(shard["token_offsets"], shard["token_ids"].size, "token_offsets")
        if shard["offsets"].size != shard["token_offsets"].size:
            raise CorruptError("offsets and token_offsets are of different numbers of sequences", path=path)
    return shard


def _row(shard: Mapping[str, NDArray[Any]], i: int, place: int, temperature: float) -> Row:
    begin, end = shard["offsets"][i : i + 2]
    tokens = shard["token_ids"][slice(*shard["token_offsets"][i : i + 2])]
    ids = shard["topk_ids"][begin:end].astype(np.int64)
    logits = (shard["topk_logits"][begin:end].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    logs = logits / temperature - shard["logz"][begin:end, place : place + 1].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # what is no number is refused by a check
        excess = np.log(np.exp(logs).sum(1, keepdims=True))
        rounding = np.abs(logits).max(1, keepdims=True, initial=0) / temperature * _BF16_STEP
        logs -= np.where((excess > 0) & (excess <= rounding), excess, 0)
    return Row(tokens, ids.reshape(-1), logs.reshape(-1), np.arange(end - begin + 1, dtype=np.int64) * ids.shape[1])
