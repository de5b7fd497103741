"""Index and trailer: they prove each other, every block and the size of the file."""

import struct

import pytest
import reference
from strategies import small_shard

import sklformat as skl

SHARD = small_shard(3)
KEY = reference.shard_key_of(SHARD)
INDEX = struct.unpack_from("<Q", SHARD, len(SHARD) - 56)[0]


def open_bytes(tmp_path, data):
    (tmp_path / "a.skl").write_bytes(data)
    return skl.Shard(tmp_path / "a.skl")


def fixed(*changes, data=SHARD, root=False):
    """The shard with bytes changed, and the checksums of index and trailer fitted."""
    changed = bytearray(data)
    end = len(changed) - 64
    for offset, value in changes:
        changed[offset : offset + len(value)] = value
    changed[end + 48 : end + 56] = reference.xxh64(bytes(changed[INDEX:end]), KEY).to_bytes(8, "little")
    if root:
        sums = struct.unpack_from("<3Q", changed, INDEX + 48)
        changed[end + 32 : end + 48] = reference.root_of(bytes(changed[:4096]), sums).to_bytes(16, "little")
    changed[end + 56 :] = reference.xxh64(bytes(changed[end : end + 56]), KEY).to_bytes(8, "little")
    return bytes(changed)


def test_a_sound_index(tmp_path):
    """The columns of the index are those of the blocks."""
    shard = open_bytes(tmp_path, SHARD)
    blocks = [SHARD[offset : offset + 64] for offset in shard.index.offset.tolist()]
    assert [block[:4] for block in blocks] == [b"SKLB"] * 3
    assert [struct.unpack_from("<Q", block, 32)[0] for block in blocks] == shard.index.alignment.tolist()
    assert [struct.unpack_from("<Q", block, 56)[0] for block in blocks] == shard.index.block_checksum.tolist()
    assert shard.index.num_positions.tolist() == [3, 3, 3]
    assert shard.index.num_records.tolist() == [3, 3, 3]
    assert f"{reference.decode_shard(SHARD).root:032x}" == shard.fingerprint
    shard.close()


END = len(SHARD) - 64


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            [(END, b"X")],
            skl.TruncatedError,
            "no trailer at the end: cut short, or never finished: copy or capture it again",
        ),
        (
            [(END + 8, struct.pack("<Q", INDEX + 64))],
            skl.CorruptError,
            f"makes {len(SHARD) + 64} bytes, the file has {len(SHARD)}",
        ),
        ([(END + 8, struct.pack("<Q", 2**64 - 64))], skl.CorruptError, "the file has"),
        ([(END + 16, struct.pack("<Q", 5))], skl.CorruptError, "with 5 sequences makes"),
        ([(END + 16, struct.pack("<Q", 1 << 32))], skl.CorruptError, "4294967296 sequences"),
        ([(END + 24, struct.pack("<Q", 10))], skl.CorruptError, "records sum to 9, the trailer says 10"),
        ([(END + 32, b"X")], skl.CorruptError, "the root digest does not follow"),
        ([(INDEX + 96, b"X")], skl.CorruptError, "padding after the columns is not zero"),
        ([(INDEX, struct.pack("<Q", 4160))], skl.CorruptError, "block offsets do not rise from the end of the header"),
        ([(INDEX + 8, struct.pack("<Q", 4096))], skl.CorruptError, "block offsets do not rise"),
        ([(INDEX + 8, struct.pack("<Q", 4096 + 1))], skl.CorruptError, "block offsets do not rise"),
        ([(INDEX + 8, struct.pack("<Q", 4096 + 64))], skl.CorruptError, "block offsets leave a hole or overlap"),
        ([(INDEX + 72, struct.pack("<I", 0))], skl.CorruptError, r"sequences have 0\.\.3 positions"),
        ([(INDEX + 72, struct.pack("<I", (1 << 22) + 1))], skl.CorruptError, "4194305 positions"),
        ([(INDEX + 72, struct.pack("<I", 4))], skl.CorruptError, "a sequence's length differs from seq_len 3"),
        (
            [(INDEX + 84, struct.pack("<II", 60, 0)), (END + 24, struct.pack("<Q", 63))],
            skl.CorruptError,
            "hole or overlap",
        ),
    ],
)
def test_lies_are_named(tmp_path, changes, error, message):
    """An index or trailer that fits its checksum and lies is refused on opening, here and in the reference."""
    data = fixed(*changes)
    with pytest.raises(error, match=message) as caught:
        open_bytes(tmp_path, data)
    assert caught.value.path == tmp_path / "a.skl"
    assert caught.value.section in ("index", "trailer")
    assert caught.value.offset is not None
    with pytest.raises(getattr(reference, error.__name__)):
        reference.decode_shard(data)


@pytest.mark.parametrize("offset", [24, 48, 84])
def test_an_index_that_contradicts_its_blocks(tmp_path, offset):
    """An index that is not of its blocks is found when they are touched."""
    value = SHARD[INDEX + offset : INDEX + offset + 8]
    data = fixed(
        (INDEX + offset, bytes([value[0] ^ 1]) + value[1:]),
        (END + 24, struct.pack("<Q", 9 + (offset == 84) * -1)),
        root=True,
    )
    with open_bytes_cache(tmp_path, data) as cache, pytest.raises(skl.CorruptError, match="contradicts the index"):
        [cache[i] for i in range(3)]
    with pytest.raises(reference.CorruptError):
        reference.decode_shard(data)


def open_bytes_cache(tmp_path, data):
    (tmp_path / "a.skl").write_bytes(data)
    return skl.open(tmp_path / "a.skl")


@pytest.mark.parametrize(("offset", "section"), [(INDEX + 3, "index"), (END + 10, "trailer"), (END + 60, "trailer")])
def test_damage_is_named(tmp_path, offset, section):
    """A flipped bit shows both checksums and the part."""
    data = bytearray(SHARD)
    data[offset] ^= 1
    with pytest.raises(
        skl.CorruptError, match=rf"{section}: byte \d+: checksum 0x[0-9a-f]+ stored, 0x[0-9a-f]+ computed"
    ):
        open_bytes(tmp_path, bytes(data))


def test_an_empty_shard(tmp_path):
    """A shard without sequences is a shard; bytes between its header and its index belong to nothing."""
    shard = open_bytes(tmp_path, small_shard(0))
    assert len(shard) == 0
    shard.close()
    header = small_shard(0)[:4096]
    trailer = bytearray(small_shard(0)[-64:])
    trailer[8:16] = struct.pack("<Q", 4160)
    trailer[56:] = reference.xxh64(bytes(trailer[:56]), reference.shard_key_of(header)).to_bytes(8, "little")
    with pytest.raises(skl.CorruptError, match="bytes between the header and the index belong to no block"):
        open_bytes(tmp_path, header + bytes(64) + trailer)


@pytest.mark.parametrize(("first", "sound"), [(2**64 - 3, True), (2**64 - 2, False)])
def test_the_last_sequences_that_have_numbers(tmp_path, first, sound):
    """Sequences are numbered below 2^64: a shard that passes it is refused, read and written, here and there."""
    data = small_shard(3, first_sequence=first)
    if sound:
        assert 3 == len(open_bytes(tmp_path, data))
        assert 3 == len(reference.decode_shard(data).sequences)
        return
    with pytest.raises(skl.CorruptError, match=r"3 sequences from number 18446744073709551614 on pass 2\*\*64"):
        open_bytes(tmp_path, data)
    with pytest.raises(reference.CorruptError):
        reference.decode_shard(data)
    header = skl.Header(vocab_size=20, seq_len=1, kind="counts", rounds=5, first_sequence=first)
    targets = skl.SparseTargets(token_ids=[3], counts=[5], offsets=[0, 1])
    with skl.ShardWriter(tmp_path / "b.skl", header=header) as writer:
        writer.append([1, 2], targets)
        writer.append([1, 2], targets)
        with pytest.raises(ValueError, match="sequence number 18446744073709551616 is beyond 2\\*\\*64 - 1"):
            writer.append([1, 2], targets)
    assert 2 == len(open_bytes(tmp_path, (tmp_path / "b.skl").read_bytes()))
