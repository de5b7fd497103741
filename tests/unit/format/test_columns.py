"""Optional columns: shapes, types, bytes, and what their values must be."""

import numpy as np
import pytest
import strategies

import sklformat as skl
from sklformat.errors import CorruptError
from sklformat.format import columns, layout
from sklformat.format.block import check_payload, decode_body, encode_block, parse_block_header

ALL = tuple(layout.COLUMNS)
OFFSETS = np.array([0, 2, 2, 3])
GIVEN = {
    "label_logprob": [-1.5, 0.0, -0.25],
    "entropy": [2.0, 0.0, -1e-7],
    "document_start": [True, False, False, True],
    "record_logprob": [-0.5, -65504.0, 0.0],
}


def typed(**changes):
    return columns.typed_columns(ALL, GIVEN | changes, 3, (3,))


def test_types_and_bytes():
    """Each column has its type, its size and, after its bytes, its values."""
    made = typed()
    assert list(ALL) == list(made)
    assert ["float16", "float16", "bool", "float16"] == [str(values.dtype) for values in made.values()]
    assert columns.find_fault(made, OFFSETS) is None
    data = columns.pack(made)
    assert [6, 6, 1, 6] == [columns.size_of(name, 3, 3) for name in ALL]
    assert (19, 0b1001) == (data.size, data[12])
    back = columns.unpack(ALL, data, 3, 3)
    assert {name: values.tolist() for name, values in made.items()} == {n: v.tolist() for n, v in back.items()}
    assert all(values.flags.aligned for values in back.values())


@pytest.mark.parametrize(("tokens", "size"), [(2, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_starts_take_a_bit_per_token(tokens, size):
    """Whole bytes, (T + 8) / 8 of them; many sizes at once are what each alone is."""
    starts = np.arange(tokens) % 3 == 0
    data = columns.pack({"document_start": starts})
    assert size == data.size == columns.size_of("document_start", tokens - 1, 0)
    assert starts.tolist() == columns.unpack(("document_start",), data, tokens - 1, 0)["document_start"].tolist()
    assert [size] == columns.size_of("document_start", np.array([tokens - 1], np.uint64), 0).tolist()


def test_no_columns():
    """Nothing has no bytes."""
    assert columns.pack(columns.typed_columns((), None, 3, (3,))) is None


def test_minus_zero_becomes_zero():
    """A writer's -0 is 0, also where float16 rounds to it."""
    made = typed(label_logprob=[-0.0, 0, -1e-9], entropy=[-0.0] * 3, record_logprob=[-1e-9, -0.0, 0.0])
    assert not any(np.signbit(made[name]).any() for name in ALL if name != "document_start")


def test_any_layout_and_integers_for_booleans():
    """Arrays of any order become contiguous; 0 and 1 are booleans too."""
    wide = np.asfortranarray(np.zeros((3, 4)))
    made = columns.typed_columns(ALL, GIVEN | {"record_logprob": wide, "document_start": [1, 0, 0, 1]}, 3, (3, 4))
    assert made["record_logprob"].flags.c_contiguous
    assert GIVEN["document_start"] == made["document_start"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entropy": [1.0]}, r"column entropy has shape \(1,\), must be \(3,\)"),
        ({"document_start": [True]}, r"column document_start has shape \(1,\), must be \(4,\)"),
        ({"record_logprob": [0.0] * 4}, r"column record_logprob has shape \(4,\), must be \(3,\)"),
        ({"document_start": [2, 0, 0, 1]}, "column document_start must be booleans, True where a document begins"),
        ({"document_start": [0.0, 0.0, 0.0, 1.0]}, "column document_start must be booleans"),
        ({"logits": [1.0]}, "columns .*'logits'.* given, the header names"),
    ],
)
def test_wrong_shapes_and_types(change, message):
    """The message names the column, what it has and what it must have."""
    with pytest.raises(ValueError, match=message):
        typed(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_logprob": [-1, 0, np.nan]}, "label_logprob holds a value at position 2 that is not finite"),
        ({"label_logprob": [0.25, 0, -1]}, "label_logprob holds 0.25 at position 0; a log-probability is not above 0"),
        ({"label_logprob": [-1, -1, -1]}, "label_logprob holds -1.0 at position 1, which has no record; it must be 0"),
        ({"entropy": [1, 1, 1]}, "entropy holds 1.0 at position 1, which has no record; it must be 0"),
        ({"entropy": [1, 0, -np.inf]}, "entropy holds a value at position 2 that is not finite"),
        ({"record_logprob": [-1, -np.inf, -1]}, "record_logprob holds a value at record 1 that is not finite"),
        ({"record_logprob": [-1, -1e6, -1]}, "record_logprob holds a value at record 1 that is not finite"),
        ({"record_logprob": [-1, -1, 6e-8]}, "record_logprob holds .* at record 2; a log-probability is not above 0"),
    ],
)
def test_values_that_break_a_rule(change, message):
    """The fault names column, place and value."""
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(columns.find_fault(typed(**change), OFFSETS))


@pytest.mark.parametrize("name", ["label_logprob", "entropy", "record_logprob"])
def test_minus_zero_is_refused(name):
    """Stored, -0 breaks the rule that equal values have equal bytes."""
    made = typed() | {name: np.array([-0.0, 0.0, 0.0], np.float16)}
    assert f"column {name} holds -0.0 at" in columns.find_fault(made, OFFSETS)


def test_unused_bits_are_zero():
    """A bit behind the last token is damage."""
    with pytest.raises(CorruptError, match="document_start has a bit behind its 4 tokens"):
        columns.unpack(("document_start",), np.array([0b10001], np.uint8), 3, 0)


def test_records_take_their_log_probs_along():
    """Sorted otherwise or left out: each record keeps its value; other columns are as they were."""
    before = (np.array([0, 3, 4]), np.array([9, 5, 7, 5], np.uint32))
    after = (np.array([0, 2, 3]), np.array([5, 9, 5], np.uint32))
    given = {"entropy": np.ones(2, np.float16), "record_logprob": np.array([-9.0, -5.0, -7.0, -55.0])}
    moved = columns.follow_records(given, before, after)
    assert [-5.0, -9.0, -55.0] == moved["record_logprob"].tolist()
    assert given["entropy"] is moved["entropy"]


def test_positions_that_lose_all_records_lose_their_values():
    """Where every weight was too small for the code there is no record, and so the other columns are 0."""
    names = ("label_logprob", "entropy", "document_start", "record_logprob")
    header = skl.Header(vocab_size=20, seq_len=2, kind="ratios", rounds=0, sampler="topk", columns=names)
    targets = skl.SparseTargets(token_ids=[3, 4], weights=[2.0**-60, 1.0], offsets=[0, 1, 2])
    given = {"label_logprob": [-1.0, -2.0], "entropy": [1.0, 2.0], "document_start": [1, 0, 0]}
    data, _ = encode_block(header, 7, 0, [1, 2, 3], targets, given | {"record_logprob": [-9.0, -4.0]})
    block = parse_block_header(data, header, 7, 0)
    sequence = decode_body(header, block, check_payload(data, block, 7))
    assert [0, 0, 1] == sequence.targets.offsets.tolist()
    assert [[0.0, -2.0], [0.0, 2.0], [True, False, False], [-4.0]] == [
        values.tolist() for values in sequence.columns.values()
    ]


def test_a_block_of_weights_in_any_order():
    """Weights are sorted and cut when they are coded; record_logprob comes back beside its ids."""
    header = skl.Header(
        vocab_size=20, seq_len=2, kind="ratios", rounds=0, sampler="topk", columns=("document_start", "record_logprob")
    )
    ids, weights = [3, 1, 9, 4], [0.25, 0.5, 2.0**-40, 1.0]
    targets = skl.SparseTargets(token_ids=ids, weights=weights, offsets=[0, 3, 4])
    given = {"document_start": [False, True, False], "record_logprob": [-3.0, -1.0, -9.0, -4.0]}
    data, _ = encode_block(header, 7, 0, [1, 2, 3], targets, given)
    block = parse_block_header(data, header, 7, 0)
    sequence = decode_body(header, block, check_payload(data, block, 7))
    assert [1, 3, 4] == sequence.targets.token_ids.tolist()
    assert [-1.0, -3.0, -4.0] == sequence.columns["record_logprob"].tolist()
    assert given["document_start"] == sequence.columns["document_start"].tolist()


def test_verify_finds_every_fault(tmp_path):
    """verify names sequence and fault of a column, in shards where every checksum is right."""
    path = tmp_path / "a.skl"
    settings = strategies.small_settings(columns=12)
    sequence = strategies.small_sequence(0)
    sequence.document_start, sequence.record_logprob = [True] * 4, [-1.0, 0.5, -1.0]
    path.write_bytes(strategies.reference.encode_shard(settings, [sequence]))
    (problem,) = skl.verify(path)
    assert (0, "CorruptError") == (problem.sequence, problem.error)
    assert "column record_logprob holds 0.5 at record 1; a log-probability is not above 0" in problem.message
