"""How far a capture is, by the files of its directory while it runs, after it died, and beside uploads."""

import json
import os

import pytest
from operation_data import header, sequence

import sklformat as skl
from sklformat.cache.contents import UNFINISHED_NAME
from sklformat.capture.advance import describe_goal, find_advance, is_unfinished

BEGUN = 1_700_000_000


def begin(directory, sequences, per_shard=3):
    """A cache of which so many sequences are written, by a writer that is still at work."""
    of = header()
    writer = skl.CacheWriter(directory, header=of, sequences_per_shard=per_shard)
    for number in range(sequences):
        writer.append(*sequence(of, number))
    writer.flush()
    return writer


def dated(directory, seconds):
    """Every shard as if it had been written so many seconds after the run began."""
    for path in directory.iterdir():
        os.utime(path, (BEGUN, BEGUN + (0 if path.name == UNFINISHED_NAME else seconds)))


def test_sealed_and_unsealed_sequences_are_counted(tmp_path):
    """Whole sequences count, sealed or not, while the writer has the files; a torn one does not."""
    writer = begin(tmp_path, 8)
    advance = find_advance(tmp_path)
    assert (2, 6, (("shard-00002.skl.partial", 2),), 8) == (
        advance.shards, advance.sealed, advance.partials, advance.sequences,
    )  # fmt: skip
    assert header() == advance.header
    assert is_unfinished(tmp_path)
    with pytest.raises(skl.UnfinishedError):
        skl.open(tmp_path)
    partial = tmp_path / "shard-00002.skl.partial"
    os.truncate(partial, partial.stat().st_size - 1)
    assert 7 == find_advance(tmp_path).sequences
    os.truncate(partial, 100)  # in the middle of its header
    assert 6 == find_advance(tmp_path).sequences
    del writer


def test_rate_and_time_left(tmp_path):
    """They follow from the mark of the run and the time of the last write; without the mark's word nobody knows."""
    writer = begin(tmp_path, 2)
    assert (None, None, None) == (find_advance(tmp_path).goal, find_advance(tmp_path).per_second, None)
    (tmp_path / UNFINISHED_NAME).write_bytes(describe_goal(tmp_path, 20, uploads=False))
    dated(tmp_path, 10)
    assert (20, None, None) == (find_advance(tmp_path).goal, find_advance(tmp_path).per_second, None)  # nothing made
    for number in range(2, 8):
        writer.append(*sequence(header(), number))
    writer.flush()
    dated(tmp_path, 30)
    advance = find_advance(tmp_path)
    assert (6 / 30, 12 / (6 / 30)) == (advance.per_second, pytest.approx(advance.seconds_left))
    assert (BEGUN, BEGUN + 30) == (advance.begun, advance.written)
    (tmp_path / UNFINISHED_NAME).write_bytes(describe_goal(tmp_path, 20, uploads=True))
    dated(tmp_path, 30)
    assert (20, None) == (find_advance(tmp_path).goal, find_advance(tmp_path).per_second)
    for torn in (b"", b'{"num_seq', b"[3]", json.dumps({"num_sequences": "many"}).encode()):
        (tmp_path / UNFINISHED_NAME).write_bytes(torn)
        assert find_advance(tmp_path).goal is None


def test_what_is_no_unfinished_cache(tmp_path):
    """A finished cache, a shard, an empty directory and nothing are not unfinished."""
    directory = tmp_path / "a"
    with begin(directory, 2):
        assert is_unfinished(directory)
    assert not is_unfinished(directory)
    (directory / "shard-00009.skl.partial").touch()  # the manifest says that it does not belong
    assert not is_unfinished(directory)
    (tmp_path / "empty").mkdir()
    for path in (directory / "shard-00000.skl", tmp_path / "empty", tmp_path / "none"):
        assert not is_unfinished(path)
