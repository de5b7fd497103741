"""sklformat cache from the command line: every sampler, every input, and one clear line for what cannot work."""

import gzip
import itertools
import json
import re
import signal
import sys
import types

import forked
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import teacher_data
import torch
from capture_data import shard_bytes
from mmap_ninja import RaggedMmap
from system import complaint
from teacher_data import SEQ_LEN, make_teacher

import sklformat as skl
from sklformat.capture.estimates import estimate
from sklformat.cli import main
from sklformat.distill.models import loading, outputs, tokenization
from sklformat.distill.teacher import drawing, forward, gpu_sampler
from sklformat.distill.teacher.calibration import calibrate
from sklformat.distill.teacher.logit_columns import LogitColumns
from sklformat.distill.text.corpus import read_documents
from sklformat.distill.text.packing import PackedSequences
from sklformat.files import remote
from sklformat.format import layout
from sklformat.settings.estimate import EstimateConfig


@pytest.fixture
def cache(place, tmp_path, capfd):
    """Run ``sklformat cache``: status, parsed stdout or None, stderr."""

    def run(*words, out="cache", **flags):
        settings = {
            "teacher": place / "teacher",
            "out": out if "://" in out else tmp_path / out,
            "seq-len": SEQ_LEN,
            "num-sequences": 5,
        }
        settings |= {"batch-size": 3, "sequences-per-shard": 4}
        if not {"tokens", "dataset"} & set(flags):
            settings["text"] = place / "text"
        settings |= {name.replace("_", "-"): value for name, value in flags.items()}
        given = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
        status = main(["cache", *given, *map(str, words), "--json"])
        printed, err = capfd.readouterr()
        return status, json.loads(printed) if printed else None, err

    return run


def refusal(result, status=1):
    """The one line of a run that could not work."""
    assert (status, None) == result[:2], result
    err = complaint(result[2])
    assert err.startswith("sklformat cache: ")
    return err


@pytest.mark.parametrize(
    ("flags", "words", "expected"),
    [
        ({"rounds": 20}, (), ("systematic", 20, "counts", 0)),
        ({"sampler": "multinomial", "rounds": 16}, (), ("multinomial", 16, "counts", 0)),
        ({"rounds": 200}, (), ("systematic", 200, "ratios", 0)),
        ({"sampler": "multinomial", "rounds": 3000}, (), ("multinomial", 3000, "ratios", 0)),
        ({"proposal_temperature": 0.8}, (), ("systematic", 50, "ratios", 0)),
        ({"proposal_temperature": 0.8}, ("--unbiased-weights",), ("systematic", 50, "ratios", 2)),
        (
            {"sampler": "multinomial", "proposal_temperature": 1.2},
            ("--unbiased-weights",),
            ("multinomial", 50, "ratios", 7),
        ),
        ({"sampler": "topk", "k": 12}, (), ("topk", 0, "ratios", 0)),
        ({"sampler": "topp", "p": 0.9, "k": 30}, (), ("topp", 0, "ratios", 0)),
    ],
)
def test_every_sampler_makes_a_sound_cache(cache, tmp_path, flags, words, expected):
    """Whatever takes the records, the cache verifies, the header says what it was, and the records are its draws."""
    status, result, err = cache(*words, **flags)
    assert 0 == status, err
    assert [] == skl.verify(tmp_path / "cache")
    found = skl.open(tmp_path / "cache")
    header = found.header
    assert expected == (header.sampler, header.rounds, header.kind, header.scale_log2)
    assert bool(words) == header.capture["sampler"]["unbiased"]
    sums = np.concatenate([np.add.reduceat(s.targets.weights, s.targets.offsets[:-1]) for s in found]) \
        if header.kind == "ratios" else None  # fmt: skip
    if header.sampler == "topk":
        assert 11 < result["unique_tokens"] <= 12
    elif words:
        assert sums.std() > 0.02  # each as it came; right on average
        assert abs(sums.mean() - 1) < 6 * sums.std() / sums.size**0.5 + 0.02
    elif header.kind == "ratios" and header.sampler != "topp":
        assert abs(sums - 1).max() < 0.1  # the ratio code's rounding


def test_inspect_says_which_weights_are_biased(cache, tmp_path, capfd):
    """The paper's weights are slightly biased, those left as they are not, and inspect tells them apart."""
    for words, verdict in (((), "slightly"), (("--unbiased-weights",), "no: sampler systematic")):
        out = "b" + "".join(words)
        cache(*words, out=out, proposal_temperature=0.8)
        main(["inspect", str(tmp_path / out)])
        [line] = [line for line in capfd.readouterr().out.splitlines() if line.startswith("biased")]
        assert verdict in line


def test_inspect_shows_a_sequence_and_card_the_cache(cache, place, tmp_path, capfd):
    """A capture is shown token by token in the text that the teacher read, and described for a hub."""
    cache(columns="label_logprob,entropy")
    directory, teacher = str(tmp_path / "cache"), str(place / "teacher")
    one, tokenizer = skl.open(directory)[2], loading.load_tokenizer(teacher)
    assert 0 == main(["inspect", directory, "--sequence", "2", "--tokenizer", teacher, "--json"])
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [tokenizer.decode([token]) for token in one.tokens[: len(rows)]] == [row["token"]["text"] for row in rows]
    assert 0 == main(["inspect", directory, "--sequence", "2", "--tokenizer", teacher, "--positions", "1:3"])
    out = capfd.readouterr().out
    assert f"Text by the tokenizer {teacher}." in " ".join(out.split())
    assert 3 <= out.count("●")  # one in the heading, one of each position
    assert re.search(r"\n  1  \"", out)
    assert 0 == main(["inspect", directory])
    assert "the teacher's, not named" in capfd.readouterr().out
    other = tokenization.train_tokenizer(["other words make other ids"] * 3, 300)
    other.save_pretrained(tmp_path / "other")
    assert 1 == main(["inspect", directory, "--sequence", "2", "--tokenizer", str(tmp_path / "other")])
    err = capfd.readouterr().err
    assert f"(fingerprint {skl.open(directory).header.tokenizer_fingerprint}, here " in err
    assert 0 == main(["card", directory, "--license", "mit"])
    assert "license: mit\n" in capfd.readouterr().out


def test_every_input_gives_the_same_cache(cache, place, tmp_path, monkeypatch):
    """Files, rows, a dataset, a token store and a bare RaggedMmap of the same documents give the same bytes."""
    documents = list(read_documents(place / "text"))
    tokenizer = loading.load_tokenizer(place / "teacher")
    cache(out="text")
    expected = shard_bytes(tmp_path / "text")
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents))
    ids = [
        np.array(part, np.int32)
        for part in tokenization.TextEncoder(tokenizer, bos="none")([d.text for d in documents])
    ]
    RaggedMmap.from_lists(tmp_path / "ragged", ids)
    rows = [{"content": d.text, "id": i} for i, d in enumerate(documents)] + [{"content": "", "id": -1}]
    asked = []

    def load_dataset(*words, **named):
        asked.append((words, named))
        return iter(rows)

    library = types.SimpleNamespace(load_dataset=load_dataset, load_from_disk=lambda path: {"all": rows})
    monkeypatch.setitem(sys.modules, "datasets", library)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "all.jsonl.gz").write_bytes(gzip.compress((tmp_path / "all.jsonl").read_bytes()))
    (tmp_path / "mixed" / "bad.png").write_bytes(b"\x89PNG")
    (tmp_path / "mixed" / "more.txt").write_text("left out")
    for out, flags in (
        ("parquet", {"text": tmp_path / "rows.parquet", "field": "content"}),
        ("mixed", {"text": tmp_path / "mixed", "exclude": "*.txt", "on_bad_file": "skip"}),
        ("disk", {"dataset": tmp_path / "saved", "dataset_split": "all", "field": "content"}),
        ("jsonl", {"text": tmp_path / "all.jsonl"}),
        ("dataset", {"dataset": "my/set", "dataset_split": "all", "field": "content"}),
        ("store", {"tokens": tmp_path / "text" / "tokens"}),
        ("ragged", {"tokens": tmp_path / "ragged"}),
        ("ragged", {"tokens": tmp_path / "ragged"}),  # again: all there already
    ):
        status, _, err = cache(out=f"from-{out}", **flags)
        assert 0 == status, err
        assert expected == shard_bytes(tmp_path / f"from-{out}")
        assert ("skipped 1 of 2 files, which cannot be read: " in err) == (out == "mixed")
    assert [(("my/set",), {"split": "all", "streaming": True})] == asked


def test_a_cache_of_other_versions_is_not_gone_on_with_silently(cache, tmp_path, monkeypatch):
    """A newer library is told with both versions; with --keep-versions the cache goes on under its first header."""
    draw = drawing.Drawer.draw

    def stopping(drawer, sequence, *rest):
        if sequence == 3:
            raise KeyboardInterrupt
        return draw(drawer, sequence, *rest)

    cache(out="whole")
    monkeypatch.setattr(drawing.Drawer, "draw", stopping)
    assert cache()[0] == 130
    monkeypatch.setattr(drawing.Drawer, "draw", draw)
    monkeypatch.setattr(loading, "versions", lambda: {"torch": "99.0", "transformers": "1.0"})
    err = refusal(cache())
    assert f"capture.versions.torch: '{torch.__version__}' != '99.0'" in err
    assert "give --keep-versions" in err
    err = refusal(cache("--keep-versions", seed=3))  # another setting is no version
    assert "sampling_seed: 0 != 3" in err
    assert 0 == cache("--keep-versions")[0]
    assert shard_bytes(tmp_path / "whole") == shard_bytes(tmp_path / "cache")


def test_another_config_is_another_teacher(cache, place, tmp_path):
    """Equal weights with another rope_theta are another teacher: the cache is refused, both digests are shown."""
    cache()
    config = json.loads((place / "teacher" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (tmp_path / "other").mkdir()
    for file in (place / "teacher").iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    err = refusal(cache(teacher=tmp_path / "other"))
    assert "teacher_fingerprint: " in err
    assert "capture.teacher.config: " in err


def test_bad_input_is_one_line(cache, place, tmp_path):
    """What cannot work is one line that names it, and status 1; nothing is left that would hinder the next run."""
    tokenizer = loading.load_tokenizer(place / "teacher")
    loading.save(make_teacher(270), tokenizer, tmp_path / "narrow")
    for name, value in (("nan", float("nan")), ("inf", float("inf"))):
        broken = make_teacher()
        with torch.no_grad():
            broken.lm_head.weight[7, 0] = value
        loading.save(broken, tokenizer, tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    RaggedMmap.from_lists(tmp_path / "wide", [np.array([1, 2, 280])])
    RaggedMmap.from_lists(tmp_path / "floats", [np.array([1.5, 2.5])])
    for flags, message in (
        ({"teacher": tmp_path / "narrow"}, "the tokenizer has 280 ids, the model only 270"),
        ({"teacher": tmp_path / "nan"}, "sequence 0, position 0: the logits hold NaN"),
        ({"teacher": tmp_path / "inf"}, "the logits hold NaN, +inf"),
        ({"teacher": tmp_path / "empty"}, f"{tmp_path}/empty: cannot load a tokenizer"),
        ({"text": tmp_path / "empty"}, "no text found"),
        ({"text": tmp_path / "none"}, f"{tmp_path}/none: No such file"),
        ({"tokens": tmp_path / "empty"}, "is no token store and no RaggedMmap"),
        ({"tokens": tmp_path / "wide"}, "token ids from 1 to 280 are not all in [0, 280)"),
        ({"tokens": tmp_path / "floats"}, "must be token ids"),
        ({"seq_len": SEQ_LEN + 1}, f"--seq-len {SEQ_LEN + 1} is beyond the {SEQ_LEN} positions"),
        ({"num_sequences": 10**6}, "the text is too short: 1000000 sequences"),
        ({"out": "file"}, "file: is a file; a cache is a directory"),
        ({"out": "file/below"}, "Not a directory"),
        ({"device_map": "auto"}, "--device-map auto spreads the teacher over several CUDA devices"),
    ):
        where = f"out {len(message)}" if "out" not in flags else flags.pop("out")
        assert message in refusal(cache(out=where, **flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rounds": 0}, "rounds must be >= 1"),
        ({"rounds": 65536}, "rounds must be >= 1 and <= 65535"),
        ({"k": 5}, "k and p belong to topk and topp"),
        ({"sampler": "topk", "k": 0}, "needs k in 1..65535, got 0"),
        ({"sampler": "topp", "p": 1.5}, "needs p in (0, 1], got 1.5"),
        ({"proposal_temperature": -1}, "--proposal-temperature must be in 0.001..100, got -1.0"),
        ({"batch_size": 0}, "--batch-size must be >= 1"),
        ({"out": "s3://bucket/cache"}, "give --work-dir"),
        ({"work_dir": "here"}, "--work-dir belongs to an out that is a URL"),
        ({"out": "s3://bucket/cache", "work_dir": "s3://bucket/work"}, "must be a directory here"),
        ({"tokens": "x", "text": "y"}, "give one of --text, --dataset and --tokens"),
    ],
)
def test_wrong_usage_is_one_line(cache, flags, message):
    """A value out of range is found before anything is read, with status 2 and where to read on."""
    err = refusal(cache(**flags), status=2)
    assert message in err
    assert "see sklformat cache --help" in err


def test_a_missing_dataset_is_one_line(cache, monkeypatch):
    """No datasets package, no such dataset, and a dataset without the column each say so."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "datasets" in refusal(cache(dataset="x/y"))

    def load_dataset(name, **named):
        if name == "x/none":
            raise FileNotFoundError("Couldn't find any data file at x/none")
        return [{"body": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert "dataset x/none: cannot load split 'train'" in refusal(cache(dataset="x/none"))
    assert "dataset x/y: row 0 of split 'train' has no field 'text'; it has 'body'" in refusal(cache(dataset="x/y"))


def test_a_url_from_the_command_line(cache, tmp_path):
    """A cache goes to a URL through a directory here, and has the bytes of one that stays."""
    cache(out="stays")
    status, result, err = cache(out=f"file://{tmp_path}/store", work_dir=tmp_path / "work")
    assert 0 == status, err
    assert f"file://{tmp_path}/store" == result["directory"]
    assert shard_bytes(tmp_path / "stays") == shard_bytes(tmp_path / "store")
    assert [] == skl.verify(tmp_path / "store")
    assert {"tokens"} == {path.name for path in (tmp_path / "work").iterdir()}
    status, again, _ = cache(out=f"file://{tmp_path}/store", work_dir=tmp_path / "work")
    assert (0, 0, result["fingerprint"]) == (status, again["sequences_made"], again["fingerprint"])


def test_a_manifest_that_did_not_arrive(cache, tmp_path, monkeypatch):
    """Where only the manifest could not be uploaded, or a kill left it here, the same command publishes it."""
    words = {"work_dir": tmp_path / "work"}
    upload = remote.upload

    def failing(local, url):
        if local.name == "manifest.json":
            raise skl.RemoteError(f"{url}: the store is full")
        upload(local, url)

    with monkeypatch.context() as patch:
        patch.setattr(remote, "upload", failing)
        assert "the store is full" in refusal(cache(out=f"file://{tmp_path}/store", **words))
    assert (tmp_path / "work" / "manifest.json").exists()
    (tmp_path / "work" / ".manifest.json.tmp").touch()
    status, result, err = cache(out=f"file://{tmp_path}/store", **words)
    assert (0, 0) == (status, result["sequences_made"]), err
    assert [] == skl.verify(tmp_path / "store")


def test_a_url_with_other_files_is_refused(cache, tmp_path):
    """Files of somebody's own at the URL stay as they are."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "precious.txt").touch()
    message = refusal(cache(out=f"file://{tmp_path}/store", work_dir=tmp_path / "work"))
    assert f"file://{tmp_path}/store is not empty and holds no cache (precious.txt is there)" in message


def test_a_url_that_cannot_be_written_to_is_refused_at_once(cache, tmp_path):
    """Before there is anything to upload."""
    answer = cache(out="file:///no-such-bucket/cache", work_dir=tmp_path / "work")
    assert "there is no /no-such-bucket in the store; make it, or correct the URL" in refusal(answer)
    assert [] == list((tmp_path / "work").glob("*.skl*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_cleanly(place, tmp_path, number):
    """Ctrl-C and SIGTERM end in one line that says what is kept and how to go on, and status 130."""
    words = ["cache", "--teacher", place / "teacher", "--text", place / "text", "--out", tmp_path / "c"]
    words += ["--seq-len", SEQ_LEN, "--num-sequences", 8]
    done = forked.run(teacher_data.main_with_a_signal, number, 3, "0", [*map(str, words)])
    kept = f"3 of 8 sequences of {tmp_path / 'c'} are kept"
    line = f"sklformat cache: stopped: {kept}; run the same command again to resume\n"
    assert (130, line) == (done.status, complaint(done.stderr))


def test_threads_draw_the_same(cache, tmp_path, monkeypatch):
    """How many threads draw is no setting, nor how many slices are ahead."""
    cache(out="one")
    monkeypatch.setitem(forward.LOGITS_AT_ONCE, "cpu", 280 * 4)
    cache(out="slices")
    make = drawing.Drawer.__init__
    monkeypatch.setattr(drawing.Drawer, "__init__", lambda self, **named: make(self, **named | {"threads": 3}))
    cache(out="threads")
    assert shard_bytes(tmp_path / "slices") == shard_bytes(tmp_path / "threads")


@pytest.mark.parametrize("by", ["host", "threads", "device"])
@pytest.mark.parametrize("flags", [{}, {"sampler": "topk", "k": 12}, {"proposal_temperature": 0.8}], ids=str)
def test_columns_are_the_teachers(cache, place, tmp_path, monkeypatch, by, flags):
    """Each column is what the teacher's logits and the text say, whoever draws; records and tokens stay as they are."""
    if by == "threads":
        make = drawing.Drawer.__init__
        monkeypatch.setattr(drawing.Drawer, "__init__", lambda self, **named: make(self, **named | {"threads": 3}))
    if by == "device":
        monkeypatch.setattr(gpu_sampler, "DEVICES", ("cpu",))
    monkeypatch.setitem(forward.LOGITS_AT_ONCE, "cpu", 280 * 5)
    cache(out="plain", **flags)
    names = "record_logprob,label_logprob,document_start,entropy"
    assert 0 == cache(columns=names, **flags)[0]
    assert [] == skl.verify(tmp_path / "cache")
    model = loading.load_model(place / "teacher")
    found, plain = skl.open(tmp_path / "cache"), skl.open(tmp_path / "plain")
    assert tuple(layout.COLUMNS) == found.header.columns
    packed = PackedSequences(tmp_path / "cache" / "tokens", seq_len=SEQ_LEN, separator_id=0, seed=0)
    for i, sequence in enumerate(found):
        assert (plain[i].tokens == sequence.tokens).all()
        assert plain[i].targets == sequence.targets
        with torch.inference_mode():
            logits = outputs.logits(model, torch.from_numpy(sequence.tokens[None, :-1].astype(np.int64)))[0, :, :280]
        logp = torch.log_softmax(logits.double(), -1).numpy()
        rows = np.repeat(np.arange(SEQ_LEN), np.diff(sequence.targets.offsets))
        expected = {
            "label_logprob": logp[np.arange(SEQ_LEN), sequence.tokens[1:]],
            "entropy": -(np.exp(logp) * logp).sum(-1),
            "record_logprob": logp[rows, sequence.targets.token_ids],
        }
        for name, values in expected.items():
            np.testing.assert_allclose(sequence.columns[name], values, rtol=2e-3, atol=1e-4)
        assert packed.document_starts(i).tolist() == sequence.columns["document_start"].tolist()
    assert any(sequence.columns["document_start"].any() for sequence in found)


def test_labels_without_probability_have_the_least_number():
    """A label of logit -inf has the least float16 as its log-prob, and adds nothing to the entropy."""
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    taken = LogitColumns(("label_logprob", "entropy"), np.array([0, 1], np.uint32))
    taken.add(np.array([0]), logits, None, torch.tensor([[0]]))
    values = taken.values()
    assert [-65504.0] == values["label_logprob"].tolist()
    assert values["entropy"][0] == np.float16(np.log(2))


def test_a_column_that_there_is_not_is_refused(cache):
    """The message names the columns that there are."""
    err = refusal(cache(columns="entropy,logits"), status=2)
    assert "columns may be label_logprob, entropy, document_start, record_logprob, got logits" in err


def test_estimate_measures_what_it_must(place, monkeypatch):
    """A calibration run gives vocabulary, records a position and speed, and tokenises each document once."""
    encode, encoded = tokenization.TextEncoder.__call__, []
    monkeypatch.setattr(
        tokenization.TextEncoder, "__call__", lambda self, texts: encoded.extend(texts) or encode(self, texts)
    )
    config = EstimateConfig(
        positions=1e6, rounds=20, seq_len=SEQ_LEN, teacher=str(place / "teacher"), text=(place / "text",),
        calibration_sequences=4, batch_size=2,
    )  # fmt: skip
    measured = calibrate(config)
    assert 280 == measured.vocab_size
    assert 2 < measured.unique_tokens < 20
    assert measured.positions_per_second > 0
    assert estimate(measured).gpu_hours > 0
    assert sorted(document.text for document in read_documents([place / "text"])) == sorted(encoded)


def test_estimate_measures_a_dataset_without_end(place, monkeypatch):
    """Of a dataset the calibration run reads the first rows alone."""
    rows = ({"content": f"alpha beta {number} " * 9, "image": b"x"} for number in itertools.count())
    library = types.SimpleNamespace(load_dataset=lambda *words, **named: rows)
    monkeypatch.setitem(sys.modules, "datasets", library)
    config = EstimateConfig(
        positions=1e6, rounds=20, seq_len=SEQ_LEN, teacher=str(place / "teacher"), dataset=("my/set",), field="content",
        calibration_sequences=4, batch_size=2,
    )  # fmt: skip
    assert 2 < calibrate(config).unique_tokens < 20
    assert 300 > int(next(rows)["content"].split()[2])


def test_a_ring_that_finds_no_room_is_refused_by_its_flag(cache, tmp_path):
    """Memory is asked for before the teacher is loaded, and the message names the flag and both figures."""
    err = refusal(cache(ring_mib=10**8))
    words = (
        r"--ring-mib is too large: a ring of 131,072\.0 GiB takes as much memory at once, and [\d,.]+ [GM]iB are free"
    )
    assert re.fullmatch(rf"sklformat cache: {words} here\n", err), err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_damaged_shard_is_made_again(cache, capfd, tmp_path, shards, with_manifest):
    """
    The recovery that ``verify`` and the pages give works when it is followed, also where the shard is the only one.

    Who forgets the manifest comes to the same cache.
    """
    flags = {"num_sequences": 4 * shards}
    cache(**flags)
    sound = shard_bytes(tmp_path / "cache")
    path = tmp_path / "cache" / "shard-00000.skl"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert 3 == main(["verify", str(path.parent)])
    todo = "remove it and manifest.json, then rerun the command that made the cache"
    assert todo in capfd.readouterr().out
    path.unlink()
    if with_manifest:
        (path.parent / "manifest.json").unlink()
    status, result, err = cache(**flags)
    assert (0, 4) == (status, result["sequences_made"]), err
    assert sound == shard_bytes(path.parent)
    assert 0 == main(["verify", str(path.parent)])


def test_a_missing_shard_is_made_again(cache, capfd, tmp_path):
    """So does the recovery from a shard that is gone."""
    cache(num_sequences=8)
    sound = shard_bytes(tmp_path / "cache")
    (tmp_path / "cache" / "shard-00001.skl").unlink()
    assert 3 == main(["verify", str(tmp_path / "cache")])
    assert "put the shard back, or remove manifest.json and rerun the command" in capfd.readouterr().out
    (tmp_path / "cache" / "manifest.json").unlink()
    assert 4 == cache(num_sequences=8)[1]["sequences_made"]
    assert sound == shard_bytes(tmp_path / "cache")
