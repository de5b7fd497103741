"""
Caches on one sheet: what ``stats`` found in them, which ``plot`` draws; runs are left to ``curves``.

Computes no figure beside those of ``stats`` but shares of their sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sklformat.cache.contents import partial_files, shard_files
from sklformat.cache.manifest import has_manifest
from sklformat.errors import UnsupportedError
from sklformat.files.disk import make_place_of
from sklformat.files.places import is_url
from sklformat.files.regular import check_exists
from sklformat.plot import CacheRow, plot_caches
from sklformat.settings.inspection import PlotConfig, StatsConfig
from sklformat.views import curves
from sklformat.views.characters import visible
from sklformat.views.curves import LOG, Plotted
from sklformat.views.overview import counted
from sklformat.views.page import short_names
from sklformat.views.stats import gather

Points = list[tuple[float, float]]


def plot(config: PlotConfig, tell: Callable[[str, int, int], None] | None = None) -> Plotted:
    """
    Draw caches side by side, or training runs; what each path is decides.

    Args:
        config: Paths and the file to write.
        tell: Hears which cache is read, and how many sequences of how many are done.

    Raises:
        FileNotFoundError: A path is not there.
        UnsupportedError: It is neither a cache nor a run, or the paths are of both.
        ValueError: A cache holds no sequence.
        FormatError: A cache is damaged or not whole, or the log of a run cannot be read.
        OSError: The sheet cannot be written.
    """
    is_run = [_is_run(path) for path in config.paths]
    make_place_of(config.out)
    if all(is_run):
        return curves.plot(config)
    if any(is_run):
        run, cache = config.paths[is_run.index(True)], config.paths[is_run.index(False)]
        raise UnsupportedError(f"a training run, and {cache} is a cache; plot them on sheets of their own", path=run)
    names = [visible(name) for name in short_names(config.paths)]
    all_found = []
    for path, name in zip(config.paths, names, strict=True):
        hear = None if tell is None else lambda _, done, total, name=name: tell(name, done, total)
        found = gather(StatsConfig(path=path, sample=config.sample, seed=config.seed), hear)
        if not found["sequences"]:
            raise ValueError(f"{path}: holds no sequence, so there is nothing to draw")
        all_found.append(found)
    by_weight = any("counts" not in found for found in all_found)
    rows = [row_of(found, name, by_weight=by_weight) for found, name in zip(all_found, names, strict=True)]
    plot_caches(rows, config.out, by_weight=by_weight)
    return Plotted(out=config.out, names=names)


def row_of(found: dict[str, Any], name: str, *, by_weight: bool = False) -> CacheRow:
    """
    What is drawn of one cache.

    Args:
        found: What ``stats`` says of it.
        name: In the legend.
        by_weight: Whether records are sorted by weight also where they have counts, as beside a cache of ratios.
    """
    labels, positions, size = found.get("labels", {}), found["positions"], found["bytes"]
    part = found["sampled_sequences"] < found["sequences"]
    notes = [counted(found["sequences"], "sequence") + f", {found['sampled_sequences']:,} of them read" * part]
    if positions:
        mean = size["total"] / positions
        notes.append(f"{mean:{',.0f' if mean >= 1000 else '.3g'}} bytes per position")
    if labels.get("suspicious"):
        notes.append("suspicious: looks misaligned")
    along = labels.get("along_the_sequence", [])
    return CacheRow(
        name=name,
        notes=notes,
        uniques=_shares(dict(enumerate(found["unique_tokens"]["histogram"][1:], 1))),
        reliability=labels.get("reliability", []),
        in_support=[(each["first"], each["in_support"]) for each in along],
        chance=[(each["first"], each["chance"]) for each in along],
        expected=labels["expected"]["mean"] if labels else None,
        bytes={name: number / positions for name, number in size.items() if number and name != "total" and positions},
        sizes=_shares(_sizes(found, by_weight=by_weight)),
    )


def _is_run(path: str) -> bool:
    """Whether a path is a run's; else a cache is there, whole or not."""
    if is_url(path):
        return False
    place = Path(path)
    check_exists(place)
    if not place.is_dir():
        return False
    if (place / LOG).is_file():
        return True
    if not (has_manifest(place) or shard_files(place) or partial_files(place)):
        raise UnsupportedError(
            f"neither a training run nor a cache: it has no {LOG}, which sklformat train writes, and no .skl shards",
            path=place,
        )
    return False


def _sizes(found: dict[str, Any], *, by_weight: bool) -> dict[float, int]:
    """Numbers of records by count, or by the power of two at or below their weight."""
    if "counts" not in found:
        return {2.0**-k: number for k, number in enumerate(found["weights"]["histogram"])}
    numbers = dict(enumerate(found["counts"]["histogram"]))
    if not by_weight:
        return {count: number for count, number in numbers.items() if count}
    sizes: dict[float, int] = {}
    for count, number in numbers.items():
        if count:
            weight = 2.0 ** math.floor(math.log2(count / found["counts"]["rounds"]))
            sizes[weight] = sizes.get(weight, 0) + number
    return sizes


def _shares(numbers: dict[Any, int]) -> Points:
    """Share of each in the sum."""
    total = sum(numbers.values())
    return [(float(value), number / total) for value, number in numbers.items()] if total else []
