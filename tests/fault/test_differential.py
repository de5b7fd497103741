"""Shards that fit all their checksums and lie somewhere: the package accepts exactly what the reference accepts."""

import dataclasses
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import reference
import strategies
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import small_settings

import sklformat as skl

RATIO = small_settings(kind=reference.RATIOS, profile=reference.R32, rounds=0, columns=1, scale_log2=1)
RATIO_RECORDS = [[(3, 0), (4, 0), (1, 40)], [], [(19, 5), (2, 100)]]
BASES = [
    (small_settings(columns=3), [[[(3, 2), (6, 3)], [], [(16, 5)]]] * 2),
    (RATIO, [RATIO_RECORDS] * 2),
    (small_settings(columns=15), [[[(3, 2), (6, 3)], [], [(16, 5)]]] * 2),
    (dataclasses.replace(RATIO, columns=12), [RATIO_RECORDS] * 2),
    (small_settings(seq_len=0, token_size=0, record_count_size=2), [[[(3, 2), (6, 3)]], [[(16, 5)]] * 4]),
]


def build(of, positions):
    sequences = [
        reference.Sequence(
            [(i * 3) % 20 for i in range(len(p) + 1)],
            p,
            *([-1.0 if r else 0.0 for r in p] for _ in range(2)),
            [i % 2 == 0 for i in range(len(p) + 1)],
            [-1.0 for r in p for _ in r],
        )
        for p in positions
    ]
    return reference.encode_shard(of, sequences), [len(reference.encode_block(of, s, 0, 0)) for s in sequences]


SHARDS = [build(*base) for base in BASES]


def fit(data: bytearray, sizes: list[int]) -> bytes:
    """All checksums, the index's copies of them and the root made to fit the content."""
    data[4088:4096] = struct.pack("<Q", reference.xxh64(bytes(data[:4088]), 0))
    header, n, at, sums = bytes(data[:4096]), len(sizes), 4096, []
    key = reference.shard_key_of(header)
    for size in sizes:
        payload = bytes(data[at + 64 : at + size])
        data[at + 40 : at + 48] = struct.pack("<Q", reference.xxh64(payload, key))
        sums.append(reference.xxh64(bytes(data[at : at + 56]), key))
        data[at + 56 : at + 64] = struct.pack("<Q", sums[-1])
        at += size
    data[at + 16 * n : at + 24 * n] = struct.pack(f"<{n}Q", *sums)
    end = len(data) - 64
    data[end + 32 : end + 48] = reference.root_of(header, sums).to_bytes(16, "little")
    data[end + 48 : end + 56] = struct.pack("<Q", reference.xxh64(bytes(data[at:end]), key))
    data[end + 56 :] = struct.pack("<Q", reference.xxh64(bytes(data[end : end + 56]), key))
    return bytes(data)


@st.composite
def lies(draw):
    number = draw(st.integers(0, len(SHARDS) - 1))
    data, _ = SHARDS[number]
    places = (
        st.integers(0, 160)
        | st.integers(256, 262)
        | st.integers(4096, len(data) - 1)
        | st.integers(4096, len(data) - 129)
        | st.integers(4096 + 64, 4096 + 110)
    )
    values = st.sampled_from([0, 1, 2, 3, 4, 5, 0x40, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)
    return number, draw(st.lists(st.tuples(places, values), min_size=1, max_size=3))


def verdict_of_the_reference(data):
    try:
        return None, reference.decode_shard(data)
    except (reference.CorruptError, reference.TruncatedError, reference.UnsupportedError) as error:
        return type(error).__name__, None


@settings(max_examples=500)
@given(lies())
@example((1, [(4096 + 64 + 3 + 4, 3)]))  # an id that comes twice
@example((0, [(33, 2)]))  # another profile moves every record
def test_the_reference_agrees(lie):
    """Accepted by both with the same records, or refused by both with an error of the format."""
    number, changes = lie
    data, sizes = SHARDS[number]
    changed = bytearray(data)
    for place, value in changes:
        changed[place] = value
    changed = fit(changed, sizes)
    error, decoded = verdict_of_the_reference(changed)
    with tempfile.NamedTemporaryFile(suffix=".skl") as file:
        Path(file.name).write_bytes(changed)
        refusal = None
        try:
            problems = skl.verify(file.name)
        except skl.UnsupportedError as raised:  # nothing here is a shard of this version
            refusal = raised
        if refusal is not None:
            assert (error, "header") == ("UnsupportedError", refusal.section)
            return
        if error is not None:
            assert problems != []
            assert {p.error for p in problems} <= {"CorruptError", "TruncatedError", "UnsupportedError"}
            if len(changes) == 1:
                assert error in {p.error for p in problems}
            return
        assert problems == []
        with skl.open(file.name) as cache:
            found = [
                (
                    [[i for i, _ in p] for p in strategies.pairs_of(s.targets)],
                    {name: column.tolist() for name, column in s.columns.items()},
                )
                for s in cache
            ]
        ids = [[[i for i, _ in p] for p in s.positions] for s in decoded.sequences]
        assert found == list(zip(ids, map(strategies.columns_of, decoded.sequences), strict=True))


@pytest.mark.parametrize("base", range(len(BASES)))
def test_a_payload_size_that_does_not_follow_is_named(tmp_path, base):
    """A block header whose payload_size is not what its counts give is damage, whichever way it is read."""
    data, sizes = SHARDS[base]
    lying = bytearray(data)
    lying[4096 + 24] += 1
    path = tmp_path / "shard-00000.skl"
    path.write_bytes(fit(lying, sizes))
    assert ["CorruptError"] == [problem.error for problem in skl.verify(path)]
    with skl.open(path) as cache:
        with pytest.raises(skl.CorruptError, match="payload_size"):
            cache[0]
        with pytest.raises(skl.CorruptError, match="payload_size"):
            cache.payloads(np.array([0]))


@pytest.mark.parametrize(("record_count_size", "records"), [(1, 256), (1, 70_000), (2, 65_536)])
def test_more_records_than_a_position_counts(tmp_path, record_count_size, records):
    """A block of more records than its positions can have, all checksums right, is damage for every way of reading."""
    of = small_settings(seq_len=1, token_size=0, record_count_size=record_count_size)
    header = reference.encode_header(of)
    key, size = reference.shard_key_of(header), record_count_size + 3 * records
    body = bytes(reference.round_up(size + 64))
    head = reference.BLOCK_MAGIC + struct.pack("<4xQIII4xQ", 0, 1, records, size, reference.alignment_of([0, 0]))
    head += struct.pack("<Q8x", reference.xxh64(body, key))
    head += struct.pack("<Q", reference.xxh64(head, key))
    path = tmp_path / "shard-00000.skl"
    path.write_bytes(reference.join_shard(header, [head + body]))
    (problem,) = skl.verify(path)
    assert ("CorruptError", path, 4096 + 64 + len(body)) == (problem.error, problem.path, problem.offset)
    with pytest.raises(skl.CorruptError, match="more records than its positions count"):
        skl.open(path)
    with pytest.raises(reference.CorruptError):
        reference.decode_shard(path.read_bytes())
