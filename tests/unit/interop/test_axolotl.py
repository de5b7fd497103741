"""Axolotl's data sets, each form value for value against what a teacher said; their alignment; what is refused."""

import itertools

import numpy as np
import pytest
from axolotl_data import prepared, v1, write_jsonl
from distillkit_data import V, teacher

import sklformat as skl
from sklformat.errors import CorruptError
from sklformat.interop import convert
from sklformat.interop.kinds import find_kind
from sklformat.settings.convert import ConvertConfig

LENGTHS = (6, 4, 7)
K = 4
V2 = {"logprobs": [[-1.0]], "target_token_ids": [[2]]}


def run(source, destination, **settings):
    return convert(ConvertConfig(source=source, destination=destination, **{"vocab_size": V, **settings}))


def sequences():
    return [teacher(seed, length, K) for seed, length in enumerate(LENGTHS)]


def tokens_file(tmp_path):
    return write_jsonl(tmp_path / "tokens.jsonl", [{"input_ids": tokens.tolist()} for tokens, _, _ in sequences()])


def shown(form, ids, logs):
    if form == "v1":
        return {"messages": [{"role": "user", "content": "x"}], "logprobs": v1(ids, logs)}
    return {"text": "x", "logprobs": logs.tolist(), "target_token_ids": ids.tolist()}


def parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def assert_records(cache, i, ids, logs, bare=()):
    """Row t of a sequence holds these records, and none at the positions that are bare."""
    targets = skl.open(cache)[i].targets
    assert targets.num_positions == len(ids)
    for t, (begin, end) in enumerate(itertools.pairwise(targets.offsets.tolist())):
        found = dict(zip(targets.token_ids[begin:end].tolist(), targets.weights[begin:end].tolist(), strict=True))
        wanted = {} if t in bare else dict(zip(ids[t].tolist(), np.exp(logs[t]).tolist(), strict=True))
        assert found == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("form", ["v1", "v2"])
@pytest.mark.parametrize("write", [write_jsonl, parquet])
@pytest.mark.parametrize(("convention", "begin", "bare"), [("next", 0, ()), ("own", 0, ()), ("own", 3, (0, 1))])
def test_texts(tmp_path, form, write, convention, begin, bare):
    """
    Rows belong to the last tokens: to all of them, or to those of an answer.

    The last is about the token after the sequence ("next"), or about the last token ("own").
    """
    rows = []
    for _, ids, logs in sequences():
        about_own = np.roll(np.arange(len(ids)), 1)  # what is said about token t stands at t - 1 of the teacher
        order = np.arange(len(ids)) if convention == "next" else about_own
        rows.append(shown(form, ids[order][begin:], logs[order][begin:]))
    source = write(tmp_path / f"a.{'jsonl' if write is write_jsonl else 'parquet'}", rows)
    assert find_kind(source) == "axolotl"
    made = run(source, tmp_path / "cache", convention=convention, tokens=tokens_file(tmp_path))
    for i, (tokens, ids, logs) in enumerate(sequences()):
        assert (skl.open(tmp_path / "cache")[i].tokens == tokens).all()
        assert_records(tmp_path / "cache", i, ids[:-1], logs[:-1], bare)
    header = skl.open(tmp_path / "cache").header
    assert header.biased
    assert header.capture["converted"]["source"] == {"system": "axolotl", "form": form}
    moved = "token t, and is moved to the one before" if convention == "own" else "token t + 1"
    assert f"row t describes {moved}; rows belong to the last tokens" in made.says
    assert any("their temperature is not in the files" in sentence for sentence in made.says)


def test_one_row_less_than_tokens(tmp_path):
    """L - 1 rows about tokens 1 to L - 1: Axolotl would put each a token too late, ``own`` puts them right."""
    rows = [shown("v2", ids[:-1], logs[:-1]) for _, ids, logs in sequences()]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    run(source, tmp_path / "cache", convention="own", tokens=tokens_file(tmp_path))
    for i, (_, ids, logs) in enumerate(sequences()):
        assert_records(tmp_path / "cache", i, ids[:-1], logs[:-1])


def test_prepared(tmp_path):
    """What Axolotl's trainer takes: entries of mask 0 are none, whatever stands there."""
    rows = [prepared(tokens, ids, logs, masked=(1,)) for tokens, ids, logs in sequences()]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    assert find_kind(source) == "axolotl"
    run(source, tmp_path / "cache")
    for i, (tokens, ids, logs) in enumerate(sequences()):
        assert (skl.open(tmp_path / "cache")[i].tokens == tokens).all()
        assert_records(tmp_path / "cache", i, ids[:-1], logs[:-1], bare=(1,))


def test_other_names_and_fillers(tmp_path):
    """Columns under the names of a public set; positions of null, entries of -Infinity, and lists of other lengths."""
    _, ids, logs = teacher(0, 6, K)
    about = v1(ids[:-1], logs[:-1])
    about[1] = about[1][:2]
    about[2][3]["logprob"] = float("-inf")
    row = {"conversation": "x", "llm_logprobs": [None, *about]}
    source = write_jsonl(tmp_path / "a.jsonl", [row])
    tokens = write_jsonl(tmp_path / "tokens.jsonl", [{"input_ids": [1, 2, 3, 4, 5, 6]}])
    settings = {"columns": ("logprobs=llm_logprobs",), "tokens": tokens, "convention": "own", "from_": "axolotl"}
    run(source, tmp_path / "cache", **settings)
    assert np.diff(skl.open(tmp_path / "cache")[0].targets.offsets).tolist() == [4, 2, 3, 4, 4]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_there_and_back(tmp_path, suffix):
    """An export is read back as the same records; its own columns say what Axolotl is to leave out."""
    source = write_jsonl(tmp_path / "a.jsonl", [prepared(*one, masked=(0,)) for one in sequences()])
    run(source, tmp_path / "cache")
    made = convert(ConvertConfig(source=tmp_path / "cache", destination=tmp_path / f"b{suffix}", to="axolotl"))
    run(tmp_path / f"b{suffix}", tmp_path / "again")
    for one, two in zip(skl.open(tmp_path / "cache"), skl.open(tmp_path / "again"), strict=True):
        assert (one.tokens == two.tokens).all()
        assert one.targets == two.targets
    assert any("kd_normalize_topk: false" in sentence for sentence in made.says)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (V2, {}, "give --convention own or next"),
        (V2, {"convention": "own", "tokens": None}, "holds no token ids; give them with --tokens FILE"),
        (V2 | {"input_ids": [1, 2]}, {"convention": "own"}, "its tokens are in the column input_ids"),
        (V2, {"columns": ("token_ids=ids",)}, "there is no column 'ids', only logprobs, target_token_ids; say with"),
        ({"text": "x"}, {"convention": "own"}, "there is no column 'logprobs', only text; say with --columns which"),
        (
            {"logprobs": [[-1.0]]},
            {"convention": "own", "columns": ("counts=logprobs",)},
            "--columns counts=…: an Axolotl data set has no such",
        ),
        ({"logprobs": []}, {"convention": "own", "drop_last_row": True}, "--drop-last-row: of no use for axolotl"),
    ],
)
def test_refusals(tmp_path, row, settings, message):
    """What must be said of a data set, and what is of no use."""
    source = write_jsonl(tmp_path / "a.jsonl", [row])
    tokens = write_jsonl(tmp_path / "tokens.jsonl", [{"input_ids": [1, 2]}])
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "cache", from_="axolotl", **{"tokens": tokens, **settings})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"logprobs": [[-1.0]] * 3, "target_token_ids": [[2]] * 3}, "has 3 rows for 2 tokens; Axolotl would take"),
        ({"logprobs": [[-1.0, -2.0]], "target_token_ids": [[2]]}, "position 0: 1 token_ids, but 2 logprobs"),
        ({"logprobs": [[-1.0]], "target_token_ids": ["x"]}, "token_ids holds something other than lists of numbers"),
        ({"logprobs": [[-1.0]], "target_token_ids": [[V]]}, "token id 300 is not in"),
        ({"logprobs": [[float("nan")]], "target_token_ids": [[2]]}, "logprob nan of id 2 cannot be"),
        ({"logprobs": [[{"token": " the", "logprob": -1.0}]]}, "token ' the' is no token_id: with its number"),
        ({"logprobs": [[{"token": "token_id:7"}]]}, "no list of lists of objects with token and logprob: KeyError"),
        ({"logprobs": [[-1.0]]}, "logprobs are numbers without ids; --columns token_ids=NAME"),
        ({"logprobs": [[]], "target_token_ids": [[]], "target_mask": [[1]]}, None),
    ],
)
def test_wrong_rows(tmp_path, row, message):
    """A row that can't be is told with its number, or dropped; one without any record is none of these."""
    good = {name: [[]] for name in row}
    source = write_jsonl(tmp_path / "a.jsonl", [good, row])
    tokens = write_jsonl(tmp_path / "tokens.jsonl", [{"input_ids": [1, 2]}] * 2)
    settings = {"from_": "axolotl", "convention": "own", "tokens": tokens}
    if message is None:
        run(source, tmp_path / "cache", **settings)
        assert len(skl.open(tmp_path / "cache")) == 2
        return
    with pytest.raises(CorruptError, match=f"row 1: .*{message}"):
        run(source, tmp_path / "cache", **settings)


def test_no_table(tmp_path):
    """A directory with no table is no data set."""
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="an Axolotl data set is Parquet, Arrow or JSONL files; it is or holds none"):
        run(tmp_path / "data", tmp_path / "cache", from_="axolotl")
