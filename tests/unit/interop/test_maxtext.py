"""MaxText's ArrayRecord files: rows about targets, packed documents, and protocol buffers read strictly."""

import contextlib
import struct

import numpy as np
import pytest
from converted import assert_probs, run
from hypothesis import given
from hypothesis import strategies as st

import sklformat as skl
from sklformat.interop.tables.examples import read_example, read_varints

V, K = 300, 4
module = pytest.importorskip("array_record.python.array_record_module")


def varint(number):
    number &= (1 << 64) - 1
    octets = []
    while number >= 0x80:
        octets.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*octets, number])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values):
    """A list of int64, float32 or texts, packed as TensorFlow packs it."""
    if isinstance(values, list):
        return field(1, b"".join(field(1, value) for value in values))
    values = np.asarray(values)
    if values.dtype.kind == "f":
        return field(2, field(1, values.astype("<f4").tobytes()))
    return field(3, field(1, b"".join(varint(int(value)) for value in values)))


def example(**features):
    entries = [field(1, name.encode()) + field(2, feature(values)) for name, values in features.items()]
    return field(1, b"".join(field(1, entry) for entry in entries))


def teach(seed, length):
    """Inputs [length], targets that follow, ids [length, K], logits and their probabilities over the K."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, length + 1)
    logits = np.sort(rng.normal(0, 3, (length, V)).astype(np.float32), 1)[:, ::-1][:, :K]
    ids = np.stack([rng.permutation(V)[:K] for _ in range(length)])
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return tokens[:-1], tokens[1:], ids, logits, probs


def record(taught, **changes):
    inputs, _, ids, logits, _ = taught
    features = {
        "inputs": inputs, "top_k_logits": logits.reshape(-1), "top_k_indices": ids.reshape(-1),
        "sequence_hash": np.array([-5]),
    }  # fmt: skip
    return example(**{name: values for name, values in (features | changes).items() if values is not None})


def write(path, records):
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for one in records:
        writer.write(one)
    writer.close()
    return path


def name(part, host=0):
    return f"teacher_top_k_part_{part:05d}_host_{host:03d}.array_record"


@pytest.fixture
def packed():
    """Documents of 4 and 3 tokens, and 2 of padding; the last token of each document has no target."""
    taught = teach(0, 9)
    inputs, targets, *_ = taught
    inputs[7:] = 0
    targets[:] = np.append(inputs[1:], 0)
    targets[[3, 6, 7, 8]] = 0
    segments = np.array([1, 1, 1, 1, 2, 2, 2, 0, 0])
    real = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0])
    return taught, {
        "inputs_segmentation": segments, "targets": targets, "targets_segmentation": real,
        "inputs_position": np.array([0, 1, 2, 3, 0, 1, 2, 0, 0]),
    }  # fmt: skip


def test_bare_records(tmp_path):
    """Without targets row t is about the next input, and the last row is left out; files come by part and host."""
    (tmp_path / "out").mkdir()
    taughts = [teach(seed, 6 + seed % 2) for seed in range(8)]
    for place, (part, host) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        write(tmp_path / "out" / name(part, host), [record(one) for one in taughts[2 * place : 2 * place + 2]])
    made = run(tmp_path / "out", tmp_path / "cache", vocab_size=V)
    for i, (inputs, _, ids, _, probs) in enumerate(taughts):
        assert skl.open(tmp_path / "cache")[i].tokens.tolist() == inputs.tolist()
        assert_probs(tmp_path / "cache", i, ids[:-1], probs[:-1])
    converted = skl.open(tmp_path / "cache").header.capture["converted"]
    assert (converted["from"], converted["values"]) == ("maxtext", "renormalised")
    assert converted["source"] == {"temperature": 1, "k": K, "tail": "unknown"}
    assert "where documents and padding are is not known" in made.says


def test_targets_behind_the_last_input(tmp_path):
    """With targets and one document the last row is about the last target, which becomes a token."""
    inputs, targets, ids, logits, probs = teach(1, 6)
    ones = np.ones(6, int)
    changes = {"targets": targets, "inputs_segmentation": ones, "targets_segmentation": ones}
    source = write(tmp_path / name(0), [record((inputs, targets, ids, logits, probs), **changes)])
    run(source, tmp_path / "cache", vocab_size=V)
    sequence = skl.open(tmp_path / "cache")[0]
    assert sequence.tokens.tolist() == [*inputs.tolist(), targets[-1]]
    assert sequence.columns["document_start"].tolist() == [True, *[False] * 6]
    assert_probs(tmp_path / "cache", 0, ids, probs)


@pytest.mark.parametrize("targets", [True, False])
def test_packed_documents(tmp_path, packed, targets):
    """Documents keep their borders; padding goes; the last row of a document has no records."""
    taught, changes = packed
    if not targets:
        changes = {"inputs_segmentation": changes["inputs_segmentation"]}
    source = write(tmp_path / name(0), [record(taught, **changes)])
    run(source, tmp_path / "cache", vocab_size=V)
    sequence = skl.open(tmp_path / "cache")[0]
    assert sequence.tokens.tolist() == taught[0][:7].tolist()
    assert sequence.columns["document_start"].tolist() == [True, False, False, False, True, False, False]
    shown = [t if t != 3 else None for t in range(6)]
    assert_probs(
        tmp_path / "cache",
        0,
        [[] if t is None else taught[2][t] for t in shown],
        [[] if t is None else taught[4][t] for t in shown],
    )


def test_from_any_sequence(tmp_path):
    """A stopped conversion is resumed at any record, in any file."""
    from sklformat.interop.kinds import find_kind, open_reading
    from sklformat.interop.readings import Asked

    taughts = [teach(seed, 5) for seed in range(5)]
    write(tmp_path / name(0), [record(one) for one in taughts[:3]])
    write(tmp_path / name(1), [record(one) for one in taughts[3:]])
    assert find_kind(tmp_path) == "maxtext"
    reading, _ = open_reading(tmp_path, "maxtext", Asked(vocab_size=V))
    for start in range(6):
        rest = [row.input_ids.tolist() for row in reading.rows(start)]
        assert rest == [inputs.tolist() for inputs, *_ in taughts[start:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": None}, "has no list inputs of integers"),
        ({"top_k_logits": np.arange(4 * K)}, "has no list top_k_logits of numbers"),
        ({"top_k_logits": np.ones(7, np.float32)}, "has 7 top_k_logits and 16 top_k_indices for 4 inputs"),
        ({"top_k_indices": np.arange(7)}, "has 16 top_k_logits and 7 top_k_indices for 4 inputs"),
        (
            {"top_k_indices": np.arange(8), "top_k_logits": np.ones(8, np.float32)},
            "has 2 entries for each position, the first sequence has 4",
        ),
        ({"inputs_segmentation": np.ones(4, int)}, "inputs_segmentation is in some sequences only"),
        ({"targets": np.arange(3)}, "targets has 3 values for 4 inputs"),
        ({"targets": np.full(4, 299)}, "position 0: the target is 299, but the next input of its document"),
        ({"top_k_indices": np.full(16, V)}, "position 0: token id 300 is not in"),
        ({"top_k_indices": np.full(16, -1)}, "position 0: token id -1 is not in"),
        ({"top_k_indices": np.full(16, 1)}, "position 0: token_ids has 1 twice"),
        ({"top_k_logits": np.full(16, np.nan, np.float32)}, "position 0: logprob nan"),
    ],
)
def test_records_that_cannot_be(tmp_path, changes, message):
    """A record that contradicts itself or the first is refused, or dropped when told."""
    source = write(tmp_path / name(0), [record(teach(0, 4)), record(teach(1, 4), **changes)])
    with pytest.raises(skl.CorruptError, match=f"row 1: {message}"):
        run(source, tmp_path / "none", vocab_size=V)
    run(source, tmp_path / "cache", vocab_size=V, on_bad_row="drop")
    assert skl.open(tmp_path / "cache")[0].tokens.tolist() == teach(0, 4)[0].tolist()


def test_padding_alone(tmp_path):
    """Records of nothing but padding, or of one token, have nothing to give."""
    for length, segments, message in (
        (4, [0] * 4, "row 0: is nothing but padding"),
        (1, [1], "row 0: has a single token"),
    ):
        source = write(tmp_path / name(0), [record(teach(0, length), inputs_segmentation=np.array(segments))])
        with pytest.raises(skl.CorruptError, match=message):
            run(source, tmp_path / "out", vocab_size=V)


def test_half_a_directory(tmp_path):
    """Parts that are missing, files that were cut short or are none, and files without a record."""
    asked = {"vocab_size": V, "from_": "maxtext"}
    with pytest.raises(skl.CorruptError, match="holds no file named teacher_top_k_part"):
        run(tmp_path, tmp_path.parent / "out", **asked)
    source = write(tmp_path / name(1, 1), [record(teach(0, 4))])
    write(tmp_path / name(0, 0), [record(teach(0, 4))])
    with pytest.raises(
        skl.CorruptError, match="has no part 0 of host 1; copy all files, or convert them one at a time"
    ):
        run(tmp_path, tmp_path.parent / "out", **asked)
    whole = source.read_bytes()
    for size in (0, 100, 1 << 16, len(whole) - 1000):
        source.write_bytes(whole[:size])
        with pytest.raises(skl.CorruptError, match=r"array_record: .*; copy the file again, or leave it out"):
            run(source, tmp_path / "out", **asked)
    source.write_bytes(whole[: 1 << 16])
    with pytest.raises(skl.CorruptError, match="its end, which tells where records are, is missing"):
        run(source, tmp_path / "out", **asked)
    source.write_bytes(whole[:0x90] + b"\xff\xff" + whole[0x92:])
    with pytest.raises(
        skl.CorruptError, match="array_record: Corrupted Riegeli/records file: chunk data hash mismatch"
    ):
        run(source, tmp_path / "out", **asked)
    with pytest.raises(skl.CorruptError, match="holds no sequence"):
        run(write(source, []), tmp_path / "out", **asked)
    with pytest.raises(skl.CorruptError, match=r"row 0: not a tf\.train\.Example: has field 8 of wire type 1"):
        run(write(source, [b"A" * 9]), tmp_path / "out", **asked)


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1)))
def test_packed_integers(values):
    """Every list of 64-bit integers comes back."""
    assert read_varints(b"".join(varint(value) for value in values)).tolist() == values


def test_other_ways_to_write_an_example():
    """Lists that are not packed, in several pieces, or of texts are what the format allows too."""
    floats = field(2, varint(1 << 3 | 5) + struct.pack("<f", 1.5) + field(1, struct.pack("<f", -2)))
    integers = field(3, varint(1 << 3) + varint(300) + field(1, varint(-1) + varint(7)))
    entries = [field(1, key) + field(2, value) for key, value in ((b"f", floats), (b"i", integers))]
    found = read_example(field(1, field(1, entries[0])) + field(1, field(1, entries[1])) + example(text=[b"a", b"b"]))
    assert {key: values.tolist() for key, values in found.items()} == {"f": [1.5, -2], "i": [300, -1, 7]}
    assert read_example(b"") == {}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\x0a\x05\x0a", "a protocol buffer ends inside a field"),
        (b"\x0a", "a protocol buffer ends inside a number"),
        (b"\xff" * 11, "a protocol buffer ends inside a number"),
        (b"\x0b", "a protocol buffer has no wire type 3"),
        (
            field(1, field(1, field(1, b"a") + field(2, field(3, field(1, b"\x80"))))),
            "a list of integers ends inside one",
        ),
        (field(1, field(1, field(2, field(3, field(1, b"\x80" * 10 + b"\0"))))), "an integer is longer than 64 bits"),
        (field(1, field(1, field(2, field(3, b"\x0d1234")))), "not a list of integers: field 1 of wire type 5"),
        (field(1, field(1, field(2, field(2, field(1, b"123"))))), "not a list of floats: field 1 of wire type 2"),
    ],
)
def test_bytes_that_are_no_example(record, message):
    """Bytes that end early or mean nothing are refused."""
    with pytest.raises(ValueError, match=message):
        read_example(record)


@given(st.binary(max_size=60))
def test_any_bytes(record):
    """Any bytes are an Example or a ValueError."""
    with contextlib.suppress(ValueError):
        read_example(record)
