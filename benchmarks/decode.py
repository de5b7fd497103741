"""
How fast are records decoded, against copying memory?

One core, records in DRAM (the block and the outputs are larger than the last-level cache): R24 counts to uint32 ids
and uint8 counts, every record checked, through ``native.decode`` into fresh arrays and through C into arrays that are
there.  The limit is memcpy: bytes read and written per second by each, in the same run.
"""

from __future__ import annotations

import argparse

import numpy as np
from timing import measure, processor

from sklformat import native
from sklformat._native import ffi, lib

VOCAB, ROUNDS, RECORDS = 128_256, 50, 12


def payload(positions: int) -> tuple[native.Shape, np.ndarray]:
    """A padded payload of 12 records per position."""
    records = positions * RECORDS
    shape = native.Shape(1, 1, 1, 0, 0, VOCAB, ROUNDS, positions, records)
    rng = np.random.default_rng(0)
    stride = VOCAB // RECORDS
    ids = (np.arange(RECORDS) * stride + rng.integers(0, stride, (positions, 1))).astype(np.uint32).ravel()
    counts = np.ones((positions, RECORDS), np.uint8)
    counts[:, 0] = ROUNDS - RECORDS + 1
    data = np.zeros(native.payload_size(shape) + 64, np.uint8)
    offsets = np.arange(positions + 1, dtype=np.int64) * RECORDS
    native.encode(shape, offsets, ids, counts.ravel(), None, None, data)
    return shape, data


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding records against memcpy.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--positions", type=int, default=1 << 21, help="positions decoded a call (default: 2**21)")
    args = parser.parse_args()
    shape, data = payload(args.positions)
    offsets = np.empty(args.positions + 1, np.int64)
    ids, counts = np.empty(shape.num_records, np.uint32), np.empty(shape.num_records, np.uint8)
    moved = data.nbytes + offsets.nbytes + ids.nbytes + counts.nbytes
    source, target = np.full(moved // 2, 2, np.uint8), np.ones(moved // 2, np.uint8)
    shape_c, fault = shape.to_c(), ffi.new("skl_fault *")
    arguments = (
        shape_c,
        native.view("uint8_t[]", data),
        data.size,
        native.view("int64_t[]", offsets, writable=True),
        native.view("uint32_t[]", ids, writable=True),
        native.view("uint8_t[]", counts, writable=True),
        ffi.NULL,
        ffi.NULL,
        fault,
    )
    ways = {
        "decode in C": lambda: native.check(lib.skl_decode(*arguments)),
        "native.decode": lambda: native.decode(shape, data),
        "memcpy": lambda: np.copyto(target, source),
    }
    results = measure("decode in C", ways, 3 if args.quick else 15)
    print(
        f"{processor()}, 1 core, {shape.num_records / 1e6:.0f} M records of R24, {moved / 1e6:.0f} MB read and written"
    )
    print(f"{'way':<15} {'seconds':>9} {'GB/s':>7} {'M positions/s':>14}")
    for name, (median, _) in results.items():
        print(f"{name:<15} {median:>9.4f} {moved / median / 1e9:>7.1f} {args.positions / median / 1e6:>14.1f}")
    print(f"decode in C / memcpy, bytes per second: {1 / results['memcpy'][1]:.2f} (limit 1.0)")


if __name__ == "__main__":
    main()
