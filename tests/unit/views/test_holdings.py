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


def test_one_unsealed_shard(tmp_path, capsys):
    """By itself it counts as its part of the directory; inspect says how far it is, and no reader takes it."""
    begin(tmp_path, 4, seq_len=0)
    partial = tmp_path / "shard-00001.skl.partial"
    found = skl.stats(partial)
    assert (1, str(partial)) == (found["sequences"], found["path"])
    assert {
        "unfinished": True,
        "num_sequences": None,
        "sequences_sealed": 0,
        "unsealed": {partial.name: 1},
    }.items() <= (found.items())
    assert found["positions"] == skl.stats(tmp_path)["positions"] - skl.stats(tmp_path / "shard-00000.skl")["positions"]
    assert "unfinished: 1 sequence so far, 1 of them not sealed" in str(found)
    assert 0 == main(["inspect", str(partial)])
    assert "1 whole sequence, not sealed" in capsys.readouterr().out
    for verb in (["card"], ["view"], ["verify"], ["inspect", "--sequence", "0"]):
        assert 1 == main([*verb, str(partial)])
        said = capsys.readouterr()
        assert "unfinished" in said.err
        assert "" == said.out


def test_an_unfinished_capture_behind_a_url(tmp_path, capsys):
    """Shards without a manifest count as in a directory whose capture goes on, and only readers refuse them."""
    fsspec = pytest.importorskip("fsspec")
    begin(tmp_path, 7)
    here = skl.stats(tmp_path)
    (tmp_path / "shard-00002.skl.partial").unlink()
    store, url = fsspec.filesystem("memory"), "memory://unfinished"
    try:
        store.makedirs("/unfinished")
        assert 1 == main(["stats", url])
        assert "no manifest.json here" in capsys.readouterr().err
        for path in tmp_path.glob("*.skl"):
            store.pipe(f"/unfinished/{path.name}", path.read_bytes())
        found = skl.stats(f"{url}/")
        assert {"path": url, "sequences": 6, "sequences_sealed": 6, "unsealed": {}}.items() <= found.items()
        assert (here["lengths"], skl.stats(url, sample=6)) == (found["lengths"], found)
        assert "unfinished: 6 sequences so far, 0 of them not sealed" in str(found)
        assert 0 == main(["inspect", url])
        assert "2 sealed, of 6 sequences" in capsys.readouterr().out
        with pytest.raises(skl.UnfinishedError, match="the capture or conversion has not ended"):
            skl.open(url)
        assert 1 == main(["card", url])
        assert "unfinished" in capsys.readouterr().err
    finally:
        store.rm("/unfinished", recursive=True)


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
