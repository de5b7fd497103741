"""
What do many shards, far positions, proofs of alignment and reading instead of mapping cost the loader?

* open: a cache of 10 000 shards from its manifest, and the first batch of it.  Limit: one second for both together.
* resume: load a state at position 10^9 of the stream and make the next batch; and the places alone, of a shuffle of
  4 * 10^9 sequences.  Limit: 100 ms.
* state: its bytes as JSON at the largest numbers.  Limit: 300.
* alignment: an epoch with tokens of the caller's own, each sequence proven, against the proof alone.  Limit: 2 % of it.
* prefetch: an epoch with one millisecond of other work per batch, batches made ahead by two threads against none.
* io: later epochs of batches read with pread against mapped ones, and the windowed order against the global one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import measure, processor
from verify import write_shard

import sklformat as skl
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import write_manifest
from sklformat.checksums import checksum
from sklformat.distill import SparseLogitDataset
from sklformat.files.disk import Disk
from sklformat.format.order import Schedule


class QuickDisk(Disk):
    """Writes that nothing has to survive."""

    def sync(self, fd: int) -> None:
        pass

    def sync_directory(self, path: Path) -> None:
        pass


def write_small_shards(directory: Path, num_shards: int) -> None:
    """A cache of shards of two short sequences each."""
    directory.mkdir()
    targets = skl.SparseTargets(token_ids=[1, 2], counts=[1, 1], offsets=[0, 1, 2])
    for number in range(num_shards):
        header = skl.Header(
            vocab_size=1000, seq_len=2, kind="counts", rounds=1, shard_number=number, first_sequence=2 * number
        )
        with skl.ShardWriter(directory / f"shard-{number:05}.skl", header=header, disk=QuickDisk()) as writer:
            for i in range(2):
                writer.append([number % 1000, number // 1000, i], targets)
    write_manifest(directory, scan_directory(directory))


def median_seconds(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]


def measure_many_shards(directory: Path, num_shards: int, rounds: int) -> None:
    path = directory / "many"
    write_small_shards(path, num_shards)
    opened = median_seconds(lambda: skl.open(path), rounds)

    def first_batch() -> None:
        next(iter(SparseLogitDataset(path, batch_size=8, prefetch=0)))

    started = median_seconds(first_batch, rounds)
    print(f"open {num_shards} shards: {opened:.3f} s; with the dataset and its first batch {started:.3f} s")
    ds = SparseLogitDataset(path, batch_size=8, prefetch=0)
    per_epoch = len(ds) * 8
    state = ds.state_dict() | {"epoch": 10**9 // per_epoch, "consumed": 10**9 % per_epoch // 8 * 8}

    def resume() -> None:
        ds.load_state_dict(state)
        next(iter(ds))

    places = Schedule(num_sequences=4 * 10**9, batch_size=8)
    windows = Schedule(num_sequences=4 * 10**9, batch_size=8, window=4096)
    print(
        f"resume at position 10^9: {1e3 * median_seconds(resume, rounds):.1f} ms with the next batch; places alone "
        f"{1e3 * median_seconds(lambda: next(places.batches(0, 10**9)), rounds):.1f} ms, windowed "
        f"{1e3 * median_seconds(lambda: next(windows.batches(0, 10**9)), rounds):.1f} ms"
    )
    largest = SparseLogitDataset(path, batch_size=8, seed=2**64 - 1, window=2**62, tail="wrap").state_dict()
    largest |= {"epoch": 2**63 - 1, "consumed": 2**62, "sequences": [2**62 - 1, 2**62]}
    print(f"state: {len(json.dumps(ds.state_dict()))} bytes, {len(json.dumps(largest))} at the largest numbers")


def measure_epochs(directory: Path, size_bytes: int, rounds: int) -> None:
    path = directory / "shard-00000.skl"
    write_shard(path, size_bytes, {})
    with skl.open(path) as cache:
        num_sequences = len(cache)
        alignments = [cache.alignment_of(i) for i in range(num_sequences)]
        np.save(directory / "tokens.npy", np.stack([sequence.tokens for sequence in cache]).astype(np.uint32))
    tokens = np.load(directory / "tokens.npy", mmap_mode="r")

    def epoch(ds: SparseLogitDataset) -> Callable[[], None]:
        def run() -> None:
            for _ in ds:
                pass

        return run

    rows = np.array(tokens, "<u4")

    def proof() -> None:
        """What the proof alone costs: the checksum of each sequence, checked against the index."""
        data, size = memoryview(rows).cast("B"), rows.strides[0]
        for number, expected in enumerate(alignments):
            assert checksum(data[number * size : number * size + size]) == expected

    def busy(ds: SparseLogitDataset) -> Callable[[], None]:
        """An epoch with a step of a millisecond, which lets go of the GIL as torch does."""
        matrix = torch.ones(300, 300)

        def run() -> None:
            for _ in ds:
                end = time.perf_counter() + 1e-3
                while time.perf_counter() < end:
                    torch.mm(matrix, matrix)

        return run

    settings = {"batch_size": 8, "prefetch": 0}
    ways = {
        "stored tokens, mmap": epoch(SparseLogitDataset(skl.open(path, "mmap"), **settings)),
        "own tokens, proven": epoch(SparseLogitDataset(skl.open(path, "mmap"), tokens=tokens, **settings)),
        "the proof alone": proof,
        "stored tokens, pread": epoch(SparseLogitDataset(skl.open(path, "pread"), **settings)),
        "stored tokens, window 256": epoch(SparseLogitDataset(skl.open(path, "mmap"), window=256, **settings)),
    }
    results = measure("own tokens, proven", ways, rounds)
    positions = num_sequences // 8 * 8 * 1024
    for name, (median, ratio) in results.items():
        print(f"{name:<26}{positions / median / 1e6:>8.1f} M positions/s   this / own tokens: {1 / ratio:.3f}")

    ahead = {f"prefetch {n}": busy(SparseLogitDataset(path, batch_size=8, prefetch=n)) for n in (2, 0)}
    results = measure("prefetch 2", ahead, rounds)
    steps = num_sequences // 8 * 1e-3
    for name, (median, _) in results.items():
        print(f"{name}: {median:.4f} s for {steps:.3f} s of other work")


def main() -> None:
    parser = argparse.ArgumentParser(description="Many shards, far positions, proofs and ways of reading.")
    parser.add_argument("--quick", action="store_true", help="fewer shards and rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}, 1 core")
    with tempfile.TemporaryDirectory() as directory:
        measure_many_shards(Path(directory), 500 if args.quick else 10_000, 3 if args.quick else 7)
        measure_epochs(Path(directory), (6 if args.quick else 42) << 20, 3 if args.quick else 9)


if __name__ == "__main__":
    main()
