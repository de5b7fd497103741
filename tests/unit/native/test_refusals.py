"""What C refuses, each reason once by its own words; tests/c and the other tests of this folder say when."""

import numpy as np
import pytest

import sklformat as skl
from sklformat import native


def test_a_reserved_bit():
    """Bit 31 of a record of profile R32 is kept free; its record is named."""
    shape = native.Shape(
        kind=1,
        profile=3,
        record_count_size=1,
        token_size=0,
        columns=0,
        vocab_size=10,
        rounds=3,
        num_positions=1,
        num_records=2,
    )
    payload = np.zeros(shape.record_count_size + 8 + 64, np.uint8)
    native.encode(shape, np.array([0, 2]), np.array([2, 7], np.uint32), np.array([1, 2], np.uint8), None, None, payload)
    payload[8] |= 0x80
    with pytest.raises(skl.CorruptError, match="position 0: the reserved bit of record number 1 is set"):
        native.decode(shape, payload)
