"""The containers that ``containers`` compares, each written and read as its library does it best."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import sklformat as skl

POSITIONS, VOCAB_SIZE, ROUNDS = 1024, 128_256, 50
NAMES = ("tokens", "numbers", "token_ids", "counts")
Arrays = dict[str, NDArray[Any]]
"""Of one sequence: tokens uint32 [T + 1], numbers uint8 [T], token_ids uint32 [nnz], counts uint8 [nnz]."""


class Container:
    """Sequences in one directory: written by ``write``, open from when it is made."""

    name: str
    needs: str | None = None
    """Package that it cannot do without, where sklformat itself does."""

    @staticmethod
    def write(directory: Path, data: list[Arrays]) -> None:
        raise NotImplementedError

    def __init__(self, directory: Path) -> None:
        raise NotImplementedError

    def read(self, numbers: list[int]) -> list[Arrays]:
        raise NotImplementedError

    def scan(self, begin: int, end: int) -> list[Arrays]:
        """Sequences that follow each other: by one read, where that is another one."""
        return self.read(list(range(begin, end)))


class Ours(Container):
    name = "sklformat"

    @staticmethod
    def write(directory: Path, data: list[Arrays]) -> None:
        header = skl.Header(vocab_size=VOCAB_SIZE, seq_len=data[0]["numbers"].size, kind="counts", rounds=ROUNDS)
        with skl.CacheWriter(directory, header=header, sequences_per_shard=1 << 20) as writer:
            for sequence in data:
                offsets = np.concatenate([[0], np.cumsum(sequence["numbers"], dtype=np.int64)])
                pairs = {name: sequence[name] for name in ("token_ids", "counts")}
                writer.append(sequence["tokens"], skl.SparseTargets(**pairs, offsets=offsets))

    def __init__(self, directory: Path) -> None:
        self.cache = skl.open(directory)

    def read(self, numbers: list[int]) -> list[Arrays]:
        return [
            {
                "tokens": sequence.tokens,
                "numbers": np.diff(sequence.targets.offsets).astype(np.uint8),
                "token_ids": sequence.targets.token_ids,
                "counts": sequence.targets.counts,
            }
            for sequence in map(self.cache.__getitem__, numbers)
        ]


class Parquet(Container):
    """One file per column, one row group per sequence."""

    name = "Parquet, flat columns"
    checks = False

    @classmethod
    def write(cls, directory: Path, data: list[Arrays]) -> None:
        settings = {"compression": "none", "use_dictionary": False, "write_page_checksum": cls.checks}
        for name, first in data[0].items():
            schema = pa.schema([(name, pa.from_numpy_dtype(first.dtype))])
            with pq.ParquetWriter(directory / f"{name}.parquet", schema, **settings) as writer:
                for sequence in data:
                    writer.write_table(pa.table({name: sequence[name]}), row_group_size=1 << 24)

    def __init__(self, directory: Path) -> None:
        self.files = {
            path.stem: pq.ParquetFile(path, memory_map=True, page_checksum_verification=self.checks)
            for path in sorted(directory.iterdir())
        }

    def read(self, numbers: list[int]) -> list[Arrays]:
        return [
            {
                name: file.read_row_group(number, use_threads=False).column(0).to_numpy()
                for name, file in self.files.items()
            }
            for number in numbers
        ]


class PackedParquet(Container):
    """One file, one row of four lists per sequence, 64 of them in a row group that is read whole."""

    name = "Parquet, zstd, a row group per 64 sequences"

    @staticmethod
    def write(directory: Path, data: list[Arrays]) -> None:
        columns = {name: lists([sequence[name] for sequence in data]) for name in NAMES}
        pq.write_table(pa.table(columns), directory / "all.parquet", row_group_size=64, compression="zstd")

    def __init__(self, directory: Path) -> None:
        self.opened = pq.ParquetFile(directory / "all.parquet", memory_map=True)

    def read(self, numbers: list[int]) -> list[Arrays]:
        groups = {group: self.opened.read_row_group(group, use_threads=False) for group in {n // 64 for n in numbers}}
        return [next(rows(groups[n // 64].slice(n % 64, 1))) for n in numbers]


class CheckedParquet(Parquet):
    name = "Parquet, with page checksums"
    checks = True


class Arrow(Container):
    """One IPC file, one record batch per sequence: a row of four lists, mapped and not copied."""

    name = "Arrow, one file"

    @staticmethod
    def write(directory: Path, data: list[Arrays]) -> None:
        batches = [pa.record_batch({name: lists([array]) for name, array in sequence.items()}) for sequence in data]
        with pa.ipc.new_file(str(directory / "all.arrow"), batches[0].schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    def __init__(self, directory: Path) -> None:
        self.opened = pa.ipc.open_file(pa.memory_map(str(directory / "all.arrow")))
        self.names = self.opened.schema.names

    def read(self, numbers: list[int]) -> list[Arrays]:
        batches = map(self.opened.get_batch, numbers)
        return [{name: batch.column(name).values.to_numpy() for name in self.names} for batch in batches]


class ZstdTorch(Container):
    """torch.save, zstd level 3, one file per sequence, behind 8 bytes with its size."""

    name = "zstd + torch.load, a file per sequence"

    @staticmethod
    def write(directory: Path, data: list[Arrays]) -> None:
        for number, sequence in enumerate(data):
            buffer = io.BytesIO()
            torch.save({name: torch.from_numpy(array) for name, array in sequence.items()}, buffer)
            packed = pa.Codec("zstd", 3).compress(buffer.getvalue(), asbytes=True)
            (directory / f"{number}.pt.zst").write_bytes(buffer.tell().to_bytes(8, "little") + packed)

    def __init__(self, directory: Path) -> None:
        self.directory, self.codec = directory, pa.Codec("zstd")

    def read(self, numbers: list[int]) -> list[Arrays]:
        found = []
        for number in numbers:
            packed = (self.directory / f"{number}.pt.zst").read_bytes()
            size = min(int.from_bytes(packed[:8], "little"), 1 << 24)
            raw = self.codec.decompress(packed[8:], size, asbytes=True)
            loaded = torch.load(io.BytesIO(raw), weights_only=True)
            found.append({name: tensor.numpy() for name, tensor in loaded.items()})
        return found


class SafetensorsFiles(Container):
    name = "safetensors, a file per sequence"

    @staticmethod
    def write(directory: Path, data: list[Arrays]) -> None:
        for number, sequence in enumerate(data):
            save_file(sequence, directory / f"{number}.safetensors")

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, numbers: list[int]) -> list[Arrays]:
        return [load_file(self.directory / f"{number}.safetensors") for number in numbers]


class Members(Container):
    """One file, one member per sequence and array."""

    def __init__(self, directory: Path) -> None:
        self.member = self.open(directory)

    @staticmethod
    def open(directory: Path) -> Callable[[str], NDArray[Any]]:
        raise NotImplementedError

    @staticmethod
    def members(data: list[Arrays]) -> Arrays:
        return {f"{name}.{n}": array for n, sequence in enumerate(data) for name, array in sequence.items()}

    def read(self, numbers: list[int]) -> list[Arrays]:
        return [{name: self.member(f"{name}.{n}") for name in NAMES} for n in numbers]


class Safetensors(Members):
    """
    The format's fastest, for as many sequences as one header names.

    Headers are JSON of up to 100 MB, so that a million tensors or so fit into a file.
    """

    name = "safetensors, one file"

    @staticmethod
    def write(directory: Path, data: list[Arrays]) -> None:
        save_file(Members.members(data), directory / "all.safetensors")

    @staticmethod
    def open(directory: Path) -> Callable[[str], NDArray[Any]]:
        return safe_open(directory / "all.safetensors", framework="numpy").get_tensor


class Npz(Members):
    name = "npz, one file"

    @staticmethod
    def write(directory: Path, data: list[Arrays]) -> None:
        np.savez(directory / "all.npz", **Members.members(data))

    @staticmethod
    def open(directory: Path) -> Callable[[str], NDArray[Any]]:
        return np.load(directory / "all.npz").__getitem__


class Flat(Container):
    """Two matrices and two flat arrays, with the place in them where each sequence begins."""

    def __init__(self, directory: Path) -> None:
        self.columns = self.open(directory)
        self.starts = self.columns["starts"][:]

    @staticmethod
    def open(directory: Path) -> Any:
        raise NotImplementedError

    @staticmethod
    def flat(data: list[Arrays]) -> Arrays:
        lists = {name: [sequence[name] for sequence in data] for name in data[0]}
        starts = np.concatenate([[0], np.cumsum([ids.size for ids in lists["token_ids"]])])
        both = {name: np.stack(lists[name]) for name in ("tokens", "numbers")}
        return both | {name: np.concatenate(lists[name]) for name in ("token_ids", "counts")} | {"starts": starts}

    def read(self, numbers: list[int]) -> list[Arrays]:
        found = []
        for n in numbers:
            ours = slice(self.starts[n], self.starts[n + 1])
            places = {"tokens": n, "numbers": n, "token_ids": ours, "counts": ours}
            found.append({name: self.columns[name][place] for name, place in places.items()})
        return found

    def scan(self, begin: int, end: int) -> list[Arrays]:
        ours = slice(self.starts[begin], self.starts[end])
        tokens, numbers = (self.columns[name][begin:end] for name in ("tokens", "numbers"))
        token_ids, counts = (self.columns[name][ours] for name in ("token_ids", "counts"))
        inner = self.starts[begin + 1 : end] - self.starts[begin]
        parts = zip(tokens, numbers, np.split(token_ids, inner), np.split(counts, inner), strict=True)
        return [dict(zip(NAMES, part, strict=True)) for part in parts]


class Hdf5(Flat):
    name, needs = "HDF5, contiguous", "h5py"
    settings: ClassVar[dict[str, bool]] = {}

    @classmethod
    def write(cls, directory: Path, data: list[Arrays]) -> None:
        import h5py

        with h5py.File(directory / "all.h5", "w") as file:
            for name, array in Flat.flat(data).items():
                chunks = {"chunks": chunk_of(array)} if cls.settings else {}
                file.create_dataset(name, data=array, **chunks, **cls.settings)

    @staticmethod
    def open(directory: Path) -> Any:
        import h5py

        file = h5py.File(directory / "all.h5", "r")
        return {name: file[name] for name in file}


class CheckedHdf5(Hdf5):
    name, settings = "HDF5, chunks with Fletcher-32", {"fletcher32": True}


class Zarr(Flat):
    name, needs = "zarr, sharded", "zarr"
    checks = False

    @classmethod
    def write(cls, directory: Path, data: list[Arrays]) -> None:
        import zarr

        group = zarr.create_group(directory)
        for name, array in Flat.flat(data).items():
            chunks = chunk_of(array)
            shards = (chunks[0] * 1024, *chunks[1:])
            codecs = [zarr.codecs.Crc32cCodec()] if cls.checks else None
            group.create_array(name, data=array, chunks=chunks, shards=shards, compressors=codecs)

    @staticmethod
    def open(directory: Path) -> Any:
        import zarr

        return dict(zarr.open_group(directory, mode="r").arrays())


class CheckedZarr(Zarr):
    name, checks = "zarr, sharded, with CRC-32C", True


class Lance(Container):
    """One row of four lists per sequence, encoded and compressed as the library chooses."""

    name, needs = "Lance", "lance"

    @staticmethod
    def write(directory: Path, data: list[Arrays]) -> None:
        import lance

        columns = {name: lists([sequence[name] for sequence in data]) for name in data[0]}
        lance.write_dataset(pa.table(columns), directory / "all.lance")

    def __init__(self, directory: Path) -> None:
        import lance

        self.opened = lance.dataset(directory / "all.lance")

    def read(self, numbers: list[int]) -> list[Arrays]:
        return list(rows(self.opened.take(numbers)))

    def scan(self, begin: int, end: int) -> list[Arrays]:
        return list(rows(self.opened.to_table(offset=begin, limit=end - begin)))


def lists(arrays: list[NDArray[Any]]) -> pa.Array:
    offsets = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def chunk_of(array: NDArray[Any]) -> tuple[int, ...]:
    """A row of a matrix, or as many of a flat array as four ids per position."""
    return (1, array.shape[1]) if array.ndim == 2 else (min(4 * POSITIONS, array.size),)


def rows(table: pa.Table) -> Iterator[Arrays]:
    columns = {name: table.column(name) for name in table.column_names}
    for row in range(table.num_rows):
        yield {name: column[row].values.to_numpy() for name, column in columns.items()}


CONTAINERS: list[type[Container]] = [
    Ours, Parquet, CheckedParquet, PackedParquet, Arrow, ZstdTorch, SafetensorsFiles, Safetensors, Npz, Hdf5,
    CheckedHdf5, Zarr, CheckedZarr, Lance,
]  # fmt: skip
