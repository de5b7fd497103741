"""What is counted of a capture that has not ended: sealed shards, and the valid prefix of each that is not."""

import os
import re

import pytest
from operation_data import header, sequence

import sklformat as skl
from sklformat.cache.contents import UNFINISHED_NAME
from sklformat.cli import main


def begin(directory, count, **settings):
    """A writer of shards of three sequences that has written so many."""
    of = header(**settings)
    writer = skl.CacheWriter(directory, header=of, sequences_per_shard=3)
    for number in range(count):
        writer.append(*sequence(of, number))
    writer.flush()
    return writer


def test_an_unfinished_capture_counts_as_the_finished_one(tmp_path, capsys):
    """Seven sequences in two shards and a part of a third; only what tells that it has not ended differs."""
    writer = begin(tmp_path, 7)
    (tmp_path / UNFINISHED_NAME).write_text('{"num_sequences": 20}')
    found = skl.stats(tmp_path)
    advance = {
        "unfinished": True,
        "num_sequences": 20,
        "sequences_sealed": 6,
        "unsealed": {"shard-00002.skl.partial": 1},
    }
    assert advance.items() <= found.items()
    assert re.search(r"^state +unfinished: 7 of 20 sequences so far, 1 of them not sealed$", str(found), re.MULTILINE)
    assert 0 == main(["stats", str(tmp_path)])
    assert f"{found}\n" == capsys.readouterr().out
    assert skl.stats(tmp_path, sample=5) == skl.stats(tmp_path, sample=5)
    with writer:
        pass  # sealed, and the manifest written
    whole = skl.stats(tmp_path)
    assert whole.keys() == found.keys() - advance.keys()
    assert [] == [name for name in whole if whole[name] != found[name] and name not in ("fingerprint", "bytes")]


def test_a_torn_tail_does_not_count(tmp_path):
    """Of an unsealed shard whose last block was cut, the whole ones do; nothing is changed."""
    begin(tmp_path, 5)
    partial = tmp_path / "shard-00001.skl.partial"
    os.truncate(partial, partial.stat().st_size - 1)
    before = partial.read_bytes()
    found = skl.stats(tmp_path)
    assert (4, {partial.name: 1}) == (found["sequences"], found["unsealed"])
    assert found["bytes"]["total"] < sum(path.stat().st_size for path in tmp_path.iterdir())
    assert before == partial.read_bytes()


def test_a_capture_that_has_written_nothing(tmp_path, capsys):
    """Neither with the mark alone, nor with a shard that is still empty."""
    for name in (UNFINISHED_NAME, "shard-00000.skl.partial"):
        (tmp_path / name).touch()
        assert 1 == main(["stats", str(tmp_path)])
        assert "the capture has written no sequence yet; look again later" in capsys.readouterr().err


def test_a_damaged_shard_of_an_unfinished_capture(tmp_path):
    """A block of a sealed one is named; so is a shard of another cache."""
    begin(tmp_path / "a", 4)
    sealed = tmp_path / "a" / "shard-00000.skl"
    data = bytearray(sealed.read_bytes())
    data[4096 + 64] ^= 255
    sealed.write_bytes(data)
    with pytest.raises(skl.CorruptError, match=r"shard-00000\.skl: block 0: byte 4096: payload checksum"):
        skl.stats(tmp_path / "a")
    begin(tmp_path / "b", 4)
    (tmp_path / "b" / "shard-00000.skl").unlink()
    other = header(vocab_size=301)
    with skl.ShardWriter(tmp_path / "b" / "shard-00000.skl", header=other) as writer:
        writer.append(*sequence(other, 0))
    with pytest.raises(skl.CorruptError, match="belongs to a different cache"):
        skl.stats(tmp_path / "b")
