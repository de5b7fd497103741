"""
How fast is a cache verified, against copying memory?

One core; a shard of R24 counts with its tokens, in the page cache; every checksum and every record is checked.
The limit is memcpy of as many bytes, in the same run; the goal is 1 GB/s of shard.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from timing import measure, processor

import sklformat as skl

VOCAB, ROUNDS, POSITIONS = 128_256, 50, 1024


def write_shard(path: Path, sequences: int) -> None:
    """Sequences of 1024 positions with 4 to 20 records each, 12 on average."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 21, POSITIONS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    stride = VOCAB // 20
    ids = np.concatenate([np.arange(n) * stride for n in lengths])
    counts = np.ones(offsets[-1], np.uint8)
    counts[offsets[:-1]] = ROUNDS - lengths + 1
    header = skl.Header(vocab_size=VOCAB, seq_len=POSITIONS, kind="counts", rounds=ROUNDS)
    with skl.ShardWriter(path, header=header) as writer:
        for _ in range(sequences):
            targets = skl.SparseTargets(token_ids=ids + rng.integers(0, stride), counts=counts, offsets=offsets)
            writer.append(rng.integers(0, VOCAB, POSITIONS + 1), targets)


def main() -> None:
    parser = argparse.ArgumentParser(description="Verifying a cache against memcpy.")
    parser.add_argument("--quick", action="store_true", help="a smaller shard, fewer rounds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "shard-00000.skl"
        write_shard(path, 256 if args.quick else 2048)
        size = path.stat().st_size
        source, target = np.zeros(size, np.uint8), np.ones(size, np.uint8)

        def verify() -> None:
            assert skl.verify(path) == []

        ways = {"verify": verify, "memcpy": lambda: np.copyto(target, source)}
        results = measure("verify", ways, 3 if args.quick else 9)
    print(f"{processor()}, 1 core, shard of {size / 1e6:.0f} MB")
    for name, (median, _) in results.items():
        print(f"{name:<8} {median:>8.4f} s  {size / median / 1e9:>6.2f} GB/s of shard")
    print(f"verify / memcpy: {1 / results['memcpy'][1]:.3f}")


if __name__ == "__main__":
    main()
