"""Beyond 32 bits: offsets, sizes, records and positions of shards larger than 4 GiB, in files of holes."""

import dataclasses
import struct

import numpy as np
import pytest
import reference
import strategies

import sklformat as skl
from sklformat import native
from sklformat.cache import writer as writer_module
from sklformat.cache.report import inspect
from sklformat.checksums import checksum
from sklformat.format import layout
from sklformat.format.block import BlockHeader, encode_block
from sklformat.format.index import Index, pack_trailer

POSITIONS = layout.MAX_POSITIONS
PAGE = 1 << 16


class HoleDisk(strategies.FastDisk):
    """Leaves a hole where whole pages of zeros would be written."""

    def write(self, fd, data, offset):
        values = np.frombuffer(data, np.uint8)
        whole = values.size // PAGE * PAGE
        full = np.flatnonzero(values[:whole].view(np.uint64).reshape(-1, PAGE // 8).any(axis=1)) * PAGE
        for start in [*full.tolist(), whole]:
            super().write(fd, values[start : start + PAGE].data, offset + start)


@pytest.fixture
def large_blocks(monkeypatch):
    """The writer encodes a sequence once; later blocks differ from the first in their number and in no other byte."""
    first = []

    def encode(header, key, number, tokens, targets, columns=None):
        if not first:
            first[:] = encode_block(header, key, number, tokens, targets, columns)
        data, block = first
        struct.pack_into("<Q", data, 8, number)
        struct.pack_into("<Q", data, 56, checksum(data[:56], key))
        sums = struct.unpack_from("<Q", data, 56)[0]
        return data, dataclasses.replace(block, number=number, block_checksum=sums)

    monkeypatch.setattr(writer_module, "encode_block", encode)


def write_large(path) -> tuple[int, int]:
    """A shard a little beyond 4 GiB; returns its number of sequences and the size of a block."""
    header = skl.Header(
        vocab_size=20, seq_len=POSITIONS, kind="counts", rounds=5, token_size=4, columns=("label_logprob", "entropy")
    )
    counts = np.zeros(POSITIONS, np.int64)
    counts[[0, -1]] = 2, 1
    offsets = np.concatenate([[0], np.cumsum(counts)])
    targets = skl.SparseTargets(token_ids=[3, 4, 19], counts=[2, 3, 5], offsets=offsets)
    tokens = np.zeros(POSITIONS + 1, np.uint32)
    tokens[-1] = 19
    column = np.zeros(POSITIONS)
    column[-1] = -2.5
    with skl.ShardWriter(path, header=header, disk=HoleDisk()) as writer:
        while writer.size <= 1 << 32:
            writer.append(tokens, targets, {"label_logprob": column, "entropy": column})
        number = len(writer)
    payload = POSITIONS * (1 + 2 + 2) + 3 * 3 + 4 * (POSITIONS + 1)
    return number, 64 + reference.round_up(payload + 64)


def check_large(sequence):
    assert [3, 4, 19] == sequence.targets.token_ids.tolist()
    assert [2, 3, 5] == sequence.targets.counts.tolist()
    assert [0, 2, 2, 3] == sequence.targets.offsets[[0, 1, -2, -1]].tolist()
    assert [0, 19] == sequence.tokens[[0, -1]].tolist()
    assert [0, -2.5] == sequence.columns["entropy"][[0, -1]].tolist()


def test_a_shard_beyond_4_gib(tmp_path, large_blocks):
    """Offsets beyond 2^32 are exact: blocks on both sides of 4 GiB read back, damage there is named by its byte."""
    path = tmp_path / "large.skl"
    number, size = write_large(path)
    with skl.open(path) as cache:
        (shard,) = cache.shards()
        assert [4096 + i * size for i in range(number)] == shard.index.offset.tolist()
        assert 4096 + number * size == shard.trailer.index_offset
        assert shard.trailer.index_offset > 1 << 32
        assert path.stat().st_size == cache.size_bytes
        check_large(cache[number - 1])  # it lies across 4 GiB
    last = 4096 + (number - 1) * size
    with path.open("r+b") as file:
        file.seek((1 << 32) - 1)
        file.write(b"\1")
    with skl.open(path) as cache, pytest.raises(skl.CorruptError, match=f"block {number - 1}: byte {last}: payload"):
        cache[number - 1]


@pytest.mark.soak
def test_recovery_beyond_4_gib(tmp_path, large_blocks):
    """verify and recover go through every block of a shard beyond 4 GiB."""
    path = tmp_path / "large.skl"
    number, size = write_large(path)
    assert [] == skl.verify(path)
    partial = path.rename(tmp_path / "large.skl.partial")
    cut, found = reference.round_up(32 * number) + 64, skl.recover(path)
    assert (partial, number, cut, 0) == (found.path, found.sequences, found.bytes_cut, found.sequences_cut)
    assert f"block {number}: byte {4096 + number * size}: block magic" in found.cause
    assert 4096 + number * size == partial.stat().st_size


def hollow_shard(path, header, num_records, count) -> int:
    """A shard whose header, index and trailer are right and whose blocks are holes; returns the size of a block."""
    payload = POSITIONS * header.record_count_size + 3 * num_records
    assert payload <= layout.MAX_PAYLOAD_SIZE
    size = layout.block_size(payload)
    index, key = Index(), header.shard_key
    for number in range(count):
        index.append(4096 + number * size, BlockHeader(number, POSITIONS, num_records, payload, 7, 8, 9))
    packed = index.pack()
    with path.open("wb") as file:
        file.write(header.pack())
        file.seek(4096 + count * size)
        file.write(packed)
        file.write(pack_trailer(header, key, 4096 + count * size, index, packed))
    return size


def test_more_records_than_32_bits_count(tmp_path):
    """Records are counted in 64 bits from the index to inspect; a damaged block far behind is named by its byte."""
    path, records, count = tmp_path / "hollow.skl", 350_000_000, 13
    header = skl.Header(
        vocab_size=20, seq_len=POSITIONS, kind="ratios", rounds=0, store_tokens=False, record_count_size=2
    )
    size = hollow_shard(path, header, records, count)
    with skl.open(path) as cache:
        assert records * count == cache.num_records
        assert records * count > 1 << 32
        assert 4096 + count * size + reference.round_up(32 * count) + 64 == cache.size_bytes
        with pytest.raises(skl.CorruptError, match=f"block 12: byte {4096 + 12 * size}: block magic"):
            cache[-1]
    assert records * count == inspect(path)["records"]


def test_more_positions_than_32_bits_count(tmp_path):
    """Positions are counted in 64 bits."""
    path, count = tmp_path / "hollow.skl", 1025
    header = skl.Header(vocab_size=20, seq_len=POSITIONS, kind="counts", rounds=5, store_tokens=False)
    hollow_shard(path, header, 0, count)
    assert POSITIONS * count == inspect(path)["positions"]
    assert POSITIONS * count > 1 << 32


def test_payloads_beyond_32_bits():
    """C computes sizes in 64 bits, whatever a shape claims."""
    positions, records = (1 << 32) - 1, 1 << 47
    shape = native.Shape(1, layout.PROFILES["R32"], 2, 4, 15, 1 << 24, 127, positions, records)
    columns = 4 * positions + (positions + 8) // 8 + 2 * records
    assert 2 * positions + 4 * records + 4 * (positions + 1) + columns == native.payload_size(shape)
