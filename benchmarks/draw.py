"""
How many positions per second does one core draw, against torch softmax + multinomial and against reading the rows?

Rows of 128 256 logits, 32 per call, lie in DRAM: every call takes the next rows of a pool larger than the caches. The
contenders take turns of several calls within one run, on one thread, so that all see the same machine; its own time is
counted, so that a busy neighbour costs little. With --calls-a-turn 1 every call comes right after another contender's,
in which this processor's vector units are still slow. Run:

    python benchmarks/draw.py [--quick] [--kernels avx2]
"""

import argparse
import itertools
import statistics
import time

import numpy as np
import torch
from timing import processor

from sklformat import native
from sklformat.sampler import draw

VOCAB_SIZE = 128_256
ROWS_A_CALL = 32
ROUNDS = 50
K = 12


def make_pool(pool_bytes, dtype):
    """[rows, V] logits like a teacher's: power laws that give about 12 unique ids in 50 rounds, each row its own."""
    rows = pool_bytes // (VOCAB_SIZE * dtype.itemsize) // ROWS_A_CALL * ROWS_A_CALL
    rng = np.random.default_rng(0)
    ranks = np.arange(1, VOCAB_SIZE + 1)
    bases = [
        torch.from_numpy(rng.permutation(-exponent * np.log(ranks)).astype(np.float32))
        for exponent in (1.0, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0)
    ]
    pool = torch.empty((rows, VOCAB_SIZE), dtype=dtype)
    for i in range(rows):
        pool[i] = torch.roll(bases[i % len(bases)], int(rng.integers(VOCAB_SIZE)))
    return pool


def torch_draw(rows):
    return torch.multinomial(torch.softmax(rows.float(), -1), ROUNDS, replacement=True)


def torch_topk(rows):
    return torch.topk(torch.softmax(rows.float(), -1), K)


def read(rows):
    """The limit: every byte once, the result thrown away."""
    return np.maximum.reduce(rows.view(torch.int64).numpy().reshape(-1))


CONTENDERS = {
    "read the rows": read,
    "draw multinomial": lambda rows: draw(rows, ROUNDS, sequence=0),
    "draw systematic": lambda rows: draw(rows, ROUNDS, "systematic", sequence=0),
    f"draw topk {K}": lambda rows: draw(rows, sequence=0, sampler="topk", k=K),
    "torch softmax + multinomial": torch_draw,
    f"torch softmax + topk {K}": torch_topk,
}


def measure(pool, turns, calls_a_turn):
    """Median seconds per position, of this thread, of each contender; no two calls in a row touch the same rows."""
    times = {name: [] for name in CONTENDERS}
    groups = itertools.cycle(pool.split(ROWS_A_CALL))
    names = list(CONTENDERS)
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for rows in itertools.islice(groups, calls_a_turn):
                begin = time.thread_time()
                CONTENDERS[name](rows)
                if turn > 0:  # the first warms up
                    times[name].append((time.thread_time() - begin) / ROWS_A_CALL)
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small pool (may lie in the cache) and few calls")
    parser.add_argument("--calls-a-turn", type=int, default=8)
    parser.add_argument(
        "--kernels", help="avx512, avx2, neon or portable; by default the widest that the processor has"
    )
    args = parser.parse_args()
    if args.kernels is not None:
        native.use_kernels(args.kernels)
    torch.set_num_threads(1)
    pool_bytes, turns = (100 << 20, 3) if args.quick else (640 << 20, 12)
    print(f"{processor()}; kernels {native.kernels_name()}; pool {pool_bytes >> 20} MiB; torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pool = make_pool(pool_bytes, dtype)
        seconds = measure(pool, turns, args.calls_a_turn)
        unique = np.diff(draw(pool[:ROWS_A_CALL], ROUNDS, sequence=0).offsets).mean()
        print(f"\n{dtype}, V = {VOCAB_SIZE}, {ROWS_A_CALL} rows per call, {unique:.1f} unique ids per position")
        print(f"{'':30}{'us/position':>12}{'positions/s':>13}{'GB/s':>7}{'x torch':>9}{'x read time':>12}")
        for name, value in seconds.items():
            rival = seconds[f"torch softmax + topk {K}" if "topk" in name else "torch softmax + multinomial"]
            rate = VOCAB_SIZE * dtype.itemsize / value / 1e9
            print(
                f"{name:30}{value * 1e6:12.1f}{1 / value:13.0f}{rate:7.1f}{rival / value:9.1f}"
                f"{value / seconds['read the rows']:12.2f}"
            )


if __name__ == "__main__":
    main()
