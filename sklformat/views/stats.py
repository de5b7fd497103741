"""
What a cache holds, in numbers: distributions of its records, how labels and records agree, and what looks wrong.

Reads and adds up; prints and draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sklformat import native
from sklformat.errors import FormatError
from sklformat.format.block import block_shape
from sklformat.format.columns import size_of
from sklformat.format.header import Header
from sklformat.format.layout import RECORD_SIZE
from sklformat.native import RowError
from sklformat.views.characters import visible
from sklformat.views.holdings import Holdings, hold
from sklformat.views.overview import counted

if TYPE_CHECKING:
    from sklformat.settings.inspection import StatsConfig

Floats = NDArray[np.float64]
_BUCKETS, _GROUP_BYTES, _MOST_UNIQUES = 16, 1 << 20, 4096
_MOST_FALSE_ALARMS = 1e-4  # more of them, and nothing is said to be suspicious or not
_LEAST = "the least of systematic draws"
_TOP = "the largest record"
_DRAWN_TOP = "the largest record, too high by chance"
_ESTIMATE = "Miller-Madow: -sum(c/N log(c/N)) + (unique tokens - 1) / 2N"


class Stats(dict[str, Any]):
    """What ``stats`` found, by name, ready for JSON; printed it is a table for people."""

    def __str__(self) -> str:
        lines = table(self)
        width = max(map(len, lines)) + 2
        return "\n".join(f"{name:<{width}}{visible(value)}" for name, value in lines.items())


def stats(path: Any, sample: int | None = None, seed: int = 0) -> Stats:
    """
    What a cache holds, in numbers, ready for JSON; entropies in nats, shares in 0..1.  Printed it is a table.

    Every mean over positions comes as {"mean", "error"}: the standard error, clustered by sequence, where a sample was
    taken, else None.  Positions without record do not count in them.

    Args:
        path: Cache directory or .skl shard, or the URL of either; also what there is of a capture that has not ended:
            its directory, the URL that its shards go to, or a .skl.partial shard.
        sample: This many sequences, drawn without replacement; None: all.
        seed: Of the draw.

    Raises:
        FormatError, FileNotFoundError: As ``skl.open``; a block that is damaged is named.
        UnfinishedError: A capture has not ended, and has written nothing yet.
        ValueError: sample is below 2.
    """
    from sklformat.settings.inspection import StatsConfig  # noqa: PLC0415  opening a cache needs no settings

    return gather(StatsConfig(path=str(path), sample=sample, seed=seed))


def gather(config: StatsConfig, tell: Callable[[str, int, int], None] | None = None) -> Stats:
    """As ``stats``; ``tell`` hears what is being done, and how many sequences of how many are done."""
    with closing(hold(config.path)) as cache:
        lengths, records = cache.num_positions, cache.num_records
        available = lengths.size
        numbers = np.arange(available)
        if config.sample is not None and config.sample < available:
            rng = np.random.default_rng(config.seed)
            numbers = np.sort(rng.choice(available, config.sample, replace=False))
        header, longest = cache.header, int(lengths.max(initial=1))
        ids = _special_ids(header)
        tables = native.StatsTables(
            _MOST_UNIQUES, _BUCKETS, -(-longest // _BUCKETS), np.array([*ids.values()], np.uint32)
        )
        rows = _add(cache, numbers, tables, tell)
        sums = _Sums(rows, lengths[numbers].astype(np.float64), available, sampled=numbers.size < available)
        found = Stats(
            {
                "path": str(cache.path),
                "fingerprint": cache.fingerprint,
                **cache.advance,
                "sequences": available,
                "sampled_sequences": int(numbers.size),
                "positions": int(lengths.sum(dtype=np.uint64)),
                "records": int(records.sum(dtype=np.uint64)),
                "lengths": _spread(lengths),
                "repeated_sequences": available - int(np.unique(cache.alignments).size),
                "bytes": _bytes(header, lengths, records, cache.size_bytes),
                "positions_without_records": sums.mean("positions", of_all=True, flip=True),
                "unique_tokens": {**sums.mean("records"), **_histogram(tables.uniques)},
                **_of_kind(header, sums, tables.sizes),
            }
        )
        if header.token_size:
            found |= {"labels": _labels(header, sums, tables), "tokens": _tokens(header, sums, tables, ids)}
        return found


def _add(
    cache: Holdings,
    numbers: NDArray[np.int64],
    tables: native.StatsTables,
    tell: Callable[[str, int, int], None] | None,
) -> Floats:
    """Rows of all sequences; a megabyte or so at a time, which stays in the caches."""
    shape, scale = block_shape(cache.header, 0, 0), cache.header.scale_log2
    pieces = (
        np.cumsum(RECORD_SIZE[cache.header.profile or "R24"] * cache.num_records[numbers].astype(np.int64))
        // _GROUP_BYTES
    )
    groups = np.split(numbers, np.flatnonzero(np.diff(pieces)) + 1)
    rows, done = [np.zeros((0, len(native.SUMS)))], 0
    for group in groups:
        of = cache.rows(group)
        try:
            rows.append(tables.add(shape, scale, of.sources, of.sizes, of.num_positions, of.num_records))
        except RowError as error:
            cache.check(int(group[error.row]))  # names file, block and byte
            if isinstance(error.__cause__, FormatError):
                raise error.__cause__ from None
            raise
        done += group.size
        if tell is not None:
            tell("stats", done, numbers.size)
    return np.concatenate(rows)


class _Sums:
    """Means over positions of what rows add up to, with errors by sequence."""

    def __init__(self, rows: Floats, lengths: Floats, population: int, *, sampled: bool) -> None:
        self._rows, self._lengths, self._population, self._sampled = rows, lengths, population, sampled
        self.positions = float(self._column("positions").sum())
        self.num_tokens = float((lengths + 1).sum())

    def _column(self, name: str) -> Floats:
        return self._rows[:, native.SUMS.index(name)]

    def total(self, name: str) -> float:
        return float(self._column(name).sum())

    def mean(
        self, *names: str, shift: float = 0.0, factor: float = 1.0, of_all: bool = False, flip: bool = False
    ) -> dict[str, float | None]:
        """The sum of the first less that of the others, over positions: {"mean", "error"}."""
        over = self._lengths if of_all else self._column("positions")
        values = self._column(names[0]) - sum((self._column(name) for name in names[1:]), np.zeros(()))
        total, n = float(over.sum()), over.size
        if total == 0:
            return {"mean": None, "error": None}
        ratio = float(values.sum()) / total
        error = None
        if self._sampled and n > 1:
            spread = float(((values - ratio * over) ** 2).sum()) * n / (n - 1) * (1 - n / self._population)
            error = math.sqrt(spread) / total * abs(factor)
        mean = factor * ratio + shift
        return {"mean": 1 - mean if flip else mean, "error": error}


def _of_kind(header: Header, sums: _Sums, sizes: NDArray[np.uint64]) -> dict[str, Any]:
    shown = np.trim_zeros(sizes, "b").tolist()
    drawn = header.kind == "counts" or header.sampler in ("multinomial", "systematic", "thinned")
    found: dict[str, Any] = {"confidence": {**sums.mean("top"), "method": _DRAWN_TOP if drawn else _TOP}}
    if header.kind == "counts":
        plain, unique = sums.mean("entropy"), sums.mean("records")
        found["counts"] = {"rounds": header.rounds, "histogram": shown}
        found["entropy"] = {
            "mean": None
            if plain["mean"] is None or unique["mean"] is None
            else plain["mean"] + (unique["mean"] - 1) / (2 * header.rounds),
            "error": plain["error"],
            "method": _ESTIMATE,
        }
    else:
        found["retained_mass"] = sums.mean("mass")
        found["weights"] = {"histogram": shown, "bins": "by powers of two below 1: bin k holds 2^-k to 2^-(k-1)"}
        found["entropy"] = {**sums.mean("entropy"), "method": "of the records alone, without what they leave out"}
    if "entropy" in header.columns:
        found["entropy"] = {**sums.mean("exact_entropy"), "method": "exact, of the column entropy"}
    if "label_logprob" in header.columns:
        found["label_logprob"] = sums.mean("label_logprob")
    return found


def _labels(header: Header, sums: _Sums, tables: native.StatsTables) -> dict[str, Any]:
    rate, chance = sums.mean("hits"), sums.mean("other_hits")
    expected: dict[str, Any] = {"mean": None, "error": None, "method": "not known of weighted records"}
    if header.kind == "counts":
        # Of systematic draws it is too low, by sum N p^2 over Np <= 1 and sum (2 - Np) / N over 1 < Np < 2.
        least = f", {_LEAST}" * (header.sampler == "systematic")
        expected = {**sums.mean("unseen", flip=True), "method": f"Good-Turing: 1 - tokens drawn once / N{least}"}
    elif header.sampler in ("topk", "topp"):
        expected = {**sums.mean("mass"), "method": "the retained mass"}
    suspicious = false_alarms = None
    if rate["mean"] is not None and chance["mean"] is not None and expected["mean"] is not None:
        gap = max(expected["mean"] - chance["mean"], 0.0)
        # By Hoeffding: hit - chance / 2 - expected / 2 is in -1..1, gap / 2 in the mean, and depends on one other.
        false_alarms = math.exp(-sums.positions * gap * gap / 16)
        if false_alarms <= _MOST_FALSE_ALARMS:
            suspicious = rate["mean"] - chance["mean"] < gap / 2
    found = {
        "in_support": rate,
        "expected": expected,
        "chance": chance,
        "confidence": sums.mean("label"),
        "is_top": sums.mean("right"),
        "suspicious": suspicious,
        "false_alarm_rate": false_alarms,
        "along_the_sequence": [
            {
                "first": place * tables.bucket_positions,
                "positions": int(n),
                "in_support": hits / n,
                "chance": others / n,
            }
            for place, (n, hits, others, *_) in enumerate(tables.buckets.tolist())
            if n
        ],
        "reliability": [
            {"confidence": top / n, "accuracy": right / n, "share": n / sums.positions}
            for n, top, right in tables.bins.tolist()
            if n
        ],
    }
    if suspicious:
        found["warning"] = (
            f"labels are among the records of their position in {100 * (rate['mean'] or 0):.1f} % of positions, where "
            f"{100 * expected['mean']:.1f} % are expected and {100 * (chance['mean'] or 0):.1f} % are by chance: "
            "tokens and records look misaligned"
        )
    return found


def _special_ids(header: Header) -> dict[str, int]:
    packing = header.capture.get("packing")
    if not isinstance(packing, Mapping):
        return {}
    bos = packing.get("bos")
    named = {"separator": packing.get("separator_id"), "bos": bos.get("id") if isinstance(bos, Mapping) else None}
    return {name: value for name, value in named.items() if type(value) is int and 0 <= value < 1 << 32}


def _tokens(header: Header, sums: _Sums, tables: native.StatsTables, ids: dict[str, int]) -> dict[str, Any]:
    tokens = sums.num_tokens
    found: dict[str, Any] = {
        name: {"id": ids[name], "share": int(count) / tokens if tokens else None}
        for name, count in zip(ids, tables.id_counts.tolist(), strict=True)
    }
    if "document_start" in header.columns:
        found["documents"] = int(sums.total("documents"))
        if "bos" in ids and found["documents"]:
            found["bos_a_document"] = int(tables.id_counts[list(ids).index("bos")]) / found["documents"]
    return found


def _bytes(header: Header, lengths: NDArray[np.uint32], records: NDArray[np.uint32], size: int) -> dict[str, int]:
    positions, number = lengths.astype(np.uint64), records.astype(np.uint64)
    found = {
        "numbers of records": int(positions.sum()) * (header.record_count_size or 0),
        "records": int(number.sum()) * RECORD_SIZE[header.profile or "R24"],
        "tokens": int((positions + np.uint64(1)).sum()) * (header.token_size or 0),
    }
    found |= {name: int(size_of(name, positions, number).sum()) for name in header.columns}
    return found | {"headers, index and padding": size - sum(found.values()), "total": size}


def _spread(lengths: NDArray[np.uint32]) -> dict[str, float]:
    return {
        "shortest": int(lengths.min(initial=1 << 31)) if lengths.size else 0,
        "mean": float(lengths.mean()) if lengths.size else 0.0,
        "longest": int(lengths.max(initial=0)),
    }


def _histogram(numbers: NDArray[np.uint64]) -> dict[str, Any]:
    """Percentiles of positions that have records, and how many positions have 0, 1, 2, ... of them."""
    some = numbers.astype(np.int64)
    some[0] = 0
    reached, total = np.cumsum(some), int(some.sum())
    percentiles = {
        f"p{p}": int(np.searchsorted(reached, p / 100 * total)) if total else None for p in (1, 10, 50, 90, 99)
    }
    return {**percentiles, "histogram": np.trim_zeros(numbers, "b").tolist()}


def table(found: Mapping[str, Any]) -> dict[str, str]:
    """The same for people, line by line; what is not known has no line."""
    unique, entropy = found["unique_tokens"], found["entropy"]
    lines = {
        "path": found["path"],
        **_state(found),
        "sequences": f"{found['sequences']:,}, {found['repeated_sequences']:,} of them repeated"
        + (f"; sample of {found['sampled_sequences']:,}" * (found["sampled_sequences"] < found["sequences"])),
        "positions": f"{found['positions']:,}{_each(found['lengths'])}",
        **_line("without records", found["positions_without_records"], percent=True),
        **_line("unique tokens", unique, f"; half <= {unique['p50']}, 99 % <= {unique['p99']}"),
        **_line("entropy", entropy, f" nats ({entropy['method'].partition(':')[0]})"),
        **_line("confidence", found["confidence"], f" ({found['confidence']['method']})", percent=True),
    }
    if "retained_mass" in found:
        lines |= _line("retained mass", found["retained_mass"], percent=True)
    if "label_logprob" in found:
        lines |= _line("log-prob of label", found["label_logprob"], " (exact, of the column)")
    if labels := found.get("labels"):
        least = "at least " * labels["expected"]["method"].endswith(_LEAST)
        beside = [("expected", f"expected {least}"), ("chance", "by chance ")]
        known = [f"{words}{_said(labels[name], percent=True)}" for name, words in beside if _is_known(labels[name])]
        lines |= _line("confidence in label", labels["confidence"], percent=True)
        lines |= _line("label has a record", labels["in_support"], f"; {', '.join(known)}", percent=True)
        if along := " ".join(f"{100 * part['in_support']:.0f}" for part in labels["along_the_sequence"]):
            lines["along the sequence"] = f"{along} %"
        lines |= _line("label is the largest", labels["is_top"], percent=True)
        lines |= {"suspicious": labels["warning"]} if labels["suspicious"] else {}
    for name, value in found.get("tokens", {}).items():
        if isinstance(value, dict):
            lines[name] = f"id {value['id']}" + (
                "" if value["share"] is None else f", {100 * value['share']:.2f} % of tokens"
            )
        else:
            lines[name.replace("_", " ")] = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    total = found["bytes"]["total"]
    return lines | {
        f"bytes: {name}": f"{size:,} ({100 * size / total:.1f} %)"
        for name, size in found["bytes"].items()
        if size and name != "total"
    }


def _each(lengths: Mapping[str, float]) -> str:
    shortest, longest = lengths["shortest"], lengths["longest"]
    if not longest:
        return ""
    return f", {longest:,} in each sequence" if shortest == longest else f", {shortest:,} to {longest:,} in a sequence"


def _state(found: Mapping[str, Any]) -> dict[str, str]:
    """That a capture has not ended, and how far it is."""
    if not found.get("unfinished"):
        return {}
    there, goal, unsealed = found["sequences"], found["num_sequences"], sum(found["unsealed"].values())
    far = f"{there:,} of {counted(goal, 'sequence')}" if goal else counted(there, "sequence")
    return {"state": f"unfinished: {far} so far, {unsealed:,} of them not sealed"}


def _line(name: str, value: Mapping[str, Any], note: str = "", *, percent: bool = False) -> dict[str, str]:
    return {name: _said(value, percent=percent) + note} if _is_known(value) else {}


def _is_known(value: Mapping[str, Any]) -> bool:
    return value["mean"] is not None


def _said(value: Mapping[str, Any], *, percent: bool) -> str:
    factor, unit = (100, " %") if percent else (1, "")
    error = "" if value["error"] is None else f" ± {factor * value['error']:.2g}"
    mean = factor * value["mean"]
    return f"{mean:{',.0f' if abs(mean) >= 1e4 else '.4g'}}{error}{unit}"
