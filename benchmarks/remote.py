"""
What does a cache behind a URL cost: requests, bytes and time per sequence, beside the least that is possible?

Moto's server on localhost plays the store, behind a proxy that counts, and that makes each answer wait ``--latency``
milliseconds.  The least is the bytes of what is asked for, in as few requests as there are files, or stretches of one
that follow each other.  Needs moto and s3fs, as ``make integrations ONLY=s3`` installs them: run it by
``build/integrations/s3/bin/python benchmarks/remote.py``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import s3_proxy
import scale
from timing import processor
from torch.utils.data import DataLoader

import sklformat as skl
from sklformat.cache.contents import scan_directory
from sklformat.capture.destinations import Target, Uploader
from sklformat.distill import SparseLogitDataset
from sklformat.files.copies import LocalCopies
from sklformat.format import layout
from sklformat.format.listing import Entry

URL = f"s3://{s3_proxy.BUCKET}/cache"
BATCH, SEQ_LEN = 8, 1024
COLUMNS = (
    "what", "requests", "per sequence", "of the least", "kB per sequence", "of the least", "seconds", "sequences/s",
)  # fmt: skip


class Least(NamedTuple):
    """What a perfect reader or writer takes."""

    requests: int
    bytes: int


class Measured(NamedTuple):
    """What one took."""

    what: str
    sequences: int
    requests: dict[str, int]
    bytes: int
    seconds: float
    least: Least

    def row(self) -> str:
        total = sum(self.requests.values())
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.requests.items()) if count)
        return scale.row(
            self.what, kinds, f"{total / self.sequences:.3f}", f"{total / self.least.requests:.1f}",
            f"{self.bytes / self.sequences / 1e3:.1f}", f"{self.bytes / self.least.bytes:.2f}",
            f"{self.seconds:.2f}", f"{self.sequences / self.seconds:,.0f}",
        )  # fmt: skip


class Bench:
    """Measures one thing after the other, each with local copies of its own, at first empty."""

    def __init__(self, proxy: s3_proxy.Proxy, directory: Path, folder: Path) -> None:
        self.proxy, self.directory, self.folder = proxy, directory, folder
        self.entries = scan_directory(directory)
        self.sequences = sum(entry.num_sequences for entry in self.entries)
        self.size = sum(entry.size_bytes for entry in self.entries)

    def measure(self, what: str, sequences: int, least: Least, run: Callable[[], object]) -> Measured:
        self.proxy.clear()
        begin = time.perf_counter()
        begun = run()
        seconds = time.perf_counter() - (begun if isinstance(begun, float) else begin)
        moved = self.proxy.sent.total() + self.proxy.received.total()
        return Measured(what, sequences, dict(self.proxy.answered), moved, seconds, least)

    @contextmanager
    def open(self, name: str, **settings: int) -> Iterator[skl.Cache]:
        with skl.open(URL, copies=LocalCopies(self.folder / name, **settings)) as cache:
            yield cache

    def capture(self) -> None:
        """Upload every shard and the manifest, as the writer process of a capture does, from copies that it removes."""
        work = self.folder / "work"
        work.mkdir()
        target, uploader = Target(work, URL), Uploader(URL)
        target.find(self.entries[0].name)
        for entry in self.entries:
            (work / entry.name).write_bytes(Path(entry.path).read_bytes())
            uploader.put(work / entry.name)
        uploader.finish()
        target.publish([_moved(entry, work) for entry in self.entries])

    def epoch(self, name: str, workers: int, window: int | None) -> float:
        """When the first batch came: until then processes start, and each loads and opens s3fs for seconds."""
        with self.open(name) as cache:
            dataset = SparseLogitDataset(cache, batch_size=BATCH, window=window, tail="pad")
            rows, begun = 0, 0.0
            for batch in DataLoader(dataset, batch_size=None, num_workers=workers) if workers else dataset:
                begun = begun or time.perf_counter()
                rows += batch.input_ids.shape[0]
        assert rows >= self.sequences
        return begun

    def random(self, name: str, numbers: list[int]) -> None:
        with self.open(name) as cache:
            for number in numbers:
                cache[number]

    def index_bytes(self) -> int:
        """Of headers, indexes and trailers."""
        total = 0
        for entry in self.entries:
            with skl.open(entry.path) as cache:
                (shard,) = cache.shards()
                total += layout.HEADER_SIZE + shard.trailer.index_size + layout.TRAILER_SIZE
        return total


def _moved(entry: Entry, directory: Path) -> Entry:
    return Entry(
        directory,
        entry.name,
        shard_number=entry.shard_number,
        first_sequence=entry.first_sequence,
        num_sequences=entry.num_sequences,
        num_records=entry.num_records,
        size_bytes=entry.size_bytes,
        fingerprint=entry.fingerprint,
    )


def measured(bench: Bench, per_shard: int) -> Iterator[Measured]:
    """Everything, in the order of its life."""
    shards, everything = len(bench.entries), bench.sequences
    manifest = (bench.directory / "manifest.json").stat().st_size
    # Each file is put once and read back once; then each is read once.
    yield bench.measure("capture", everything, Least(2 * (shards + 1), 2 * (bench.size + manifest)), bench.capture)
    whole = Least(shards + 1, bench.size + manifest)
    yield bench.measure("verify", everything, whole, lambda: _check(skl.verify(URL) == []))
    # Of each shard the header, and the index with the trailer behind it.
    yield bench.measure(
        "inspect", everything, Least(2 * shards + 1, bench.index_bytes() + manifest), lambda: _inspect(bench)
    )
    for workers in (0, 1, 4):
        yield bench.measure(
            f"epoch in windows of {per_shard}, {workers or 'no'} worker{'s' * (workers != 1)}", everything, whole,
            lambda workers=workers: bench.epoch(f"windows-{workers}", workers, per_shard),
        )  # fmt: skip
    yield bench.measure("epoch in global order, 1 worker", everything, whole, lambda: bench.epoch("global", 1, None))
    numbers = np.random.default_rng(1).choice(everything, min(50, everything // 4), replace=False).tolist()
    some = sum(_block_bytes(bench, number) for number in numbers)
    touched = len({number // per_shard for number in numbers})
    least = Least(len(numbers) + 2 * touched + 1, some + bench.index_bytes() + manifest)
    yield bench.measure("random access", len(numbers), least, lambda: bench.random("random", numbers))


def _block_bytes(bench: Bench, number: int) -> int:
    with skl.open(bench.directory) as cache:
        shard, place = cache.find(number)
        return int(shard._ends[place]) - int(shard.index.offset[place])  # noqa: SLF001  what a reader asks for


def _inspect(bench: Bench) -> None:
    with bench.open("inspect") as cache:
        _check(sum(len(shard.index) for shard in cache.shards()) == bench.sequences)


def _check(holds: bool) -> None:
    assert holds


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests and bytes of caches behind URLs, beside the least possible.")
    parser.add_argument("--latency", type=float, default=0.0, metavar="MS", help="milliseconds that an answer waits")
    parser.add_argument("--sequences", type=int, default=1920, help="of 1024 positions and about 12 records")
    parser.add_argument("--per-shard", type=int, default=480, help="sequences of a shard, and of a window")
    parser.add_argument("--quick", action="store_true", help="an eighth of the sequences")
    args = parser.parse_args()
    if find_spec("moto") is None or find_spec("s3fs") is None:
        print("not measured: moto and s3fs are missing here; make integrations ONLY=s3 builds an environment with them")
        return
    sequences, per_shard = (
        (args.sequences // 8, args.per_shard // 8) if args.quick else (args.sequences, args.per_shard)
    )
    with tempfile.TemporaryDirectory() as name, s3_proxy.serving() as proxy:
        folder = Path(name)
        os.environ["HOME"] = str(folder)
        s3_proxy.enter(proxy)
        scale.write_small(folder / "cache", sequences, per_shard, SEQ_LEN)
        bench = Bench(proxy, folder / "cache", folder)
        print(f"{processor()}, {args.latency:g} ms for each answer")
        print(
            f"{sequences} sequences in {len(bench.entries)} shards of {bench.size / len(bench.entries) / 1e6:.1f} MB\n"
        )
        proxy.delay = args.latency / 1000
        print("\n".join(scale.heading(*COLUMNS)))
        for found in measured(bench, per_shard):
            print(found.row(), flush=True)


if __name__ == "__main__":
    main()
