"""BOS and special tokens: the teacher reads text as its tokenizer begins it, and every verb follows the cache."""

import json

import numpy as np
import pytest
import tiny
from mmap_ninja import RaggedMmap

import sklformat as skl
from sklformat.cli import main
from sklformat.distill.models import loading, tokenization
from sklformat.distill.text.documents import Document
from sklformat.distill.text.packing import PackedSequences

SEQ_LEN = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher whose tokenizer puts <bos> before a text, and a folder of text."""
    root = tmp_path_factory.mktemp("bos")
    documents = tiny.make_documents(6, 40)
    tokenizer = tiny.with_template(tiny.train_tokenizer(documents), "<bos> $A")
    tiny.write_model(root / "teacher", tokenizer)
    (root / "text").mkdir()
    for document in documents:
        (root / "text" / document.name).write_text(document.text)
    return root


@pytest.fixture
def cache(place, tmp_path, capfd):
    """Run ``sklformat cache`` over the text, or other tokens: status and what it said on stderr."""

    def run(out, *words):
        given = () if "--tokens" in words or "--text" in words else ("--text", place / "text")
        flags = ("--out", tmp_path / out, "--seq-len", SEQ_LEN, "--rounds", 5, *given, *words)
        status = main(["cache", "--teacher", str(place / "teacher"), *map(str, flags)])
        return status, capfd.readouterr().err

    return run


@pytest.fixture(scope="module")
def bos_id(place):
    return loading.load_tokenizer(place / "teacher").bos_token_id


def capture_of(directory):
    return skl.open(directory).header.capture["packing"]


def test_cache_follows_the_tokenizer(cache, place, tmp_path, bos_id):
    """By default each document begins with BOS, the header says so, and eval, check and train pack in the same way."""
    status, err = cache("cache", "--columns", "document_start")
    assert (status, "warning" in err) == (0, False), err
    found = skl.open(tmp_path / "cache")
    assert {"at": "document", "id": bos_id} == capture_of(tmp_path / "cache")["bos"]
    tokens = np.concatenate([found[0].tokens, *(found[i].tokens[1:] for i in range(1, len(found)))])
    assert bos_id == tokens[0]
    separators = np.flatnonzero(tokens == loading.load_tokenizer(place / "teacher").eos_token_id)
    assert (tokens[separators[:-1] + 1] == bos_id).all()
    for i in range(len(found)):
        assert (found[i].columns["document_start"] == (found[i].tokens == bos_id)).all()
    assert 0 == main(["check", str(tmp_path / "cache"), "--tokens", str(tmp_path / "cache/tokens")])
    assert len(found) == len(PackedSequences(tmp_path / "cache/tokens", seq_len=SEQ_LEN, separator_id=0, seed=0))


def test_each_place_of_bos(cache, tmp_path, bos_id):
    """--bos says where it stands; a window begins with it and stays as long."""
    for bos, first, count in (("none", False, 0), ("window", True, 1)):
        assert 0 == cache(bos, "--bos", bos)[0]
        found = skl.open(tmp_path / bos)
        assert all((sequence.tokens[0] == bos_id) == first for sequence in found)
        assert all(np.count_nonzero(sequence.tokens == bos_id) == count for sequence in found)
        assert {SEQ_LEN + 1} == {sequence.tokens.size for sequence in found}
    assert "bos" not in capture_of(tmp_path / "none")


def test_a_cache_of_before_is_resumed_as_it_was_begun(cache, tmp_path):
    """One that was begun without BOS, when nothing said so, goes on without, with a warning; its bytes are the same."""
    assert 0 == cache("old", "--bos", "none")[0]
    expected = skl.open(tmp_path / "old").fingerprint
    facts = json.loads((tmp_path / "old/tokens/store.json").read_text())
    for name in ("bos", "bos_id", "special_tokens"):
        del facts[name]
    (tmp_path / "old/tokens/store.json").write_text(json.dumps(facts | {"version": 1}))
    for path in (tmp_path / "old/manifest.json", *(tmp_path / "old").glob("*.skl")):
        path.unlink()
    status, err = cache("old")
    assert 0 == status
    assert f"warning: {tmp_path / 'old'} was begun without BOS, which the tokenizer puts before a text, and is" in err
    assert expected == skl.open(tmp_path / "old").fingerprint
    status, err = cache("old", "--bos", "document")
    assert 1 == status
    assert "in another way (--bos none, now --bos document (id 290))" in err


def test_tokens_without_bos_are_noticed(cache, place, tmp_path, bos_id):
    """Token sources are looked at: without BOS a warning, with it none, and it is not put twice."""
    tokenizer = loading.load_tokenizer(place / "teacher")
    ids = [
        np.array(part)
        for part in tokenization.TextEncoder(tokenizer, bos="none")([d.text for d in tiny.make_documents(6, 40)])
    ]
    RaggedMmap.from_lists(tmp_path / "without", ids)
    RaggedMmap.from_lists(tmp_path / "with", [np.concatenate([[bos_id], part]) for part in ids])
    tiny.write_store(tmp_path / "store", tokenizer, [Document(f"{i}", "alpha beta " * 20) for i in range(3)])
    told = "documents do not begin with <bos>, which the tokenizer puts before a text"
    for source, flags, warned in (
        ("without", (), False),  # auto puts it
        ("without", ("--bos", "none"), False),
        ("store", (), True),
        ("store", ("--bos", "none"), False),
        ("with", (), False),
        ("with", (), False),  # again: all there already
        ("with", ("--bos", "none"), False),
    ):
        status, err = cache(f"{source}{len(flags)}", "--tokens", tmp_path / source, *flags)
        assert (0, warned) == (status, told in err), err
        assert "begun without BOS" not in err
    assert skl.open(tmp_path / "without0").fingerprint != skl.open(tmp_path / "with0").fingerprint
    assert skl.open(tmp_path / "without0")[3].tokens.tolist() == skl.open(tmp_path / "with0")[3].tokens.tolist()
    for i in (0, 2):
        assert ("bos" in capture_of(tmp_path / f"without{i}")) == (i == 0)
    status, err = cache("twice", "--tokens", tmp_path / "with", "--bos", "document")
    assert (1, f"begin with BOS (id {bos_id}) already; give --bos none" in err) == (status, True)
    status, err = cache("other", "--tokens", tmp_path / "store", "--bos", "document")
    assert (1, "its tokens go with --bos none, asked for is --bos document" in err) == (status, True)


def test_names_of_special_tokens(cache, tmp_path):
    """They are plain characters unless kept; what looks like rendered chats is said, with the flag that helps."""
    chat = "<bos><sep>alpha beta<sep>gamma delta<sep>"
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"text": chat}) + "\n" for _ in range(20)))
    status, err = cache("text", "--text", tmp_path / "chats.jsonl")
    assert 0 == status
    assert (
        "warning: the text holds 80 names of special tokens such as <sep>, taken as plain characters; this looks like "
        "chats that a template rendered: give --special-tokens keep\n"
    ) in err
    status, err = cache("keep", "--text", tmp_path / "chats.jsonl", "--special-tokens", "keep")
    assert (0, "taken as the tokens themselves; this looks" in err) == (status, True)
    assert "keep" == capture_of(tmp_path / "keep")["special_tokens"]
    tokens = skl.open(tmp_path / "keep")[0].tokens.tolist()
    assert [290, 291] == tokens[:2]  # one <bos>, not two


def test_eval_and_check_follow(cache, place, tmp_path, capfd):
    """eval encodes text as the student's tokenizer begins it, and says so when asked otherwise; check names BOS."""
    assert 0 == cache("cache")[0]
    losses = {}
    for name, flags in {
        "store": ("--tokens", tmp_path / "cache/tokens"),
        "text": ("--text", place / "text"),
        "none": ("--text", place / "text", "--bos", "none"),
    }.items():
        words = ("--student", place / "teacher", "--seq-len", SEQ_LEN, *flags, "--json")
        assert 0 == main(["eval", *map(str, words)])
        losses[name] = json.loads(capfd.readouterr().out)["lm_loss"]
    assert losses["store"] == losses["text"] != losses["none"]
    assert 0 == cache("none", "--bos", "none")[0]
    assert 1 == main(["check", str(tmp_path / "cache"), "--tokens", str(tmp_path / "none/tokens")])
    assert "its tokens go with --bos none, the cache was captured with --bos document" in capfd.readouterr().err
