"""
What does it cost to make one stream of several caches, against the loader on one cache?

One core; the two shards of one cache (12 records on average, 1024 positions, tokens stored, in the page cache), read as
that cache and as two caches, alternately; batches of 8, no prefetch threads, later epochs.  "unlike records" mixes one
of the shards with one of ratios, "two teachers" unites the records of two caches of the same tokens.  Seconds are of
the processor, so that other work on the machine counts less.
The limit is the loader on one cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timing import processor
from verify import write_shard

import sklformat as skl
from sklformat.distill import SparseLogitDataset, Teachers


def seconds_of_epoch(ds: SparseLogitDataset) -> float:
    start = time.process_time()
    for _ in ds:
        pass
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Streams of several caches against the stream of one.")
    parser.add_argument("--quick", action="store_true", help="smaller caches, fewer rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size, rounds = (5_000_000, 5) if args.quick else (86_000_000, 15)
    with tempfile.TemporaryDirectory() as directory:
        first, second = (Path(directory) / "cache" / f"shard-0000{number}.skl" for number in (0, 1))
        ratios, settings = Path(directory) / "ratios.skl", {"batch_size": 8, "prefetch": 0}
        first.parent.mkdir()
        write_shard(first, size, {})
        write_shard(second, size, {"shard_number": 1, "first_sequence": len(skl.open(first))})
        write_shard(ratios, size, {"kind": "ratios", "rounds": 0})

        def stream(path: Any, **more: Any) -> SparseLogitDataset:
            return SparseLogitDataset(path, **settings, **more)

        ways = {
            "one cache": stream(first.parent),
            "two caches": stream([first, second]),
            "two caches, weights 0.7 and 0.3": stream([first, second], weights=[0.7, 0.3]),
            "two caches, unlike records": stream([first, ratios]),
            "one cache of ratios": stream(ratios),
            "two teachers": stream(Teachers([first, second])),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, ds in list(ways.items())[:: 1 if number % 2 else -1]:
                taken = seconds_of_epoch(ds) / (len(ds) * 8 * 1024)
                if number:
                    times[name].append(taken)
    print(f"{processor()}, 1 core, {rounds} rounds")
    for name, some in times.items():
        ratio = statistics.median(mine / one for mine, one in zip(some, times["one cache"], strict=True))
        rate = 1e-6 / statistics.median(some)
        print(f"{name:<34} {rate:>6.1f} M positions/s, {ratio:>6.3f} of the time of one cache")


if __name__ == "__main__":
    main()
