"""Damage to a sealed shard never goes unnoticed: any bit, any length, any place."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import reference
from strategies import make_cache, small_sequence, small_settings, small_shard

import sklformat as skl

SHARD = small_shard(2, columns=0)
END = len(SHARD)
GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "valid").glob("*.skl"))
INDEX = END - 128
REGIONS = ((0, 256, 3), (256, 4088, 67), (4088, 4096, 1), (4096, INDEX, 3), (INDEX, END, 1))


def read(path):
    """Read everything, sequence by sequence."""
    with skl.open(path) as cache:
        return [sequence.targets for sequence in cache]


def load(path):
    """Read everything in one batch, as a loader does."""
    with skl.open(path) as cache:
        payloads = cache.payloads(np.arange(len(cache)))
        return payloads.decode(cache.header, None if cache.header.token_size else payloads.no_tokens(cache.header))


def parts_of(shard):
    """Where each part of a shard begins and ends, and which sequence it holds."""
    end = len(shard) - 64
    index, count = struct.unpack_from("<QQ", shard, end + 8)
    offsets = [*struct.unpack_from(f"<{count}Q", shard, index), index]
    blocks = [(start, stop, number) for number, (start, stop) in enumerate(itertools.pairwise(offsets))]
    return [(0, 4096, None), *blocks, (index, end, None), (end, end + 64, None)]


def faults(way, path):
    """What a way of reading says is wrong; verify lists it, or raises it where nothing is a shard of this version."""
    try:
        result = way(path)
    except skl.FormatError as error:
        return [error]
    return result if way is skl.verify else []


def survivors(path, shard, bits):
    """Flip each bit in turn; the bits whose file, byte and sequence some way of reading does not name."""
    found, parts = [], parts_of(shard)
    with path.open("r+b", buffering=0) as file:
        for bit in bits:
            (place,) = ((start, end, number) for start, end, number in parts if start <= bit // 8 < end)
            start, end, sequence = place
            file.seek(bit // 8)
            file.write(bytes([shard[bit // 8] ^ 1 << bit % 8]))
            found += [
                (bit, way.__name__)
                for way in (read, load, skl.verify)
                if [(path, sequence)] != [(f.path, f.sequence) for f in faults(way, path) if start <= f.offset < end]
            ]
            file.seek(bit // 8)
            file.write(shard[bit // 8 : bit // 8 + 1])
    return found


def test_sampled_bits(tmp_path):
    """No flipped bit goes unnoticed or unnamed: some of every region, all of the index and the trailer."""
    path = tmp_path / "a.skl"
    path.write_bytes(SHARD)
    bits = [bit for start, stop, step in REGIONS for bit in range(8 * start, 8 * stop, step)]
    assert len(bits) > 3000
    assert [] == survivors(path, SHARD, bits)
    assert SHARD == path.read_bytes()


@pytest.mark.soak
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_all_bits(tmp_path, golden):
    """No flipped bit of any kind of shard goes unnoticed or unnamed."""
    path, shard = tmp_path / "a.skl", golden.read_bytes()
    path.write_bytes(shard)
    assert [] == survivors(path, shard, range(8 * len(shard)))


def test_truncation(tmp_path):
    """A shard cut at any byte is truncated, and the first bytes of another one behind it change nothing."""
    path = tmp_path / "a.skl"
    path.write_bytes(SHARD)
    with path.open("r+b", buffering=0) as file:
        for size in range(END - 1, -1, -1):
            if 300 < size < 4000 and size % 29:
                continue
            file.truncate(size)
            with pytest.raises(skl.TruncatedError, match=r"a\.skl"):
                read(path)


@pytest.mark.parametrize("extra", [b"\0", bytes(64), b"\n", SHARD[-64:], SHARD, SHARD[-128:]], ids=len)
def test_appended_bytes(tmp_path, extra):
    """Bytes behind the trailer are damage, also where they end in a trailer."""
    (tmp_path / "a.skl").write_bytes(SHARD + extra)
    with pytest.raises(skl.FormatError):
        read(tmp_path / "a.skl")


def test_a_lost_page(tmp_path):
    """64 bytes of zeros anywhere are damage."""
    path = tmp_path / "a.skl"
    for at in range(0, END, 64):
        changed = SHARD[:at] + bytes(64) + SHARD[at + 64 :]
        if changed == SHARD:
            continue
        path.write_bytes(changed)
        with pytest.raises(skl.FormatError):
            read(path)


def blocks_of(shard):
    return [shard[at : at + 192] for at in range(4096, len(shard) - 128, 192)]


@pytest.mark.parametrize("fit", [False, True])
def test_blocks_swapped_inside_a_shard(tmp_path, fit):
    """Two blocks that changed places are damage, also where the index went with them."""
    first, second = blocks_of(SHARD)
    swapped = SHARD[:4096] + second + first + SHARD[INDEX:]
    if fit:
        swapped = reference.join_shard(SHARD[:4096], [second, first])
    (tmp_path / "a.skl").write_bytes(swapped)
    with pytest.raises(skl.CorruptError):
        read(tmp_path / "a.skl")


@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("changes", [{"shard_number": 1, "first_sequence": 0}, {"sampling_seed": 1}])
def test_blocks_swapped_between_shards(tmp_path, changes, fit):
    """A sound block of another shard or cache, in the same place, is damage."""
    other = reference.encode_shard(small_settings(**changes), [small_sequence(0), small_sequence(1)])
    foreign = [blocks_of(SHARD)[0], blocks_of(other)[1]]
    data = SHARD[:4096] + b"".join(foreign) + SHARD[INDEX:]
    if fit:
        data = reference.join_shard(SHARD[:4096], foreign)
    (tmp_path / "a.skl").write_bytes(data)
    with pytest.raises(skl.CorruptError, match="block 1: byte 4288: block header checksum"):
        read(tmp_path / "a.skl")


def test_shards_swapped_in_a_cache(tmp_path):
    """Files that changed names are read in the right order: names mean nothing."""
    first, second, _ = make_cache(tmp_path / "cache")
    expected = read(tmp_path / "cache")
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    assert expected == read(tmp_path / "cache")


def test_the_end_of_another_shard(tmp_path):
    """Header and blocks of one shard with index and trailer of another are damage."""
    other = small_shard(2, sampling_seed=1)
    (tmp_path / "a.skl").write_bytes(SHARD[:INDEX] + other[INDEX:])
    with pytest.raises(skl.CorruptError, match="trailer"):
        read(tmp_path / "a.skl")
