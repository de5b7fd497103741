"""What payloads add up to, against a slow and obvious count of the same sequences."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sklformat as skl
from sklformat import native
from sklformat.format.block import block_shape
from sklformat.native import RowError

V = 11


@st.composite
def positions_of(draw, kind):
    """Ids with their counts of 6, or with weights."""
    if not draw(st.integers(0, 4)):
        return {}
    if kind == "counts":
        ids = draw(st.lists(st.integers(0, V - 1), min_size=6, max_size=6))
        return {i: ids.count(i) for i in ids}
    weights = st.floats(1 / 64, 1, width=32)
    return draw(st.dictionaries(st.integers(0, V - 1), weights, min_size=1, max_size=5))


@st.composite
def sequences(draw, kind):
    """Up to three sequences: tokens and what each position has."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(1, 9))
        tokens = draw(st.lists(st.integers(0, V - 1), min_size=n + 1, max_size=n + 1))
        found.append((tokens, [draw(positions_of(kind)) for _ in range(n)]))
    return found


def counted(tokens, positions, rounds):
    """The sums of a row, one position after the other."""
    sums = dict.fromkeys(native.SUMS, 0.0)
    n = len(positions)
    for t, records in enumerate(positions):
        if not records:
            continue
        weights = {i: (c / rounds if rounds else c) for i, c in records.items()}
        label, other, top = tokens[t + 1], tokens[(t + n // 2) % n + 1], max(weights.values())
        largest = [i for i, w in weights.items() if w == top]
        sums["positions"] += 1
        sums["records"] += len(weights)
        sums["mass"] += sum(weights.values())
        sums["entropy"] -= sum(w * math.log(w) for w in weights.values())
        sums["top"] += top
        sums["right"] += (label in largest) / len(largest)
        sums["label"] += weights.get(label, 0)
        sums["hits"] += label in weights
        sums["other_hits"] += other in weights
        sums["unseen"] += sum(c == 1 for c in records.values()) / rounds if rounds else 0
    return [sums[name] for name in native.SUMS]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sums_and_tables(tmp_path_factory, data):
    """Every sum of every row, and every table, of both kinds."""
    kind = data.draw(st.sampled_from(["counts", "ratios"]))
    found = data.draw(sequences(kind))
    rounds = 6 if kind == "counts" else 0
    path = tmp_path_factory.mktemp("stats") / "one.skl"
    header = skl.Header(vocab_size=V, seq_len=0, kind=kind, rounds=rounds)
    with skl.ShardWriter(path, header=header) as writer:
        for tokens, positions in found:
            offsets = np.cumsum([0, *map(len, positions)])
            ids = np.array([i for records in positions for i in sorted(records)], np.uint32)
            values = [records[i] for records in positions for i in sorted(records)]
            name, dtype = ("counts", np.uint8) if rounds else ("weights", np.float32)
            writer.append(tokens, skl.SparseTargets(token_ids=ids, offsets=offsets, **{name: np.array(values, dtype)}))
    with skl.open(path) as cache:
        if kind == "ratios":  # as they were rounded when they were stored
            found = [
                (
                    tokens,
                    [
                        dict(zip(t.token_ids[a:b].tolist(), t.weights[a:b].tolist(), strict=True))
                        for a, b in zip(t.offsets, t.offsets[1:], strict=False)
                    ],
                )
                for (tokens, _), t in ((one, cache[i].targets) for i, one in enumerate(found))
            ]
        payloads = cache.payloads(np.arange(len(cache)))
        tables = native.StatsTables(4, 3, 2, np.array([0, 3], np.uint32))
        shape = block_shape(cache.header, 0, 0)
        arrays = payloads.sources, payloads.sizes, payloads.num_positions, payloads.num_records
        rows = tables.add(shape, cache.header.scale_log2, *arrays)
        assert np.array_equal(rows, tables.add(shape, cache.header.scale_log2, *arrays))
    np.testing.assert_allclose(rows, [counted(*one, rounds) for one in found], rtol=1e-5, atol=1e-6)
    numbers = [min(len(records), 3) for _, positions in found for records in positions]
    assert np.array_equal(tables.uniques, 2 * np.bincount(numbers, minlength=4))
    assert [2 * sum(tokens.count(i) for tokens, _ in found) for i in (0, 3)] == tables.id_counts.tolist()
    values = [value for _, positions in found for records in positions for value in records.values()]
    sizes = values if rounds else [-math.floor(math.log2(w)) if w < 1 else 0 for w in values]
    assert np.array_equal(tables.sizes, 2 * np.bincount(np.array(sizes, np.int64), minlength=256))
    np.testing.assert_allclose(tables.bins.sum(0), 2 * rows[:, [0, 4, 5]].sum(0), rtol=1e-6)
    np.testing.assert_allclose(tables.buckets.sum(0), 2 * rows[:, [0, 7, 8, 9, 6]].sum(0), rtol=1e-6)
    for bucket in range(3):
        stretch = [
            (tokens[t + 1], positions[t])
            for tokens, positions in found
            for t in range(len(positions))
            if min(t // 2, 2) == bucket and positions[t]
        ]
        hits = sum(label in records for label, records in stretch)
        assert [2 * len(stretch), 2 * hits] == tables.buckets[bucket, :2].tolist()


def test_a_payload_that_is_damaged_or_no_array():
    """The row is named; what is no array of the right kind never reaches C."""
    tables = native.StatsTables(4, 1, 8, np.zeros(0, np.uint32))
    shape = native.Shape(1, 1, 1, 0, 0, 10, 5, 0, 0)
    payload = np.zeros(128, np.uint8)
    payload[0], payload[3] = 1, 4
    sources = np.array([native.address_of(payload.data)], np.uint64)
    arrays = [sources, np.array([128], np.uint64), np.array([1], np.uint32), np.array([1], np.uint32)]
    with pytest.raises(RowError, match="row 0") as caught:
        tables.add(shape, 0, *arrays)
    assert isinstance(caught.value.__cause__, skl.CorruptError)
    for wrong in range(1, 4):
        given = list(arrays)
        given[wrong] = given[wrong].astype(np.int16)
        with pytest.raises(ValueError, match="C needs 1 uint"):
            tables.add(shape, 0, *given)
