"""
Every byte and every cut of small shards: what is changed is refused, what is whole before a cut is kept.

Where checksums are made to fit a change, the reference says whether the shard is another valid one.
"""

import itertools
import struct

import pytest
import reference
import strategies
from enumerated import LAYOUTS, name_of, sequence_of, settings_of, weights_of
from reference import COUNTS, R24
from strategies import FastDisk

import sklformat as skl
from sklformat.cache import recovery
from sklformat.format.header import parse_header

COUNTED = [[(0, 1), (2, 2)], [], [(1, 3)]]
CODED = [[(2, 0), (0, 127)], [], [(0, 0), (1, 0), (2, 64)]]
SMALLEST = reference.encode_shard(settings_of(COUNTS, R24), [sequence_of(settings_of(COUNTS, R24), [[]])])
STORED = [
    {"token_size": 2, "seq_len": 3},
    {"token_size": 3, "columns": 4},
    {"token_size": 0, "columns": 11, "record_count_size": 2},
    {"token_size": 4, "columns": 15, "sampler": 5},
]
SETTINGS = [settings_of(*layout, **STORED[i % 4]) for i, layout in enumerate(LAYOUTS)]
SHARDS = {
    name_of((of.kind, of.profile)): reference.encode_shard(
        of, [sequence_of(of, COUNTED if of.kind == COUNTS else CODED)] * 2
    )
    for of in SETTINGS
}


def refused(path):
    """Whether reading everything ends in an error of the format; any other error passes through."""
    try:
        with skl.open(path) as cache:
            for _ in cache:
                pass
    except skl.FormatError:
        return True
    return False


def accepted_changes(path, shard, changes):
    """The (offset, mask) pairs whose bits can be flipped without a refusal."""
    path.write_bytes(shard)
    assert not refused(path)
    found = []
    with path.open("r+b", buffering=0) as file:
        for place, mask in changes:
            file.seek(place)
            file.write(bytes([shard[place] ^ mask]))
            found += [] if refused(path) else [(place, mask)]
            file.seek(place)
            file.write(shard[place : place + 1])
    return found


def test_every_bit_of_the_smallest_shard(tmp_path):
    """One sequence, one position, no record: each of its bits is refused when it is flipped."""
    for place, bit in itertools.product(range(4096), range(8)):  # what opening a file does first
        header = bytearray(SMALLEST[:4096])
        header[place] ^= 1 << bit
        with pytest.raises(skl.FormatError) as caught:
            parse_header(header)
        assert "header" == caught.value.section
    changes = itertools.product(range(4096, len(SMALLEST)), (1 << bit for bit in range(8)))
    assert [] == accepted_changes(tmp_path / "a.skl", SMALLEST, list(changes))


@pytest.mark.soak
def test_every_byte_of_the_smallest_shard(tmp_path):
    """The same of every other value at every byte, always in a file."""
    assert [] == accepted_changes(tmp_path / "a.skl", SMALLEST, itertools.product(range(len(SMALLEST)), range(1, 256)))


@pytest.mark.parametrize("name", SHARDS)
def test_a_bit_of_every_byte(tmp_path, name):
    """Of each kind and profile, with tokens and columns: another bit from byte to byte."""
    shard = SHARDS[name]
    places = [*range(260), *range(4088, len(shard))]  # between them lie zeros, as in the smallest
    assert [] == accepted_changes(tmp_path / "a.skl", shard, [(place, 1 << place % 8) for place in places])


def seal(header, block):
    """A shard of one block, with all checksums made to fit what they guard."""
    header = header[:4088] + struct.pack("<Q", reference.xxh64(header[:4088], 0))
    seed = reference.shard_key_of(header)
    head = block[:40] + struct.pack("<Q", reference.xxh64(block[64:], seed)) + block[48:56]
    return reference.join_shard(header, [head + struct.pack("<Q", reference.xxh64(head, seed)) + block[64:]])


def check_lie(path, data):
    """Both implementations accept a shard whose checksums fit, with the same records, or both refuse it alike."""
    try:
        expected = reference.decode_shard(data)
    except (reference.CorruptError, reference.TruncatedError, reference.UnsupportedError) as error:
        expected = error
    path.write_bytes(data)
    refusal = None
    try:
        with skl.open(path) as cache:
            (found,) = cache
    except skl.FormatError as error:
        refusal = error
    if refusal is not None:
        assert type(expected).__name__ == type(refusal).__name__, (expected, refusal)
        return 0
    if isinstance(expected, reference.CorruptError):
        assert "id twice" == str(expected)  # which shows in a full verification only
        assert ["CorruptError"] == [problem.error for problem in skl.verify(path)]
        return 0
    (sequence,) = expected.sequences
    expected_pairs = weights_of(expected.settings, sequence) or sequence.positions
    assert expected_pairs == strategies.pairs_of(found.targets)
    assert strategies.columns_of(sequence) == {name: column.tolist() for name, column in found.columns.items()}
    return 1


def flipped(data, places):
    """The data with each bit of these places flipped, one after the other."""
    for place, bit in itertools.product(places, range(8)):
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        yield bytes(changed)


def parts_of(of):
    """Header and block of a shard of one sequence, and where its padding begins."""
    sequence = sequence_of(of, COUNTED if of.kind == COUNTS else CODED)
    size = len(reference.encode_payload(of, sequence))
    return reference.encode_header(of), reference.encode_block(of, sequence, 0, 0), 64 + size


@pytest.mark.parametrize("of", [SETTINGS[0], SETTINGS[-1]], ids=lambda of: name_of((of.kind, of.profile)))
def test_every_bit_of_a_header_with_fitting_checksums(tmp_path, of):
    """A flipped bit under fitting checksums is refused, or is another shard, with which the reference agrees."""
    header, block, _ = parts_of(of)
    verdicts = [
        check_lie(tmp_path / "a.skl", seal(lie, block)) for lie in flipped(header, [*range(160), 256, 257, 258])
    ]
    assert 600 < sum(verdicts) < len(verdicts) - 200


@pytest.mark.parametrize("of", SETTINGS[1:4], ids=lambda of: name_of((of.kind, of.profile)))
def test_every_bit_of_a_block_with_fitting_checksums(tmp_path, of):
    """The same of the block's header without its checksums, the payload, and the zeros around it."""
    header, block, end = parts_of(of)
    places = [*range(40), *range(48, 56), *range(64, end), end, len(block) - 1]
    verdicts = [check_lie(tmp_path / "a.skl", seal(header, lie)) for lie in flipped(block, places)]
    assert 0 < sum(verdicts) < len(verdicts) - 200


@pytest.mark.parametrize("name", ["smallest", *SHARDS])
def test_every_cut(tmp_path, name):
    """A sealed shard that is cut is truncated, wherever."""
    path, shard = tmp_path / "a.skl", SHARDS.get(name, SMALLEST)
    path.write_bytes(shard)
    for size in range(len(shard) - 1, -1 if name == "smallest" else 4090, -1):
        with path.open("r+b") as file:
            file.truncate(size)
        with pytest.raises(skl.TruncatedError):
            skl.open(path)


@pytest.mark.parametrize("of", SETTINGS, ids=lambda of: name_of((of.kind, of.profile)))
def test_every_cut_of_an_unfinished_shard(tmp_path, monkeypatch, of):
    """Recovery keeps the whole blocks before the cut and nothing else, and a writer resumes behind them."""
    monkeypatch.setattr(recovery, "Disk", FastDisk)
    sequences = [sequence_of(of, COUNTED if of.kind == COUNTS else CODED)] * 2
    header = reference.encode_header(of)
    blocks = [reference.encode_block(of, s, i, reference.shard_key_of(header)) for i, s in enumerate(sequences)]
    data, ends = header + b"".join(blocks), list(itertools.accumulate([4096, *map(len, blocks)]))
    path, partial = tmp_path / "a.skl", tmp_path / "a.skl.partial"
    for size in [*range(0, 4000, 40), *range(4000, len(data) + 1)]:
        partial.write_bytes(data[:size])
        recovered = skl.recover(path)
        kept = sum(end <= size for end in ends)  # the header and whole blocks
        assert (max(kept - 1, 0), size - (ends[kept - 1] if kept else 0)) == (recovered.sequences, recovered.bytes_cut)
        assert data[: ends[kept - 1] if kept else 0] == partial.read_bytes()
    for kept in range(3):
        partial.write_bytes(data[: ends[kept] + 1])
        with skl.ShardWriter(path, header=strategies.header_of(of), resume=True, disk=FastDisk()) as writer:
            assert kept == len(writer)
            for sequence in sequences[kept:]:
                positions = weights_of(of, sequence) or sequence.positions
                targets = strategies.targets_of(of.kind, positions)
                writer.append(sequence.tokens, targets, strategies.columns_of(sequence))
        assert reference.encode_shard(of, sequences) == path.read_bytes()
        path.unlink()
