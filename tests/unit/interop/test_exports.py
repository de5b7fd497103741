"""What other systems are given: read back by their own means, value for value, and what it says was lost."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import make_listed_cache

import sklformat as skl
from sklformat.format.records import SparseTargets
from sklformat.interop import convert
from sklformat.interop.columns import Row
from sklformat.interop.tables.exports import Evener, Export
from sklformat.settings.convert import ConvertConfig

V = 40
FILLER = -1e4
SEQUENCES = [
    ([3, 1, 4, 1], [{7: 0.5, 2: 0.25}, {}, {0: 0.125}]),
    ([9, 2, 6], [{5: 0.0625, 1: 0.5, 39: 0.25}, {0: 1.0}]),
]


@pytest.fixture
def cache(tmp_path):
    """Two sequences with 0 to 3 records at a position, of which the ratio code keeps a weight within 5 %."""
    header = skl.Header(vocab_size=V, seq_len=0, kind="ratios", rounds=0, sampler="topk")
    with skl.CacheWriter(tmp_path / "cache", header=header, sequences_per_shard=2) as writer:
        for tokens, rows in SEQUENCES:
            offsets = np.cumsum([0, *(len(row) for row in rows)])
            ids = np.array([i for row in rows for i in row], np.uint32)
            weights = np.array([w for row in rows for w in row.values()], np.float32)
            writer.append(np.array(tokens), SparseTargets(token_ids=ids, weights=weights, offsets=offsets))
    return tmp_path / "cache"


def export(cache, path, to, **settings):
    return convert(ConvertConfig(source=cache, destination=path, to=to, **settings))


def rows_of(path):
    """The rows of a file, by pyarrow or json alone."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()


def assert_even(ids, values, rows, k):
    """L rows of k entries: the records of each position, the most probable first, then fillers; the last has none."""
    assert len(ids) == len(values) == len(rows) + 1
    for got_ids, got, row in zip(ids, values, [*rows, {}], strict=True):
        best = sorted(row, key=lambda i: -row[i])[:k]
        assert len(got) == k == len(set(got_ids))
        assert all(0 <= i < V for i in got_ids)
        assert got_ids[: len(best)] == best
        np.testing.assert_allclose(np.exp(got), [row[i] for i in best] + [0.0] * (k - len(best)), rtol=0.05)
        assert got[len(best) :] == [FILLER] * (k - len(best))


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
@pytest.mark.parametrize("k", [None, 2, 1])
def test_distillkit_raw(tmp_path, cache, name, k):
    """Equal k, a row for each token, and a label of -100 where DistillKit is to leave row t out."""
    made = export(cache, tmp_path / name, "distillkit-raw", k=k)
    rows = rows_of(tmp_path / name)
    assert len(rows) == 2
    for row, (tokens, records) in zip(rows, SEQUENCES, strict=True):
        assert set(row) == {"input_ids", "labels", "token_ids", "top_values"}
        assert row["input_ids"] == tokens
        assert_even(row["token_ids"], row["top_values"], records, k or 3)
        assert row["labels"] == [t if r else -100 for t, r in zip(tokens, [*records, {}], strict=True)]
    lost = {None: 0, 2: 1, 1: 3}[k]
    assert any(f"lost: {lost} records" in sentence for sentence in made.says) == bool(lost)
    fillers = 8 if k is None else sum(max(k - len(r), 0) for _, records in SEQUENCES for r in records)
    assert any(f": {fillers} were put in" in sentence and "1 positions" in sentence for sentence in made.says)
    assert (made.sequences, made.positions, made.records, made.fingerprint) == (2, 5, 7, None)


def test_counts_become_log_probs(tmp_path):
    """Counts are written as log(count / rounds), which is said."""
    source = make_listed_cache(tmp_path / "cache")
    made = export(source, tmp_path / "out.jsonl", "distillkit-raw")
    rounds = skl.open(source).header.rounds
    for row, sequence in zip(rows_of(tmp_path / "out.jsonl"), skl.open(source), strict=True):
        counts = [np.rint(np.exp(values) * rounds).astype(int) for values in row["top_values"]]
        assert [sum(c) for c in counts[:-1]] == [rounds if n else 0 for n in np.diff(sequence.targets.offsets)]
    assert any(f"log(count / {rounds})" in sentence for sentence in made.says)


def test_floats_do_not_pass_the_ratio_code(tmp_path):
    """From one system to another the values are not rounded to 7 bits."""
    row = {"input_ids": [1, 2], "token_ids": [[3, 4]], "logprobs": [[-0.123456, -3.21987]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    export(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "distillkit-raw", vocab_size=V, sampler="topk")
    np.testing.assert_allclose(rows_of(tmp_path / "b.jsonl")[0]["top_values"][0], row["logprobs"][0], rtol=1e-6)


def test_small_vocabulary(tmp_path):
    """Where k is the whole vocabulary, fillers still repeat no id."""
    row = {"input_ids": [1, 2, 0], "token_ids": [[2, 0, 1], [1]], "logprobs": [[-1.0, -2.0, -3.0], [-0.5]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    export(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "distillkit-raw", vocab_size=3, sampler="topk")
    assert rows_of(tmp_path / "b.jsonl")[0]["token_ids"] == [[2, 0, 1], [1, 0, 2], [1, 0, 2]]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("out.npz", {"to": "distillkit-raw"}, "is to be Parquet or JSON lines; end its name in .parquet or .jsonl"),
        ("out.jsonl", {"to": "distillkit-raw", "kind": "counts"}, "--kind: distillkit-raw has log-probabilities"),
        ("out.jsonl", {"to": "jsonl", "k": 2}, "--k: "),
        ("out.jsonl", {"to": "distillkit-raw", "profile": "R32"}, "--profile: for a cache only"),
    ],
)
def test_refusals(tmp_path, cache, name, settings, message):
    """What an export can't be is refused before anything is written."""
    with pytest.raises(ValueError, match=message):
        export(cache, tmp_path / name, **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]


def test_a_failed_export_leaves_nothing(tmp_path, cache, monkeypatch):
    """An exception while rows are written leaves neither the file nor a part of it."""
    from sklformat.interop.tables import jsonl

    monkeypatch.setattr(jsonl.Sink, "finish", lambda self: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        export(cache, tmp_path / "out.jsonl", "distillkit-raw")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
@pytest.mark.parametrize("k", [None, 2])
def test_axolotl(tmp_path, cache, name, k):
    """A prepared data set: equal k, a row for each token, every filler and the last row masked, labels to match."""
    made = export(cache, tmp_path / name, "axolotl", k=k)
    for row, (tokens, records) in zip(rows_of(tmp_path / name), SEQUENCES, strict=True):
        assert row["input_ids"] == tokens
        assert row["attention_mask"] == [1] * len(tokens)
        assert_even(row["target_token_ids"], row["target_logprobs"], records, k or 3)
        assert [sum(mask) for mask in row["target_mask"]] == [min(len(r), k or 3) for r in [*records, {}]]
        assert all(mask == sorted(mask, reverse=True) for mask in row["target_mask"])
        assert row["labels"] == [tokens[0]] + [t if r else -100 for t, r in zip(tokens[1:], records, strict=True)]
    assert any("the last row is masked" in sentence for sentence in made.says)
    assert any("kd_normalize_topk: false" in sentence for sentence in made.says)


def test_columns_that_are_lost_are_said(tmp_path):
    """Columns of the cache for which another system has no place."""
    row = {"input_ids": [1, 2], "token_ids": [[3]], "logprobs": [[-1.0]], "entropy": [1.5]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    made = export(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "axolotl", vocab_size=V, sampler="topk")
    assert "lost: entropy, for which axolotl has no place" in made.says


@given(
    rows=st.lists(st.dictionaries(st.integers(0, 11), st.floats(-9, 0), max_size=12), min_size=1, max_size=6),
    k=st.integers(1, 12),
)
def test_any_rows_become_even(rows, k):
    """Whatever the records and k: the most likely stay, no id comes twice, the rest is 0, and all is counted."""
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    ids = np.array([i for row in rows for i in row], np.uint32)
    logs = np.array([log for row in rows for log in row.values()], np.float64)
    header = skl.Header(vocab_size=12, seq_len=0, kind="ratios", rounds=0, sampler="topk")
    evener = Evener(Export(header=header, count=1, k=k))
    evened = evener.even(Row(np.zeros(len(rows) + 1, np.uint32), ids, logs, offsets)).with_last()
    for got_ids, got, real, row in zip(*evened, [*rows, {}], strict=True):
        kept = min(len(row), k)
        assert len(set(got_ids.tolist())) == k
        assert real.tolist() == [True] * kept + [False] * (k - kept)
        assert got[:kept].tolist() == sorted(row.values(), reverse=True)[:kept]
        assert all(row[i] == log for i, log in zip(got_ids[:kept].tolist(), got[:kept].tolist(), strict=True))
        assert got[kept:].tolist() == [FILLER] * (k - kept)
    assert evener.cut == sum(max(len(row) - k, 0) for row in rows)
    assert evener.fillers == sum(max(k - len(row), 0) for row in rows)
    assert evener.empty == rows.count({})
