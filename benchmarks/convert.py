"""
How fast does convert read caches of other systems?

Seconds of processor, k records per position.  Each source is made first, from one cache or by numpy; both readings of
it, the check and the conversion, are in the time, and the cache that comes of it is verified.  The goal is 50 000
positions per second and core, sources of Python's objects (JSON) excepted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from timing import processor

import sklformat as skl
from sklformat.interop import convert
from sklformat.settings.convert import ConvertConfig

VOCAB_SIZE = 100_000
SEQ_LEN = 2048
TOPK = {"vocab_size": VOCAB_SIZE, "sampler": "topk"}
Rows = list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]


class Given(NamedTuple):
    """Where a source is to be made, and of what."""

    directory: Path
    cache: Path
    rows: Rows
    k: int


Maker = Callable[[Given], dict[str, Any]]


def make_rows(count: int, k: int) -> Rows:
    """Tokens [L], ids [T, k] and log-probs [T, k], the most likely first, of sequences."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        ids = rng.integers(0, VOCAB_SIZE // k, (SEQ_LEN, k)) * k + np.arange(k)
        weights = np.sort(rng.gamma(0.3, size=(SEQ_LEN, k)) + 1e-4, axis=1)[:, ::-1]
        logs = np.log(0.95 * weights / weights.sum(1, keepdims=True))
        rows.append((rng.integers(0, VOCAB_SIZE, SEQ_LEN + 1), ids, logs))
    return rows


def write_cache(path: Path, rows: Rows) -> None:
    header = skl.Header(vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, kind="ratios", rounds=0, sampler="topk")
    with skl.CacheWriter(path, header=header, sequences_per_shard=64) as writer:
        for tokens, ids, logs in rows:
            offsets = np.arange(SEQ_LEN + 1) * ids.shape[1]
            order = np.argsort(ids, axis=1)
            flat, weights = (np.take_along_axis(each, order, 1).reshape(-1) for each in (ids, np.exp(logs)))
            writer.append(tokens, skl.SparseTargets(token_ids=flat, weights=weights, offsets=offsets))


def export(kind: str, ending: str = "", **settings: Any) -> Maker:
    """A source that ``convert --to`` writes; without the note in which a cache says what it was."""

    def make(given: Given) -> dict[str, Any]:
        path = given.directory / f"source{ending}"
        more = {"k": given.k} if kind == "megatron" else {}
        convert(ConvertConfig(source=given.cache, destination=path, to=kind, **more))
        return {"source": path, "from_": kind, **settings}

    return make


def make_stacked(given: Given) -> dict[str, Any]:
    names = ("input_ids", "token_ids", "logprobs")
    arrays = {name: np.stack([row[i] for row in given.rows]) for i, name in enumerate(names)}
    np.savez(given.directory / "source.npz", **arrays)
    return {"source": given.directory / "source.npz", **TOPK}


def make_distillkit(given: Given) -> dict[str, Any]:
    """Rows of k float16 values and ids of as few bits as do, 16 sequences in a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    bits = int(np.ceil(np.log2(np.float32(VOCAB_SIZE))))
    shifts = np.arange(bits - 1, -1, -1)

    def lists(data: NDArray[np.uint8]) -> Any:
        flat = pa.array(data.reshape(-1))
        inner = pa.ListArray.from_arrays(np.arange(SEQ_LEN + 1, dtype=np.int32) * data.shape[1], flat)
        return pa.ListArray.from_arrays(np.array([0, SEQ_LEN], np.int32), inner)

    writer = None
    for tokens, ids, logs in given.rows:
        table = pa.table(
            {
                "input_ids": pa.array([tokens.astype(np.uint64)]),
                "compressed_logprobs": lists(np.ascontiguousarray(logs.astype("<f2")).view(np.uint8)),
                "bytepacked_indices": lists(
                    np.packbits(((ids[:, :, None] >> shifts) & 1).reshape(SEQ_LEN, -1).astype(np.uint8), axis=1)
                ),
            }
        )
        writer = writer or pq.ParquetWriter(given.directory / "data_0.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    codec = {
        "d": VOCAB_SIZE, "k": given.k, "exact_k": given.k, "exact_dtype": "float16", "polynomial_terms": [],
        "term_dtype": "float32",
        "residual_bins": [], "delta_encoding": False, "error_diffusion": False, "normalize_t": False,
    }  # fmt: skip
    (given.directory / "compression_config.json").write_text(json.dumps(codec))
    settings = {"source": given.directory / "data_0.parquet", "from_": "distillkit", "vocab_size": VOCAB_SIZE}
    return {**settings, "codec": given.directory / "compression_config.json"}


def make_eullm(given: Given) -> dict[str, Any]:
    rows, k = given.rows, given.k
    path, shards = given.directory / "eullm", []
    path.mkdir()
    for first in range(0, len(rows), 16):
        part = rows[first : first + 16]
        shards.append(f"shard-{len(shards):05d}.npz")
        logits = np.concatenate([logs for *_, logs in part]).astype(np.float32)
        np.savez(
            path / shards[-1],
            offsets=np.arange(len(part) + 1) * SEQ_LEN,
            token_offsets=np.arange(len(part) + 1) * (SEQ_LEN + 1),
            token_ids=np.concatenate([tokens for tokens, *_ in part]).astype(np.int32),
            topk_ids=np.concatenate([ids for _, ids, _ in part]).astype(np.uint32),
            topk_logits=(logits.view(np.uint32) >> 16).astype(np.uint16),
            logz=np.zeros((len(logits), 1), np.float32),
        )
    provenance = {"teacher_model": "teacher", "top_k": k, "vocab_size": VOCAB_SIZE, "temperatures": [1.0]}
    manifest = {"format_version": 1, "provenance": provenance, "shards": shards, "n_sequences": len(rows)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return {"source": path}


SOURCES: dict[str, Maker] = {
    "plain columns, Parquet": export("parquet", ".parquet"),
    "plain columns, JSONL": export("jsonl", ".jsonl"),
    "plain columns, npz of stacked arrays": make_stacked,
    "distillkit": make_distillkit,
    "distillkit-raw": export("distillkit-raw", ".parquet", **TOPK),
    "axolotl, prepared": export("axolotl", ".parquet", **TOPK),
    "megatron": export("megatron", vocab_size=VOCAB_SIZE),
    "eullm": make_eullm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="times that each source is converted; the best counts")
    args = parser.parse_args()
    print(f"{processor()}; {args.sequences} sequences of {SEQ_LEN} positions, {args.k} records each\n")
    print("| source | bytes per position | positions/s of a core |")
    print("|---|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        rows = make_rows(args.sequences, args.k)
        write_cache(base / "cache", rows)
        np.save(base / "tokens.npy", np.stack([tokens for tokens, *_ in rows]))
        for kind, make in SOURCES.items():
            (directory := base / "source").mkdir()
            settings = make(Given(directory, base / "cache", rows, args.k))
            if kind == "megatron":
                settings["tokens"] = base / "tokens.npy"
            best = float("inf")
            for _ in range(args.rounds):
                shutil.rmtree(base / "out", ignore_errors=True)
                start = time.process_time()
                convert(ConvertConfig(destination=base / "out", **settings))
                best = min(best, time.process_time() - start)
            assert not skl.verify(base / "out")
            positions = args.sequences * SEQ_LEN
            size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
            print(f"| {kind} | {size / positions:.0f} | {positions / best:,.0f} |", flush=True)
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
