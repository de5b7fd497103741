"""
What does this format cost and check, against other containers that hold the same records?

Sequences of 1024 positions, in the page cache: tokens, numbers of records, ids and counts, drawn 50 times per position.
Each container is laid out to be read a sequence at a time with no more bytes than that: uncompressed but where its name
or its library says otherwise, the smallest integers that it has, files open and mapped where its library can.

* bytes per position, of all its files
* random reads: sequences as arrays, 8 at a time in shuffled order
* scan: all sequences as arrays, 64 at a time in their order
* batches: epochs of shuffled sequences, 8 per batch, a batch being the tensors of a step
* flipped bits noticed: of the bits that, flipped one at a time anywhere in its files, change or stop what is read,
  those that stop it; each container in a process of its own, as some bits may kill it

All ways give equal values, which is checked first.  All run on one core, turn by turn with this format, which verifies
checksums, every record and the alignment of every sequence; what is not installed is left out by name.  HDF5, zarr and
Lance come with ``pip install --group bench``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from container_kinds import CONTAINERS, POSITIONS, ROUNDS, VOCAB_SIZE, Arrays, Container, Ours
from timing import Run, measure, processor

from sklformat.distill import SparseLogitDataset
from sklformat.format.order import permute

BATCH, RUN, SEED = 8, 64, 0


def make(num_sequences: int) -> list[Arrays]:
    """
    Records of 50 draws per position from 64 candidates of its own, about 12 different ones.

    Ids are log-uniform, as words are by Zipf's law, so that what compresses finds about as much as in real ones; the
    k-th candidate's probability is proportional to k^-1.6.
    """
    rng = np.random.default_rng(0)
    weights = np.cumsum(1 / np.arange(1, 65) ** 1.6)
    data = []
    for _ in range(num_sequences):
        candidates = np.exp(rng.uniform(0, np.log(VOCAB_SIZE), (POSITIONS, 64))).astype(np.uint32) - 1
        ranks = np.searchsorted(weights, rng.uniform(0, weights[-1], (POSITIONS, ROUNDS)))
        drawn = np.sort(np.take_along_axis(candidates, ranks, 1), 1)
        is_first = np.diff(drawn, axis=1, prepend=np.uint32(VOCAB_SIZE)) != 0
        ends = np.append(np.flatnonzero(is_first.ravel())[1:], drawn.size)
        data.append(
            {
                "tokens": np.exp(rng.uniform(0, np.log(VOCAB_SIZE), POSITIONS + 1)).astype(np.uint32) - 1,
                "numbers": is_first.sum(1).astype(np.uint8),
                "token_ids": drawn[is_first],
                "counts": np.diff(ends, prepend=0).astype(np.uint8),
            }
        )
    return data


def collate(sequences: list[Arrays]) -> tuple[torch.Tensor, ...]:
    """What a training step takes: input_ids, labels, token_ids, probs, offsets."""
    tokens = torch.from_numpy(np.stack([s["tokens"] for s in sequences]).astype(np.int64))
    numbers = np.concatenate([s["numbers"] for s in sequences])
    offsets = np.zeros(numbers.size + 1, np.int64)
    np.cumsum(numbers, out=offsets[1:])
    token_ids = np.concatenate([s["token_ids"] for s in sequences]).view(np.int32)
    probs = np.concatenate([s["counts"] for s in sequences]).astype(np.float32) / np.float32(ROUNDS)
    arrays = (torch.from_numpy(array) for array in (token_ids, probs, offsets))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), *arrays


def are_equal(left: list[Arrays], right: list[Arrays]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def drain(items: Iterable[object]) -> None:
    deque(items, maxlen=0)


def flip(kind: type[Container], directory: Path, data: list[Arrays], flips: int) -> str:
    """Flip one bit at a time, anywhere in the container's files, and read everything: noticed, of those that matter."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of tasks that zarr leaves behind when a read fails
    sys.unraisablehook = lambda _: None
    rng = np.random.default_rng(1)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sizes = np.cumsum([path.stat().st_size for path in files])
    noticed = changed = 0
    for place in rng.integers(0, sizes[-1], flips):
        which = int(np.searchsorted(sizes, place, side="right"))
        with files[which].open("r+b") as file:
            file.seek(int(place - sizes[which] + files[which].stat().st_size))
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1 << int(rng.integers(8))]))
            file.flush()
            try:
                changed += not are_equal(kind(directory).scan(0, len(data)), data)
            except BaseException as error:  # Rust's panics are no Exceptions
                if isinstance(error, KeyboardInterrupt):
                    raise
                noticed += 1
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte]))
    return f"{noticed} of {noticed + changed}"


def flips_of(kind: type[Container], flips: int) -> str:
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        data = make(8)
        kind.write(Path(name), data)
        try:
            return pool.submit(flip, kind, Path(name), data, flips).result()
        except BrokenProcessPool:
            return "killed the process"


def main() -> None:
    parser = argparse.ArgumentParser(description="This format against other containers of the same records.")
    parser.add_argument("--quick", action="store_true", help="fewer sequences, rounds and flips")
    args = parser.parse_args()
    rounds = 3 if args.quick else 5
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    there = [kind for kind in CONTAINERS if kind.needs is None or find_spec(kind.needs)]
    data = make(128 if args.quick else 1024)
    total = len(data) * POSITIONS
    with tempfile.TemporaryDirectory() as name:
        places = {kind: Path(name) / kind.__name__ for kind in there}
        for kind, place in places.items():
            place.mkdir()
            kind.write(place, data)
        opened = {kind.name: kind(place) for kind, place in places.items()}
        ours = SparseLogitDataset(places[Ours], batch_size=BATCH, seed=SEED, prefetch=0)
        order = permute(np.arange(len(data)), len(data), seed=SEED).reshape(-1, BATCH).tolist()
        for container in opened.values():
            assert are_equal([s for n in range(0, len(data), RUN) for s in container.scan(n, n + RUN)], data)
            for numbers, batch in zip(order, ours, strict=True):
                read = container.read(numbers)
                assert are_equal(read, [data[n] for n in numbers])
                tensors = (batch.input_ids, batch.labels, *vars(batch.targets).values())
                assert all(map(torch.equal, tensors, collate(read)))

        def reads(container: Container) -> Run:
            return lambda: drain(map(container.read, order))

        def scans(container: Container) -> Run:
            return lambda: drain(container.scan(n, n + RUN) for n in range(0, len(data), RUN))

        def epochs(container: Container) -> Run:
            return lambda: drain(ours if isinstance(container, Ours) else map(collate, map(container.read, order)))

        times = [
            measure(Ours.name, {name: way(container) for name, container in opened.items()}, rounds)
            for way in (reads, scans, epochs)
        ]
        sizes = {k.name: sum(p.stat().st_size for p in places[k].rglob("*") if p.is_file()) for k in there}
    print(f"{processor()}, 1 core, {total} positions, {sum(s['counts'].size for s in data) / total:.1f} records each")
    for kind in CONTAINERS:
        if kind not in there:
            print(f"left out: {kind.name}: {kind.needs} is not installed")
    print("\n| container | bytes per position | random, thousand sequences/s (of ours) ", end="")
    print("| scan, M positions/s (of ours) | batches, M positions/s (of ours) | flipped bits noticed |")
    print("|---|---:|---:|---:|---:|---:|")
    for kind in there:
        cells = [f"{sizes[kind.name] / total:.1f}"]
        for results, unit in zip(times, (len(data) / 1e3, total / 1e6, total / 1e6), strict=True):
            median, ratio = results[kind.name]
            cells.append(f"{unit / median:.1f} ({ratio:.2f})")
        cells.append(flips_of(kind, 40 if args.quick else 400))
        print("|", " | ".join([kind.name, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
