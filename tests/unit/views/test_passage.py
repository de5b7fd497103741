"""The page of ``inspect --sequence``: tokens, records and labels as the cache has them, safe and in its columns."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operation_data import COLUMNS, SEQ_LEN, VOCAB, write

import sklformat as skl
from sklformat.cli import main
from sklformat.settings.inspection import InspectConfig
from sklformat.views import passage
from sklformat.views.characters import columns, is_writable


def read(path, sequence=0, **settings):
    return passage.read_passage(InspectConfig(path=str(path), sequence=sequence, **settings))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A cache of counts with every column."""
    return write(tmp_path_factory.mktemp("whole") / "a", 4, columns=COLUMNS)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A cache of the heads of distributions, without tokens."""
    return write(tmp_path_factory.mktemp("kept") / "a", 2, kind="ratios", rounds=0, store_tokens=False)


def test_facts_are_what_the_cache_holds(whole):
    """Tokens, labels, counts, weights and columns of each position, the heaviest record first."""
    facts = passage.facts_of(read(whole, 2))
    one = skl.open(whole)[2]
    assert ([0, SEQ_LEN], list(range(SEQ_LEN))) == (facts["positions"], [row["position"] for row in facts["rows"]])
    for t, row in enumerate(facts["rows"]):
        part = slice(*one.targets.offsets[t : t + 2])
        said = {record["id"]: record for record in row["records"]}
        assert dict(zip(one.targets.token_ids[part], one.targets.counts[part], strict=True)) == {
            token: record["count"] for token, record in said.items()
        }
        exact = np.exp(one.columns["record_logprob"][part].astype(float))
        assert np.allclose(exact, [said[token]["probability"] for token in one.targets.token_ids[part]], rtol=1e-5)
        weights = [record["weight"] for record in row["records"]]
        assert sorted(weights, reverse=True) == weights
        assert one.tokens[t : t + 2].tolist() == [row["token"]["id"], row["label"]["id"]]
        assert one.columns["document_start"][t] == row["document_start"]
        assert not part.stop - part.start or np.isclose(row["entropy"], one.columns["entropy"][t])
        assert bool(weights) == ("label_probability" in row)
        assert "rest" not in row  # 20 draws stand for everything


def test_one_of_each(tmp_path, capsys):
    """One round and one position that follows are in the singular, on the page, at a glance and on the card."""
    of = skl.Header(vocab_size=9, seq_len=2, kind="counts", rounds=1)
    with skl.ShardWriter(tmp_path / "a.skl", header=of) as writer:
        records = skl.SparseTargets(token_ids=np.array([1, 2]), counts=np.array([1, 1]), offsets=np.array([0, 1, 2]))
        writer.append([0, 1, 2], records)
    page = passage.page(passage.facts_of(read(tmp_path / "a.skl", positions="0:1")))
    assert "counts (1 round, multinomial)" in page
    assert page.endswith("\n1 position follows; the next: --positions 1:2\n")
    for verb, said in (("inspect", "sampler multinomial, 1 round\n"), ("card", "records of 1 draw per position")):
        assert 0 == main([verb, str(tmp_path / "a.skl")])
        assert said in capsys.readouterr().out


def test_rest(kept):
    """Of the heads of distributions, what was not kept is said; where no tokens are, neither is the label."""
    facts = passage.facts_of(read(kept))
    row = next(row for row in facts["rows"] if row["records"])
    assert 1 - sum(record["weight"] for record in row["records"]) == pytest.approx(row["rest"], abs=1e-4)
    assert not {"token", "label"} & row.keys()
    page = passage.page(facts)
    assert "The cache stores no tokens" in page
    assert "●" not in page


def line_of(page, text):
    [line] = [line for line in page.splitlines() if text in line]
    return line


def test_page():
    """Shares as numbers and bars, the label marked, also where it is not among the records; what has none is said."""
    token = lambda number, text, **more: {"id": number, "text": text, **more}  # noqa: E731
    rows = [
        {"position": 7, "token": token(1, "The"), "label": token(2, " 日本"), "document_start": True, "entropy": 1.25,
         "label_probability": 0.5, "records": [token(3, " a", weight=0.75), token(2, " 日本", weight=0.25)]},
        {"position": 8, "token": token(2, " 日本"), "label": token(4, "\x1b[2J"), "rest": 0.4,
         "records": [token(5, "x", weight=0.6, probability=0.00012)]},
        {"position": 9, "token": token(4, "\x1b[2J"), "label": token(6, "y"), "records": []},
    ]  # fmt: skip
    facts = {
        "path": "my-cache", "sequence": 3, "sequences": 12, "num_positions": 64, "positions": [7, 10], "rows": rows,
        "kind": "counts", "rounds": 20, "sampler": "multinomial", "tokenizer": "t", "tokens_stored": True,
    }  # fmt: skip
    page = passage.page(facts)
    assert page.startswith("my-cache: sequence 3 of 12, positions 7 to 9 of 64, counts (20 rounds,")
    assert "── new document ──" in page
    assert re.search(r'  7  "The" +0\.750 +██████ +" a"\n', page)
    assert re.search(r'\n +entropy 1\.25 +0\.250 +██ +● " 日本"\n', page)
    assert re.search(r"\n +p of ● 0\.500\n", page)
    assert re.search(r'  8  " 日本" +0\.600   1e-04 █+▊ +"x"\n', page)
    assert re.search(r"0\.400 +███▎ +the rest: all other tokens\n", page)
    assert re.search(r' - +● "\\x1b\[2J"  not among them\n', page)
    assert re.search(r'  9  "\\x1b\[2J" +● "y"  no record\n', page)
    assert page.endswith("\n54 positions follow; the next: --positions 10:13\n")
    at = columns(line_of(page, "not among them").partition("●")[0])
    assert at == columns(line_of(page, '● " 日本"').partition("●")[0])


def test_many_records_are_folded():
    """The heaviest are shown, the others together; the label's is shown wherever it stands."""
    records = [{"id": number, "weight": (30 - number) / 1000} for number in range(30)]
    row = {"position": 0, "token": {"id": 9}, "label": {"id": 29}, "records": records}
    facts = {
        "path": "c", "sequence": 0, "sequences": 1, "num_positions": 1, "positions": [0, 1], "rows": [row],
        "kind": "ratios", "rounds": 0, "sampler": "topk", "tokenizer": None, "ids_since": "x", "tokens_stored": True,
    }  # fmt: skip
    page = passage.page(facts)
    assert re.search(r"0\.001  +● 29\n", page)
    assert re.search(r"0\.104  █▋ +13 more together \(--json\)\n", page)


def test_a_prompt_without_records_is_text():
    """Positions in a row without records are one piece of text, of a few lines at most."""
    rows = [{"position": t, "token": {"id": t, "text": f"word{t} "}, "records": []} for t in range(200)]
    facts = {
        "path": "c", "sequence": 0, "sequences": 1, "num_positions": 200, "positions": [0, 200], "rows": rows,
        "kind": "counts", "rounds": 5, "sampler": "multinomial", "tokenizer": "t", "tokens_stored": True,
    }  # fmt: skip
    page = passage.page(facts)
    assert "  0  to 199: no records\n       word0 word1 word2" in page
    assert page.endswith("…\n")
    assert len(page.splitlines()) < 12


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_no_text_of_a_corpus_reaches_the_terminal_raw(whole, kept, data):
    """Whatever tokens say, each line is printable, has an encoding's characters, and ends before the last column."""
    found = read(data.draw(st.sampled_from([whole, kept])))
    hostile = st.text(st.characters(exclude_categories=()), max_size=8)
    texts = {token: data.draw(hostile) for token in found.ids()[:12]}
    width = data.draw(st.integers(60, 140))
    encoding = data.draw(st.sampled_from(["utf-8", "latin-1", "ascii"]))
    facts = passage.facts_of(found, dict.fromkeys(found.ids(), "\x1b]0;x\x07") | texts, "\x9bname")
    page = passage.page(facts, width, encoding)
    assert is_writable(page, encoding)
    for line in page.splitlines():
        assert line.isprintable()
        assert columns(line) <= min(max(width, 80), 120)


def test_json_holds_no_control_character(tmp_path, capfd, monkeypatch):
    """What JSON would print raw, such as a C1 control, is written as an escape, and comes back whole."""
    path = write(tmp_path / "a", 1)
    whole = passage.facts_of
    monkeypatch.setattr(
        passage, "facts_of", lambda found, *_: whole(found, dict.fromkeys(found.ids(), "\x9b\u202e\x7f語"), "t")
    )
    assert 0 == main(["inspect", str(path), "--sequence", "0", "--json"])
    out = capfd.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert "語" in out
    assert "\x9b\u202e\x7f語" == json.loads(out)["rows"][0]["token"]["text"]


@pytest.mark.parametrize(
    ("status", "words", "message"),
    [
        (1, ("--sequence", "4"), "sequence 4 is asked for, and the cache has 4, numbered from 0"),
        (2, ("--sequence", "-1"), "sequence must be >= 0, got -1"),
        (
            1,
            ("--sequence", "0", "--positions", "4:9"),
            "positions 4:9 are asked for, and sequence 0 has 8; give A:B with 0 <= A",
        ),
        (1, ("--sequence", "0", "--positions", "5:5"), "positions 5:5 are asked for, and sequence 0 has 8"),
        (2, ("--sequence", "0", "--positions", "5"), "the positions to show must be A:B, such as 0:32, got '5'"),
        (2, ("--positions", "0:5"), "positions is about one sequence; say which: --sequence I"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path, capfd, status, words, message):
    """A sequence or position that is not there is refused in one line with both values."""
    assert status == main(["inspect", str(write(tmp_path / "a", 4)), *words])
    assert message in capfd.readouterr().err


def test_an_empty_cache(tmp_path, capfd):
    """It has no sequence to show, and inspect says what it is all the same."""
    path = str(write(tmp_path / "a", 0))
    assert 1 == main(["inspect", path, "--sequence", "0"])
    assert "sequence 0 is asked for, and the cache holds no sequence" in capfd.readouterr().err
    assert 0 == main(["inspect", path])


def test_a_damaged_sequence_is_named(tmp_path, capfd):
    """By file, block and byte, and by its number in the cache; its neighbours are shown."""
    path = write(tmp_path / "a", 4)
    shard = path / "shard-00001.skl"
    content = bytearray(shard.read_bytes())
    content[4096 + 80] ^= 1
    shard.write_bytes(content)
    assert 1 == main(["inspect", str(path), "--sequence", "3"])
    err = capfd.readouterr().err
    assert "shard-00001.skl: block 0: byte 4096: " in err
    assert "it is sequence 3 of the cache, sklformat verify lists all that is damaged" in err
    assert 0 == main(["inspect", str(path), "--sequence", "2", "--positions", "6:"])


def test_ids_where_no_tokenizer_is_at_hand(tmp_path, capfd):
    """Without a tokenizer ids are shown, and how to see text."""
    path = write(tmp_path / "a", 1, vocab_size=VOCAB)
    assert 0 == main(["inspect", str(path), "--sequence", "0"])
    out = capfd.readouterr().out
    assert "Tokens are shown by their ids: no tokenizer" in out
    assert f"\n  0  {skl.open(path)[0].tokens[0]} " in out
