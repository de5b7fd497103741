"""Directories as Megatron writes them, in its three layouts; written from the description of the layouts alone."""

import io
import json
import tarfile

import numpy as np

V, S, K = 70_000, 8, 5


def teacher(count, seed=0, rows=S, vocab_size=V, k=K):
    """Tokens [count, rows + 1], ids [count, rows, k], log-probs [count, rows, k] in the order of size."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(vocab_size, k, replace=False) for _ in range(count * rows)]).reshape(count, rows, k)
    ids[0, 0, 0] = vocab_size - 1
    logits = -np.sort(-rng.normal(size=(count, rows, k)), axis=2)
    logs = logits - np.log(np.exp(logits).sum(2, keepdims=True) + rng.random((count, rows, 1)))
    return rng.integers(0, vocab_size, (count, rows + 1)), ids, logs


def tar(path, meta, members, *, end=True):
    with tarfile.open(path, "w") as archive:
        for name, content in (("_meta.json", json.dumps(meta, separators=(",", ":")).encode()), *members):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    if not end:
        path.write_bytes(path.read_bytes()[:-1024])


def packed(payload):
    import torch
    import zstandard

    file = io.BytesIO()
    torch.save(payload, file)
    return zstandard.ZstdCompressor(level=3).compress(file.getvalue())


def tensors(logs, ids, dtype, *, bits=False):
    """The three tensors [S, B, K] of samples [B, S, K]."""
    import torch

    high = ids >> 16
    values = torch.tensor(np.swapaxes(logs, 0, 1).copy()).to(dtype)
    low = torch.tensor(np.swapaxes(ids & 0xFFFF, 0, 1).copy()).to(torch.uint16)
    high = np.swapaxes(high, 0, 1).copy()
    bit_17 = torch.tensor(np.packbits(high.astype(bool).reshape(-1))) if bits else torch.tensor(high).bool()
    return values, low, bit_17


def zigzag(rows, rank, ranks):
    """The rows of a context-parallel rank: its chunk and the one that mirrors it."""
    size = rows // (2 * ranks)
    other = 2 * ranks - 1 - rank
    return [*range(rank * size, (rank + 1) * size), *range(other * size, (other + 1) * size)]


def meta_of(version=None, **saver):
    saver = {"k": K, "p": None, "min_k": 1, "save_dtype": "fp32", **saver}
    identifiers = {"seed": 7, "sequence_length": S, "train_samples": 24, "blend": {"kind": "mock", "mock": True}}
    return {
        "hash": "0" * 32,
        "identifiers": identifiers,
        "saver": ({"format_version": version} if version else {}) | saver,
    }


def write_lists(path, ids, logs, *, cp=1, dp=1, mbs=1, gbs=None, per_tar=2, first=0, dtype=None, cut=None):
    """Layout 1. ``cut``: records that context-parallel rank r keeps in micro-batch m, a function of both."""
    import torch

    path.mkdir(exist_ok=True)
    count, rows, _ = ids.shape
    gbs = gbs or mbs * dp
    iterations = count // gbs
    for c in range(cp):
        for d in range(dp):
            members = []
            for i in range(iterations):
                lists = ([], [], [])
                for m in range(gbs // (mbs * dp)):
                    begin = i * gbs + (m * dp + d) * mbs
                    local = np.s_[begin : begin + mbs, zigzag(rows, c, cp) if cp > 1 else slice(None)]
                    k = cut(c, m) if cut else None
                    batch = tensors(logs[local][..., :k], ids[local][..., :k], dtype or torch.float32)
                    for one, tensor in zip(lists, batch, strict=True):
                        one.append(tensor)
                names = ("values", "indices_low", "bit_17")
                members.append((f"{first + i}.pt.zst", packed(dict(zip(names, lists, strict=True)))))
            for begin in range(0, iterations, per_tar):
                part = members[begin : begin + per_tar]
                tar(path / f"cp{c}_dp{d}__{first + begin + len(part) - 1}.tar", meta_of(), part)
    return path


def write_tensors(path, ids, logs, *, ranges, dp=1, mbs=1, gbs=None, per_tar=2, first=0, documents=None, dtype=None):
    """Layout 2, by iterations or by ranges of samples."""
    import torch

    path.mkdir(exist_ok=True)
    gbs = gbs or mbs * dp
    iterations = len(ids) // gbs
    meta = meta_of(2, mbs_save=mbs, dp_size_save=dp, gbs_save=gbs)
    for d in range(dp):
        members = []
        for i in range(iterations):
            mine = [i * gbs + (m * dp + d) * mbs + j for m in range(gbs // (mbs * dp)) for j in range(mbs)]
            values, low, bit_17 = tensors(logs[mine], ids[mine], dtype or torch.float32, bits=ranges)
            payload = {"values": values, "indices_low": low, "bit_17": bit_17, "format_version": 2}
            if ranges:
                payload["cu_seqlens_padded"] = None if documents is None else torch.tensor(documents[mine])
            name = f"{first + i * gbs}-{first + (i + 1) * gbs}" if ranges else str(first + i)
            members.append((f"{name}.pt.zst", packed(payload)))
        for begin in range(0, iterations, per_tar):
            part = members[begin : begin + per_tar]
            last = begin + len(part)
            name = f"{first + begin * gbs}-{first + last * gbs}" if ranges else str(first + last - 1)
            tar(path / f"dp{d}__{name}.tar", meta, part)
    return path
