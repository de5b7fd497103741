"""
How many positions per second and core does ``sklformat stats`` look at, against decoding them alone?

One core, the verb's own function over a whole cache of 12 records of R24 per position in sequences of 1024, in the
page cache; each run opens the cache again, so that checksums count.  Beside it the same payloads are
decoded into arrays that are there, in the same run; seconds are this process's own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from timing import measure, processor

import sklformat as skl
from sklformat import native
from sklformat._native import ffi, lib
from sklformat.format.block import block_shape

VOCAB, ROUNDS, RECORDS, SEQ_LEN, GOAL = 128_256, 50, 12, 1024, 20


def write(path: Path, sequences: int) -> None:
    """12 records per position, of which labels are one in half of the positions."""
    rng, stride = np.random.default_rng(0), VOCAB // RECORDS
    counts = np.ones((SEQ_LEN, RECORDS), np.uint8)
    counts[:, 0] = ROUNDS - RECORDS + 1
    header = skl.Header(vocab_size=VOCAB, seq_len=SEQ_LEN, kind="counts", rounds=ROUNDS, sampler="multinomial")
    with skl.ShardWriter(path, header=header) as writer:
        for _ in range(sequences):
            ids = np.arange(RECORDS) * stride + rng.integers(0, stride, (SEQ_LEN, RECORDS))
            labels = np.where(rng.random(SEQ_LEN) < 0.5, ids[:, 0], rng.integers(0, VOCAB, SEQ_LEN))
            targets = skl.SparseTargets(
                token_ids=ids.ravel(), counts=counts.ravel(), offsets=np.arange(SEQ_LEN + 1) * RECORDS
            )
            writer.append(np.append(0, labels), targets)


def decode(path: Path) -> None:
    """Prove and decode every payload into arrays that are there, as stats does, and count nothing."""
    offsets, tokens = np.empty(SEQ_LEN + 1, np.int64), np.empty(SEQ_LEN + 1, np.uint32)
    ids, counts = np.empty(SEQ_LEN * RECORDS, np.uint32), np.empty(SEQ_LEN * RECORDS, np.uint8)
    out = [
        native.view("int64_t[]", offsets, writable=True),
        native.view("uint32_t[]", ids, writable=True),
        native.view("uint8_t[]", counts, writable=True),
        native.view("uint32_t[]", tokens, writable=True),
        ffi.NULL,
    ]
    fault = ffi.new("skl_fault *")
    with skl.open(path) as cache:
        shape = block_shape(cache.header, SEQ_LEN, ids.size).to_c()
        for first in range(0, len(cache), 21):  # a megabyte or so
            found = cache.payloads(np.arange(first, min(first + 21, len(cache))))
            for source, size in zip(found.sources.tolist(), found.sizes.tolist(), strict=True):
                native.check(lib.skl_decode(shape, ffi.cast("uint8_t *", source), size, *out, fault))


def main() -> None:
    parser = argparse.ArgumentParser(description="Statistics of a cache against decoding it.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--sequences", type=int, default=2048, help="of 1024 positions each (default: 2048)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "one.skl"
        write(path, args.sequences)
        ways = {"stats": lambda: skl.stats(path), "decode alone": lambda: decode(path)}
        results = measure("stats", ways, 3 if args.quick else 15, time.process_time)
    positions = args.sequences * SEQ_LEN / 1e6
    print(f"{processor()}, 1 core, {positions:.1f} M positions of {RECORDS} records")
    for name, (median, _) in results.items():
        print(f"{name:<13} {median:>8.3f} s {positions / median:>7.1f} M positions/s")
    print(f"stats / decode alone, seconds: {results['decode alone'][1]:.2f}; goal {GOAL} M positions/s")


if __name__ == "__main__":
    main()
