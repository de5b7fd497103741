"""DistillKit's and open-instruct's files, each form against what a teacher said, and what is refused."""

import json

import numpy as np
import pytest
from distillkit_data import PADDED, V, compressed_row, encode_ids, legacy_words, teacher, write_parquet, write_saved

import sklformat as skl
from sklformat.errors import CorruptError
from sklformat.interop import convert
from sklformat.interop.kinds import find_kind
from sklformat.settings.convert import ConvertConfig

EXACT = {"d": PADDED, "k": 6, "exact_k": 6, "residual_bins": [], "delta_encoding": False}
CURVED = {
    "d": PADDED,
    "k": 24,
    "exact_k": 8,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 6, "num_elements": 16}],
    "delta_encoding": False,
}
LEGACY = {"vocab_size": V, "k": 12, "exact_k": 4, "polynomial_degree": 4, "with_sqrt_term": True}
SEQUENCES = [(seed, length) for seed, length in enumerate((7, 5, 9))]


def run(source, destination, **settings):
    return convert(ConvertConfig(source=source, destination=destination, **settings))


def codec_file(directory, codec, name="compression_config.json"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(codec))
    return directory / name


def parts(directory, codec, files=2, sequences=SEQUENCES, **more):
    """A directory of data_0.parquet and so on beside its codec, with L - 1 rows of L tokens."""
    codec_file(directory, codec)
    rows = [compressed_row(teacher(s, n, codec["k"]), codec, n - 1) | more for s, n in sequences]
    for i in range(files):
        write_parquet(directory / f"data_{i}.parquet", rows[i * len(rows) // files : (i + 1) * len(rows) // files])
    return directory


def assert_records(cache, ids, logs, i=0, rtol=0.05, ratio=0.05):
    """The records of a sequence are these, but for those too small to keep."""
    targets = skl.open(cache)[i].targets
    assert targets.num_positions == len(ids)
    for t, (want_ids, want) in enumerate(zip(ids, logs, strict=True)):
        begin, end = targets.offsets[t : t + 2]
        found = dict(zip(targets.token_ids[begin:end].tolist(), targets.weights[begin:end], strict=True))
        wanted = {int(one): np.exp(log) for one, log in zip(want_ids, want, strict=True)}
        assert set(found) <= set(wanted)
        assert {one for one, w in wanted.items() if w > 0.002} <= set(found)
        for one, weight in found.items():
            assert weight == pytest.approx(wanted[one], rel=rtol + ratio, abs=2e-4)


def bare_positions(cache, i=0):
    return np.flatnonzero(np.diff(skl.open(cache)[i].targets.offsets) == 0).tolist()


def test_compressed(tmp_path):
    """A directory of parts, guessed by its columns, its codec beside it; the vocabulary is the teacher's."""
    source = parts(tmp_path / "logits", EXACT)
    assert find_kind(source) == "distillkit"
    made = run(source, tmp_path / "cache", vocab_size=V)
    for i, (seed, length) in enumerate(SEQUENCES):
        tokens, ids, logs = teacher(seed, length, 6)
        assert (skl.open(tmp_path / "cache")[i].tokens == tokens).all()
        assert_records(tmp_path / "cache", ids[:-1], logs[:-1], i)
    header = skl.open(tmp_path / "cache").header
    assert header.biased
    assert header.vocab_size == V
    found = header.capture["converted"]
    assert found["source"] == {"system": "distillkit", "k": 6, "exact": 6, "approximate": 0, "d": PADDED}
    assert found["values"] == "log-probabilities"
    assert "row t describes token t + 1" in made.says
    assert "the files do not say the temperature; DistillKit captures at 1" in made.says
    assert "the values are log-probabilities of the 6 most likely tokens" in made.says


@pytest.mark.parametrize("name", ["compression_config.json", "compression_config.yaml", "trainer.yml"])
def test_curves_and_codec_files(tmp_path, name):
    """The curve's values are near those that went in; the codec is a file of its own, or part of a trainer's YAML."""
    source = parts(tmp_path / "logits", CURVED, files=1)
    (source / "compression_config.json").unlink()
    settings = {"teacher": {"logprob_compressor": CURVED}} if name == "trainer.yml" else CURVED
    if name != "compression_config.json":
        pytest.importorskip("yaml")
    codec = codec_file(tmp_path / "other", settings, name)
    made = run(source, tmp_path / "cache", vocab_size=V, codec=codec)
    for i, (seed, length) in enumerate(SEQUENCES):
        _, ids, logs = teacher(seed, length, 24)
        assert_records(tmp_path / "cache", ids[:-1], logs[:-1], i, rtol=0.03)
    assert any("16 of them, the least likely, are approximate" in sentence for sentence in made.says)


def test_open_instruct(tmp_path):
    """The same bytes beside texts."""
    source = parts(tmp_path / "logits", EXACT, messages="[]", text="a")
    assert find_kind(source / "data_0.parquet") == "open-instruct"
    run(source, tmp_path / "cache", vocab_size=V)
    assert skl.open(tmp_path / "cache").header.capture["converted"]["source"]["system"] == "open-instruct"
    assert len(skl.open(tmp_path / "cache")) == 3


def test_packed_and_saved(tmp_path):
    """
    Documents behind one another, as many rows as tokens, the number of each token's document as its mask.

    The last row of a document, and rows of padding, have no records; borders are kept.
    """
    docs = [teacher(seed, length, 6) for seed, length in SEQUENCES]
    row = {name: [] for name in ("input_ids", "compressed_logprobs", "bytepacked_indices", "attention_mask")}
    for number, doc in enumerate(docs, 1):
        rows = len(doc[0]) - 1  # the token after the last row is not in the file
        one = compressed_row((doc[0][:rows], doc[1], doc[2]), EXACT, rows)
        for name in one:
            row[name] += one[name]
        row["attention_mask"] += [number] * rows
    for name in ("input_ids", "compressed_logprobs", "bytepacked_indices"):
        row[name] += [row[name][0]] * 2
    row["attention_mask"] += [0, 0]
    source = write_saved(tmp_path / "packed", [row, row, row])
    codec_file(source, EXACT)
    assert find_kind(source) == "distillkit"
    run(source, tmp_path / "cache", vocab_size=V)
    cache = tmp_path / "cache"
    assert len(skl.open(cache)) == 3
    lengths = [length - 1 for _, length in SEQUENCES]
    ends = (np.cumsum(lengths) - 1).tolist()
    for i in range(3):
        assert bare_positions(cache, i) == [*ends, ends[-1] + 1]
        starts = np.flatnonzero(skl.open(cache)[i].columns["document_start"]).tolist()
        assert starts == [0, *(end + 1 for end in ends)]
    ids = np.concatenate([doc[1][:rows] for doc, rows in zip(docs, lengths, strict=True)])
    logs = np.concatenate([doc[2][:rows] for doc, rows in zip(docs, lengths, strict=True)])
    targets = skl.open(cache)[1].targets
    for t in set(range(sum(lengths))) - set(ends):
        assert targets.token_ids[targets.offsets[t]] in ids[t]
        total = targets.weights[targets.offsets[t] : targets.offsets[t + 1]].sum()
        assert total == pytest.approx(np.exp(logs[t]).sum(), rel=0.05)


@pytest.mark.parametrize("values", ["logprobs", "logits"])
def test_legacy(tmp_path, values):
    """The first release's form; what its values are, the user says."""
    ranks, rows, stored = np.arange(1, 9.0), [], []
    terms = np.stack([ranks**-j for j in range(5)] + [np.sqrt(ranks)], axis=1)
    for seed, length in SEQUENCES:
        tokens, ids, logs = teacher(seed, length, 12)
        shown = logs[:-1] + (3.0 if values == "logits" else 0)
        fits = [np.linalg.lstsq(terms, one[4:], rcond=None)[0] for one in shown]
        row = {"input_ids": tokens.tolist(), "packed_indices": [legacy_words(one.tolist(), V) for one in ids[:-1]]}
        row |= {"exact_values": np.float16(shown[:, :4]).tolist(), "coeffs": [fit.tolist() for fit in fits]}
        rows.append(row)
        curves = np.stack([terms @ fit for fit in fits])
        assert np.abs(curves - shown[:, 4:]).max() < 0.5
        stored.append((ids[:-1], np.concatenate([shown[:, :4], curves], axis=1)))
    source = write_parquet(tmp_path / "a.parquet", rows)
    codec_file(tmp_path, {"teacher": {"legacy_logit_compression": LEGACY}})
    assert find_kind(source) == "distillkit-legacy"
    made = run(source, tmp_path / "cache", values=values)
    for i, (ids, logs) in enumerate(stored):
        whole = np.log(np.exp(logs).sum(1, keepdims=True)) if values == "logits" else 0
        assert_records(tmp_path / "cache", ids, logs - whole, i, rtol=0.01)
    assert skl.open(tmp_path / "cache").header.vocab_size == V
    assert any("8 of 12 are approximate" in sentence for sentence in made.says)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("extra", [0, 1])
def test_raw(tmp_path, suffix, extra):
    """Raw rows, L - 1 of them or L; fillers, of a log-prob that no token has, are left out with their equal ids."""
    rows = []
    for seed, length in SEQUENCES:
        tokens, ids, logs = teacher(seed, length, 4)
        ids, logs = ids[: length - 1 + extra].copy(), logs[: length - 1 + extra].copy()
        ids[1, 2:], logs[1, 2:] = 0, [-1000.0, -10000.0]
        rows.append({"input_ids": tokens.tolist(), "token_ids": ids.tolist(), "top_values": logs.tolist()})
    source = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        write_parquet(source, rows)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert find_kind(source) == "distillkit-raw"
    run(source, tmp_path / "cache", vocab_size=V)
    for i, (seed, length) in enumerate(SEQUENCES):
        _, ids, logs = teacher(seed, length, 4)
        logs[1, 2:] = -np.inf
        assert_records(tmp_path / "cache", ids[:-1], logs[:-1], i)


def test_raw_there_and_back(tmp_path):
    """What is exported as raw rows comes back as the same records, without the fillers."""
    source = parts(tmp_path / "logits", EXACT)
    run(source, tmp_path / "cache", vocab_size=V)
    run(tmp_path / "cache", tmp_path / "raw.parquet", to="distillkit-raw")
    run(tmp_path / "raw.parquet", tmp_path / "again", vocab_size=V)
    for one, two in zip(skl.open(tmp_path / "cache"), skl.open(tmp_path / "again"), strict=True):
        assert (one.tokens == two.tokens).all()
        assert one.targets == two.targets


def test_other_values_are_not_guessed(tmp_path):
    """Where normalized values lie beside the raw ones, the user says which are meant; so do logits."""
    row = {"input_ids": [1, 2], "token_ids": [[3, 4]], "top_values": [[9.0, 7.0]], "normalized_logits": [[0.6, 0.1]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert find_kind(tmp_path / "a.jsonl") == "jsonl"
    run(tmp_path / "a.jsonl", tmp_path / "cache", from_="distillkit-raw", vocab_size=V, values="logits")
    assert skl.open(tmp_path / "cache")[0].targets.weights.sum() == pytest.approx(1, rel=0.05)


def test_bad_rows(tmp_path):
    """A lost value, an id outside the vocabulary and equal ids are refused by position, or dropped and counted."""
    source = parts(tmp_path / "logits", EXACT, files=1)
    rows = [compressed_row(teacher(s, n, 6), EXACT, n - 1) for s, n in SEQUENCES]
    rows[0]["compressed_logprobs"][1][:4] = [0, 0, 0xC0, 0x7F]  # NaN
    rows[1]["bytepacked_indices"][2] = encode_ids([1, 2, 3, 4, 5, 400], PADDED)
    rows[2]["bytepacked_indices"][3] = encode_ids([1, 2, 3, 4, 5, 5], PADDED)
    write_parquet(source / "data_0.parquet", rows)
    with pytest.raises(CorruptError, match=r"row 0: position 1: logprob nan of id"):
        run(source, tmp_path / "cache", vocab_size=V)
    made = run(source, tmp_path / "cache", vocab_size=V, on_bad_row="drop")
    assert [bare_positions(tmp_path / "cache", i) for i in range(3)] == [[1], [2], [3]]
    assert skl.open(tmp_path / "cache").header.capture["converted"]["dropped"]["positions"] == 3
    assert any("1 positions with an id twice" in sentence for sentence in made.says)


def test_infinite_values_are_no_records(tmp_path):
    """An exact log-prob of -inf is a probability of 0."""
    source = parts(tmp_path / "logits", EXACT, files=1)
    row = compressed_row(teacher(0, 7, 6), EXACT, 6)
    row["compressed_logprobs"][2][-4:] = [0, 0, 0x80, 0xFF]
    write_parquet(source / "data_0.parquet", [row])
    run(source, tmp_path / "cache", vocab_size=V)
    assert np.diff(skl.open(tmp_path / "cache")[0].targets.offsets).tolist() == [6, 6, 5, 6, 6, 6]


def test_wrong_rows(tmp_path):
    """Bytes that the codec does not fit, and columns that do not fit each other, name the row."""
    source = parts(tmp_path / "logits", EXACT, files=1)
    good = compressed_row(teacher(0, 7, 6), EXACT, 6)
    short = good | {"compressed_logprobs": [*good["compressed_logprobs"][:-1], [1, 2]]}
    fewer = good | {"bytepacked_indices": good["bytepacked_indices"][:-1]}
    for row, message in [
        (short, "position 5: compressed_logprobs has 2 bytes, the codec takes 24; it is another file's codec"),
        (fewer, "there are 5 rows of ids and 6 rows of values"),
    ]:
        write_parquet(source / "data_0.parquet", [good, row])
        with pytest.raises(CorruptError, match=f"row 1: {message}"):
            run(source, tmp_path / "cache", vocab_size=V)
    row = {"input_ids": [1, 2], "compressed_logprobs": [[256] * 24], "bytepacked_indices": [[0] * 7]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(CorruptError, match="compressed_logprobs holds something other than bytes"):
        run(tmp_path / "a.jsonl", tmp_path / "cache", vocab_size=V, codec=source / "compression_config.json")
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"compressed_logprobs": "text"}))
    with pytest.raises(CorruptError, match="compressed_logprobs holds text or objects, not lists of numbers"):
        run(tmp_path / "a.jsonl", tmp_path / "cache", vocab_size=V, codec=source / "compression_config.json")


def test_wrong_legacy_rows(tmp_path):
    """So do those of the first release."""
    row = {
        "input_ids": [1, 2, 3],
        "packed_indices": [[0, 0]] * 2,
        "exact_values": [[0.0] * 4],
        "coeffs": [[0.0] * 6] * 2,
    }
    source = write_parquet(tmp_path / "a.parquet", [row])
    codec_file(tmp_path, LEGACY)
    with pytest.raises(CorruptError, match="packed_indices has 2 rows, exact_values 1 and coeffs 2"):
        run(source, tmp_path / "cache", values="logprobs")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "its codec says d = 301, for which DistillKit takes one more"),
        ({"vocab_size": 513}, "has ids beyond the 9 bits of its codec, d = 301"),
        ({"vocab_size": V, "values": "logits"}, "--values: of no use for distillkit; leave it out"),
        ({"vocab_size": V, "convention": "own"}, "--convention: of no use for distillkit"),
        ({"vocab_size": V, "from_": "distillkit-raw"}, "is no distillkit-raw, it has no column token_ids"),
        ({"vocab_size": V, "codec": "none"}, "compression_config.yaml is beside it; give --codec FILE"),
    ],
)
def test_refusals(tmp_path, settings, message):
    """What the user must say, or says in vain."""
    source = parts(tmp_path / "logits", EXACT)
    if settings.get("codec") == "none":
        (source / "compression_config.json").unlink()
        settings = {"vocab_size": V}
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "cache", **settings)
    assert not (tmp_path / "cache").exists()


def test_legacy_refusals(tmp_path):
    """Values of the first release are of two kinds; its codec says the vocabulary."""
    row = {"input_ids": [1, 2], "packed_indices": [[0, 0]], "exact_values": [[0.0] * 4], "coeffs": [[0.0] * 6]}
    source = write_parquet(tmp_path / "a.parquet", [row])
    codec_file(tmp_path, LEGACY)
    with pytest.raises(ValueError, match="may hold log-probs or logits less their mean, and does not say which"):
        run(source, tmp_path / "cache")
    with pytest.raises(ValueError, match="--vocab-size 7, its codec says vocab_size 300; leave the flag out"):
        run(source, tmp_path / "cache", values="logprobs", vocab_size=7)


def test_half_a_directory(tmp_path):
    """A part that is missing, or of which only the beginning was written, is told by name."""
    source = parts(tmp_path / "logits", EXACT, files=3)
    kept = (source / "data_2.parquet").read_bytes()
    (source / "data_2.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptError, match=r"data_2\.parquet: parquet: "):
        run(source, tmp_path / "cache", vocab_size=V)
    (source / "data_2.parquet").write_bytes(kept)
    (source / "data_1.parquet").unlink()
    with pytest.raises(CorruptError, match=r"data_1\.parquet is missing; copy the whole directory"):
        run(source, tmp_path / "cache", vocab_size=V)
    rows = [compressed_row(teacher(s, n, 6), EXACT, n) for s, n in SEQUENCES]
    saved = write_saved(tmp_path / "saved", rows, files=3)
    codec_file(saved, EXACT)
    (saved / "state.json").unlink()
    whole = (saved / "data-00001-of-00003.arrow").read_bytes()
    (saved / "data-00001-of-00003.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptError, match=r"data-00001-of-00003\.arrow: arrow table: "):
        run(saved, tmp_path / "cache", vocab_size=V)
    (saved / "data-00002-of-00003.arrow").unlink()
    with pytest.raises(CorruptError, match=r"data-00002-of-00003\.arrow is missing"):
        run(saved, tmp_path / "cache", vocab_size=V)


def test_damaged_names(tmp_path):
    """A byte of a column's name that is no text is damage of that file, not a fault of its own."""
    source = parts(tmp_path / "logits", EXACT, files=1)
    file = source / "data_0.parquet"
    file.write_bytes(file.read_bytes().replace(b"input_ids", b"i\xf3put_ids"))
    with pytest.raises(CorruptError, match=r"data_0\.parquet: parquet: 'utf-8' codec can't decode"):
        run(source, tmp_path / "cache", from_="distillkit", vocab_size=V)


def test_a_stream_cut_between_batches(tmp_path):
    """A saved file that ends after a whole batch has no mark of its end, so sequences are missing."""
    rows = [compressed_row(teacher(s, n, 6), EXACT, n) for s, n in SEQUENCES]
    saved = write_saved(tmp_path / "saved", rows, files=1)
    codec_file(saved, EXACT)
    file = saved / "data-00000-of-00001.arrow"
    run(saved, tmp_path / "whole", vocab_size=V)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CorruptError, match="the stream has no end, so batches may be missing; copy the file again"):
        run(saved, tmp_path / "cache", vocab_size=V)


def test_splits(tmp_path):
    """A data set of several splits is not one source."""
    rows = [compressed_row(teacher(s, n, 6), EXACT, n) for s, n in SEQUENCES]
    for split in ("train", "test"):
        codec_file(write_saved(tmp_path / "all" / split, rows), EXACT)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="holds the splits test, train; give the directory of one of them"):
        run(tmp_path / "all", tmp_path / "cache", vocab_size=V)
    run(tmp_path / "all" / "train", tmp_path / "cache", vocab_size=V)
    assert len(skl.open(tmp_path / "cache")) == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "{d: [", r"a\.yaml: yaml: while parsing"),
        ("a.json", "{", r"a\.json: "),
        ("a.yaml", "7", "not a file of settings by name"),
        ("a.yaml", "{d: 301}", "codec: k must be a whole number"),
    ],
)
def test_codec_files_that_are_none(tmp_path, name, text, message):
    """A codec file that can't be read, or lacks a setting, is named."""
    pytest.importorskip("yaml")
    source = parts(tmp_path / "logits", EXACT)
    (tmp_path / name).write_text(text)
    with pytest.raises(CorruptError, match=message):
        run(source, tmp_path / "cache", vocab_size=V, codec=tmp_path / name)


def test_no_table(tmp_path):
    """A directory with no table is none of these kinds."""
    (tmp_path / "logits").mkdir()
    with pytest.raises(ValueError, match="distillkit is read from Parquet, Arrow or JSONL files; it is or holds none"):
        run(tmp_path / "logits", tmp_path / "cache", from_="distillkit", vocab_size=V)
    (tmp_path / "a.parquet").write_bytes(b"rubbish")
    assert find_kind(tmp_path / "a.parquet") == "parquet"
