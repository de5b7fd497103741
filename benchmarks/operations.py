"""
How many positions per second are merged, sliced and thinned?

One core; two caches of about 12 records per position in the page cache, as ``benchmarks/verify.py`` writes them.  The
figure is of the processor's time, and beside it that of the clock; the goal is 5 million for what only copies.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from timing import processor
from verify import write_shard

import sklformat as skl
from sklformat.operations import Made, merge_caches, slice_cache, subsample_cache
from sklformat.settings.operations import MergeConfig, SliceConfig, SubsampleConfig


def measure(out: Path, run: Callable[[], Made], rounds: int) -> tuple[float, float]:
    """Positions per second of processor and clock, the best of some rounds."""
    best = [0.0, 0.0]
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        used, begin = time.process_time(), time.perf_counter()
        made = run()
        seconds = time.process_time() - used, time.perf_counter() - begin
        best = [max(old, made.positions / new) for old, new in zip(best, seconds, strict=True)]
    return best[0], best[1]


def ways(root: Path, size_bytes: int, seq_len: int) -> dict[str, Callable[[], Made]]:
    """What is measured, on two caches that are written first; all of it goes to ``root / "out"``."""
    paths = [root / "a.skl", root / "b.skl"]
    for path in paths:
        write_shard(path, size_bytes, {"seq_len": seq_len, "capture": {"text": path.stem}})
    a, out, count = str(paths[0]), root / "out", len(skl.open(paths[0]))
    return {
        "merge": lambda: merge_caches(MergeConfig(caches=tuple(map(str, paths)), out=out)),
        "slice": lambda: slice_cache(SliceConfig(cache=a, sequences=f"3:{count - 5}", out=out)),
        "subsample": lambda: subsample_cache(SubsampleConfig(cache=a, rounds=12, out=out)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=160, help="size of each cache")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write; else the system's, for a disk or for memory")
    args = parser.parse_args()
    print(f"{processor()}, {args.mb} MB per cache")
    print("| positions per sequence | verb | M positions/s of a core | by the clock |\n|---:|---|---:|---:|")
    for seq_len in (1024, 64):
        with tempfile.TemporaryDirectory(dir=args.directory) as folder:
            for verb, run in ways(Path(folder), args.mb << 20, seq_len).items():
                of_core, of_clock = measure(Path(folder) / "out", run, args.rounds)
                print(f"| {seq_len} | {verb} | {of_core / 1e6:.1f} | {of_clock / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
