"""Opening and reading caches: places, damage, alignment, and what other processes and threads may do."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import pickle
import signal
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import reference
import strategies
from strategies import make_cache, small_sequence, small_settings, small_shard
from system import HANGS

import sklformat as skl
from sklformat.cache import reader
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import write_manifest
from sklformat.cache.payloads import Payloads
from sklformat.cache.shard import Shard


@pytest.fixture
def directory(tmp_path):
    make_cache(tmp_path / "cache")
    return tmp_path / "cache"


def with_manifest(directory):
    write_manifest(directory, scan_directory(directory))
    return directory


def tokens_of(cache):
    return [sequence.tokens.tolist() for sequence in cache]


EXPECTED = [small_sequence(i).tokens for i in range(9)]


@pytest.mark.parametrize("listed", [False, True])
def test_a_directory_is_one_sequence_of_sequences(directory, listed):
    """A cache reads through its shards in order, with or without its manifest."""
    if listed:
        with_manifest(directory)
    with skl.open(directory) as cache:
        assert len(cache) == 9
        assert EXPECTED == tokens_of(cache)
        assert [small_sequence(i).positions for i in range(9)] == [strategies.pairs_of(s.targets) for s in cache]
        assert EXPECTED[-1] == cache[-1].tokens.tolist()
        assert EXPECTED[0] == cache[np.int64(-9)].tokens.tolist()
        shards = reference.decode_cache(directory)
        assert f"{reference.cache_fingerprint([s.root for s in shards]):032x}" == cache.fingerprint
        assert [f"{shard.root:032x}" for shard in shards] == cache.fingerprints
        assert cache.num_records == 27
        assert sum(shard.size_bytes for shard in shards) == cache.size_bytes
        assert cache.header == strategies.header_of(small_settings())


def test_the_order_is_not_that_of_names(tmp_path):
    """Shards are ordered by their first sequence, whatever their names."""
    paths = make_cache(tmp_path / "cache")
    for path, name in zip(paths, ("c.skl", "b.skl", "a.skl"), strict=True):
        path.rename(path.with_name(name))
    with skl.open(tmp_path / "cache") as cache:
        assert EXPECTED == tokens_of(cache)


@pytest.mark.parametrize("lengths", [(0, 3), (3, 0), (2, 0, 0, 1), (0,)])
def test_empty_shards(tmp_path, lengths):
    """Empty shards have their place by their number, also where a name would put them elsewhere."""
    for place, path in enumerate(make_cache(tmp_path / "cache", lengths)):
        path.rename(path.with_name(f"{9 - place}.skl"))
    with skl.open(tmp_path / "cache") as cache:
        assert sum(lengths) == len(cache)
        assert EXPECTED[: len(cache)] == tokens_of(cache)
    assert len(lengths) == len(reference.decode_cache(tmp_path / "cache"))


def test_a_single_shard(directory):
    """A shard opened by itself counts from 0 and says where it begins."""
    with skl.open(directory / "shard-00001.skl") as cache:
        assert (len(cache), cache.first_sequence) == (2, 3)
        assert EXPECTED[3:5] == tokens_of(cache)


@pytest.mark.parametrize("i", [9, -10, 1 << 70])
def test_no_such_sequence(directory, i):
    """An index outside of the cache is an IndexError that names it."""
    with skl.open(directory) as cache, pytest.raises(IndexError, match=rf"cache: sequence {i} of 9"):
        cache[i]


def test_nothing_there(tmp_path):
    """A path without anything, a directory without shards, an unfinished one: each is said."""
    with pytest.raises(FileNotFoundError, match=r"no such file or directory; a cache is a directory of \.skl shards"):
        skl.open(tmp_path / "none")
    with pytest.raises(skl.MissingShardError, match=r"no \.skl shards here: not a cache, or an empty one"):
        skl.open(tmp_path)
    (tmp_path / "a.skl.partial").touch()
    with pytest.raises(skl.MissingShardError, match=r"a\.skl\.partial: the shard is unfinished"):
        skl.open(tmp_path)


def test_an_unfinished_cache_is_not_whole(directory):
    """Sealed shards beside an unfinished one are no cache, which names how to go on; a manifest knows better."""
    (directory / "shard-00003.skl.partial").touch()
    with pytest.raises(
        skl.MissingShardError,
        match=r"shard-00003\.skl\.partial: the shard is unfinished.*started it to finish it",
    ):
        skl.open(directory)
    (directory / "shard-00003.skl.partial").unlink()
    with_manifest(directory)
    (directory / "shard-00003.skl.partial").touch()
    with skl.open(directory) as cache:
        assert EXPECTED == tokens_of(cache)


@pytest.mark.parametrize(
    ("size", "error"),
    [(0, skl.TruncatedError), (5, skl.TruncatedError), (4096, skl.TruncatedError), (4159, skl.TruncatedError)],
)
def test_short_files(tmp_path, size, error):
    """A file that is too short for header and trailer is truncated."""
    (tmp_path / "a.skl").write_bytes(small_shard(1)[:size])
    with pytest.raises(error, match=r"a\.skl"):
        skl.open(tmp_path / "a.skl")


def test_gaps_are_named(directory):
    """A missing shard is named by its sequences, without a manifest and with one."""
    with_manifest(directory)
    (directory / "shard-00001.skl").unlink()
    with pytest.raises(
        skl.MissingShardError, match=r"shard-00001.skl: sequences 3\.\.4 are missing; put the shard back"
    ):
        skl.open(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(skl.MissingShardError, match=r"sequences 3\.\.4 are missing before shard-00002.skl"):
        skl.open(directory)
    (directory / "shard-00000.skl").unlink()
    with pytest.raises(skl.MissingShardError, match=r"sequences 0\.\.4 are missing before shard-00002.skl"):
        skl.open(directory)


def test_overlaps_are_named(directory):
    """Two shards of the same sequences are refused, and a copy is named as one."""
    copy = directory / "copy.skl"
    copy.write_bytes((directory / "shard-00001.skl").read_bytes())
    with pytest.raises(skl.CorruptError, match=r"shard-00001\.skl is a copy of copy\.skl; remove one of them"):
        skl.open(directory)
    copy.write_bytes(small_shard(1, shard_number=1, first_sequence=3))
    with pytest.raises(skl.CorruptError, match="begins at sequence 3, which an earlier shard holds already"):
        skl.open(directory)


def test_wrong_shard_numbers_are_named(directory):
    """A shard whose number is not its place is refused: its blocks would pass for another's."""
    (directory / "shard-00002.skl").write_bytes(small_shard(4, shard_number=1, first_sequence=5))
    with pytest.raises(skl.CorruptError, match=r"shard-00002\.skl has shard_number 1, but it is number 2 of the cache"):
        skl.open(directory)
    with pytest.raises(reference.CorruptError):
        reference.decode_cache(directory)


def test_foreign_shards_are_named(directory):
    """A shard of other settings is refused on opening, with the setting that differs."""
    (directory / "shard-00002.skl").write_bytes(small_shard(4, shard_number=2, first_sequence=5, sampling_seed=9))
    with pytest.raises(
        skl.CorruptError, match=r"shard-00002.skl: belongs to a different cache .* sampling_seed: 0 != 9"
    ):
        skl.open(directory)


def test_a_replaced_shard_is_named(directory):
    """Behind a manifest, a sound shard of other content is refused when it is touched."""
    with_manifest(directory)
    settings = small_settings(shard_number=1, first_sequence=3)
    other = reference.encode_shard(settings, [small_sequence(7), small_sequence(8)])
    (directory / "shard-00001.skl").write_bytes(other)
    with (
        skl.open(directory) as cache,
        pytest.raises(skl.CorruptError, match=r"fingerprint is .*, .* expected; the file was"),
    ):
        cache[3]


def test_damage_names_file_byte_and_sequence(directory):
    """A damaged block is named by file, byte and sequence; the others stay readable, and it stays damaged."""
    path = directory / "shard-00001.skl"
    data = bytearray(path.read_bytes())
    offset = reference.HEADER_SIZE + 192
    data[offset + 70] ^= 1
    path.write_bytes(data)
    with skl.open(directory) as cache:
        for _ in range(2):
            with pytest.raises(
                skl.CorruptError, match=rf"shard-00001.skl: block 1: byte {offset}: payload checksum"
            ) as caught:
                cache[4]
            assert (path, offset, 1) == (caught.value.path, caught.value.offset, caught.value.sequence)
        assert EXPECTED[3] == cache[3].tokens.tolist()


def test_errors_hold_nothing_open(tmp_path):
    """Damage of every part of a block leaves nothing mapped once the cache is closed, while the error is still held."""
    key = reference.shard_key_of(small_shard(0))
    block = bytearray(reference.encode_block(small_settings(), small_sequence(0), 0, key))
    broken = []
    for offset, fit in ((5, False), (70, False), (67, True)):
        changed = bytearray(block)
        changed[offset] ^= 0x40
        if fit:
            changed[40:48] = reference.xxh64(bytes(changed[64:]), key).to_bytes(8, "little")
            changed[56:64] = reference.xxh64(bytes(changed[:56]), key).to_bytes(8, "little")
        broken.append(bytes(changed))
    for number, changed in enumerate(broken):
        path = tmp_path / f"{number}.skl"
        path.write_bytes(reference.join_shard(small_shard(0)[:4096], [changed]))
        reads = [lambda cache: cache[0], lambda cache: cache.payloads(np.array([0]))]
        for read in reads[: 1 if number == 2 else 2]:  # the last one's fault is for the decoder to find
            cache = skl.open(path)
            with pytest.raises(skl.CorruptError) as caught:
                read(cache)
            cache.close()
            assert caught.value.sequence == 0
            assert str(path) not in Path("/proc/self/maps").read_text()


def test_alignment(directory):
    """The right tokens pass, in any integer type."""
    with skl.open(directory) as cache:
        for i, tokens in enumerate(EXPECTED):
            cache.check_alignment(i, tokens)
            cache.check_alignment(i - 9, np.array(tokens, np.int64))


@pytest.mark.parametrize(
    ("tokens", "cause"),
    [
        (EXPECTED[4][:-1], "3 tokens given, 4 captured"),
        (EXPECTED[3], "they are sequence 3 of the cache: another order or packing seed, or a shift"),
        ([*EXPECTED[4][1:], 0], "shifted by one token"),
        ([0, *EXPECTED[4][:-1]], "shifted by one token"),
        ([*EXPECTED[4][:3], 19], "1 of 4 tokens differ, the first at 3: 17 captured, 19 given"),
    ],
)
def test_misalignment_is_explained(directory, tokens, cause):
    """Wrong tokens are refused with the sequence, both checksums, the cause and what to do."""
    with skl.open(directory) as cache, pytest.raises(skl.AlignmentError) as caught:
        cache.check_alignment(4, tokens)
    text = str(caught.value)
    assert cause in text
    for part in (
        "sequence 4",
        f"{reference.alignment_of(EXPECTED[4]):#018x} stored",
        "computed",
        "pack the tokens with",
    ):
        assert part in text
    assert caught.value.sequence_index == 4


def test_misalignment_without_stored_tokens(tmp_path):
    """Alignment is proved also where tokens are not stored."""
    make_cache(tmp_path / "cache", token_size=0)
    with skl.open(tmp_path / "cache") as cache:
        assert cache[4].tokens is None
        cache.check_alignment(4, EXPECTED[4])
        with pytest.raises(skl.AlignmentError, match="another packing seed, tokenizer or corpus"):
            cache.check_alignment(4, [1, 1, 1, 1])


def test_views_never_leak(directory):
    """Arrays that a cache returned stay valid after it is closed."""
    cache = skl.open(directory)
    got = list(cache)
    cache.close()
    assert EXPECTED == tokens_of(got)
    assert [small_sequence(i).positions for i in range(9)] == [strategies.pairs_of(s.targets) for s in got]
    got[0].tokens[:] = 7  # writable: the caller's own


def test_nothing_is_read_after_closing(directory):
    """A closed cache or shard says so, whether what is asked for was read before or not; closing twice is allowed."""
    cache = skl.open(directory)
    shard, number = cache.find(0)
    numbers = np.array([number])
    shard.payloads(numbers)
    cache.close()
    cache.close()
    for read in (
        lambda: cache[0],
        lambda: cache[8],
        lambda: next(cache.shards()),
        lambda: cache.payloads(numbers),
        lambda: cache.check_alignment(0, EXPECTED[0]),
    ):
        with pytest.raises(ValueError, match="cache: the cache is closed; open it again"):
            read()
    for read in (lambda: shard[0], lambda: shard[1], lambda: shard.payloads(numbers)):
        with pytest.raises(ValueError, match=r"shard-00000\.skl: the shard is closed; open it again"):
            read()


def test_few_shards_are_open(directory, monkeypatch):
    """Of a cache of more than MAX_OPEN_SHARDS half of them stay open, the least recently used goes first, and one in
    use stays readable; of a smaller one all stay open."""
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 2)
    with skl.open(directory) as cache:
        shard, number = cache.find(0)
        cache[3], cache[0], cache[5]
        assert list(cache._open_shards) == [2]
        cache[3]
        assert list(cache._open_shards) == [1]
        assert EXPECTED[0] == shard[number].tokens.tolist()
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 3)
    with skl.open(directory) as cache:
        cache[3], cache[0], cache[5]
        assert list(cache._open_shards) == [1, 0, 2]


def test_threads(directory, monkeypatch):
    """Threads that read one cache do not disturb each other, also while shards are opened and let go."""
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 1)
    places = [(i * 5) % 9 for i in range(300)]
    with skl.open(directory) as cache, concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: cache[i].tokens.tolist(), places))
    assert [EXPECTED[i] for i in places] == got


def test_pickle_opens_again(directory):
    """A pickled cache is its path: it opens again, with the same content."""
    with skl.open(directory) as cache:
        data = pickle.dumps(cache)
        with pickle.loads(data) as again:
            assert cache.fingerprint == again.fingerprint
            assert EXPECTED == tokens_of(again)
    assert len(data) < 400


@pytest.mark.parametrize("act", [lambda cache: cache.close(), lambda cache: cache[0]], ids=["close", "read"])
def test_a_fork_does_not_wait_for_the_parent(directory, act):
    """A child that was forked while another thread of its parent held the cache's lock closes, and reads, at once."""
    with skl.open(directory) as cache, cache._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # it would wait for ever
            try:
                act(cache)
                os._exit(0)
            finally:
                os._exit(1)
        assert 0 == os.waitpid(child, 0)[1]


def test_fork(directory):
    """A forked child reads on, and what it closes stays open in the parent."""
    with skl.open(directory) as cache:
        assert EXPECTED[0] == cache[0].tokens.tolist()

        def child():
            assert EXPECTED == tokens_of(cache)
            cache.close()

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(HANGS)
        assert process.exitcode == 0
        assert EXPECTED == tokens_of(cache)


def test_shards_in_turn(directory):
    """shards() gives every shard in order; each is a sequence of its own."""
    with skl.open(directory) as cache:
        assert [3, 2, 4] == [len(shard) for shard in cache.shards()]
        shard = next(cache.shards())
        with pytest.raises(IndexError, match="sequence 3 of 3"):
            shard[3]
        with pytest.raises(IndexError):
            shard[-1]


def test_ratios_of_the_reference(tmp_path):
    """A ratio shard made by the reference reads as weights times the header's scale."""
    settings = small_settings(kind=reference.RATIOS, rounds=0, scale_log2=2)
    sequence = dataclasses.replace(small_sequence(0), positions=[[(3, 0), (5, 32), (1, 32)], [], [(2, 64)]])
    (tmp_path / "a.skl").write_bytes(reference.encode_shard(settings, [sequence]))
    with skl.open(tmp_path / "a.skl") as cache:
        assert cache.header.scale == 4.0
        assert [[(3, 4.0), (5, 2.0), (1, 1.0)], [], [(2, 0.25)]] == strategies.pairs_of(cache[0].targets)


def test_selected_rows_name_their_own_block(directory):
    """Some rows of many decode as all of them do, and a fault in one is said of its sequence."""
    with closing(Shard(directory / "shard-00000.skl")) as shard:
        payloads = Payloads(3)
        payloads.fill(np.arange(3), shard, np.arange(3))
        tokens = payloads.decode(shard.header).tokens
        assert np.array_equal(tokens[[2, 0]], payloads.select(np.array([2, 0])).decode(shard.header).tokens)
        payloads.alignment[2] ^= np.uint64(1)
        with pytest.raises(skl.CorruptError, match=r"shard-00000\.skl: block 2: byte \d+: alignment checksum"):
            payloads.select(np.array([0, 2])).decode(shard.header)
        assert payloads.select(np.array([0, 1])).decode(shard.header).offsets[-1] == 6


def test_repr_says_what_a_cache_is(tmp_path):
    """The repr of a cache names its place, sizes, records and fingerprint, also once it is closed."""
    header = skl.Header(vocab_size=5000, seq_len=2, kind="counts", rounds=3)
    with skl.ShardWriter(tmp_path / "a.skl", header=header) as writer:
        writer.append([1, 2, 3], skl.SparseTargets(token_ids=[1, 7], counts=[1, 2], offsets=[0, 2, 2]))
    with skl.open(tmp_path / "a.skl") as cache:
        pass
    assert repr(cache) == (
        f"<Cache {str(tmp_path / 'a.skl')!r}: 1 sequences of 2 positions, 2 records, counts of 3 rounds (multinomial), "
        f"vocab_size 5,000, fingerprint {cache.fingerprint}>"
    )
    skl.ShardWriter(tmp_path / "b.skl", header=skl.Header(vocab_size=9, seq_len=0, kind="ratios", rounds=0)).seal()
    assert "0 sequences of any number of positions, 0 records, ratios (unknown)" in repr(skl.open(tmp_path / "b.skl"))
