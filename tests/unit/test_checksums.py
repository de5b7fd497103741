"""Checksums and fingerprints are those of SPEC section 6."""

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from sklformat import checksums


@given(st.lists(st.integers(0, 2**32 - 1), max_size=300))
def test_alignment_is_the_same_for_every_type(tokens):
    """The alignment checksum depends on the values of the tokens alone, not on their type or byte order."""
    expected = reference.alignment_of(tokens)
    array = np.array(tokens, np.int64)
    assert expected == checksums.alignment(tokens)
    assert expected == checksums.alignment(array) == checksums.alignment(array.astype(">u4"))
    assert expected == checksums.alignment(np.repeat(array.astype(np.uint64), 2)[::2])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], r"tokens must be a 1-D array of integers, got shape \(1, 2\)"),
        ([1.0, 2.0], "float64"),
        ([True, False], "bool"),
        ([-1, 2], r"tokens must be in \[0, 2\*\*32\), got values from -1 to 2"),
        ([1 << 32], r"must be in \[0, 2\*\*32\)"),
    ],
)
def test_wrong_tokens(tokens, message):
    """Tokens that are no ids are refused instead of wrapped."""
    with pytest.raises(ValueError, match=message):
        checksums.alignment(tokens)


@given(st.binary(max_size=600), st.integers(0, 2**64 - 1))
def test_functions_of_xxhash(data, seed):
    """checksum is XXH3-64 with a seed, fingerprint is XXH3-128 as canonical text, whole or in parts."""
    assert reference.xxh64(data, seed) == checksums.checksum(data, seed)
    assert f"{reference.xxh128(data):032x}" == checksums.fingerprint(data)
    assert checksums.fingerprint(data) == checksums.fingerprint_of([data[:7], b"", data[7:]])
    assert checksums.checksum(data, seed) == checksums.checksum(memoryview(bytearray(data)), seed)


@given(st.binary(max_size=600), st.lists(st.tuples(st.integers(0, 600), st.integers(0, 600)), max_size=9), st.data())
def test_checksums_of_pieces(data, places, draw):
    """Pieces of some bytes have the checksums that they have alone, overlapping, empty and cut at the end too."""
    seed = draw.draw(st.integers(0, 2**64 - 1))
    found = checksums.checksums_of(memoryview(data), [at for at, _ in places], [size for _, size in places], seed)
    assert found.dtype == np.uint64
    assert found.tolist() == [reference.xxh64(data[at : at + size], seed) for at, size in places]


def test_as_many_places_as_lengths():
    """A length without its place is refused."""
    with pytest.raises(ValueError, match="zip"):
        checksums.checksums_of(memoryview(bytes(8)), [0], [1, 2])


@pytest.mark.parametrize("dtype", ["<u4", ">u4"])
@pytest.mark.parametrize("lengths", [(1, 5, 2), (300, 0, 7), ()])
def test_alignments_are_those_of_the_rows(lengths, dtype):
    """Each row's own tokens give its checksum, whatever stands behind them and however the processor keeps them."""
    positions = np.array(lengths, np.uint32)
    tokens = np.random.default_rng(1).integers(0, 2**32, (len(lengths), 301), np.uint32).astype(dtype)
    expected = [reference.alignment_of(row[: n + 1].tolist()) for row, n in zip(tokens, lengths, strict=True)]
    assert checksums.alignments(tokens, positions).tolist() == expected
