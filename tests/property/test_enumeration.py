"""Every small position and sequence there is goes in and comes out, or is refused: nothing is left to what is drawn."""

import itertools

import numpy as np
import pytest
import reference
import strategies
from enumerated import LAYOUTS, ROUNDS, VOCAB_SIZE, name_of, sequence_of, settings_of, weights_of
from reference import COUNTS, RATIOS

import sklformat as skl
from sklformat import native


def candidates(codes, ids=range(VOCAB_SIZE)):
    """All lists of at most 3 (id, code) pairs, valid or not."""
    pairs = list(itertools.product(ids, codes))
    return [list(records) for n in range(4) for records in itertools.product(pairs, repeat=n)]


def accepts(of, records):
    try:
        reference.check_records(of, records)
    except reference.CorruptError:
        return False
    return True


def arrays_of(records):
    """Offsets, ids and codes of one position, as C takes them."""
    pairs = np.array(records, np.int64).reshape(-1, 2)
    return np.array([0, len(pairs)]), pairs[:, 0].astype(np.uint32), pairs[:, 1].astype(np.uint8)


def valid_positions(of, codes):
    return [records for records in candidates(codes) if accepts(of, records)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_every_position(layout):
    """Of all lists of at most 3 pairs, with an id and counts too many, C takes and reads what the reference does."""
    of = settings_of(*layout)
    codes = range(ROUNDS + 2) if of.kind == COUNTS else (0, 1, 64, 127)
    header, accepted = strategies.header_of(of), 0
    for records in candidates(codes, range(VOCAB_SIZE + 1)):
        good = accepts(of, records)
        payload = reference.encode_payload(of, reference.Sequence([0, 0], [records]))
        shape = native.Shape(of.kind, of.profile, 1, 0, 0, VOCAB_SIZE, header.rounds, 1, len(records))
        offsets, ids, values = arrays_of(records)
        out = np.zeros(len(payload) + 64, np.uint8)
        try:
            native.encode(shape, offsets, ids, values, None, None, out)
            native.check_distinct(offsets, ids)
        except (ValueError, skl.CorruptError):
            assert not good, records
        else:
            assert good, records
            assert payload + bytes(64) == out.tobytes()
        try:
            found = native.decode(shape, payload + bytes(64))
            native.check_distinct(*found[:2])
        except skl.CorruptError:
            assert not good, records
        else:
            assert good, records
            assert records == list(zip(found[1].tolist(), found[2].tolist(), strict=True))
        accepted += good
    assert {COUNTS: 11, RATIOS: 329}[of.kind] == accepted


def check_sequences(path, of, codes, longest):
    """All sequences of up to ``longest`` positions in one shard: written, read, and read in one batch; how many."""
    alphabet = valid_positions(of, codes)
    sequences = [
        sequence_of(of, positions)
        for length in range(1, longest + 1)
        for positions in itertools.product(alphabet, repeat=length)
    ]
    weights = None if of.kind == COUNTS else [weights_of(of, sequence) for sequence in sequences]
    data = strategies.write(path, of, sequences, weights)
    assert reference.encode_shard(of, sequences) == data
    for sequence, found in zip(sequences, reference.decode_shard(data).sequences, strict=True):
        assert sequence.positions == found.positions
        assert strategies.columns_of(sequence) == strategies.columns_of(found)
    with skl.open(path) as cache:
        for number in range(0, len(cache), 97):
            expected = weights_of(of, sequences[number]) or sequences[number].positions
            assert expected == strategies.pairs_of(cache[number].targets)
        payloads = cache.payloads(np.arange(len(cache)))
        batch = payloads.decode(cache.header, None if of.token_size else payloads.no_tokens(cache.header))
        assert [i for s in sequences for p in s.positions for i, _ in p] == batch.token_ids.tolist()
        top = ROUNDS if of.kind == COUNTS else 1
        values = [v for s in sequences for p in weights_of(of, s) or s.positions for _, v in p]
        np.testing.assert_allclose(np.array(values, np.float32) / np.float32(top), batch.probs, rtol=1e-7)
    assert [] == skl.verify(path)
    return len(sequences)


@pytest.mark.parametrize(
    "stored", [{"token_size": 2}, {"columns": 15, "record_count_size": 2}], ids=["tokens", "columns"]
)
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=name_of)
def test_every_sequence_of_counts(tmp_path, layout, stored):
    """All sequences of at most 3 positions and 3 records at each come back, through both implementations."""
    assert 11 + 11**2 + 11**3 == check_sequences(tmp_path / "a.skl", settings_of(*layout, **stored), range(1, 4), 3)


@pytest.mark.parametrize(
    "stored", [{"token_size": 2}, {"columns": 15, "record_count_size": 2}], ids=["tokens", "columns"]
)
@pytest.mark.parametrize("layout", LAYOUTS[3:], ids=name_of)
@pytest.mark.parametrize("longest", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_every_sequence_of_ratios(tmp_path, layout, stored, longest):
    """The same of the first and the last ratio code."""
    expected = sum(27**length for length in range(1, longest + 1))
    assert expected == check_sequences(tmp_path / "a.skl", settings_of(*layout, **stored), (0, 127), longest)
