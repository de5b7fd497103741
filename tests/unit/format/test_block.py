"""One sequence as one block: what the encoder refuses and what the decoder finds."""

import numpy as np
import pytest
import reference
import strategies
from strategies import small_sequence, small_settings

import sklformat as skl
from sklformat.format import block

SETTINGS = small_settings(columns=3)
HEADER = strategies.header_of(SETTINGS)
KEY = HEADER.shard_key
COLUMNS = {"label_logprob": [-1.5, 0.0, -0.25], "entropy": [2.0, 0.0, 0.5]}


def good() -> dict:
    sequence = small_sequence(0)
    return {
        "tokens": sequence.tokens,
        "targets": strategies.targets_of(reference.COUNTS, sequence.positions),
        "columns": COLUMNS,
    }


def encode(**changes):
    return block.encode_block(HEADER, KEY, 0, **good() | changes)


def targets(token_ids=(0, 3, 19), counts=(2, 3, 5), offsets=(0, 2, 2, 3)):
    return skl.SparseTargets(token_ids=token_ids, counts=counts, offsets=offsets)


def test_bytes_are_the_references():
    """A block is the reference's, and what encode_block says of it is in its header."""
    data, said = encode()
    sequence = small_sequence(0)
    sequence.label_logprob, sequence.entropy = COLUMNS["label_logprob"], COLUMNS["entropy"]
    assert reference.encode_block(SETTINGS, sequence, 0, KEY) == bytes(data)
    assert said == block.parse_block_header(bytes(data), HEADER, KEY, 0)
    assert len(data) == said.size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokens": [1, 2, 3]},
            "3 tokens and 3 positions of records; a sequence of L tokens has exactly L - 1 records",
        ),
        ({"tokens": [1, 2, 20, 3]}, "token number 2 is 20, vocab_size is 20"),
        ({"tokens": [1.0, 2.0, 3.0, 4.0]}, "1-D array of integers"),
        (
            {"tokens": [1, 2], "targets": targets((1,), (5,), (0, 1))},
            "sequence of 1 positions, the header's seq_len is 3",
        ),
        ({"targets": targets(token_ids=(0, 3, 20))}, r"position 2: token id 20 .* \(vocab_size 20, rounds 5\)"),
        ({"targets": targets(token_ids=(3, 3, 19))}, "position 0: token id 3 comes twice or out of order"),
        ({"targets": targets(token_ids=(3, 0, 19))}, "position 0: token id 0 comes twice or out of order"),
        ({"targets": targets(counts=(2, 2, 5))}, "position 0: counts sum to 4, not to rounds"),
        ({"targets": targets(counts=(0, 5, 5))}, r"position 0: count 0 is not in 1\.\.rounds"),
        ({"targets": targets(counts=(2, 3, 6))}, r"position 2: count 6 is not in 1\.\.rounds"),
        (
            {"targets": skl.SparseTargets(token_ids=[0, 3, 19], weights=[1, 1, 1], offsets=[0, 2, 2, 3])},
            "kind is 'counts'",
        ),
        ({"columns": {}}, r"columns \[\] given, the header names \['entropy', 'label_logprob'\]"),
        ({"columns": COLUMNS | {"entropy": [1.0]}}, r"column entropy has shape \(1,\), must be \(3,\)"),
        (
            {"columns": COLUMNS | {"entropy": [1.0, 0.0, np.nan]}},
            "column entropy holds a value at position 2 that is not finite",
        ),
        ({"columns": COLUMNS | {"entropy": [1.0, 0.0, 1e6]}}, "position 2 that is not finite in float16"),
        (
            {"columns": COLUMNS | {"entropy": [1.0, 0.5, 1.0]}},
            "column entropy holds 0.5 at position 1, which has no record",
        ),
    ],
)
def test_wrong_sequences_are_refused(changes, message):
    """Everything that a reader could not trust is refused with its place and its value."""
    with pytest.raises(ValueError, match=message):
        encode(**changes)


def test_counts_for_ratios_are_refused():
    """A shard of ratios takes weights only, and weights in (0, scale] only."""
    header = skl.Header(vocab_size=20, seq_len=3, kind="ratios", rounds=0)
    tokens = [1, 2, 3, 4]
    with pytest.raises(ValueError, match="kind is 'ratios', the targets hold counts"):
        block.encode_block(header, header.shard_key, 0, tokens, targets())
    weighted = skl.SparseTargets(token_ids=[0, 3, 19], weights=[0.5, 1.5, 1], offsets=[0, 2, 2, 3])
    with pytest.raises(ValueError, match="position 0: weight number 1 is not in"):
        block.encode_block(header, header.shard_key, 0, tokens, weighted)
    beyond_float32 = skl.SparseTargets(token_ids=[0, 3, 19], weights=[0.5, 1, 1e300], offsets=[0, 2, 2, 3])
    with pytest.raises(ValueError, match="position 2: weight number 2 is not in"):
        block.encode_block(header, header.shard_key, 0, tokens, beyond_float32)


def test_too_many_records_for_their_number():
    """256 records do not fit one byte; the message says which setting helps."""
    header = skl.Header(vocab_size=300, seq_len=1, kind="ratios", rounds=0)
    many = skl.SparseTargets(token_ids=range(256), weights=np.full(256, 0.001), offsets=[0, 256])
    with pytest.raises(ValueError, match="position 0: 256 records do not fit; set record_count_size=2"):
        block.encode_block(header, header.shard_key, 0, [0, 1], many)
    wider = skl.Header(vocab_size=300, seq_len=1, kind="ratios", rounds=0, record_count_size=2)
    data, said = block.encode_block(wider, wider.shard_key, 0, [0, 1], many)
    assert many.token_ids.tolist() == decode(data, said, wider).targets.token_ids.tolist()


def test_no_positions_are_no_sequence():
    """A ragged sequence has at least one position."""
    header = skl.Header(vocab_size=20, seq_len=0, kind="counts", rounds=5)
    with pytest.raises(ValueError, match=r"a sequence has 1\.\.4194304 positions, got 0"):
        block.encode_block(header, header.shard_key, 0, [1], targets((), (), (0,)))


def decode(data, said, header=HEADER):
    return block.decode_body(header, said, block.check_payload(data, said, header.shard_key))


def test_decoded_arrays_own_their_memory():
    """What is decoded shares no memory with the block."""
    data, said = encode()
    got = decode(data, said)
    raw = np.frombuffer(data, np.uint8)
    arrays = [got.tokens, got.targets.token_ids, got.targets.counts, got.targets.offsets, *got.columns.values()]
    assert not any(np.shares_memory(raw, array) for array in arrays)
    assert {name: list(values) for name, values in COLUMNS.items()} == {n: c.tolist() for n, c in got.columns.items()}


def fixed(data, *changes):
    """A block with bytes changed and its header's checksum fitted."""
    changed = bytearray(data)
    for offset, value in changes:
        changed[offset : offset + len(value)] = value
    changed[40:48] = reference.xxh64(bytes(changed[64:]), KEY).to_bytes(8, "little")
    changed[56:64] = reference.xxh64(bytes(changed[:56]), KEY).to_bytes(8, "little")
    return bytes(changed)


@pytest.mark.parametrize(
    ("offset", "value", "error", "message"),
    [
        (0, b"X", skl.CorruptError, "block magic is 58 4b 4c 42, must be 53 4b 4c 42"),
        (4, b"\x01", skl.UnsupportedError, "codec 1 is not known to this version; install a newer"),
        (6, b"\x01", skl.CorruptError, "reserved_0 of the block header is not zero"),
        (31, b"\x01", skl.CorruptError, "reserved_1 of the block header is not zero"),
        (48, b"\x01", skl.CorruptError, "reserved_2 of the block header is not zero"),
        (8, b"\x05", skl.CorruptError, "block number 5 stands where block 0 belongs"),
        (16, b"\x02", skl.CorruptError, "block of 2 positions, must have 3"),
        (20, b"\x04", skl.CorruptError, "payload_size 32 stored, 35 follows from the counts"),
        (20, b"\xff\xff\xff\xff", skl.CorruptError, "4294967295 records in 3 positions"),
        (24, b"\x21", skl.CorruptError, "payload_size 33 stored, 32 follows"),
    ],
)
def test_wrong_headers_are_named(offset, value, error, message):
    """A block header that is sound by its checksum and wrong in a field is named with both values."""
    data, _ = encode()
    with pytest.raises(error, match=message):
        block.parse_block_header(fixed(data, (offset, value)), HEADER, KEY, 0)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (64, b"\x01", "sizes contradict each other"),
        (67, b"\x14", "position 0: token id 20"),
        (76, b"\x14", "token number 0 of the sequence is 20, not below vocab_size"),
        (76, b"\x01", "alignment checksum 0x[0-9a-f]+ stored, the tokens give 0x"),
        (84, b"\x00\x7c", "column label_logprob holds a value at position 0 that is not finite"),
        (92, b"\x01", r"column entropy holds .* at position 1, which has no record; it must be 0"),
        (96, b"\x01", "padding at payload byte 32 is not zero"),
    ],
)
def test_wrong_payloads_are_named(offset, value, message):
    """A payload that is sound by its checksum and breaks a rule is named, here and in the reference."""
    data, _ = encode()
    changed = fixed(data, (offset, value))
    with pytest.raises(skl.CorruptError, match=message):
        decode(changed, block.parse_block_header(changed, HEADER, KEY, 0))
    with pytest.raises(reference.CorruptError):
        reference.decode_shard(reference.join_shard(reference.encode_header(SETTINGS)[:4096], [changed]))


def test_damage_is_named():
    """A flipped bit in header or payload shows both checksums."""
    data, said = encode()
    for offset, message in ((33, "block header checksum"), (70, "payload checksum")):
        changed = bytearray(data)
        changed[offset] ^= 4
        with pytest.raises(skl.CorruptError, match=message + r" 0x[0-9a-f]{16} stored, 0x[0-9a-f]{16} computed"):
            decode(changed, block.parse_block_header(bytes(changed), HEADER, KEY, 0))
    assert said.number == 0


def test_short_blocks():
    """A block that ends early is truncated."""
    data, said = encode()
    with pytest.raises(skl.TruncatedError, match="63 bytes, a block header has 64"):
        block.parse_block_header(bytes(data[:63]), HEADER, KEY, 0)
    with pytest.raises(skl.TruncatedError, match=f"block of {len(data)} bytes ends after {len(data) - 1}"):
        block.check_payload(data[:-1], said, KEY)


def blocks_and_words():
    """Three blocks in a piece of memory, where they are, and the words of their headers as an index implies them."""
    blocks = [bytes(block.encode_block(HEADER, KEY, i, **good())[0]) for i in range(3)]
    lengths = np.array([len(data) for data in blocks], np.uint64)
    words = np.stack([np.frombuffer(data[:64], "<u8") for data in blocks])
    words[:, 5] = 0  # the payload's checksum
    return bytearray(b"".join(blocks)), np.cumsum(lengths) - lengths, lengths, words


def test_every_byte_of_a_block_counts():
    """The first block with another byte anywhere is found, in header, payload and padding."""
    data, *rest = blocks_and_words()
    view = memoryview(data)
    assert block.find_unsound(view, *rest, KEY) is None
    assert block.find_unsound(view, *rest, KEY ^ 1) == 0
    size = int(rest[1][0])
    for place in range(size, 2 * size):
        data[place] ^= 1
        assert block.find_unsound(view, *rest, KEY) == 1
        data[place] ^= 1


def test_every_word_that_the_index_implies_counts():
    """A header that is sound in itself is refused where another is expected."""
    data, begins, lengths, words = blocks_and_words()
    for place in set(range(8)) - {5}:
        others = words.copy()
        others[2, place] ^= np.uint64(1)
        assert block.find_unsound(memoryview(data), begins, lengths, others, KEY) == 2
    assert block.find_unsound(memoryview(data), begins[::-1], lengths, words, KEY) == 0


def test_a_wrong_checksum_that_the_index_repeats():
    """The index proves a header's checksum, and that proves the header: both together are not believed."""
    data, begins, lengths, words = blocks_and_words()
    data[int(begins[1]) + 56] ^= 1
    words[1, 7] ^= np.uint64(1)
    assert block.find_unsound(memoryview(data), begins, lengths, words, KEY) == 1


def test_a_block_beyond_the_formats_limit(monkeypatch):
    """It is refused although all of it is as it should be."""
    data, *rest = blocks_and_words()
    monkeypatch.setattr(block, "_MAX_SIZE", int(rest[1][0]) - 1)
    assert block.find_unsound(memoryview(data), *rest, KEY) == 0


def test_locate_keeps_what_is_known():
    """A fault's place is filled where it is unknown and kept where it is known."""
    error = block.locate(skl.CorruptError("bad", offset=5), path="a", offset=9, section="block", sequence=1)
    assert str(error) == "a: block 1: byte 5: bad"
