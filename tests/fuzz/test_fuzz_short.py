"""A short, fixed run of the fuzzer of shards, caches, manifests and recovery; make fuzz runs longer ones."""

import tracemalloc
from unittest import mock

import pytest
from fuzz import fuzz_shards
from strategies import small_shard

from sklformat.format import block


def test_no_law_breaks():
    """200 hostile inputs: typed errors, no time or memory beyond the input's, the reference's verdict and values."""
    verdicts = fuzz_shards.run(2026, cases=200)
    assert verdicts.total() == 200
    assert len(verdicts) > 30
    assert verdicts["sound"] > 20


def test_a_broken_reader_is_noticed(tmp_path, monkeypatch):
    """The laws break where a reader does not compare the tokens with their alignment checksum."""
    data = small_shard()
    parts = fuzz_shards.Parts(0)
    parts.header, parts.blocks = bytearray(data[:4096]), [bytearray(data[4096:4288])]
    parts.blocks[0][32] ^= 1
    parts.sign()
    assert fuzz_shards.judge_shard(tmp_path, bytes(parts.join())) == "alignment"
    monkeypatch.setattr(block, "alignment", lambda tokens: mock.ANY)
    with pytest.raises(fuzz_shards.BrokenLawError, match="verify finds nothing, the reference: CorruptError"):
        fuzz_shards.judge_shard(tmp_path, bytes(parts.join()))


def test_a_greedy_reader_is_noticed(tmp_path, monkeypatch):
    """The laws break where a reader allocates more than its input explains."""
    monkeypatch.setattr(fuzz_shards, "inspect", lambda path: bytes(1 << 22))
    tracemalloc.start()
    try:
        with pytest.raises(fuzz_shards.BrokenLawError, match="bytes allocated for an input of"):
            fuzz_shards.judge_shard(tmp_path, small_shard())
    finally:
        tracemalloc.stop()
