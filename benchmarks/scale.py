"""
What does a cache of 10^12 and of 1.5 * 10^13 positions cost: bytes, shards, requests at an object store, hours, cores?

The arithmetic is that of ``sklformat estimate`` and of the modules that upload and read; ``check`` holds it against a
small cache that is written, uploaded to a store that counts requests, and read for an epoch from there.  The tables
are those of docs/scale.md, where a test compares them.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem
from timing import processor

import sklformat as skl
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import read_manifest, write_manifest
from sklformat.capture.destinations import Target, Uploader
from sklformat.capture.estimates import Estimate, estimate
from sklformat.files import remote
from sklformat.files.copies import PIECE, LocalCopies
from sklformat.format import layout
from sklformat.format.listing import Entry
from sklformat.settings.estimate import EstimateConfig

SIZES = {"1 T": 1e12, "15 T": 1.5e13}
RECORDS = {2.4: 4, 3.6: 4, 6.6: 8, 14.9: 20, 31.9: 50}  # per position, and the systematic N that gave them somewhere
SEQ_LEN, PER_SHARD, VOCABULARY = 4096, 16384, 128256
SPEEDS = 10_000, 40_000, 160_000  # positions per second of a teacher's GPU: examples, not measurements
# benchmarks/RESULTS.md, positions per second of one core: draw.py (bfloat16), loader.py (first epoch, 12 records).
DRAWN, LOADED = 59_460, 49e6
NAMES_PER_LIST = 1000  # of S3 and those like it
PART = 50 << 20  # bytes in which s3fs sends a file of twice as many or more, with one request before and one behind
CHECKED = 16 << 20  # bytes of a request when an upload is read back


def costs(positions: float, records: float, **changes: int) -> Estimate:
    """What ``sklformat estimate`` says."""
    settings = {"seq_len": SEQ_LEN, "sequences_per_shard": PER_SHARD, "rounds": RECORDS.get(records, 50)} | changes
    return estimate(EstimateConfig(positions=positions, unique_tokens=records, vocab_size=VOCABULARY, **settings))


def upload_requests(shards: int, bytes_per_shard: float, part: int | None = None) -> dict[str, int]:
    """
    Of a capture into a store: each shard is put, looked at and read back; the manifest likewise.

    Args:
        part: Bytes of a request; None: a file is one.
    """
    parts = 1 if part is None or bytes_per_shard < 2 * part else math.ceil(bytes_per_shard / part) + 2
    # The shards by name when the run begins, and once more before the manifest.
    return {
        "PUT": shards * parts + 1,
        "HEAD": shards + 1,
        "GET": shards * math.ceil(bytes_per_shard / CHECKED) + 1,
        "LIST": 2 * math.ceil((shards + 1) / NAMES_PER_LIST),
    }


def windowed_gets(shards: int, bytes_per_shard: float) -> int:
    """Of an epoch in windows, or of any order over local copies that hold the whole cache: each piece once."""
    return shards * math.ceil(bytes_per_shard / PIECE)


def global_gets(sequences: int, bytes_per_sequence: float) -> float:
    """Of an epoch in global order over small local copies: the pieces that each sequence lies in."""
    return sequences * (1 + bytes_per_sequence / PIECE)


def row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def heading(*cells: str) -> list[str]:
    return [row(*cells), "|" + "---:|" * len(cells)]


def size_table() -> list[str]:
    lines = heading(
        "records per position",
        "bytes per position",
        "1 T, TB",
        "15 T, TB",
        "shards, 1 T",
        "shards, 15 T",
        "GB per shard",
    )
    for records in RECORDS:
        one, fifteen = (costs(positions, records) for positions in SIZES.values())
        lines.append(row(
            records, f"{one.bytes_per_position:.1f}", f"{one.bytes / 1e12:.1f}", f"{fifteen.bytes / 1e12:.0f}",
            f"{one.shards:,}", f"{fifteen.shards:,}", f"{one.bytes_per_shard / 1e9:.2f}",
        ))  # fmt: skip
    return lines


def request_table() -> list[str]:
    lines = heading(
        "records per position",
        "PUT",
        "HEAD",
        "GET, to check",
        "LIST",
        "GET, an epoch in windows",
        "GET, an epoch in global order",
        "bytes then, of the cache's",
    )
    for records in RECORDS:
        found = costs(SIZES["1 T"], records)
        up = upload_requests(found.shards, found.bytes_per_shard, PART)
        everywhere = global_gets(found.sequences, found.bytes / found.sequences)
        lines.append(row(
            records, *(f"{up[name]:,}" for name in ("PUT", "HEAD", "GET", "LIST")),
            f"{windowed_gets(found.shards, found.bytes_per_shard) / 1e6:.1f} M", f"{everywhere / 1e6:.0f} M",
            f"{everywhere * PIECE / found.bytes:.1f}",
        ))  # fmt: skip
    return lines


def time_table() -> list[str]:
    lines = heading("positions per second of a GPU", "1 T, GPU hours", "15 T, GPU hours", "15 T on 512 GPUs, days")
    for speed in SPEEDS:
        hours = [positions / speed / 3600 for positions in SIZES.values()]
        lines.append(row(f"{speed:,}", *(f"{value:,.0f}" for value in hours), f"{hours[1] / 512 / 24:.1f}"))
    return lines


def training_table() -> list[str]:
    lines = heading(
        "positions per second of the training", "loader's cores", "GB/s, 3.6 records", "GB/s, 14.9 records", "1 T, days"
    )
    for speed in (100_000, 1_000_000, 10_000_000):
        flows = [costs(SIZES["1 T"], records).bytes_per_position * speed / 1e9 for records in (3.6, 14.9)]
        days = SIZES["1 T"] / speed / 86400
        lines.append(row(f"{speed:,}", f"{speed / LOADED:.3f}", *(f"{flow:.3f}" for flow in flows), f"{days:.1f}"))
    return lines


def shard_table() -> list[str]:
    lines = heading(
        "seq_len", "sequences per shard", "shards, 1 T", "shards, 15 T", "MB per shard", "manifest of 15 T, MB"
    )
    per_entry = len(manifest_of(2)) - len(manifest_of(1))
    for seq_len, per_shard in ((1024, 1024), (4096, 1024), (1024, 65536), (SEQ_LEN, PER_SHARD)):
        one, fifteen = (costs(n, 6.6, seq_len=seq_len, sequences_per_shard=per_shard) for n in SIZES.values())
        listed = f"{fifteen.shards * per_entry / 1e6:.0f}" if fifteen.shards <= layout.MAX_SHARDS else "refused"
        counts = f"{per_shard:,}", f"{one.shards:,}", f"{fifteen.shards:,}"
        lines.append(row(seq_len, *counts, f"{one.bytes_per_shard / 1e6:.0f}", listed))
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    "size": size_table,
    "shards": shard_table,
    "requests": request_table,
    "capture": time_table,
    "training": training_table,
}


def entries_of(directory: str | Path, count: int) -> list[Entry]:
    """Descriptions of as many shards, with numbers as long as those of a large cache."""
    sizes = {"num_sequences": PER_SHARD, "num_records": 442_918_502, "size_bytes": 1_811_939_328}
    return [
        Entry(
            directory,
            f"shard-{i:05}.skl",
            shard_number=i,
            first_sequence=i * PER_SHARD,
            fingerprint=f"{i * 0x9E3779B97F4A7C15:032x}",
            **sizes,
        )
        for i in range(count)
    ]


def manifest_of(count: int) -> bytes:
    """A manifest of shards whose names have six digits, as most of a large cache's have."""
    with tempfile.TemporaryDirectory() as directory:
        write_manifest(Path(directory), entries_of(directory, count))
        return (Path(directory) / "manifest.json").read_bytes()


def seconds_of(run: Callable[[], object]) -> float:
    """Of the processor; the best of three."""
    spent = []
    for _ in range(3):
        begin = time.process_time()
        run()
        spent.append(time.process_time() - begin)
    return min(spent)


def time_manifests(counts: tuple[int, ...]) -> None:
    """Write, read and check manifests alone."""
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            written = seconds_of(functools.partial(write_manifest, directory, entries_of(directory, count)))
            read = seconds_of(functools.partial(read_manifest, directory / "manifest.json"))
            size = (directory / "manifest.json").stat().st_size
        print(f"manifest of {count:,} shards: {size / 1e6:.1f} MB, written in {written:.2f} s, read in {read:.2f} s")


class CountedStore(MemoryFileSystem):
    """fsspec's store in memory, which counts what an object store would charge for."""

    protocol = "counted"
    store: dict = {}  # noqa: RUF012  as its parent has it: one store per process
    pseudo_dirs = [""]  # noqa: RUF012
    requests: Counter = Counter()  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("counted://"))  # noqa: SLF001

    def put_file(self, lpath: str, rpath: str, **_: object) -> None:
        self.requests["PUT"] += 1
        super().pipe_file(rpath, Path(lpath).read_bytes())

    def info(self, path: str, **kwargs: object) -> dict:
        self.requests["HEAD"] += 1
        return super().info(path, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: object) -> list:
        self.requests["LIST"] += 1
        return super().ls(path, detail=detail, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
        self.requests["GET"] += 1
        return self.store[self._strip_protocol(path)].getvalue()[start:end]

    def taken(self) -> Counter:
        """Requests since the last call."""
        found = Counter(self.requests)
        self.requests.clear()
        return found


def write_small(directory: Path, sequences: int, per_shard: int, seq_len: int) -> None:
    """A cache of about 12 records per position in shards of some megabytes."""
    rng = np.random.default_rng(0)
    header = skl.Header(vocab_size=VOCABULARY, seq_len=seq_len, kind="counts", rounds=16)
    with skl.CacheWriter(directory, header=header, sequences_per_shard=per_shard) as writer:
        for _ in range(sequences):
            sizes = rng.integers(8, 17, seq_len)
            offsets = np.concatenate([[0], np.cumsum(sizes)])
            within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
            counts = np.where(within == 0, np.repeat(17 - sizes, sizes), 1)
            ids = within * 1000 + rng.integers(0, 1000, offsets[-1])
            writer.append(
                rng.integers(0, VOCABULARY, seq_len + 1),
                skl.SparseTargets(token_ids=ids, counts=counts, offsets=offsets),
            )


def check(*, sequences: int = 240, per_shard: int = 60, seq_len: int = 1024) -> dict[str, tuple[float, float]]:
    """What a small cache takes, each beside what the arithmetic says."""
    from sklformat.distill import SparseLogitDataset

    fsspec.register_implementation("counted", CountedStore, clobber=True)
    store = fsspec.filesystem("counted")
    found: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        directory, url = Path(name) / "cache", "counted://scale/cache"
        write_small(directory, sequences, per_shard, seq_len)
        entries = scan_directory(directory)
        size = sum(entry.size_bytes for entry in entries)
        records = sum(entry.num_records for entry in entries) / (sequences * seq_len)
        said = costs(sequences * seq_len, records, seq_len=seq_len, sequences_per_shard=per_shard, rounds=16)
        found["shards"] = len(entries), said.shards
        found["bytes"] = size, said.bytes

        store.taken()
        target = Target(directory, url)
        target.find(entries[0].name, unlisted=False)  # which lists what is there
        uploader = Uploader(url)
        for entry in entries:
            uploader.put(Path(entry.path))
        uploader.finish()
        target.names()
        target.publish(entries)
        taken, wanted = store.taken(), upload_requests(said.shards, said.bytes_per_shard)
        found |= {f"{kind}, upload": (taken[kind], wanted[kind]) for kind in wanted}

        large = Path(name) / "large"
        large.write_bytes(bytes(40 << 20))
        remote.upload(large, "counted://scale/large")
        found["GET, upload of 40 MiB"] = store.taken()["GET"], upload_requests(1, 40 << 20)["GET"] - 1

        cache = skl.open(url, copies=LocalCopies(Path(name) / "copies"))
        store.requests["GET"] -= 1  # of the manifest
        for _ in SparseLogitDataset(cache, batch_size=4, window=per_shard, prefetch=0):
            pass
        found["GET, an epoch in windows"] = store.taken()["GET"], windowed_gets(said.shards, said.bytes_per_shard)

        small = LocalCopies(Path(name) / "few", max_bytes=PIECE + 8)
        small._make_room = lambda: [place.unlink() for place in list(small._pieces())]  # noqa: SLF001  keeps nothing on disk
        cache = skl.open(url, copies=small)
        found["GET, an epoch in global order"] = (
            _reads_one_by_one(cache, small, store),
            global_gets(said.sequences, said.bytes / said.sequences),
        )
        cache.close()
    return found


def _reads_one_by_one(cache: skl.Cache, copies: LocalCopies, store: CountedStore) -> int:
    """Requests of reading every sequence once where nothing is kept from one to the next."""
    total = 0
    for number in range(len(cache)):
        cache[number]  # opens its shard, if it was not open
        copies._memory.clear()  # noqa: SLF001
        copies._make_room()  # noqa: SLF001
        store.taken()
        cache[number]
        total += store.taken()["GET"]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="What very large caches cost, on paper and checked on a small one.")
    parser.add_argument("--quick", action="store_true", help="smaller manifests")
    args = parser.parse_args()
    for name, table in TABLES.items():
        print(f"{name}\n\n{chr(10).join(table())}\n")
    print(f"draws by C: {SIZES['1 T'] / DRAWN / 3600:,.0f} core hours for 1 T\n")
    print(f"{processor()}, seconds of one core")
    time_manifests((1_000,) if args.quick else (10_000, 100_000, 1_000_000))
    print("\n| a small cache | counted | by the arithmetic |\n|---|---:|---:|")
    for what, (counted, said) in check().items():
        print(f"| {what} | {counted:,.0f} | {said:,.0f} |")


if __name__ == "__main__":
    main()
