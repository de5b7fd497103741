"""
SampledKD: draws of each position in 12 slots of an id and a 7-bit probability, found by the SHA-1 of the tokens.

``manifest.json`` says in which ``shard_*.pt``, a pickled list, the item of each key is.  The count of an id is
certain where not all slots are filled, so that no id was left out, and the nearest counts sum to the rounds.
The keys are in memory, the shards are mapped; tokens in an order of their own take longer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError, describe_bad_json
from sklformat.interop.columns import Row, offsets_of
from sklformat.interop.notes import check_agrees
from sklformat.interop.readings import Asked, Reading, Unreadable, Values, refuse_flags, require
from sklformat.interop.tables.pickles import read_torch

_SHARD = re.compile(r"shard_\d+\.pt")
_ID_BITS = 17
_FULL = 127  # the probability that is 1
_MOST_ROUNDS = 127  # of counts in a cache
_SHARDS_KEPT = 8


def recognise(path: Path) -> str | None:
    """A directory with a manifest and such shards."""
    if not (path / "manifest.json").is_file():
        return None
    return "sampledkd" if any(_SHARD.fullmatch(file.name) for file in path.iterdir()) else None


def read(path: Path, kind: str, asked: Asked) -> Reading:
    """
    As ``kinds.open_reading``; looks at every item once, to learn whether all counts are certain.

    Raises:
        ValueError: --tokens is missing, or ids have more than 17 bits, so that they wrapped.
        CorruptError: The manifest or a shard is damaged, or items are of several runs.
    """
    refuse_flags(path, kind, asked, ("vocab_size", "tokens"))
    require(path, tokens=asked.tokens)
    items = _Items(path)
    facts = _survey(items)
    check_agrees(path, "vocab_size", asked.vocab_size, facts.vocab_size)
    if facts.vocab_size > 1 << _ID_BITS:
        raise ValueError(
            f"{path}: its vocabulary has {facts.vocab_size:,} ids, which it stores in 17 bits: those from "
            f"{1 << _ID_BITS:,} on became other ids; there is no way back, capture it again"
        )
    temperature = items.signature.get("kd_temperature", 1)
    certain = facts.certain == facts.positions and facts.rounds <= _MOST_ROUNDS
    values: Values = "counts" if certain else "logprobs"
    says = ["row t describes token t + 1", f"the values are {facts.rounds} draws"]
    if not certain:
        says[1] += (
            f", whose counts are certain at {facts.certain} of {facts.positions} positions; elsewhere weights are the "
            f"stored 7-bit probabilities, and at {facts.full} positions less frequent ids may be missing"
        )
    if temperature != 1:
        says.append(f"they were drawn at temperature {temperature}, and are about that distribution")
    says.append("the stored entropies are approximations, and left out")
    return Reading(
        rows=_Reader(items, asked, facts, values).rows,
        values=values,
        vocab_size=facts.vocab_size,
        sampler="multinomial" if certain else "topk" if facts.full else "unknown",
        rounds=facts.rounds if certain else 0,
        provenance={
            "teacher": items.signature.get("teacher_name"),
            "temperature": temperature,
            "rounds": facts.rounds,
            "k": facts.slots,
            "approximate": not certain,
            "signature": items.signature,
        },
        says=tuple(says),
        renormalised=False,
    )


class _Items:
    """
    The items of a cache, by key.

    Attributes:
        path: Its directory.
        places: Shard and index of each key.
        shards: Paths and numbers of items.
        signature: What the capture said of itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = path / "manifest.json"
        if not manifest.exists():
            raise CorruptError("has no manifest.json, which says where items are; copy all of it", path=path)
        try:
            content = json.loads(manifest.read_bytes(), object_pairs_hook=_unique)
            self.places = {key: (int(place["shard"]), int(place["index"])) for key, place in content["items"].items()}
            self.shards = [(path / Path(shard["path"]).name, int(shard["n"])) for shard in content["shards"]]
            self.signature = dict(content.get("signature", {}))
        except json.JSONDecodeError as error:
            raise CorruptError(describe_bad_json(error), path=manifest) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptError(f"no manifest of SampledKD: {error!r}", path=manifest) from None
        self.shard = functools.lru_cache(_SHARDS_KEPT)(self._shard)

    def _shard(self, number: int) -> list[_Item]:
        path, count = self.shards[number]
        if not path.exists():
            raise CorruptError("is missing, the manifest names it; copy all shards", path=path)
        items = read_torch(path)
        if not isinstance(items, list) or len(items) != count:
            there = f"{len(items)} items" if isinstance(items, list) else "no list"
            raise CorruptError(f"holds {there}, the manifest says {count} items", path=path)
        return [_parse(item, path, number) for number, item in enumerate(items)]

    def find(self, key: str) -> _Item:
        """
        The item of a key that is in ``places``.

        Raises:
            ValueError: It is nowhere, or there is another's; names the key.
        """
        shard, index = self.places[key]
        if not 0 <= shard < len(self.shards) or not 0 <= index < self.shards[shard][1]:
            raise ValueError(f"the item of key {key} was never written: the capture was stopped before")
        item: _Item = self.shard(shard)[index]
        if item.key != key:
            raise ValueError(f"the item of key {key} is that of {item.key}: several processes wrote the same shards")
        return item


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} stands in it twice")
        found[name] = value
    return found


@dataclass(frozen=True, slots=True)
class _Item:
    """
    One sequence of L tokens.

    Attributes:
        key: SHA-1 of its tokens.
        valid: [L - 1] whether a position is about a token that is no padding.
        packed: [L - 1, U, 3] bytes of the slots, mapped.
        rounds, vocab_size: Of the capture.
    """

    key: str
    valid: NDArray[np.bool_]
    packed: NDArray[np.uint8]
    rounds: int
    vocab_size: int

    @property
    def slots(self) -> NDArray[np.uint32]:
        """[L - 1, U] an id in the lower 17 bits, its probability above."""
        data = self.packed.astype(np.uint32)
        slots: NDArray[np.uint32] = data[..., 0] | data[..., 1] << np.uint32(8) | data[..., 2] << np.uint32(16)
        return slots


def _parse(item: Any, path: Path, number: int) -> _Item:
    try:
        stored = item["rs"]
        if (stored["id_bits"], stored["prob_bits"]) != (_ID_BITS, 7):
            raise ValueError(f"{stored['id_bits']} and {stored['prob_bits']} bits, not 17 and 7")  # noqa: TRY301
        valid = item["valid_mask"].astype(bool, copy=False)
        packed = stored["packed"].reshape(valid.size, int(stored["U"]), 3).astype(np.uint8, copy=False)
        return _Item(item["key"], valid, packed, int(stored["N"]), int(stored["sentinel_id"]))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CorruptError(f"item {number}: not what SampledKD writes: {error}", path=path) from None


class _Facts(NamedTuple):
    """What the items have in common, and how many positions have certain counts, or all slots filled."""

    rounds: int
    vocab_size: int
    slots: int
    positions: int
    certain: int
    full: int


def _survey(items: _Items) -> _Facts:
    common: tuple[int, int, int] | None = None
    positions = certain = full = 0
    for number, (path, _) in enumerate(items.shards):
        for item in items.shard(number):
            its = item.rounds, item.vocab_size, item.packed.shape[1]
            common = common or its
            if its != common:
                raise CorruptError(
                    f"has an item of {its[0]} rounds, {its[1]} ids and {its[2]} slots, others have {common[0]}, "
                    f"{common[1]} and {common[2]}; convert each run alone",
                    path=path,
                )
            counts, sure = _counts(item)
            positions += int(item.valid.sum())
            certain += int(sure[item.valid].sum())
            full += int((counts > 0)[item.valid].all(axis=1).sum())
    if common is None:
        raise CorruptError("holds no item", path=items.path)
    return _Facts(*common, positions, certain, full)


def _counts(item: _Item) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The nearest count [T, U] of each slot, and whether those of a position [T] are certain."""
    probs = (item.slots >> _ID_BITS).astype(np.int64)
    counts = np.rint(probs * item.rounds / _FULL).astype(np.int64)
    sure: NDArray[np.bool_] = (probs == 0).any(axis=1) & (counts.sum(axis=1) == item.rounds)
    return counts, sure & ((counts > 0) == (probs > 0)).all(axis=1)


class _Reader:
    """The sequences that the user's tokens name, in their order."""

    def __init__(self, items: _Items, asked: Asked, facts: _Facts, values: Values) -> None:
        assert asked.tokens is not None
        self._items, self._tokens, self._facts, self._values = items, asked.tokens, facts, values

    def rows(self, start: int) -> Iterator[Row | Unreadable]:
        tokens = self._tokens.rows(start)
        seen: dict[str, int] = {}
        for number, ids in enumerate(tokens, start):
            try:
                key = self._key(ids)
                if key in seen:
                    raise ValueError(f"its tokens are those of sequence {seen[key]}, which has their records")  # noqa: TRY301
                seen[key] = number
                row: Row | Unreadable = self._row(ids, self._items.find(key))
            except ValueError as error:
                row = Unreadable(str(error))
            yield row

    def _key(self, ids: NDArray[Any]) -> str:
        keys = [hashlib.sha1(ids.astype(kind).tobytes(), usedforsecurity=False).hexdigest() for kind in ("<i8", "<i4")]
        for key in keys:
            if key in self._items.places:
                return key
        raise ValueError(f"no item has the key of its tokens, {keys[0]}; give them as they were captured, with padding")

    def _row(self, ids: NDArray[Any], item: _Item) -> Row:
        if ids.size != item.valid.size + 1:
            raise ValueError(f"{ids.size} tokens, its item has {item.valid.size} positions")
        real = np.flatnonzero(item.valid)
        if not real.size:
            raise ValueError("all of its tokens are padding")
        # Position t is about token t + 1, so that what is real begins behind the first real position's own token.
        begin, end = int(real[0]) + 1 if real[0] else 0, int(real[-1]) + 1
        if begin >= end:
            raise ValueError("all of its tokens but one are padding")
        counts, sure = (each[begin:end] for each in _counts(item))
        slots = item.slots[begin:end]
        probs = (slots >> _ID_BITS).astype(np.float64)
        there = (probs > 0) & item.valid[begin:end, None]
        values = counts
        if self._values != "counts":
            with np.errstate(divide="ignore"):  # of empty slots
                values = np.log(np.where(sure[:, None], counts / item.rounds, probs / _FULL))
        token_ids = (slots & ((1 << _ID_BITS) - 1)).astype(np.int64)
        return Row(ids[begin : end + 1], token_ids[there], values[there], offsets_of(there.sum(1)))
