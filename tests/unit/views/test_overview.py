"""What ``inspect`` says of a cache as a whole: names beside fingerprints, dates, and how far a capture is."""

import json
import os

import pytest
from operation_data import header, sequence, write

import sklformat as skl
from sklformat.cache.contents import UNFINISHED_NAME
from sklformat.cli import main
from sklformat.views import overview
from sklformat.views.overview import in_bytes, look, table

CAPTURE = {
    "teacher": {"name": "org/big", "revision": "abc", "dtype": "bfloat16", "device": "cuda"},
    "tokenizer": {"vocabulary": "12" * 16},
    "packing": {"num_documents": 1234, "num_tokens": 56_789},
    "note": "\x1b[2J",
}
PRINTS = {f"{name}_fingerprint": digit * 32 for name, digit in (("teacher", "a"), ("tokenizer", "b"), ("corpus", "c"))}


def test_names_stand_beside_fingerprints(tmp_path):
    """Teacher, tokenizer, text and date, by name where the header has one, and nothing that commands a terminal."""
    path = write(tmp_path / "a", 4, capture=CAPTURE, **PRINTS)
    for shard, seconds in zip(sorted(path.glob("*.skl")), (1_700_000_000, 1_700_003_600), strict=True):
        os.utime(shard, (seconds, seconds))
    facts = look(str(path))
    assert {"name": "org/big", "revision": "abc", "fingerprint": "a" * 32} == facts["teacher"]
    assert {"documents": 1234, "tokens": 56_789, "fingerprint": "c" * 32} == facts["text"]
    assert {"first": "2023-11-14T22:13:20+00:00", "last": "2023-11-14T23:13:20+00:00"} == facts["sealed"]
    said = table(facts)
    assert 'org/big, revision abc, device "cuda", dtype "bfloat16"' == said["teacher"]
    assert "the teacher's, org/big" == said["tokenizer"]
    assert "1,234 documents, 56,789 tokens (names of files are not kept)" == said["text"]
    assert ("b" * 32, "c" * 32) == (said["tokenizer fingerprint"], said["text fingerprint"])
    assert "2023-11-14 22:13:20 UTC to 2023-11-14 23:13:20 UTC, by the times of the shards' files" == said["date"]
    assert all(text.isprintable() for text in said.values())


def test_what_is_not_known_is_said(tmp_path):
    """A local teacher has no name, and a cache of other making says less; a shard by itself has one date."""
    local = {"teacher": {"dtype": "float32"}, "packing": {"num_documents": 3}}
    said = table(look(str(write(tmp_path / "a", 1, capture=local) / "shard-00000.skl")))
    assert said["teacher"].startswith("not named (was a local path, which may move), dtype")
    assert ("the teacher's, not named", "unknown") == (said["tokenizer"], said["tokenizer fingerprint"])
    assert "3 documents (names of files are not kept)" == said["text"]
    assert " to " not in said["date"]
    said = table(look(str(write(tmp_path / "b", 1))))
    assert ("unknown", "unknown", "unknown") == (said["teacher"], said["tokenizer"], said["text"])
    for odd in ({"teacher": "a string"}, {"teacher": {"name": 3}, "packing": [1], "tokenizer": None}):
        assert table(look(str(write(tmp_path / f"c{len(odd)}", 1, capture=odd))))


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0"), (999_999, "999,999"), (10**6, "1,000,000 (1 MB)"), (3_362_752, "3,362,752 (3.363 MB)"),
     (999_999_999, "999,999,999 (1000 MB)"), (40 * 10**12, "40,000,000,000,000 (40 TB)"),
     (15 * 10**15, "15,000,000,000,000,000 (15,000 TB)")],
)  # fmt: skip
def test_sizes_as_people_say_them(size, words):
    """Beside every digit."""
    assert words == in_bytes(size)


def test_long_sequences(tmp_path):
    """Their length has its commas, as all numbers have."""
    assert "0, 131,072 per sequence" == table(look(str(write(tmp_path / "a", 0, seq_len=131_072))))["positions"]


@pytest.mark.parametrize(
    ("sampler", "how", "changes", "words"),
    [
        ("systematic", {"k": None, "p": None, "unbiased": False}, {}, "no: sampler systematic, 20 rounds"),
        ("topk", {"k": 12, "p": None, "unbiased": False}, {"kind": "ratios", "rounds": 0}, "yes: sampler topk, k 12"),
        ("topp", {"k": 40, "p": 0.6}, {"kind": "ratios", "rounds": 0}, "yes: sampler topp, k 40, p 0.6"),
        (
            "multinomial",
            {"k": None, "p": None, "unbiased": True},
            {"kind": "ratios", "proposal_temperature": 0.5},
            "no: sampler multinomial, 20 rounds, proposal p**0.5, weights not normalised",
        ),
    ],
)
def test_what_is_set_of_a_sampler_is_said_once(tmp_path, sampler, how, changes, words):
    """Beside whether it is biased, without what is not set; JSON has what the header has."""
    facts = look(str(write(tmp_path / "a", 1, sampler=sampler, capture={"sampler": how, "note": None}, **changes)))
    said = table(facts)
    assert words == said["biased"]
    assert not [name for name in said if name.startswith("capture.")]
    assert {"sampler": how, "note": None} == facts["header"]["capture"]


def test_a_sampler_of_another_making(tmp_path):
    """Whatever else a header says of it is shown as it is there."""
    odd = {"sampler": {"k": "five", "seed": 3, "unbiased": "\x1b"}, "note": 0}
    said = table(look(str(write(tmp_path / "a", 1, capture=odd))))
    assert 'no: sampler multinomial, 20 rounds, k "five"' == said["biased"]
    assert ('{"seed": 3}', "0") == (said["capture.sampler"], said["capture.note"])


def test_a_url_has_no_date(memory_store):
    """The times of files behind a URL are not asked for."""
    said = table(look(memory_store))
    assert "unknown: a store behind a URL is not asked" == said["date"]


@pytest.fixture
def memory_store(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    store, url = fsspec.filesystem("memory"), "memory://overview"
    for path in write(tmp_path / "a", 1).iterdir():
        store.pipe(f"/overview/{path.name}", path.read_bytes())
    yield url
    store.rm("/overview", recursive=True)


def test_a_capture_in_progress(tmp_path, capfd, monkeypatch):
    """inspect says how far it is, for people and machines, where ``skl.open`` refuses."""
    of = header(capture=CAPTURE)
    writer = skl.CacheWriter(tmp_path, header=of, sequences_per_shard=3)
    for number in range(5):
        writer.append(*sequence(of, number))
    writer.flush()
    (tmp_path / UNFINISHED_NAME).write_text('{"num_sequences": 20, "sequences_there": 0}')
    for path in tmp_path.iterdir():
        seconds = 1_700_000_000 if path.name == UNFINISHED_NAME else 1_700_000_050
        os.utime(path, (seconds, seconds))
    monkeypatch.setattr(overview.time, "time", lambda: 1_700_000_055.0)
    assert 0 == main(["inspect", str(tmp_path), "--json"])
    facts = json.loads(capfd.readouterr().out)
    assert {"sequences": 5, "num_sequences": 20, "shards": 1, "sequences_sealed": 3, "seconds_since_written": 5,
            "sequences_per_second": 0.1, "seconds_left": 150.0}.items() <= facts.items()  # fmt: skip
    assert ("org/big", 300) == (facts["teacher"]["name"], facts["header"]["vocab_size"])
    assert 0 == main(["inspect", str(tmp_path)])
    said = dict(line.split("  ", 1) for line in capfd.readouterr().out.splitlines())
    said = {name: value.strip() for name, value in said.items()}
    assert "unfinished: no reader takes it before the command that writes it has ended" == said["state"]
    assert "5 of 20 (25.0%)" == said["sequences"]
    assert "2 whole sequences, not sealed" == said["shard-00001.skl.partial"]
    assert "2023-11-14 22:14:10 UTC, 5 s ago" == said["last written"]
    assert "0.1 sequences/s since the run began, 2023-11-14 22:13:20 UTC" == said["rate"]
    assert "about 2 min at that rate, if it is still running" == said["time left"]
    assert "org/big" in said["teacher"]
    with pytest.raises(skl.UnfinishedError):
        skl.open(tmp_path)


def test_a_capture_that_has_not_begun(tmp_path):
    """The mark alone is a capture without shards, settings and rate."""
    (tmp_path / UNFINISHED_NAME).touch()
    said = table(look(str(tmp_path)))
    assert "0; how many it will be, no file here says" == said["sequences"]
    assert {"path", "state", "sequences", "shards", "bytes"} == said.keys()
