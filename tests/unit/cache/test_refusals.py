"""What shards and caches refuse, each refusal once by its own words; the other tests of this folder say when."""

import dataclasses

import numpy as np
import pytest
import reference
from strategies import header_of, make_cache, make_listed_cache, small_sequence, small_settings, small_shard, targets_of

import sklformat as skl
from sklformat.cache import shard as shard_module
from sklformat.cache.contents import list_shards
from sklformat.format import layout

HEADER = header_of(small_settings())


def append(writer, number=0):
    sequence = small_sequence(number)
    writer.append(sequence.tokens, targets_of(reference.COUNTS, sequence.positions))


@pytest.fixture
def cache(tmp_path):
    with skl.open(make_listed_cache(tmp_path / "cache")) as cache:
        yield cache


@pytest.mark.parametrize("number", [9, -10])
def test_a_sequence_that_is_not_there(cache, number):
    """The number and how many there are."""
    with pytest.raises(IndexError, match=f"cache: sequence {number} of 9$"):
        cache[number]
    with pytest.raises(IndexError, match=r"cache: sequences 0\.\.9 of 9$"):
        cache.payloads(np.arange(10))
    with pytest.raises(IndexError, match=r"\.skl: sequence 3 of 3$"):
        next(cache.shards())[3]


def test_tokens_that_are_none(cache):
    """Tokens of another kind, or beyond the vocabulary, are told from damage by sequence or row."""
    with pytest.raises(ValueError, match="cache: sequence 1: tokens must be a 1-D array of integers"):
        cache.check_alignment(1, [0.5])
    payloads = cache.payloads(np.array([4, 2]))
    with pytest.raises(ValueError, match=r"row 1 of the batch: token number 3 of the sequence is 20, not below"):
        payloads.decode(cache.header, np.array([[1, 2, 3, 4], [1, 2, 3, 20]], np.uint32))


def test_a_shard_of_a_different_cache(tmp_path, cache):
    """A shard that took another's place between opening and reading is named with what differs."""
    path = sorted((tmp_path / "cache").glob("*.skl"))[1]
    data = small_shard(2, shard_number=1, first_sequence=3, sampling_seed=7)
    path.write_bytes(data)
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(
        skl.CorruptError, match=r"belongs to a different cache from shard-00000\.skl: sampling_seed: 0 != 7"
    ):
        skl.open(tmp_path / "cache")
    (problem,) = [p for p in skl.verify(tmp_path / "cache") if p.path == path]
    assert "belongs to a different cache from shard-00000.skl: sampling_seed: 0 != 7" == problem.message
    entry = dataclasses.replace(cache._entries[1], fingerprint=f"{reference.decode_shard(data).root:032x}")
    cache._entries[1] = entry
    with pytest.raises(skl.CorruptError, match="belongs to a different cache from"):
        cache[3]


def test_a_url_without_manifest():
    """A cache behind a URL is what its manifest lists."""
    pytest.importorskip("fsspec")
    with pytest.raises(skl.MissingShardError, match=r"no manifest\.json here, which a cache behind a URL needs"):
        list_shards("memory://refusals/none", "auto", None)


def test_a_listed_shard_that_is_damaged(tmp_path):
    """verify names a shard that is listed and cannot be opened twice: for its damage, and as missing."""
    directory = make_listed_cache(tmp_path / "cache")
    path = sorted(directory.glob("*.skl"))[2]
    path.write_bytes(path.read_bytes()[:-1])
    messages = [problem.message for problem in skl.verify(directory) if problem.path == path]
    assert "the manifest lists it, but no sound shard is there" in messages


def test_nothing_to_recover(tmp_path):
    """Where there is no unfinished shard, a sealed one is not touched."""
    (path,) = make_cache(tmp_path / "cache", lengths=(2,))
    with pytest.raises(
        FileNotFoundError, match=r"a sealed shard is never cut, .*; there is no shard-00000\.skl\.partial to recover"
    ):
        skl.recover(path)
    with pytest.raises(FileNotFoundError, match=r"x\.skl: no such file; there is no x\.skl\.partial to recover"):
        skl.recover(tmp_path / "x.skl")


def test_a_shard_is_full(tmp_path, monkeypatch):
    """A shard takes fewer than 2^32 sequences."""
    monkeypatch.setattr(layout, "MAX_SEQUENCES", 2)
    with skl.ShardWriter(tmp_path / "a.skl", header=HEADER) as writer:
        append(writer)
        with pytest.raises(ValueError, match="a shard holds fewer than 2 sequences"):
            append(writer)


def test_an_unfinished_shard_of_other_settings(tmp_path):
    """Both values of each setting that differs, and the file stays."""
    with pytest.raises(RuntimeError), skl.ShardWriter(tmp_path / "a.skl", header=HEADER) as writer:
        append(writer)
        raise RuntimeError
    other = dataclasses.replace(HEADER, sampling_seed=5)
    with pytest.raises(skl.SettingsError, match=r"a\.skl\.partial: made with other settings: sampling_seed: 0 != 5$"):
        skl.ShardWriter(tmp_path / "a.skl", header=other, resume=True)


def test_checks_that_disagree(tmp_path, monkeypatch):
    """Should the quick check of a block refuse what the full check accepts, the block is not used."""
    (path,) = make_cache(tmp_path / "cache", lengths=(2,))
    monkeypatch.setattr(shard_module, "find_unsound", lambda *args: 0)
    with skl.open(path) as cache, pytest.raises(skl.CorruptError, match="a fault that the full check does not find"):
        cache.payloads(np.array([0]))
