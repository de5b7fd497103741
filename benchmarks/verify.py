"""
How fast is a cache verified, against copying memory?

One core; shards of about 12 records per position in the page cache; every checksum and every record is checked.
The limit is memcpy of as many bytes, in the same run; the goal is 1 GB/s of shard.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timing import measure, processor

import sklformat as skl

ROUNDS = 50
COLUMNS = ("label_logprob", "entropy", "document_start", "record_logprob")
SHARDS: dict[str, dict[str, Any]] = {
    "R24 counts": {},
    "R24 counts without tokens": {"store_tokens": False},
    "R24 counts with label_logprob and entropy": {"columns": ("label_logprob", "entropy")},
    "R24 counts with document_start and record_logprob": {"columns": ("document_start", "record_logprob")},
    "R24W counts": {"vocab_size": 200_000},
    "R32 counts": {"vocab_size": 400_000},
    "R24 ratios": {"kind": "ratios", "rounds": 0},
    "R24 ratios with all columns": {"kind": "ratios", "rounds": 0, "columns": COLUMNS},
    "R24 counts, 64 positions": {"seq_len": 64},
    "R24 ratios, 64 positions, all columns": {"kind": "ratios", "rounds": 0, "seq_len": 64, "columns": COLUMNS},
    "R24 counts, 16 to 1024 positions": {"seq_len": 0},
}


def write_shard(path: Path, size_bytes: int, settings: dict[str, Any]) -> None:
    """Sequences with 4 to 20 records per position, 12 on average, until the shard is so large."""
    header = skl.Header(**{"vocab_size": 128_256, "seq_len": 1024, "kind": "counts", "rounds": ROUNDS} | settings)
    vocab_size = header.vocab_size
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 21, header.seq_len or 1024)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    stride = vocab_size // 20
    ids = np.concatenate([np.arange(n) * stride for n in lengths])
    counts = np.ones(offsets[-1], np.uint8)
    counts[offsets[:-1]] = ROUNDS - lengths + 1
    pairs = {"weights": rng.uniform(1e-3, 1.0, ids.size)} if header.kind == "ratios" else {"counts": counts}
    with skl.ShardWriter(path, header=header) as writer:
        while writer.size < size_bytes:
            positions = header.seq_len or int(2 ** rng.uniform(4, 10))
            some, records = slice(positions + 1), slice(offsets[positions])
            targets = skl.SparseTargets(
                token_ids=ids[records] + rng.integers(0, stride),
                offsets=offsets[some],
                **{name: values[records] for name, values in pairs.items()},
            )
            tokens = rng.integers(0, vocab_size, positions + 1)
            sizes = {"document_start": positions + 1, "record_logprob": targets.num_records}
            columns = {name: np.full(sizes.get(name, positions), -1.0) for name in header.columns}
            if "document_start" in columns:
                columns["document_start"] = tokens % 256 == 0
            writer.append(tokens, targets, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description="Verifying a cache against memcpy.")
    parser.add_argument("--quick", action="store_true", help="smaller shards, fewer rounds")
    args = parser.parse_args()
    print(f"{processor()}, 1 core\n\n| shard | MB | GB/s | of memcpy |\n|---|---:|---:|---:|")
    for name, settings in SHARDS.items():
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "shard-00000.skl"
            write_shard(path, 10_000_000 if args.quick else 80_000_000, settings)
            size = path.stat().st_size
            source, target = np.full(size, 2, np.uint8), np.ones(size, np.uint8)

            def verify(path: Path = path) -> None:
                assert skl.verify(path) == []

            def copy(source: NDArray[Any] = source, target: NDArray[Any] = target) -> None:
                np.copyto(target, source)

            results = measure("verify", {"verify": verify, "memcpy": copy}, 3 if args.quick else 9)
        rate = size / results["verify"][0] / 1e9
        print(f"| {name} | {size / 1e6:.0f} | {rate:.2f} | {1 / results['memcpy'][1]:.3f} |")


if __name__ == "__main__":
    main()
