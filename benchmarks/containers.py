"""
How fast are batches made from this format, against other containers that hold the same records?

One core; sequences of 1024 positions with 4 to 20 records of R24 counts and their tokens, in the page cache; epochs of
shuffled sequences, 8 per batch, a batch being the tensors of a step: input_ids, labels, token_ids, probs, offsets.
All ways make equal batches, which is checked.  Ours verifies checksums, every record and the alignment of every
sequence; the others verify nothing.  Each container is laid out to be read a sequence at a time with no more bytes than
that: uncompressed but for zstd, the smallest integers that fit, files open and mapped where its library can.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from timing import measure, processor
from verify import ROUNDS, write_shard

import sklformat as skl
from sklformat.distill import SparseLogitDataset
from sklformat.format.order import permute

BATCH, SEED = 8, 0
Arrays = dict[str, NDArray[np.generic]]
"""Of one sequence: tokens uint32 [T + 1], numbers uint8 [T], token_ids uint32 [nnz], counts uint8 [nnz]."""
Read = Callable[[list[int]], list[Arrays]]


def collate(sequences: list[Arrays]) -> tuple[torch.Tensor, ...]:
    """What a training step takes."""
    tokens = torch.from_numpy(np.stack([s["tokens"] for s in sequences]).astype(np.int64))
    numbers = np.concatenate([s["numbers"] for s in sequences])
    offsets = np.zeros(numbers.size + 1, np.int64)
    np.cumsum(numbers, out=offsets[1:])
    token_ids = np.concatenate([s["token_ids"] for s in sequences]).view(np.int32)
    probs = np.concatenate([s["counts"] for s in sequences]).astype(np.float32) / np.float32(ROUNDS)
    arrays = (torch.from_numpy(array) for array in (token_ids, probs, offsets))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), *arrays


def parquet(directory: Path, data: list[Arrays]) -> Read:
    """One file per column, one row group per sequence."""
    files = {}
    for name, first in data[0].items():
        path = directory / f"{name}.parquet"
        schema = pa.schema([(name, pa.from_numpy_dtype(first.dtype))])
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            for sequence in data:
                writer.write_table(pa.table({name: sequence[name]}), row_group_size=1 << 24)
        files[name] = pq.ParquetFile(path, memory_map=True)

    def read(numbers: list[int]) -> list[Arrays]:
        return [
            {name: file.read_row_group(number, use_threads=False).column(0).to_numpy() for name, file in files.items()}
            for number in numbers
        ]

    return read


def zstd_torch(directory: Path, data: list[Arrays]) -> Read:
    """torch.save, zstd level 3, one file per sequence."""
    sizes = []
    for number, sequence in enumerate(data):
        buffer = io.BytesIO()
        torch.save({name: torch.from_numpy(array) for name, array in sequence.items()}, buffer)
        sizes.append(buffer.tell())
        (directory / f"{number}.pt.zst").write_bytes(pa.Codec("zstd", 3).compress(buffer.getvalue(), asbytes=True))

    def read(numbers: list[int]) -> list[Arrays]:
        codec, found = pa.Codec("zstd"), []
        for number in numbers:
            raw = codec.decompress((directory / f"{number}.pt.zst").read_bytes(), sizes[number], asbytes=True)
            loaded = torch.load(io.BytesIO(raw), weights_only=True)
            found.append({name: tensor.numpy() for name, tensor in loaded.items()})
        return found

    return read


def safetensors_files(directory: Path, data: list[Arrays]) -> Read:
    """One file per sequence."""
    for number, sequence in enumerate(data):
        save_file(sequence, directory / f"{number}.safetensors")
    return lambda numbers: [load_file(directory / f"{number}.safetensors") for number in numbers]


def safetensors_file(directory: Path, data: list[Arrays]) -> Read:
    """
    One file, one tensor per sequence and array: the format's fastest, for as many sequences as one header names.

    Headers are JSON of up to 100 MB, so that a million tensors or so fit into a file.
    """
    path = directory / "all.safetensors"
    save_file({f"{name}.{n}": array for n, sequence in enumerate(data) for name, array in sequence.items()}, path)
    opened = safe_open(path, framework="numpy")

    def read(numbers: list[int]) -> list[Arrays]:
        return [{name: opened.get_tensor(f"{name}.{n}") for name in data[0]} for n in numbers]

    return read


def npz(directory: Path, data: list[Arrays]) -> Read:
    """One file, one member per sequence and array."""
    path = directory / "all.npz"
    np.savez(path, **{f"{name}.{n}": array for n, sequence in enumerate(data) for name, array in sequence.items()})
    opened = np.load(path)

    def read(numbers: list[int]) -> list[Arrays]:
        return [{name: opened[f"{name}.{n}"] for name in data[0]} for n in numbers]

    return read


def arrays_of(path: Path) -> list[Arrays]:
    with skl.open(path) as cache:
        return [
            {
                "tokens": sequence.tokens,
                "numbers": np.diff(sequence.targets.offsets).astype(np.uint8),
                "token_ids": sequence.targets.token_ids,
                "counts": sequence.targets.counts,
            }
            for sequence in cache
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Batches from this format against other containers.")
    parser.add_argument("--quick", action="store_true", help="fewer sequences and rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shard = directory / "shard-00000.skl"
        write_shard(shard, 5_000_000 if args.quick else 43_000_000, {})
        data = arrays_of(shard)
        ours = SparseLogitDataset(shard, batch_size=BATCH, seed=SEED, prefetch=0)
        order = permute(np.arange(len(ours) * BATCH), len(data), seed=SEED).reshape(-1, BATCH).tolist()
        reads = {
            "Parquet, flat columns": parquet(directory, data),
            "zstd + torch.load": zstd_torch(directory, data),
            "safetensors, a file per sequence": safetensors_files(directory, data),
            "safetensors, one file": safetensors_file(directory, data),
            "npz": npz(directory, data),
        }
        for number, batch in enumerate(ours):
            for read in reads.values():
                tensors = (batch.input_ids, batch.labels, *vars(batch.targets).values())
                for left, right in zip(tensors, collate(read(order[number])), strict=True):
                    assert torch.equal(left, right)

        def epoch_of(read: Read) -> Callable[[], None]:
            def epoch() -> None:
                for numbers in order:
                    collate(read(numbers))

            return epoch

        def our_epoch() -> None:
            for _ in ours:
                pass

        ways = {"SparseLogitDataset": our_epoch} | {name: epoch_of(read) for name, read in reads.items()}
        results = measure("SparseLogitDataset", ways, 3 if args.quick else 7)
        positions = len(order) * BATCH * (data[0]["tokens"].size - 1)
    print(f"{processor()}, 1 core, {positions} positions")
    print("\n| container | M positions/s | ours is faster by |\n|---|---:|---:|")
    for name, (median, ratio) in results.items():
        print(f"| {name} | {positions / median / 1e6:.1f} | {1 / ratio:.1f} |")


if __name__ == "__main__":
    main()
