"""What converting refuses, each refusal once by its own words; test_conversion.py says when."""

import json

import numpy as np
import pytest
import reference
from strategies import make_listed_cache, small_sequence, small_settings, small_shard

import sklformat as skl
from sklformat.interop import convert
from sklformat.settings.convert import ConvertConfig

ROW = {"input_ids": [1, 2, 3], "token_ids": [[5, 4], []], "counts": [[2, 1], []]}
LOG_ROW = {"input_ids": [1, 2, 3], "token_ids": [[5, 4], [7]], "logprobs": [[-0.5, -2.0], [-0.1]]}
COUNTS = {"vocab_size": 10, "rounds": 3, "sampler": "multinomial"}
TOPK = {"vocab_size": 10, "sampler": "topk"}
EMPTY = dict(ROW)
ARRAYS = {
    "input_ids": [1, 2, 3],
    "sequence_offsets": [0, 3],
    "token_ids": [5, 4],
    "counts": [2, 1],
    "position_offsets": [0, 2, 2],
}


def run(source, destination, **settings):
    return convert(ConvertConfig(source=source, destination=destination, **settings))


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, row):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([row]).slice(0, row is not EMPTY), path)
    return path


@pytest.fixture
def cache(tmp_path):
    return make_listed_cache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("source", "destination", "settings", "error", "message"),
    [
        ("none.npz", "out", {}, FileNotFoundError, r"none\.npz: no such file or directory$"),
        (
            "cache",
            "out.jsonl",
            {"from_": "npz"},
            IsADirectoryError,
            "cache: is a directory, npz is a file; give the file, or --from skl",
        ),
        (
            "a.txt",
            "out",
            {},
            ValueError,
            r"a\.txt: the name does not say what it is; give --from skl, npz, parquet, jsonl or another kind",
        ),
        (
            "cache",
            "out.txt",
            {},
            ValueError,
            r"out\.txt: the name does not say what to make; give --to skl, npz, parquet or jsonl",
        ),
        (
            "cache",
            "out.skl",
            {},
            ValueError,
            "a conversion makes a directory of shards; give it a name without .skl",
        ),
        (
            "cache",
            "out.npz",
            {"profile": "R32", "drop_tokens": True},
            ValueError,
            r"--profile, --drop-tokens: for a cache only, .*out\.npz is to be npz",
        ),
        (
            "cache",
            "out",
            {"drop_last_row": True},
            ValueError,
            "--drop-last-row: for files of other systems; a cache says itself what it holds",
        ),
        (
            "a.jsonl",
            "out",
            {"tokens": "tokens.npy", **COUNTS},
            ValueError,
            "has tokens of its own, in the column input_ids; leave out --tokens",
        ),
        (
            "cache",
            "a.jsonl",
            {},
            FileExistsError,
            r"a\.jsonl: exists already; choose another destination, or remove it",
        ),
        ("cache", "file", {}, FileExistsError, "file: is a file; choose another destination, or remove it first"),
        ("a.jsonl", "out", TOPK, ValueError, "does not say how its records were made; give --rounds"),
    ],
)
def test_names_and_flags(tmp_path, cache, source, destination, settings, error, message):
    """What a conversion cannot tell from names and flags is asked for, before anything is written."""
    jsonl(tmp_path / "a.jsonl", ROW)
    for name in ("a.txt", "file"):
        (tmp_path / name).write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        run(tmp_path / source, tmp_path / destination, **settings)
    assert before == sorted(path for path in tmp_path.rglob("*") if path.name != ".lock")


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (ROW | {"counts": [[3, 0], []]}, COUNTS, r"position 0: count 0 is not in 1\.\.3, the rounds"),
        (ROW | {"counts": [[2, 2], []]}, COUNTS, "position 0: counts sum to 4, not to 3, the rounds"),
        (ROW | {"input_ids": [1, 2, 10]}, COUNTS, r"token number 2: id 10 is not in \[0, 10\), the vocab_size"),
        (
            LOG_ROW | {"logprobs": [[0.5, -2.0], [-0.1]]},
            TOPK,
            "position 0: logprob 0.5 of id 5 cannot be; raw logits are",
        ),
        (
            {"input_ids": [1]},
            COUNTS,
            "lacks columns; needed are input_ids, token_ids and either counts or logprobs, the",
        ),
    ],
)
def test_rows(tmp_path, row, settings, message):
    """A value that a cache could not trust is refused with its place."""
    with pytest.raises((skl.CorruptError, ValueError), match=message):
        run(jsonl(tmp_path / "a.jsonl", row), tmp_path / "out", **settings)


def test_lines_of_other_keys(tmp_path):
    """A line that lacks what the first line has is named by its row."""
    source = jsonl(tmp_path / "a.jsonl", ROW, {"input_ids": [1, 2, 3], "token_ids": [[1], []]})
    with pytest.raises(skl.CorruptError, match="row 1: no column 'counts', only input_ids, token_ids"):
        run(source, tmp_path / "out", **COUNTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": [2]}, "npz: counts has 1 values for 2 token_ids"),
        ({"sequence_offsets": [0.0, 3.0]}, "npz: sequence_offsets is not a list of integers"),
        ({"position_offsets": [0, 1, 1]}, "npz: position_offsets does not rise from 0 to 2"),
        ({"position_offsets": [0, 2]}, "npz: 1 positions do not fit 1 sequences of 3 tokens"),
        ({"document_start": [1, 0]}, "npz: document_start has 2 values for 3 tokens"),
        ({"position_offsets": None}, r"npz: arrays have 3 rows \(input_ids\), 2 rows \(token_ids\), 2 rows \(counts\)"),
        (
            {"input_ids": [], "sequence_offsets": [0], "token_ids": [], "counts": [], "position_offsets": [0]},
            "holds no se",
        ),
    ],
)
def test_arrays(tmp_path, changes, message):
    """Arrays that do not fit each other are named with their sizes."""
    arrays = {name: np.array(values) for name, values in (ARRAYS | changes).items() if values is not None}
    arrays["token_ids"], arrays["input_ids"] = arrays["token_ids"].astype(int), arrays["input_ids"].astype(int)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(skl.CorruptError, match=message):
        run(tmp_path / "a.npz", tmp_path / "out", **COUNTS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"token_ids": [1, 2]}, "row 0: token_ids is not a list of lists"),
        (ROW | {"token_ids": [None, []]}, "row 0: token_ids is no list of numbers"),
        (ROW | {"token_ids": None}, r"row 0: column token_ids has empty cells \(null\)"),
        (ROW | {"input_ids": [1, None, 3]}, r"row 0: input_ids has empty cells \(null\)"),
        (EMPTY, r"a\.parquet: holds no sequence"),
    ],
)
def test_cells(tmp_path, row, message):
    """Cells that hold something other than lists of numbers are named."""
    with pytest.raises(skl.CorruptError, match=message):
        run(parquet(tmp_path / "a.parquet", row), tmp_path / "out", **COUNTS)


def test_files_that_are_none(tmp_path):
    """A file that is no such file says what it should be, and in whose words it is not."""
    (tmp_path / "a.npz").write_bytes(b"rubbish")
    with pytest.raises(skl.CorruptError, match=r"a\.npz: not an npz file"):
        run(tmp_path / "a.npz", tmp_path / "out", **COUNTS)
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 rubbish PAR1")
    with pytest.raises(skl.CorruptError, match=r"a\.parquet: parquet: "):
        run(tmp_path / "a.parquet", tmp_path / "out", **COUNTS)
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises((skl.CorruptError, ValueError), match=r"a\.jsonl: holds no sequence$"):
        run(tmp_path / "a.jsonl", tmp_path / "out", **COUNTS)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda note: note.update(header={}), "note: not a note of sklformat: KeyError"),
        (lambda note: note.update(sequences_per_shard=0), "note: sequences_per_shard is not positive"),
        (
            lambda note: note["header"].update(kind="ratios", record_count_size=1),
            "tells of kind ratios, the file has counts",
        ),
    ],
)
def test_notes(tmp_path, cache, how, message):
    """A note that contradicts itself or its file is damage."""
    run(cache, tmp_path / "a.jsonl")
    path = tmp_path / "a.jsonl.sklformat.json"
    note = json.loads(path.read_text())
    how(note)
    path.write_text(json.dumps(note))
    with pytest.raises(skl.CorruptError, match=message):
        run(tmp_path / "a.jsonl", tmp_path / "out")


def test_a_flag_against_the_note(tmp_path, cache):
    """Both values, and what to leave out."""
    run(cache, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl: says vocab_size 20, --vocab-size says 21; leave --vocab-size out"):
        run(tmp_path / "a.jsonl", tmp_path / "out", vocab_size=21)


def test_caches_without(tmp_path):
    """A cache without sequences, or without tokens and none given, is not converted."""
    (tmp_path / "empty.skl").write_bytes(small_shard(0))
    with pytest.raises(ValueError, match=r"empty\.skl: holds no sequence; nothing to convert"):
        run(tmp_path / "empty.skl", tmp_path / "out.jsonl")
    (tmp_path / "bare.skl").write_bytes(small_shard(2, token_size=0))
    with pytest.raises(
        ValueError, match="stores no tokens, and records are of no use without them; give them with --tok"
    ):
        run(tmp_path / "bare.skl", tmp_path / "out.jsonl")
    (tmp_path / "tokens.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokens\.npy: not a \.npy array: "):
        run(tmp_path / "bare.skl", tmp_path / "out.jsonl", tokens=tmp_path / "tokens.npy")
    np.save(tmp_path / "tokens.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"tokens\.npy: must be an integer array of one row per sequence"):
        run(tmp_path / "bare.skl", tmp_path / "out.jsonl", tokens=tmp_path / "tokens.npy")


def test_a_conversion_that_cannot_be_resumed(tmp_path, cache):
    """A mark that is no JSON says to begin again."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".conversion.json").write_text("{")
    with pytest.raises(skl.CorruptError, match=r"not JSON: .*; remove the directory and convert again"):
        run(cache, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "positions", "message"),
    [
        (
            {"sampler": 3},
            [[(3, 5)]],
            "ratios cannot become counts: sampler topk drew nothing, so there are no counts; keep",
        ),
        ({"rounds": 200}, [[(3, 0)]], "drawn in 200; keep kind ratios"),
        ({"proposal_temperature": 0.5}, [[(3, 0)]], r"the draws came from p\*\*0\.5, so counts do not say the weights"),
        ({}, [[(3, 40)]], "position 0: weights times 5 rounds are nearest to counts that sum to"),
        (
            {},
            [[(3, 5)]],
            "position 0: the nearest counts of 5 rounds do not give back the stored ratios; ratios become",
        ),
    ],
)
def test_ratios_that_are_no_counts(tmp_path, changes, positions, message):
    """Ratios become counts only where nothing is lost."""
    given = {"kind": reference.RATIOS, "vocab_size": 20, "seq_len": 1, "rounds": 5, "token_size": 2, "sampler": 1}
    settings = reference.Settings(**given | changes)
    shard = reference.encode_shard(settings, [reference.Sequence([1, 2], positions)])
    (tmp_path / "a.skl").write_bytes(shard)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a.skl", tmp_path / "out", kind="counts")


def test_columns_that_a_note_tells_of(tmp_path):
    """A column that the note tells of and the file has not got is named."""
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    of = small_settings(columns=2)
    sequence = small_sequence(0)
    sequence.entropy = [1.0, 0.0, 2.0]
    (tmp_path / "a.skl").write_bytes(reference.encode_shard(of, [sequence]))
    run(tmp_path / "a.skl", tmp_path / "a.parquet")
    pq.write_table(pq.read_table(tmp_path / "a.parquet").drop_columns("entropy"), tmp_path / "a.parquet")
    with pytest.raises(skl.CorruptError, match="parquet table: no column 'entropy', only counts, input_ids, token_ids"):
        run(tmp_path / "a.parquet", tmp_path / "out")
