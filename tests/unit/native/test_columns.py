"""Columns of many payloads in a call, judged as ``find_fault`` does."""

import dataclasses

import numpy as np
import pytest

from sklformat import native
from sklformat.errors import TruncatedError
from sklformat.format.columns import find_fault, unpack
from sklformat.native import Shape

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


def addresses(*arrays):
    sources = np.array([native.address_of(array.data) for array in arrays], np.uint64)
    return sources, np.array([array.nbytes for array in arrays], np.uint64)


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


@pytest.mark.parametrize("wrong", range(4))
def test_wrong_arrays_never_reach_c(wrong):
    """An array of another type is caught, whichever it is."""
    shape, arrays = dataclasses.replace(SHAPE, columns=15), [*addresses(np.zeros(100, np.uint8))]
    arrays += [np.array([3], np.uint32), np.array([0], np.uint32)]
    assert native.columns_are_sound(shape, *arrays)
    arrays[wrong] = arrays[wrong].astype(np.int16)
    with pytest.raises(ValueError, match=r"C needs 1 uint(32|64) in one piece, got 1 int16"):
        native.columns_are_sound(shape, *arrays)
