"""verify finds every damage and names it; inspect says what a cache holds."""

import errno
import json
import os
import tracemalloc
from contextlib import closing

import numpy as np
import pytest
import reference
from strategies import make_cache, make_listed_cache, small_sequence, small_settings, small_shard

import sklformat as skl
from sklformat import native
from sklformat.cache import report
from sklformat.cache.shard import Shard


@pytest.fixture
def directory(tmp_path):
    return make_listed_cache(tmp_path / "cache")


def test_a_sound_cache(directory):
    """Nothing is wrong with a sound cache or shard, and progress ends at the last byte."""
    told = []
    assert skl.verify(directory, lambda done, total: told.append((done, total))) == []
    total = sum(path.stat().st_size for path in directory.glob("*.skl"))
    assert told[-1] == (total, total)
    assert sorted(told) == told
    assert skl.verify(directory / "shard-00001.skl") == []


def test_every_damage_is_listed(directory):
    """All damaged blocks and files are listed, not only the first, each with file, byte, sequence and error."""
    first, second, _ = sorted(directory.glob("*.skl"))
    data = bytearray(first.read_bytes())
    data[4096 + 70] ^= 1
    data[4096 + 2 * 192 + 70] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-1])
    problems = skl.verify(directory)
    found = [(p.path, p.error, p.offset, p.sequence) for p in problems]
    assert (first, "CorruptError", 4096, 0) in found
    assert (first, "CorruptError", 4096 + 2 * 192, 2) in found
    assert second in [p.path for p in problems if p.error == "TruncatedError"]
    assert any("sequences 3..4 are missing" in p.message for p in problems)
    assert str(problems[0]).startswith(f"{first}: sequence 0: byte 4096: block: payload checksum")


def test_ids_that_come_twice(tmp_path):
    """An id that comes twice in a position of kind ratios is found, though readers do not look for it."""
    settings = small_settings(kind=reference.RATIOS, rounds=0)
    sequence = small_sequence(0)
    sequence.positions = [[(3, 5)], [(3, 5), (4, 5), (3, 5)], []]
    path = tmp_path / "a.skl"
    path.write_bytes(reference.encode_shard(settings, [sequence]))
    with skl.open(path) as cache:
        assert cache[0].targets.num_records == 4
    (problem,) = skl.verify(path)
    assert problem.message.endswith("position 1: token id 3 comes twice")
    assert (problem.path, problem.sequence, problem.offset) == (path, 0, 4096)
    with pytest.raises(reference.CorruptError, match="id twice"):
        reference.decode_shard(path.read_bytes())


def test_a_gap(directory):
    """A missing shard is named by its sequences and by the manifest."""
    (directory / "shard-00001.skl").unlink()
    messages = [p.message for p in skl.verify(directory)]
    assert any("sequences 3..4 are missing before shard-00002.skl" in message for message in messages)


def test_the_last_shard_is_missing(directory):
    """Only the manifest knows of a last shard that is gone."""
    (directory / "shard-00002.skl").unlink()
    assert [(p.path.name, p.error) for p in skl.verify(directory)] == [("shard-00002.skl", "MissingShardError")]
    (directory / "manifest.json").unlink()
    assert skl.verify(directory) == []


def test_an_unfinished_shard(directory):
    """Sealed shards beside an unfinished one are not sound, unless the manifest does not want it; inspect names it."""
    partial = directory / "shard-00003.skl.partial"
    partial.touch()
    assert skl.verify(directory) == []
    (directory / "manifest.json").unlink()
    (problem,) = skl.verify(directory)
    assert (partial, "UnfinishedError") == (problem.path, problem.error)
    assert "rerun the command that started it to finish it" == problem.action
    with pytest.raises(skl.MissingShardError, match=r"shard-00003\.skl\.partial: the shard is unfinished"):
        report.inspect(directory)
    for shard in directory.glob("*.skl"):
        shard.unlink()
    with pytest.raises(skl.MissingShardError, match="unfinished"):
        skl.verify(directory)


def test_a_foreign_shard(directory):
    """A shard of another cache is named."""
    (directory / "shard-00002.skl").write_bytes(small_shard(4, shard_number=2, first_sequence=5, sampling_seed=1))
    messages = [str(p) for p in skl.verify(directory)]
    assert any("shard-00002.skl: belongs to a different cache from shard-00000.skl" in message for message in messages)


def test_a_shard_that_the_manifest_does_not_know(directory):
    """A shard that the manifest does not list is named: the cache would be read without it."""
    (directory / "shard-00003.skl").write_bytes(small_shard(1, shard_number=3, first_sequence=9))
    assert [p.message for p in skl.verify(directory)] == ["the manifest does not list this shard"]


def test_a_manifest_that_lies(directory):
    """A manifest that says of a shard what the shard does not say is named."""
    path = directory / "manifest.json"
    body = json.loads(path.read_text())
    body["shards"][2]["num_records"] += 1
    body.pop("digest")
    body["digest"] = f"{reference.xxh128(reference.canonical_json(body)):032x}"
    path.write_bytes(reference.manifest_bytes(body))
    (problem,) = skl.verify(directory)
    assert problem.error == "CorruptError"
    assert "by the manifest, num_records is " in problem.message


def test_nothing_to_verify(tmp_path):
    """A path without anything is an error, not an empty list of problems."""
    with pytest.raises(FileNotFoundError):
        skl.verify(tmp_path / "none.skl")
    with pytest.raises(skl.MissingShardError, match=r"no \.skl shards"):
        skl.verify(tmp_path)


def test_another_format_is_no_damage(directory, tmp_path):
    """Where nothing is a shard, nothing is damaged: an error; among shards, a file of another format is a problem."""
    (tmp_path / "texts").mkdir()
    text = tmp_path / "texts" / "a.skl"
    text.write_text("not a cache at all\n" * 500)
    for path in (text, text.parent):
        with pytest.raises(skl.UnsupportedError, match=r"a\.skl: .*not a sklformat shard"):
            skl.verify(path)
    (directory / "shard-00001.skl").write_bytes(text.read_bytes())
    assert ("shard-00001.skl", "UnsupportedError") in [(p.path.name, p.error) for p in skl.verify(directory)]


def test_inspect(directory):
    """inspect gives sizes and settings that JSON can hold."""
    found = report.inspect(directory)
    assert json.loads(json.dumps(found))["sequences"] == 9
    assert {"shards": 3, "sequences": 9, "positions": 27, "records": 27, "first_sequence": 0}.items() <= found.items()
    assert found["bytes"] == sum(path.stat().st_size for path in directory.glob("*.skl"))
    assert found["unique_tokens_per_position"] == 1.0
    assert found["header"]["vocab_size"] == 20
    assert report.inspect(directory / "shard-00001.skl")["first_sequence"] == 3


def test_inspect_of_nothing(tmp_path):
    """An empty cache has no bytes a position, instead of a division by zero."""
    make_cache(tmp_path / "cache", (0,))
    assert report.inspect(tmp_path / "cache")["bytes_per_position"] is None


def test_memory_follows_the_file_not_the_longest_sequence(tmp_path, monkeypatch):
    """A long sequence behind many short ones does not make verify pad all of them to its length."""
    path = tmp_path / "a.skl"
    header = skl.Header(vocab_size=20, seq_len=0, kind="counts", rounds=5)
    with skl.ShardWriter(path, header=header) as writer:
        for length in [8] * 300 + [1 << 16]:
            targets = skl.SparseTargets(token_ids=[], counts=[], offsets=np.zeros(length + 1, np.int64))
            writer.append(np.zeros(length + 1, np.int64), targets)
    asked, reset = [], native.Arena.reset
    monkeypatch.setattr(native.Arena, "reset", lambda arena, size: (asked.append(size), reset(arena, size))[1])
    assert [] == skl.verify(path)
    assert max(asked, default=0) < 16 * path.stat().st_size


COLUMNS = ("label_logprob", "entropy", "document_start", "record_logprob")


@pytest.mark.parametrize("settings", [{"kind": "counts", "rounds": 5}, {"kind": "ratios", "rounds": 0}])
@pytest.mark.parametrize("columns", [(), COLUMNS])
def test_sound_blocks_are_looked_at_together(tmp_path, monkeypatch, settings, columns):
    """Sequences of any lengths, with whatever columns, are not decoded one by one unless something is wrong."""
    path = tmp_path / "a.skl"
    header = skl.Header(vocab_size=20, seq_len=0, columns=columns, **settings)
    pairs = {"counts": np.array([5])} if settings["rounds"] else {"weights": np.array([0.5])}
    with skl.ShardWriter(path, header=header) as writer:
        for length in [1, 300, 2, 1000, 7, 64, 5000] * 3:
            targets = skl.SparseTargets(token_ids=[3], offsets=np.minimum(np.arange(length + 1), 1), **pairs)
            sizes = {"document_start": length + 1, "record_logprob": 1}
            writer.append(
                np.zeros(length + 1, np.int64),
                targets,
                {
                    name: np.zeros(sizes.get(name, length), np.float16 if name != "document_start" else bool)
                    for name in columns
                },
            )
    one_by_one = []
    monkeypatch.setattr(report, "_block_problems", lambda shard, numbers: one_by_one.extend(numbers) or [])
    assert [] == skl.verify(path)
    assert one_by_one == []
    damaged = bytearray(path.read_bytes())
    damaged[4096 + 70] ^= 1
    path.write_bytes(damaged)
    skl.verify(path)
    assert one_by_one == list(range(21))


def test_a_byte_that_the_disk_cannot_read(directory, monkeypatch):
    """A block of which the system cannot read a byte is a problem of its own, and the rest is looked at."""
    shard, whole = directory / "shard-00001.skl", os.preadv
    with closing(Shard(shard)) as opened:
        bad = int(opened.index.offset[1]) + 70
    of_shard = shard.stat().st_ino

    def read(fd, views, offset):
        if os.fstat(fd).st_ino == of_shard and offset <= bad < offset + len(views[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(fd, views, offset)

    monkeypatch.setattr(os, "preadv", read)
    (problem,) = skl.verify(directory)
    assert ("UnreadableError", shard, 1) == (problem.error, problem.path, problem.sequence)
    assert problem.action.startswith("replace the file by a sound copy")  # it is a regular file already


def test_memory_does_not_grow_with_the_number_of_sequences(tmp_path):
    """Four times as many sequences are verified in about as much memory, a small part of the shard's size."""
    peaks = []
    for number in (30, 120):
        path = tmp_path / f"{number}.skl"
        header = skl.Header(vocab_size=20, seq_len=1 << 16, kind="counts", rounds=5)
        targets = skl.SparseTargets(token_ids=[], counts=[], offsets=np.zeros((1 << 16) + 1, np.int64))
        with skl.ShardWriter(path, header=header) as writer:
            for _ in range(number):
                writer.append(np.zeros((1 << 16) + 1, np.int64), targets)
        tracemalloc.start()
        try:
            assert [] == skl.verify(path)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < path.stat().st_size / 2
