"""Many blocks in a call: checksums as xxhash has them, headers, and columns as ``find_fault`` judges them."""

import contextlib
import dataclasses

import numpy as np
import pytest
import xxhash

from sklformat import native
from sklformat.checksums import alignment
from sklformat.errors import TruncatedError, UnsupportedError
from sklformat.format.columns import find_fault, unpack
from sklformat.native import Shape
from sklformat.native.door import ffi, lib

SHAPE = Shape(
    kind=1,
    profile=1,
    record_count_size=1,
    token_size=0,
    columns=0,
    vocab_size=10,
    rounds=5,
    num_positions=0,
    num_records=0,
)
NAMES = ("label_logprob", "entropy", "document_start", "record_logprob")


@pytest.fixture(params=["portable", "avx2", "avx512"])
def kernels(request):
    name = native.kernels_name()
    with contextlib.suppress(UnsupportedError):
        native.use_kernels(request.param)
        yield request.param
        native.use_kernels(name)
        return
    pytest.skip(f"no {request.param} here")


def addresses(*arrays):
    sources = np.array([native.address_of(array.data) for array in arrays], np.uint64)
    return sources, np.array([array.nbytes for array in arrays], np.uint64)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, 2**64 - 1])
def test_checksums_are_xxh3(kernels, seed):
    """Every length around every boundary of the algorithm, and some long ones, give what the xxhash package gives."""
    data = np.random.default_rng(seed % 1000).integers(0, 256, 70_000, np.uint8)
    for length in [*range(1200), *range(2040, 2060), 8192, 8193, 69_990]:
        piece = data[length % 7 : length % 7 + length]
        expected = xxhash.xxh3_64_intdigest(piece.data, seed)
        assert expected == lib.skl_checksum(ffi.from_buffer("uint8_t[]", piece), length, seed), length


@pytest.mark.parametrize("widths", [(1, 5, 2), (300, 0, 7)])
def test_tokens_give_their_alignment_checksum(widths):
    """Each row's own tokens do, as ``alignment`` has it; the first row with another one is named with its checksum."""
    positions = np.array(widths, np.uint32)
    tokens = np.random.default_rng(1).integers(0, 2**32, (3, max(widths) + 1), np.uint32)
    expected = np.array([alignment(tokens[b, : n + 1]) if n else 3 for b, n in enumerate(widths)], np.uint64)
    assert native.find_misaligned(tokens, positions, expected) is None
    tokens[0, widths[0]] ^= 1
    tokens[2, 0] ^= 1
    assert native.find_misaligned(tokens, positions, expected) == (0, alignment(tokens[0, : widths[0] + 1]))
    with pytest.raises(ValueError, match="SKL_ERR_ARG"):
        native.find_misaligned(tokens, positions + np.uint32(max(widths)), expected)
    with pytest.raises(ValueError, match="C needs 3 uint64"):
        native.find_misaligned(tokens, positions, expected.astype(np.int64))


def make_block(number, payload):
    """A header of 24 bytes: the number, the payload's checksum, its own; then the payload."""
    head = number.to_bytes(8, "little") + xxhash.xxh3_64_intdigest(payload, 7).to_bytes(8, "little")
    head += xxhash.xxh3_64_intdigest(head, 7).to_bytes(8, "little")
    return np.frombuffer(head + payload, np.uint8).copy()


def look(blocks, expected, max_size=1000):
    return native.find_unsound(*addresses(*blocks), expected, key=7, max_size=max_size, checksum_offset=8)


def test_every_byte_of_a_block_counts():
    """The first block with another byte anywhere is found; a payload's checksum in the expected header is not read."""
    blocks = [make_block(i, bytes(range(256)) + bytes([i] * 50)) for i in range(3)]
    expected = np.stack([block[:24] for block in blocks])
    expected[:, 8:16] = 0
    assert look(blocks, expected) is None
    for place in range(blocks[1].size):
        blocks[1][place] ^= 1
        assert look(blocks, expected) == 1
        blocks[1][place] ^= 1
    assert look(blocks, expected) is None


def test_a_header_that_the_index_does_not_name():
    """A block that is sound in itself is refused in another's place, as are one too long and one too short."""
    blocks = [make_block(i, bytes(40)) for i in range(2)]
    expected = np.stack([block[:24] for block in blocks])
    assert look(blocks[::-1], expected) == 0
    assert look(blocks, expected, max_size=63) == 0
    assert look([blocks[0], blocks[1][:23]], expected) == 1
    assert look([], expected[:0]) is None


def test_wrong_arguments_never_reach_c():
    """Arrays of another type or size, and headers too short for two checksums, are caught."""
    block = make_block(0, bytes(40))
    sources, sizes = addresses(block)
    rules = {"key": 7, "max_size": 1000, "checksum_offset": 8}
    expected = block[None, :24]
    with pytest.raises(ValueError, match="C needs 1 uint64"):
        native.find_unsound(sources, sizes.astype(np.int64), expected, **rules)
    with pytest.raises(ValueError, match="C needs 24 uint8"):
        native.find_unsound(sources, sizes, np.repeat(expected, 2, axis=0), **rules)
    with pytest.raises(ValueError, match="C needs 1 uint64"):
        native.find_unsound(sources.astype(np.int64), sizes, expected, **rules)
    for offset in (9, 2**32 - 1):
        with pytest.raises(ValueError, match="SKL_ERR_ARG"):
            native.find_unsound(sources, sizes, expected, **rules | {"checksum_offset": offset})


def columns_are_sound(shape, numbers, columns):
    payload = np.concatenate([numbers.view(np.uint8), np.zeros(3 * int(numbers.sum()), np.uint8), columns])
    counts = np.array([numbers.size], np.uint32), np.array([numbers.sum()], np.uint32)
    return native.columns_are_sound(shape, *addresses(payload), *counts)


@pytest.mark.parametrize("bit", [1, 2, 8])
@pytest.mark.parametrize("count_size", [1, 2])
def test_every_float16_is_judged_as_find_fault_does(bit, count_size):
    """Alone, and among others that are sound, where there are records and where there are none."""
    shape = dataclasses.replace(SHAPE, columns=bit, record_count_size=count_size)
    name = NAMES[bit.bit_length() - 1]
    for number in (0, 1) if bit != 8 else (1,):
        numbers = np.full(37, number, f"u{count_size}")
        offsets = np.arange(38) * number
        for bits in [*range(0, 1 << 16, 37), 0, 1, 0x7BFF, 0x7C00, 0x7C01, 0x8000, 0x8001, 0xFBFF, 0xFC00, 0xFFFF]:
            values = np.zeros(37, "<u2")
            values[bits % 37] = bits
            expected = find_fault({name: values.view(np.float16)}, offsets) is None
            assert expected == columns_are_sound(shape, numbers, values.view(np.uint8)), (number, hex(bits))


def test_bits_behind_the_tokens():
    """A bit of document_start that belongs to no token is damage, in C as in ``unpack``."""
    shape = dataclasses.replace(SHAPE, columns=4)
    for positions in range(1, 20):
        numbers = np.zeros(positions, np.uint8)
        for bit in range(8 * ((positions + 8) // 8)):
            column = np.zeros((positions + 8) // 8, np.uint8)
            column[bit // 8] = 1 << bit % 8
            if bit <= positions:
                assert unpack(("document_start",), column, positions, 0)["document_start"].nonzero()[0].tolist() == [
                    bit
                ]
            assert (bit <= positions) == columns_are_sound(shape, numbers, column)


def test_columns_beyond_the_payload():
    """A payload shorter than its counts say is not read; a shape without meaning is refused."""
    shape, payload = dataclasses.replace(SHAPE, columns=15), np.zeros(100, np.uint8)
    sources, sizes = addresses(payload)
    with pytest.raises(TruncatedError):
        native.columns_are_sound(shape, sources, sizes, np.array([3], np.uint32), np.array([60], np.uint32))
    with pytest.raises(ValueError, match="SKL_ERR_ARG"):
        native.columns_are_sound(
            dataclasses.replace(shape, kind=9), sources, sizes, np.array([3], np.uint32), np.array([0], np.uint32)
        )
