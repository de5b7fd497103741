"""SparseTargets: what records in memory accept, and that nothing wraps."""

import numpy as np
import pytest

import sklformat as skl


def targets(**changes):
    return skl.SparseTargets(**{"token_ids": [2, 7, 3], "counts": [1, 2, 3], "offsets": [0, 2, 3]} | changes)


def test_types():
    """Lists and any integer arrays become uint32 ids, uint8 counts, int64 offsets."""
    made = targets(token_ids=np.array([2, 7, 3], np.int64), offsets=np.array([0, 2, 3], np.uint8))
    assert made.token_ids.dtype == np.uint32
    assert made.counts.dtype == np.uint8
    assert made.offsets.dtype == np.int64
    assert made.weights is None
    assert (made.num_positions, made.num_records) == (2, 3)
    weighted = skl.SparseTargets(token_ids=[1], weights=[0.5], offsets=[0, 1])
    assert weighted.weights.dtype == np.float32


def test_positions_without_records():
    """A position may have no record, and so may all of them."""
    assert targets(offsets=[0, 0, 3, 3]).num_positions == 3
    assert skl.SparseTargets(token_ids=[], counts=[], offsets=[0, 0, 0]).num_records == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [2, 7, -1]}, r"token_ids must be in \[0, 4294967295\], got values from -1 to 7"),
        ({"token_ids": [2, 7, 1 << 32]}, "token_ids must be in"),
        ({"token_ids": [2.0, 7.0, 3.0]}, "token_ids must be integers, got float64"),
        ({"counts": [1, 2, 256]}, r"counts must be in \[0, 255\], got values from 1 to 256"),
        ({"counts": [1, 2]}, r"token_ids \(3,\) and counts or weights \(2,\) must be equal"),
        ({"offsets": [0, 2]}, "offsets must rise from 0 to the number of pairs, 3"),
        ({"offsets": [1, 3]}, "offsets must rise from 0"),
        ({"offsets": [0, 3, 2, 3]}, "offsets must rise from 0"),
        ({"offsets": []}, r"offsets must be 1-D with T \+ 1 values"),
        ({"offsets": [[0, 3]]}, "offsets must be 1-D"),
        ({"counts": None}, "give exactly one of counts and weights"),
        ({"weights": [0.1, 0.2, 0.3]}, "give exactly one of counts and weights"),
    ],
)
def test_wrong_arguments(changes, message):
    """Values that do not fit their type and lengths that disagree are refused, with the values."""
    with pytest.raises(ValueError, match=message):
        targets(**changes)


def test_equality():
    """Targets are equal where all their arrays are; counts never equal weights."""
    assert targets() == targets()
    assert targets() != targets(counts=[1, 2, 4])
    assert targets() != targets(offsets=[0, 1, 3])
    assert targets() != skl.SparseTargets(token_ids=[2, 7, 3], weights=[1, 2, 3], offsets=[0, 2, 3])
    assert targets() != 5
    with pytest.raises(TypeError):
        hash(targets())


def test_equality_of_sequences():
    """Sequences are equal where tokens, targets, columns and alignment are; any one that differs tells them apart."""

    def sequence(**changes):
        values = {"tokens": np.arange(3), "targets": targets(), "columns": {"entropy": np.ones(2)}, "alignment": 7}
        return skl.Sequence(**values | changes)

    assert sequence() == sequence()
    assert sequence(tokens=None) == sequence(tokens=None)
    for changes in (
        {"tokens": np.arange(1, 4)},
        {"tokens": None},
        {"targets": targets(counts=[1, 2, 4])},
        {"columns": {}},
        {"columns": {"entropy": np.zeros(2)}},
        {"columns": {"label_logprob": np.ones(2)}},
        {"alignment": 8},
    ):
        assert sequence() != sequence(**changes)
        assert sequence(**changes) != sequence()
    assert sequence() != 5
    with pytest.raises(TypeError):
        hash(sequence())
