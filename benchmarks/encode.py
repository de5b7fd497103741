"""
How many bytes of finished shard does one core encode, checksum and append per second?

``ShardWriter.append`` into a file, by profile and kind, and with sorted draws merged to counts before it, against
writing the same bytes ready-made with one system call per block, and against copying them in memory. Sequences of 1024
positions with their tokens. Each turn writes a new file; what the system does later to bring it to the disk is not
counted, syncing is the checkpoint's business. The goal is 200 MB/s.

    python benchmarks/encode.py [--quick] [--directory /dev/shm]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from timing import processor

import sklformat as skl
from sklformat import native
from sklformat.capture import merge_draws

POSITIONS, ROUNDS, K = 1024, 50, 12
CASES = {
    "R24 counts": skl.Header(vocab_size=128_256, seq_len=POSITIONS, kind="counts", rounds=ROUNDS),
    "R24W counts": skl.Header(vocab_size=151_936, seq_len=POSITIONS, kind="counts", rounds=ROUNDS),
    "R32 counts": skl.Header(vocab_size=262_144, seq_len=POSITIONS, kind="counts", rounds=ROUNDS),
    "R24 ratios, top-k 12": skl.Header(vocab_size=128_256, seq_len=POSITIONS, kind="ratios", rounds=0, sampler="topk"),
    "R24 ratios, 4 to 20": skl.Header(vocab_size=128_256, seq_len=POSITIONS, kind="ratios", rounds=ROUNDS),
}
MERGED = "R24 counts from draws"

Sequence = tuple[np.ndarray, skl.SparseTargets]


def make_sequence(header: skl.Header, rng: np.random.Generator) -> Sequence:
    """Tokens and records like a teacher's: power-law weights, 4 to 20 records per position or 12 of top-k."""
    tokens = rng.integers(0, header.vocab_size, POSITIONS + 1)
    lengths = np.full(POSITIONS, K) if header.sampler == "topk" else rng.integers(4, 21, POSITIONS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([np.sort(rng.choice(header.vocab_size, n, replace=False)) for n in lengths])
    if header.kind == "counts":
        counts = np.ones(offsets[-1], np.uint8)
        counts[offsets[:-1] + rng.integers(0, lengths)] = ROUNDS - lengths + 1
        return tokens, skl.SparseTargets(token_ids=ids, counts=counts, offsets=offsets)
    weights = np.concatenate([rng.permutation(1.0 / np.arange(1, n + 1) ** 1.5) for n in lengths])
    return tokens, skl.SparseTargets(token_ids=ids, weights=weights, offsets=offsets)


def seconds(run: Callable[[], None]) -> float:
    """Of this thread, so that a busy neighbour costs little."""
    begin = time.thread_time()
    run()
    return time.thread_time() - begin


def draws_of(targets: skl.SparseTargets) -> np.ndarray:
    """[T, rounds] sorted draws that these counts are made of."""
    return np.repeat(targets.token_ids, targets.counts).reshape(-1, ROUNDS)


def measure(
    header: skl.Header, sequences: list[Sequence], directory: Path, turns: int, *, merge: bool
) -> dict[str, float]:
    """Median bytes per second of each way, and how many bytes the sequences are."""
    draws = {id(targets): draws_of(targets) for _, targets in sequences} if merge else {}
    rates: dict[str, list[float]] = {"append": [], "write": [], "memcpy": [], "size": []}
    for _ in range(turns):
        with tempfile.TemporaryDirectory(dir=directory) as name:
            path = Path(name) / "shard-00000.skl"
            writer = skl.ShardWriter(path, header=header)
            before = writer.size

            def append(writer: skl.ShardWriter = writer) -> None:
                for tokens, targets in sequences:
                    writer.append(tokens, merge_draws(draws[id(targets)]) if merge else targets)

            taken = seconds(append)
            data = np.frombuffer(writer.partial.read_bytes()[before:], np.uint8)
            writer.close()
            rates["size"].append(data.size)
            rates["append"].append(data.size / taken)
            blocks = [block.data for block in np.array_split(data, len(sequences))]
            fd = os.open(Path(name) / "plain", os.O_WRONLY | os.O_CREAT)

            def write(fd: int = fd, blocks: list[memoryview] = blocks) -> None:
                for block in blocks:
                    os.write(fd, block)

            rates["write"].append(data.size / seconds(write))
            os.close(fd)
            target = np.ones_like(data)
            rates["memcpy"].append(data.size / seconds(lambda a=target, b=data: np.copyto(a, b)))
    return {way: statistics.median(values) for way, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Encoding, checksums and appending.")
    parser.add_argument("--quick", action="store_true", help="fewer sequences and turns")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where the shards go")
    args = parser.parse_args()
    number, turns = (64, 3) if args.quick else (512, 9)
    print(f"{processor()}, 1 core, kernels {native.kernels_name()}, files in {args.directory}")
    print(f"\n{'MB/s of shard':24}{'append':>9}{'write':>9}{'memcpy':>9}{'append / write':>16}{'ns per record':>13}")
    for name, header in {**CASES, MERGED: CASES["R24 counts"]}.items():
        rng = np.random.default_rng(0)
        sequences = [make_sequence(header, rng) for _ in range(16)] * (number // 16)
        records = sum(targets.num_records for _, targets in sequences)
        rates = measure(header, sequences, args.directory, turns, merge=name == MERGED)
        print(
            f"{name:24}{rates['append'] / 1e6:9.0f}{rates['write'] / 1e6:9.0f}{rates['memcpy'] / 1e6:9.0f}"
            f"{rates['append'] / rates['write']:16.2f}{rates['size'] / rates['append'] / records * 1e9:13.1f}"
        )


if __name__ == "__main__":
    main()
