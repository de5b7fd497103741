"""Conversion between caches and plain columns."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from operation_data import run_until_call, write

import sklformat as skl
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import write_manifest
from sklformat.files.disk import locked_directory
from sklformat.format import layout
from sklformat.interop import convert
from sklformat.interop.checks import check_row
from sklformat.interop.columns import Row
from sklformat.interop.conversion import Converted
from sklformat.settings.convert import ConvertConfig

FILES = ("c.npz", "c.parquet", "c.jsonl")
SEQ_LEN = 7


def test_large_numbers_are_readable():
    """Thousands are set apart, as every other verb does it."""
    made = Converted(
        destination=Path("c.npz"), sequences=1000, positions=47872, records=2025947, fingerprint=None, says=()
    )
    assert "c.npz: 1,000 sequences, 47,872 positions, 2,025,947 records" == str(made)


def drawn(rng, positions, vocab_size, rounds):
    """Counts of each position, one position without records."""
    ids, counts, offsets = [], [], [0]
    for t in range(positions):
        if t != 2:
            drawn_ids, drawn_counts = np.unique(rng.integers(0, vocab_size, rounds) // 3, return_counts=True)
            ids += drawn_ids.tolist()
            counts += drawn_counts.tolist()
        offsets.append(len(ids))
    return skl.SparseTargets(token_ids=ids, counts=counts, offsets=offsets)


def topk(rng, positions, vocab_size, k=5):
    """Weights of each position that sum to less than 1."""
    ids = np.concatenate([rng.permutation(vocab_size)[:k] for _ in range(positions)])
    weights = np.sort(rng.dirichlet(np.ones(k + 1), positions)[:, :k], axis=1)[:, ::-1].ravel()
    return skl.SparseTargets(token_ids=ids, weights=weights, offsets=np.arange(positions + 1) * k)


def logprob_of(ids):
    """A log-prob that tells the id."""
    return -np.asarray(ids, np.float64) / 4


def write_cache(directory, kind="counts", sequences=5, per_shard=2, seed=0, **settings):
    """A cache with a provenance; returns its directory."""
    rng = np.random.default_rng(seed)
    directory.mkdir()
    given = {"vocab_size": 60, "seq_len": SEQ_LEN, "rounds": 9 if kind == "counts" else 0}
    given |= {"sampler": None if kind == "counts" else "topk", "capture": {"teacher": "t"}, "sampling_seed": 3}
    header = skl.Header(kind=kind, **(given | settings))
    for shard, first in enumerate(range(0, sequences, per_shard)):
        placed = dataclasses.replace(header, shard_number=shard, first_sequence=first)
        with skl.ShardWriter(directory / f"shard-{shard:05d}.skl", header=placed) as writer:
            for sequence in range(first, min(first + per_shard, sequences)):
                length = header.seq_len or 2 + sequence
                targets = drawn(rng, length, 60, header.rounds) if kind == "counts" else topk(rng, length, 60)
                has_records = np.diff(targets.offsets) > 0
                columns = {
                    "label_logprob": -rng.random(length) * has_records,
                    "entropy": rng.random(length) * has_records,
                    "document_start": rng.random(length + 1) < 0.3,
                    "record_logprob": logprob_of(targets.token_ids),
                }
                columns = {name: columns[name] for name in header.columns}
                writer.append(rng.integers(0, 60, length + 1), targets, columns)
    write_manifest(directory, scan_directory(directory))
    return directory


def contents(directory):
    """Name and bytes of every file that is not a lock."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def run(source, destination, **settings):
    return convert(ConvertConfig(source=source, destination=destination, **settings))


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROW = {"input_ids": [1, 2, 3], "token_ids": [[5, 4], []], "counts": [[2, 1], []]}
LOG_ROW = {"input_ids": [1, 2, 3], "token_ids": [[5, 4], [7]], "logprobs": [[-0.5, -2.0], [-0.1]]}
COUNTS = {"vocab_size": 10, "rounds": 3, "sampler": "multinomial"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kind": "ratios"},
        {"seq_len": 0, "columns": ("label_logprob", "entropy")},
        {"seq_len": 0, "columns": ("document_start",)},
        {"columns": tuple(layout.COLUMNS)},
        {"kind": "ratios", "columns": tuple(layout.COLUMNS)},
        {"kind": "ratios", "scale_log2": 2, "record_count_size": 2},
    ],
    ids=[
        "counts",
        "ratios",
        "ragged with columns",
        "document starts",
        "all columns",
        "ratios with all columns",
        "scaled ratios",
    ],
)
def test_there_and_back_gives_the_same_bytes(tmp_path, name, settings):
    """A cache that goes through plain columns and back is byte for byte the same, for every file and kind."""
    cache = write_cache(tmp_path / "cache", **settings)
    made = run(cache, tmp_path / name)
    back = run(tmp_path / name, tmp_path / "back")
    assert contents(cache) == contents(tmp_path / "back")
    assert (made.sequences, made.positions, made.records) == (back.sequences, back.positions, back.records)
    assert skl.open(cache).fingerprint == back.fingerprint
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("name", FILES)
def test_log_probs_of_records_follow_their_ids(tmp_path, name):
    """Records are sorted otherwise in another kind and in a file of any order; each keeps its log-prob."""
    cache = write_cache(tmp_path / "cache", columns=("document_start", "record_logprob"))
    run(cache, tmp_path / "ratios", kind="ratios")
    for sequence in skl.open(tmp_path / "ratios"):
        assert logprob_of(sequence.targets.token_ids).tolist() == sequence.columns["record_logprob"].tolist()
    run(tmp_path / "ratios", tmp_path / name)
    run(tmp_path / name, tmp_path / "again")
    assert contents(tmp_path / "ratios") == contents(tmp_path / "again")
    run(tmp_path / "again", tmp_path / "back", kind="counts")
    assert contents(cache) == contents(tmp_path / "back")


def test_columns_of_other_peoples_files(tmp_path):
    """Ids in any order, 0 and 1 for booleans, one row too many: the values find their places."""
    row = {
        "input_ids": [1, 2, 3],
        "token_ids": [[7, 4], [], [9]],
        "counts": [[2, 1], [], [3]],
        "document_start": [1, 0, 1],
        "record_logprob": [[-0.25, -1.5], [], [-3.0]],
        "entropy": [1.0, 0, 2.0],
    }
    run(jsonl(tmp_path / "a.jsonl", row), tmp_path / "cache", drop_last_row=True, **COUNTS)
    (sequence,) = skl.open(tmp_path / "cache")
    assert {"entropy": [1.0, 0.0], "document_start": [True, False, True], "record_logprob": [-1.5, -0.25]} == {
        name: values.tolist() for name, values in sequence.columns.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document_start": [1, 0]}, "document_start has 2 values for 3 tokens"),
        ({"document_start": [1, 0, 2]}, "document_start must be booleans"),
        ({"document_start": [1, 0, 0.5]}, "document_start holds something other than booleans"),
        ({"record_logprob": [-1, -1]}, "record_logprob is not a list of lists"),
        ({"record_logprob": [[-1], [-1]]}, "position 0: 2 token_ids, but 1 record_logprob"),
        ({"record_logprob": [[-1, 0.5], []]}, "record_logprob holds 0.5 at record 0; a log-probability is not above 0"),
        ({"label_logprob": [-1, -1]}, "label_logprob holds -1.0 at position 1, which has no record"),
    ],
)
def test_columns_that_cannot_be(tmp_path, change, message):
    """What a block may not hold is refused with its row."""
    with pytest.raises(skl.CorruptError, match=message):
        run(jsonl(tmp_path / "a.jsonl", ROW | change), tmp_path / "cache", **COUNTS)


def test_logprobs_of_any_float32_weight_come_back_exactly():
    """exp(log(w)) in float64 rounds to w for every float32 weight, so that ratio codes survive logprobs."""
    rng = np.random.default_rng(0)
    bits = rng.integers(1, int(np.float32(1).view(np.uint32)) + 1, 1 << 18).astype(np.uint32)
    weights = bits.view(np.float32)
    row = Row(
        np.array([0, 1]), np.arange(weights.size), np.log(weights.astype(np.float64)), np.array([0, weights.size])
    )
    header = skl.Header(vocab_size=1 << 18, seq_len=1, kind="ratios", rounds=0)
    found = check_row(row, header, "logprobs", trusted=True).targets.weights
    assert np.array_equal(weights, found)


def test_files_are_plain(tmp_path):
    """Other people's readers find the columns as documented, without sklformat and without pickle."""
    pq = pytest.importorskip("pyarrow.parquet")
    cache = write_cache(tmp_path / "cache")
    for name in FILES:
        run(cache, tmp_path / name)
    first = skl.open(cache)[0]
    lists = [a.tolist() for a in np.split(first.targets.token_ids, first.targets.offsets[1:-1])]
    row = json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0])
    assert (first.tokens.tolist(), lists) == (row["input_ids"], row["token_ids"])
    table = pq.read_table(tmp_path / "c.parquet").to_pylist()
    assert row == table[0]
    with np.load(tmp_path / "c.npz", allow_pickle=False) as arrays:
        offsets = arrays["position_offsets"]
        assert [5 * SEQ_LEN + 1, 6] == [offsets.size, arrays["sequence_offsets"].size]
        assert lists[1] == arrays["token_ids"][offsets[1] : offsets[2]].tolist()


def test_plain_to_plain(tmp_path):
    """A file of plain columns becomes another one, and its note goes along."""
    cache = write_cache(tmp_path / "cache")
    run(cache, tmp_path / "c.jsonl")
    run(tmp_path / "c.jsonl", tmp_path / "c.npz")
    assert skl.open(cache).fingerprint == run(tmp_path / "c.npz", tmp_path / "back").fingerprint


def test_profile_and_shards(tmp_path):
    """R24 becomes R32 in shards of another size, with the same records; tokens stay unless dropped."""
    cache = write_cache(tmp_path / "cache")
    run(cache, tmp_path / "wide", profile="R32", sequences_per_shard=4)
    wide = skl.open(tmp_path / "wide")
    assert ("R32", 2, 5) == (wide.header.profile, len(wide.fingerprints), len(wide))
    assert all(
        a.targets == b.targets and (a.tokens == b.tokens).all() for a, b in zip(skl.open(cache), wide, strict=True)
    )
    assert [] == skl.verify(tmp_path / "wide")


def test_tokens_dropped_and_given_back(tmp_path):
    """A cache without tokens converts only with the tokens it was made on, and then to the same bytes as before."""
    cache = write_cache(tmp_path / "cache")
    made = run(cache, tmp_path / "bare", drop_tokens=True)
    assert skl.open(tmp_path / "bare")[0].tokens is None
    assert any("tokens are left out" in sentence for sentence in made.says)
    with pytest.raises(ValueError, match=r"stores no tokens.*--tokens"):
        run(tmp_path / "bare", tmp_path / "c.jsonl")
    tokens = np.stack([sequence.tokens for sequence in skl.open(cache)])
    np.save(tmp_path / "tokens.npy", tokens)
    run(tmp_path / "bare", tmp_path / "full", tokens=tmp_path / "tokens.npy")
    assert contents(cache) == contents(tmp_path / "full")
    np.save(tmp_path / "wrong.npy", tokens[::-1])
    with pytest.raises(skl.AlignmentError, match="sequence 0"):
        run(tmp_path / "bare", tmp_path / "other", tokens=tmp_path / "wrong.npy")
    np.save(tmp_path / "short.npy", tokens[1:])
    with pytest.raises(ValueError, match="has 4 rows for 5 sequences; give one row for each"):
        run(tmp_path / "bare", tmp_path / "another", tokens=tmp_path / "short.npy")


@pytest.mark.parametrize("sampler", ["multinomial", "thinned"])
def test_counts_become_ratios_and_back(tmp_path, sampler):
    """Counts as ratios weigh count / rounds within the code's step; the loss is said, and the way back is exact."""
    cache = write_cache(tmp_path / "cache", sampler=sampler)
    made = run(cache, tmp_path / "ratios", kind="ratios")
    ratios = skl.open(tmp_path / "ratios")
    assert ("ratios", 9, sampler) == (ratios.header.kind, ratios.header.rounds, ratios.header.sampler)
    for exact, coded in zip(skl.open(cache), ratios, strict=True):
        order = np.lexsort((coded.targets.token_ids, np.repeat(np.arange(SEQ_LEN), np.diff(coded.targets.offsets))))
        assert (exact.targets.token_ids == coded.targets.token_ids[order]).all()
        np.testing.assert_allclose(coded.targets.weights[order], exact.targets.counts / 9, rtol=0.09)
    assert f"counts of 9 rounds, sampler {sampler}: unbiased" in made.says
    assert any(sentence.startswith("lost: the ratio code changes a weight by up to") for sentence in made.says)
    run(tmp_path / "ratios", tmp_path / "back", kind="counts")
    assert contents(cache) == contents(tmp_path / "back")


def test_ratios_that_are_no_counts_are_refused(tmp_path):
    """Top-K weights were never counts, and drawn weights that no counts give are refused with their place."""
    write_cache(tmp_path / "topk", kind="ratios")
    with pytest.raises(ValueError, match="sampler topk drew nothing"):
        run(tmp_path / "topk", tmp_path / "counts", kind="counts")
    write_cache(tmp_path / "drawn", kind="ratios", sampler="multinomial", rounds=50)
    with pytest.raises(ValueError, match=r"sequence 0: position \d+: .*keep kind ratios"):
        run(tmp_path / "drawn", tmp_path / "counts", kind="counts")
    write_cache(tmp_path / "many", kind="ratios", sampler="multinomial", rounds=500)
    with pytest.raises(ValueError, match=r"1..127 rounds.*500"):
        run(tmp_path / "many", tmp_path / "counts", kind="counts")
    header = skl.Header(vocab_size=9, seq_len=1, kind="ratios", rounds=10)
    (tmp_path / "near").mkdir()
    with skl.ShardWriter(tmp_path / "near" / "shard-00000.skl", header=header) as writer:
        writer.append([1, 2], skl.SparseTargets(token_ids=[1, 2, 3], weights=[0.52, 0.3, 0.18], offsets=[0, 3]))
    with pytest.raises(ValueError, match="the nearest counts of 10 rounds do not give back the stored ratios"):
        run(tmp_path / "near", tmp_path / "counts", kind="counts")
    assert not (tmp_path / "counts").exists()


def test_import_of_foreign_counts(tmp_path):
    """Counts in any order of ids come in exactly; provenance and convention are said."""
    made = run(jsonl(tmp_path / "f.jsonl", ROW, ROW), tmp_path / "cache", **COUNTS)
    cache = skl.open(tmp_path / "cache")
    assert ([4, 5], [1, 2]) == (cache[1].targets.token_ids.tolist(), cache[1].targets.counts.tolist())
    assert {"from": "jsonl", "name": "f.jsonl", "values": "counts"} == cache.header.capture["converted"]
    assert (2, "R24") == (cache.header.seq_len, cache.header.profile)
    assert "row t describes token t + 1, given tokens 0..t" in made.says


@pytest.mark.parametrize(
    ("logprobs", "word", "sentence"),
    [
        ([[-0.5, -2.0], [-0.1]], "log-probabilities", "weights sum to 0.742 .. 0.905, 0.823 on average"),
        ([list(np.log([0.7, 0.3])), [0.0]], "renormalised", "weights sum to 1, so what"),
    ],
)
def test_import_of_topk_says_what_its_values_are(tmp_path, logprobs, word, sentence):
    """A Top-K import is marked biased and says whether its values were renormalised."""
    source = jsonl(tmp_path / "f.jsonl", LOG_ROW | {"logprobs": logprobs})
    made = run(source, tmp_path / "cache", vocab_size=10, sampler="topk")
    header = skl.open(tmp_path / "cache").header
    assert (True, word) == (header.biased, header.capture["converted"]["values"])
    assert any(sentence in said for said in made.says)
    assert any("biased, the rest of the distribution is left out" in said for said in made.says)


def test_rows_as_many_as_tokens(tmp_path):
    """L rows for L tokens are refused until the user says that the last one is too many."""
    row = ROW | {"token_ids": [[5], [6], [9]], "counts": [[3], [3], [3]]}
    source = jsonl(tmp_path / "f.jsonl", row, row)
    with pytest.raises(skl.CorruptError, match=r"row 0: 3 tokens and 3 rows.*--drop-last-row"):
        run(source, tmp_path / "cache", **COUNTS)
    run(source, tmp_path / "cache", drop_last_row=True, **COUNTS)
    assert [5, 6] == skl.open(tmp_path / "cache")[0].targets.token_ids.tolist()
    with pytest.raises(skl.CorruptError, match="no last row too many"):
        run(jsonl(tmp_path / "g.jsonl", ROW), tmp_path / "other", drop_last_row=True, **COUNTS)
    np.savez(
        tmp_path / "f.npz",
        input_ids=[1, 2, 3, 1, 2, 3],
        sequence_offsets=[0, 3, 6],
        token_ids=[5, 6, 9, 5, 6, 9],
        counts=[3] * 6,
        position_offsets=range(7),
    )
    run(tmp_path / "f.npz", tmp_path / "npz", drop_last_row=True, **COUNTS)
    assert skl.open(tmp_path / "cache")[1].targets == skl.open(tmp_path / "npz")[1].targets


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (ROW | {"input_ids": [1, 2, 10]}, COUNTS, r"row 0: token number 2: id 10 is not in \[0, 10\)"),
        (ROW | {"token_ids": [[5, -1], []]}, COUNTS, r"position 0: token id -1 is not in \[0, 10\)"),
        (ROW | {"token_ids": [[5, 5], []]}, COUNTS, "position 0: token_ids has 5 twice"),
        (ROW | {"counts": [[2, 2], []]}, COUNTS, "position 0: counts sum to 4, not to 3"),
        (ROW | {"counts": [[3, 0], []]}, COUNTS, "count 0 is not in 1..3"),
        (ROW | {"counts": [[2.0, 1.0], []]}, COUNTS, "counts holds something other than integers"),
        (ROW | {"counts": [[3], []]}, COUNTS, "position 0: 2 token_ids, but 1 counts"),
        (ROW | {"counts": [[2, 1]]}, COUNTS, "token_ids has 2 rows, counts has 1"),
        (ROW | {"counts": [2, 1]}, COUNTS, "counts is not a list of lists"),
        (ROW | {"input_ids": "text"}, COUNTS, "input_ids is no list of numbers"),
        (ROW | {"input_ids": [1, "2", 3]}, COUNTS, "input_ids is not a list of numbers|something other than numbers"),
        (ROW | {"input_ids": [1, 2]}, COUNTS, "2 tokens and 2 rows"),
        (ROW | {"input_ids": [[1], 2]}, COUNTS, "input_ids has lists beside numbers"),
        (ROW | {"input_ids": [[1], [2]]}, COUNTS, "input_ids is a list of lists, must be a list of numbers"),
        (LOG_ROW | {"logprobs": [[0.5, -2.0], [-0.1]]}, {}, "logprob 0.5 of id 5 cannot be; raw logits"),
        (LOG_ROW | {"logprobs": [[-0.1, -0.2], [-0.1]]}, {}, "sum to 1.724, more than 1"),
        (
            LOG_ROW | {"logprobs": [[float("nan"), -2.0], [-0.1]]},
            {},
            "position 0: logprob nan of id 5 cannot be; leave such entries out",
        ),
        (
            LOG_ROW | {"logprobs": [[-0.5, -np.inf], [-0.1]]},
            {},
            "position 0: logprob -inf of id 4 cannot be; leave such entries out",
        ),
        ({"input_ids": [1, 2]}, COUNTS, "lacks columns; needed are"),
        (ROW | {"logprobs": [[-1, -1], []]}, COUNTS, "both counts and logprobs; choose with --kind"),
        (ROW, {"vocab_size": 10}, "does not say how its records were made; give --rounds, --sampler"),
    ],
)
def test_bad_values_are_refused(tmp_path, row, settings, message):
    """A value that a cache could not trust is refused with row and position, and nothing is made."""
    settings = settings or {"vocab_size": 10, "sampler": "topk"}
    with pytest.raises((skl.CorruptError, ValueError), match=message):
        run(jsonl(tmp_path / "f.jsonl", row), tmp_path / "cache", **settings)
    assert not (tmp_path / "cache").exists()


def test_nan_in_arrays_is_refused(tmp_path):
    """NaN and infinity are refused where a file can hold them."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for value, shown in ((np.nan, "nan"), (-np.inf, "-inf")):
        row = LOG_ROW | {"logprobs": [[-0.5, value], [-0.1]]}
        pq.write_table(pa.Table.from_pylist([LOG_ROW, row]), tmp_path / "f.parquet")
        with pytest.raises(skl.CorruptError, match=f"row 1: position 0: logprob {shown}"):
            run(tmp_path / "f.parquet", tmp_path / "cache", vocab_size=10, sampler="topk")
    row = LOG_ROW | {"logprobs": [[-0.5, None], [-0.1]]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "f.parquet")
    with pytest.raises(skl.CorruptError, match="row 0: logprobs has empty cells"):
        run(tmp_path / "f.parquet", tmp_path / "cache", vocab_size=10, sampler="topk")


def test_a_log_prob_that_stands_for_nothing_is_no_record(tmp_path):
    """-9999.0, which some servers write for probability 0, is absent from the cache, as if it were left out."""
    for name, ids, values in (("left-out", [5], [-0.5]), ("there", [5, 6], [-0.5, -9999.0])):
        row = LOG_ROW | {"token_ids": [ids, [1]], "logprobs": [values, [-0.1]]}
        run(jsonl(tmp_path / f"{name}.jsonl", row), tmp_path / name, vocab_size=10, sampler="topk")
    assert skl.open(tmp_path / "left-out")[0].targets == skl.open(tmp_path / "there")[0].targets


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["rubbish", "empty", "truncated"])
def test_damaged_files_are_refused(tmp_path, name, damage):
    """Rubbish, nothing and half a file end in one typed error that names the file."""
    run(write_cache(tmp_path / "cache"), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    data = {"rubbish": b"\x93rubbish" * 100, "empty": b"", "truncated": whole[: len(whole) * 2 // 3]}[damage]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(skl.CorruptError, match=name):
        run(tmp_path / name, tmp_path / "back")


def test_npz_never_unpickles(tmp_path):
    """An npz of pickled objects is refused."""
    np.savez(tmp_path / "f.npz", input_ids=np.array([[1], [1, 2]], object), token_ids=[1], counts=[1])
    with pytest.raises(skl.CorruptError, match=r"f.npz"):
        run(tmp_path / "f.npz", tmp_path / "cache", **COUNTS)


def test_note_must_fit(tmp_path):
    """Flags and content that contradict a file's note are refused."""
    run(write_cache(tmp_path / "cache"), tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="says vocab_size 60, --vocab-size says 61"):
        run(tmp_path / "c.jsonl", tmp_path / "back", vocab_size=61)
    lines = (tmp_path / "c.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "c.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(skl.CorruptError, match="its note tells of 5 sequences, it holds 4"):
        run(tmp_path / "c.jsonl", tmp_path / "back")
    (tmp_path / "c.jsonl.sklformat.json").write_text("[]")
    with pytest.raises(skl.CorruptError, match="note: not a JSON object"):
        run(tmp_path / "c.jsonl", tmp_path / "back")


def test_destination_in_use_is_not_called_a_leftover(tmp_path):
    """While another process writes there, the answer is to wait, never to remove what it writes."""
    cache = write_cache(tmp_path / "cache")
    with locked_directory(tmp_path / "captured"):
        (tmp_path / "captured/shard-00000.skl.partial").touch()
        with pytest.raises(skl.InUseError, match="another process is writing here"):
            run(cache, tmp_path / "captured")
    (tmp_path / "written").mkdir()
    header = skl.Header(vocab_size=9, seq_len=2, kind="counts", rounds=3)
    with skl.ShardWriter(tmp_path / "written/a.skl", header=header):
        with pytest.raises(skl.InUseError, match="another process is writing here"):
            run(cache, tmp_path / "written")
        assert ["a.skl.partial"] == [path.name for path in (tmp_path / "written").iterdir()]
    with pytest.raises(FileExistsError, match=r"exists already \(shard-00000\.skl\.partial is there\)"):
        run(cache, tmp_path / "captured")


def test_existing_destination_is_kept(tmp_path):
    """Nothing that exists is written over."""
    cache = write_cache(tmp_path / "cache")
    before = contents(cache)
    for name in ("file.jsonl", "directory/file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for destination in (tmp_path / "file.jsonl", tmp_path / "directory", cache):
        with pytest.raises(FileExistsError, match="exists already"):
            run(cache, destination)
    assert before == contents(cache)
    assert "mine" == (tmp_path / "file.jsonl").read_text()
    with pytest.raises(ValueError, match=r"directory of shards; give it a name without .skl"):
        run(cache, tmp_path / "one.skl")
    with pytest.raises(ValueError, match="give --to"):
        run(cache, tmp_path / "one.csv")


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_stopped_conversion_goes_on(tmp_path, stop):
    """A conversion that was stopped anywhere goes on and ends with the bytes of an undisturbed one."""
    cache = write_cache(tmp_path / "cache")
    run(cache, tmp_path / "c.jsonl")
    config = ConvertConfig(source=tmp_path / "c.jsonl", destination=tmp_path / "back")

    def interrupt(doing, done, total):
        if doing == "convert" and done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(config, interrupt)
    with pytest.raises(skl.SettingsError, match="begun by a conversion with another source or other settings"):
        convert(dataclasses.replace(config, profile="R32"))
    seen = []
    convert(config, lambda doing, done, total: seen.append(done) if doing == "convert" else None)
    assert stop + 1 == seen[0]
    assert contents(cache) == contents(tmp_path / "back")


def test_a_killed_conversion_is_no_smaller_cache(tmp_path):
    """Killed before any write, sync or rename, also between two shards, it left no cache that a reader would take."""
    source = write(tmp_path / "a", 2, per_shard=1)
    for call in itertools.count(1):
        config = ConvertConfig(source=source, destination=tmp_path / str(call))
        killed = run_until_call(call, lambda config=config: convert(config))
        if (config.destination / "manifest.json").exists():
            assert 2 == len(skl.open(config.destination))
        elif config.destination.exists():
            with pytest.raises(skl.MissingShardError):
                skl.open(config.destination)
        if not killed:
            break
    assert call > 15
    assert contents(source) == contents(config.destination)


def test_stopped_export_leaves_nothing(tmp_path):
    """A file appears whole or not at all."""
    cache = write_cache(tmp_path / "cache")

    def interrupt(doing, done, total):
        raise KeyboardInterrupt

    for name in FILES:
        with pytest.raises(KeyboardInterrupt):
            convert(ConvertConfig(source=cache, destination=tmp_path / name), interrupt)
    assert ["cache"] == [path.name for path in tmp_path.iterdir()]


def test_parquet_row_groups(tmp_path, monkeypatch):
    """A long cache goes out in several row groups and comes back whole."""
    pq = pytest.importorskip("pyarrow.parquet")
    from sklformat.interop.tables import parquet

    monkeypatch.setattr(parquet, "_GROUP_RECORDS", 100)
    cache = write_cache(tmp_path / "cache", sequences=40, per_shard=16)
    run(cache, tmp_path / "c.parquet")
    assert 10 < pq.ParquetFile(tmp_path / "c.parquet").num_row_groups <= 40
    assert skl.open(cache).fingerprint == run(tmp_path / "c.parquet", tmp_path / "back").fingerprint


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    """The missing extra is named, and no half file stays."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "sklformat.files.arrow", raising=False)
    monkeypatch.delattr("sklformat.files.arrow", raising=False)
    monkeypatch.delitem(sys.modules, "sklformat.interop.tables.parquet", raising=False)
    cache = write_cache(tmp_path / "cache")
    with pytest.raises(ModuleNotFoundError) as error:
        run(cache, tmp_path / "c.parquet")
    assert "pyarrow" in error.value.name
    assert ["cache"] == [path.name for path in Path(tmp_path).iterdir()]
