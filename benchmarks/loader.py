"""
How many positions per second come out of SparseLogitDataset, against copying as many bytes?

One core, sequences of 1024 positions with 12 records on average, tokens stored, a cache in the page cache, batches of
8, in this process; all checks on.  "first touch" is the first epoch, which verifies each block's checksums too.
The limit is memcpy of the bytes read and of the bytes handed out.  "packed" is a later epoch whose records stay as they
are stored, for the GPU to decode.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from timing import measure, processor
from verify import write_shard

from sklformat.distill import SparseLogitDataset
from sklformat.distill.loader.sources import Sources


def main() -> None:
    parser = argparse.ArgumentParser(description="Batches of the loader against memcpy.")
    parser.add_argument("--quick", action="store_true", help="a smaller cache, fewer rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "shard-00000.skl"
        write_shard(path, 10_000_000 if args.quick else 43_000_000, {})
        touched = SparseLogitDataset(path, batch_size=8, prefetch=0)
        handed_out = positions = 0
        for batch in touched:
            tensors = (batch.input_ids, batch.labels, *vars(batch.targets).values())
            handed_out += sum(tensor.nbytes for tensor in tensors)
            positions += batch.input_ids.numel()
        moved = path.stat().st_size + handed_out
        source, target = np.full(moved // 2, 2, np.uint8), np.ones(moved // 2, np.uint8)

        def epoch(ds: SparseLogitDataset) -> None:
            for _ in ds:
                pass

        packed = Sources.of(path, None, None)
        packed.pack()
        places = np.random.default_rng(0).permutation(packed.sizes[0] // 8 * 8).reshape(-1, 8)

        def packed_epoch() -> None:
            for some in places:
                packed.batch(some, {})

        packed_epoch()
        ways = {
            "later epochs": lambda: epoch(touched),
            "packed": packed_epoch,
            "first touch": lambda: epoch(SparseLogitDataset(path, batch_size=8, prefetch=0)),
            "memcpy": lambda: np.copyto(target, source),
        }
        results = measure("later epochs", ways, 3 if args.quick else 9)
    print(f"{processor()}, 1 core, {positions} positions, {moved / 1e6:.0f} MB read and handed out")
    for name, (median, _) in results.items():
        print(f"{name:<13} {median:>8.4f} s  {positions / median / 1e6:>6.1f} M positions/s")
    print(f"later epochs / memcpy: {1 / results['memcpy'][1]:.3f}")


if __name__ == "__main__":
    main()
