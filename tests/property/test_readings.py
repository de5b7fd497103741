"""Arithmetic that all readers of other systems share, against plain Python on any row."""

import dataclasses
import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sklformat.format.header import Header
from sklformat.interop.checks import Dropped, check_row
from sklformat.interop.columns import Row, offsets_of
from sklformat.interop.readings import blank, log_softmax, select, without_first_row, without_last_row
from sklformat.interop.tables.cells import array_cell, list_cell

V = 20
HEADER = Header(vocab_size=V, seq_len=0, kind="ratios", rounds=0, sampler="topk")
entries = st.dictionaries(st.integers(0, V - 1), st.floats(-20, -3.5), max_size=5)
bad_values = st.sampled_from([math.nan, math.inf, -math.inf, 1.0])


def make_row(positions, tokens):
    """A row of {id: log-prob} at each position."""
    flat = [pair for position in positions for pair in position.items()]
    return Row(
        np.arange(tokens) % V,
        np.array([one for one, _ in flat], np.int64),
        np.array([value for _, value in flat], np.float64),
        offsets_of([len(position) for position in positions]),
        {"entropy": np.arange(len(positions), dtype=np.float64)},
    )


def lists(ids, values, offsets):
    """What is at each position, as pairs of id and value."""
    return [sorted(zip(ids[a:b].tolist(), values[a:b].tolist(), strict=True)) for a, b in itertools.pairwise(offsets)]


def of(row):
    return lists(row.token_ids, row.values, row.offsets)


@given(st.lists(entries, min_size=2, max_size=6))
def test_rows_of_one_place_more(positions):
    """Of L rows the last, or the first, goes with what stands beside it; all others stay with theirs."""
    row = make_row(positions, len(positions))
    expected = [sorted(position.items()) for position in positions]
    numbers = list(range(len(positions)))
    for cut, part in ((without_last_row, slice(None, -1)), (without_first_row, slice(1, None))):
        short = cut(row)
        assert (of(short), short.columns["entropy"].tolist()) == (expected[part], numbers[part])
        assert (short.offsets[0], short.offsets[-1]) == (0, short.token_ids.size)


@given(st.lists(st.tuples(entries, st.booleans(), st.integers(0, 31)), min_size=1, max_size=6))
def test_positions_and_records_that_are_left_out(positions):
    """Blank positions keep nothing, the others everything; of records those that are selected stay at their place."""
    row = make_row([one for one, _, _ in positions], len(positions) + 1)
    masked = np.array([mask for _, mask, _ in positions])
    expected = [[] if mask else sorted(one.items()) for one, mask, _ in positions]
    assert of(blank(row, masked)) == expected
    assert (blank(row, masked).columns["entropy"][masked] == 0).all()
    kept = [[bits >> i & 1 for i in range(len(one))] for one, _, bits in positions]
    chosen = select(row, np.array([bit for bits in kept for bit in bits], np.bool_))
    assert of(chosen) == [
        sorted(pair for pair, bit in zip(one.items(), bits, strict=True) if bit)
        for (one, _, _), bits in zip(positions, kept, strict=True)
    ]


@given(st.lists(st.lists(st.floats(-1e4, 1e4), max_size=5), max_size=6))
def test_log_softmax(positions):
    """Over the entries of each position, wherever empty ones are."""
    flat = np.array([value for position in positions for value in position])
    offsets = offsets_of([len(position) for position in positions])
    found = log_softmax(flat, offsets)
    for position, a in zip(positions, offsets, strict=False):
        for i, value in enumerate(position):
            expected = -math.log(math.fsum(math.exp(min(other - value, 700)) for other in position))
            assert math.isclose(found[a + i], expected, rel_tol=1e-9, abs_tol=1e-9) or expected < -690


@given(st.lists(st.tuples(entries, st.none() | st.tuples(st.integers(0, V - 1), bad_values)), min_size=1, max_size=6))
def test_what_is_dropped(positions):
    """A position with a value that cannot be loses its records, and nothing else does; the number is right."""
    content = [one if bad is None else one | {bad[0]: bad[1]} for one, bad in positions]
    row = dataclasses.replace(make_row(content, len(content) + 1), columns={})
    dropped = Dropped()
    item = check_row(row, HEADER, "logprobs", trusted=False, dropped=dropped)
    expected = [[] if bad else sorted((i, np.float32(math.exp(v))) for i, v in one.items()) for one, bad in positions]
    targets = item.targets
    assert lists(targets.token_ids, targets.weights, targets.offsets) == expected
    assert dropped.totals() == {"positions": sum(bad is not None for _, bad in positions), "sequences": 0}


@given(st.lists(st.lists(st.integers(-(2**40), 2**40), max_size=4), min_size=1, max_size=6))
def test_lists_of_lists(lists_of):
    """Values and offsets say the lists again, nulls as empty lists."""
    values, offsets = list_cell([one or None for one in lists_of] if any(lists_of) else lists_of, "x").ragged("x")
    assert [values[a:b].tolist() for a, b in itertools.pairwise(offsets)] == lists_of


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.data())
def test_one_list_of_each_position(rows, lists_in, width, data):
    """``pick`` takes list i of each position, of arrays as of lists."""
    array = np.arange(rows * lists_in * width).reshape(rows, lists_in, width)
    index = data.draw(st.integers(0, lists_in - 1))
    for cell in (array_cell(array), list_cell(array.tolist(), "x")):
        values, offsets = cell.pick(index, "x").ragged("x")
        assert values.reshape(rows, width).tolist() == array[:, index].tolist()
        assert np.diff(offsets).tolist() == [width] * rows
