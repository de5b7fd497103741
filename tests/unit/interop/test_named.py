"""Plain columns under other names: what --columns, --values, --convention, --tokens and --on-bad-row make of them."""

import json

import numpy as np
import pytest

import sklformat as skl
from sklformat.interop import convert
from sklformat.settings.convert import ConvertConfig

V = 50
TOPK = {"vocab_size": V, "sampler": "topk"}


def run(source, destination, **settings):
    return convert(ConvertConfig(source=source, destination=destination, **{**TOPK, **settings}))


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, *rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)
    return path


def arrow(path, *rows):
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return path


def npz(path, *rows):
    np.savez(path, **{name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]})
    return path


FILES = {"jsonl": jsonl, "parquet": parquet, "arrow": arrow, "npz": npz}


def logits_of(seed, length=6, k=3):
    """Tokens [L], ids [L, k], logits [L, k], and the log of the sum of exp over all of V at each position [L]."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(length, V))
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    lse = np.log(np.exp(logits).sum(1))
    return rng.integers(0, V, length), ids, np.take_along_axis(logits, ids, 1), lse


def records(cache, i=0):
    """Ids and weights of each position, in order of ids."""
    targets = skl.open(cache)[i].targets
    pairs = []
    for begin, end in zip(targets.offsets[:-1], targets.offsets[1:], strict=True):
        order = np.argsort(targets.token_ids[begin:end])
        pairs.append((targets.token_ids[begin:end][order].tolist(), targets.weights[begin:end][order]))
    return pairs


def assert_records(cache, ids, probs, i=0):
    """The cache holds these top-k records; the ratio code keeps a weight within 5 %."""
    found = records(cache, i)
    assert len(found) == len(ids)
    for (got_ids, got), want_ids, want in zip(found, ids, probs, strict=True):
        order = np.argsort(want_ids)
        assert got_ids == np.asarray(want_ids)[order].tolist()
        np.testing.assert_allclose(got, np.asarray(want)[order], rtol=0.05)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("values", ["logprobs", "probs", "logits"])
def test_names_and_values(tmp_path, kind, values):
    """Columns under the names of a public set, whatever the file, become the probabilities that they say."""
    sequences = [logits_of(seed) for seed in range(5)]
    rows = []
    for tokens, ids, logits, lse in sequences:
        logs = logits - lse[:, None]
        shown = {"logprobs": logs, "probs": np.exp(logs), "logits": logits}[values]
        rows.append({"text_ids": tokens.tolist(), "index": ids[:-1].tolist(), "exp": shown[:-1].tolist()})
    source = FILES[kind](tmp_path / f"a.{kind}", *rows)
    made = run(
        source,
        tmp_path / "cache",
        columns=("input_ids=text_ids", "token_ids=index", "logprobs=exp"),
        values=values,
    )
    for i, (tokens, ids, logits, lse) in enumerate(sequences):
        probs = np.exp(logits - lse[:, None])
        if values == "logits":
            probs /= probs.sum(1, keepdims=True)
        assert (skl.open(tmp_path / "cache")[i].tokens == tokens).all()
        assert_records(tmp_path / "cache", ids[:-1], probs[:-1], i)
    header = skl.open(tmp_path / "cache").header
    assert header.biased
    assert header.capture["converted"]["from"] == kind
    assert header.capture["converted"]["values"] == ("renormalised" if values == "logits" else "log-probabilities")
    assert header.capture["converted"]["most_records"] == 3
    assert any("biased" in sentence for sentence in made.says)


def test_ids_and_values_in_one_column(tmp_path):
    """Positions [2, K] of one column, values first and ids as floats, as the largest public set has them."""
    tokens, ids, logits, lse = logits_of(0)
    logs = logits - lse[:, None]
    targets = np.stack([logs, ids.astype(float)], axis=1)
    source = parquet(tmp_path / "a.parquet", {"inputs": tokens.tolist(), "targets": targets.tolist()})
    names = ("input_ids=inputs", "logprobs=targets[0]", "token_ids=targets[1]")
    run(source, tmp_path / "cache", columns=names, drop_last_row=True)
    assert_records(tmp_path / "cache", ids[:-1], np.exp(logs[:-1]))


def test_logits_with_their_normaliser(tmp_path):
    """A column lse turns logits into probabilities over the whole vocabulary, so that the rest's mass stays known."""
    tokens, ids, logits, lse = logits_of(1)
    row = {"input_ids": tokens, "token_ids": ids[:-1], "logprobs": logits[:-1], "z": lse[:-1]}
    source = jsonl(tmp_path / "a.jsonl", {name: value.tolist() for name, value in row.items()})
    run(source, tmp_path / "cache", values="logits", columns=("lse=z",))
    probs = np.exp(logits - lse[:, None])
    assert_records(tmp_path / "cache", ids[:-1], probs[:-1])
    mass = skl.open(tmp_path / "cache").header.capture["converted"]["mass"]
    assert mass == pytest.approx(probs[:-1].sum(1).mean(), abs=1e-4)


def test_rows_about_their_own_token(tmp_path):
    """Where row t is about token t, the first row, often null, is left out and the others are about the next token."""
    tokens, ids, logits, lse = logits_of(2)
    logs = logits - lse[:, None]
    row = {"input_ids": tokens.tolist(), "token_ids": [None, *ids[1:].tolist()], "logprobs": [None, *logs[1:].tolist()]}
    for name, write in (("a.jsonl", jsonl), ("a.parquet", parquet)):
        run(write(tmp_path / name, row), tmp_path / f"cache-{name[2:]}", convention="own")
        assert_records(tmp_path / f"cache-{name[2:]}", ids[1:], np.exp(logs[1:]))
    short = row | {"token_ids": ids[1:].tolist(), "logprobs": logs[1:].tolist()}
    with pytest.raises(skl.CorruptError, match="6 tokens and 5 rows: where row t describes token t there is one row"):
        run(jsonl(tmp_path / "b.jsonl", short), tmp_path / "other", convention="own")


@pytest.mark.parametrize("per", ["token", "position"])
def test_masks_and_documents(tmp_path, per):
    """What a mask leaves out has no records; where the document's number changes a document begins."""
    tokens, ids, logits, lse = logits_of(3)
    logs = logits - lse[:, None]
    mask = [1, 0, 1, 1, 0, 1]
    row = {
        "input_ids": tokens.tolist(),
        "token_ids": ids[:-1].tolist(),
        "logprobs": logs[:-1].tolist(),
        "loss_mask": mask if per == "token" else mask[1:],
        "segment": [4, 4, 4, 9, 9, 9],
    }
    names = ("mask=loss_mask", "document=segment")
    run(jsonl(tmp_path / "a.jsonl", row), tmp_path / "cache", columns=names)
    sequence = skl.open(tmp_path / "cache")[0]
    assert np.diff(sequence.targets.offsets).tolist() == [0, 3, 3, 0, 3]
    assert sequence.columns["document_start"].tolist() == [True, False, False, True, False, False]


@pytest.mark.parametrize("kind", ["npy", "npz", "jsonl", "parquet"])
def test_tokens_from_another_file(tmp_path, kind):
    """Ids that the source has not come from a file of any kind, one row per sequence, no more and no fewer."""
    sequences = [logits_of(seed) for seed in range(3)]
    rows = [
        {"token_ids": ids[:-1].tolist(), "logprobs": (logits - lse[:, None])[:-1].tolist()}
        for _, ids, logits, lse in sequences
    ]
    source = jsonl(tmp_path / "a.jsonl", *rows)

    def given(number):
        tokens = [{"input_ids": sequences[i % 3][0].tolist()} for i in range(number)]
        path = tmp_path / f"tokens-{number}.{kind}"
        if kind == "npy":
            np.save(path, np.array([row["input_ids"] for row in tokens]))
            return path
        return FILES[kind](path, *tokens)

    run(source, tmp_path / "cache", tokens=given(3))
    for i, (tokens, *_) in enumerate(sequences):
        assert (skl.open(tmp_path / "cache")[i].tokens == tokens).all()
    with pytest.raises(ValueError, match="--tokens ends before its sequence 2; give the tokens of all sequences"):
        run(source, tmp_path / "short", tokens=given(2))
    with pytest.raises(ValueError, match="--tokens holds more sequences; give the tokens of this source"):
        run(source, tmp_path / "long", tokens=given(4))


def test_several_files_in_the_order_of_their_numbers(tmp_path):
    """A directory of parts is one table, data_2 before data_10, also where a stopped conversion is resumed."""
    parts = tmp_path / "parts"
    parts.mkdir()
    order = (0, 1, 2, 10)
    for number in order:
        rows = []
        for i in range(3):
            _, ids, logits, lse = logits_of(number * 3 + i)
            logs = (logits - lse[:, None])[:-1]
            rows.append(
                {"input_ids": [number, i, 1, 2, 3, 4], "token_ids": ids[:-1].tolist(), "logprobs": logs.tolist()}
            )
        parquet(parts / f"data_{number}.parquet", *rows)
    run(parts, tmp_path / "cache", sequences_per_shard=5)
    cache = skl.open(tmp_path / "cache")
    found = [tuple(cache[i].tokens[:2].tolist()) for i in range(len(cache))]
    assert found == [(number, i) for number in order for i in range(3)]
    from sklformat.interop.tables.files import open_table

    table = open_table(parts, "parquet")
    for start in range(13):
        rest = [tuple(row["input_ids"].values[:2].tolist()) for row in table.rows(["input_ids"], start)]
        assert rest == found[start:]


def test_rows_that_cannot_be_are_dropped_when_told(tmp_path):
    """Positions with NaN or strange ids lose their records, sequences of wrong lengths go, and both are counted."""
    sequences = [logits_of(seed) for seed in range(4)]
    rows = [
        {"input_ids": t.tolist(), "token_ids": ids[:-1].tolist(), "logprobs": (x - z[:, None])[:-1].tolist()}
        for t, ids, x, z in sequences
    ]
    rows[0]["logprobs"][1][2] = float("nan")
    rows[1]["token_ids"][0][1] = V
    rows[1]["token_ids"][3][0] = rows[1]["token_ids"][3][1]
    rows[2]["token_ids"].pop()
    source = jsonl(tmp_path / "a.jsonl", *rows)
    with pytest.raises(skl.CorruptError, match="row 0: position 1: logprob nan"):
        run(source, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    made = run(source, tmp_path / "cache", on_bad_row="drop")
    cache = skl.open(tmp_path / "cache")
    assert [cache[i].tokens.tolist() for i in range(len(cache))] == [sequences[i][0].tolist() for i in (0, 1, 3)]
    assert np.diff(cache[0].targets.offsets).tolist() == [3, 0, 3, 3, 3]
    assert np.diff(cache[1].targets.offsets).tolist() == [0, 3, 3, 0, 3]
    assert cache.header.capture["converted"]["dropped"] == {"positions": 3, "sequences": 1}
    (said,) = [sentence for sentence in made.says if sentence.startswith("dropped: ")]
    assert "the records of 1 positions with an id outside the vocabulary" in said
    assert "1 sequences, the first: " in said
    assert "row 2: token_ids has 4 rows, logprobs has 5" in said
    rows[:] = [rows[2]]
    with pytest.raises(skl.CorruptError, match="no sequence is left; dropped: 1 sequences"):
        run(jsonl(tmp_path / "b.jsonl", *rows), tmp_path / "none", on_bad_row="drop")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"columns": ("logprobs=nothing",)},
            "it has no 'nothing' among its columns deep, input_ids, logprobs, token_ids",
        ),
        ({"columns": ("lse=logprobs",)}, "lse turns logits into log-probs; give --values logits, or leave it out"),
        (
            {"columns": ("token_ids=token_ids[0]",)},
            r"token_ids\[0\] needs lists of lists of lists, token_ids is not so",
        ),
        ({"columns": ("token_ids=deep[1]",)}, r"deep\[1\]: position 1 has no such list"),
        ({"tokens": "a.txt", "columns": ("input_ids=x",)}, "--columns input_ids=x: it has no 'x' among"),
        ({"codec": "c.yaml", "k": 3, "seed": 0}, r"a\.jsonl: --k, --seed, --codec: of no use for jsonl; leave it out"),
        ({"sampler": None}, "does not say how its records were made; give --sampler"),
    ],
)
def test_what_columns_cannot_be(tmp_path, settings, message):
    """What the flags say must fit the file."""
    row = {
        "input_ids": [1, 2, 3],
        "token_ids": [[1], [2]],
        "logprobs": [[-1.0], [-1.0]],
        "deep": [[[1], [2]], [[3]]],
    }
    with pytest.raises((ValueError, skl.CorruptError), match=message):
        run(jsonl(tmp_path / "a.jsonl", row), tmp_path / "out", **settings)


def test_flags_that_say_nothing():
    """A pair that is none, or names a column that we do not know, is refused before anything is read."""
    for pair in ("input_ids", "tokens=input_ids", "lse="):
        with pytest.raises(ValueError, match="--columns takes NAME=NAME with the first of input_ids, token_ids"):
            ConvertConfig(source="a", destination="b", columns=(pair,))


def test_files_that_are_no_tokens(tmp_path):
    """--tokens takes files that hold ids."""
    source = jsonl(tmp_path / "a.jsonl", {"token_ids": [[1], [2]], "logprobs": [[-1.0], [-1.0]]})
    (tmp_path / "a.txt").write_text("1 2 3")
    with pytest.raises(ValueError, match=r"a\.txt: --tokens takes \.npy, \.npz, \.jsonl, \.parquet, \.arrow or"):
        run(source, tmp_path / "out", tokens=tmp_path / "a.txt")
    words = jsonl(tmp_path / "words.jsonl", {"input_ids": "1 2 3"})
    with pytest.raises(skl.CorruptError, match="row 0: input_ids is text or an object, must be a list of ids"):
        run(source, tmp_path / "out", tokens=words)


def test_a_directory_without_the_files(tmp_path):
    """A directory that --from calls Parquet, and that holds none."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: holds no file that ends in \.parquet"):
        run(tmp_path / "empty", tmp_path / "out", from_="parquet")


def test_what_was_written_from_a_cache_says_itself(tmp_path):
    """Flags that would read our own file in another way are refused."""
    row = {"input_ids": [1, 2, 3], "token_ids": [[5, 4], [7]], "logprobs": [[-0.5, -2.0], [-0.1]]}
    run(jsonl(tmp_path / "a.jsonl", row), tmp_path / "cache")
    convert(ConvertConfig(source=tmp_path / "cache", destination=tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match="was written from a cache and says itself what it holds; leave out --values"):
        run(tmp_path / "b.jsonl", tmp_path / "out", values="logits")
    with pytest.raises(ValueError, match="whose last row is a real one; leave out --drop-last-row"):
        run(tmp_path / "b.jsonl", tmp_path / "out", drop_last_row=True)


def test_content_that_several_kinds_claim(tmp_path, monkeypatch):
    """Where the content does not decide, the user must."""
    from sklformat.interop import kinds

    class Claims:
        def __init__(self, kind):
            self.kind = kind

        def recognise(self, path):
            return self.kind

    monkeypatch.setattr(kinds, "NEIGHBOURS", {"one": "one", "other": "other"})
    monkeypatch.setattr(kinds, "_neighbour", Claims)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="a: may be one or other; say which with --from"):
        run(tmp_path / "a", tmp_path / "out")
