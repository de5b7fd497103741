"""The dataset card: a header that parses and has a hub's fields, and nothing that the cache's header does not say."""

import json
import re

import pytest
from operation_data import header, sequence, write

import sklformat as skl
from sklformat.cli import main
from sklformat.files.yaml import read_settings
from sklformat.settings.inspection import CardConfig
from sklformat.views.card import write_card

pytest.importorskip("yaml")
CAPTURE = {
    "teacher": {"name": "org/big", "revision": "main"},
    "author": {"name": "teacher"},
    "packing": {"num_documents": 12, "num_tokens": 3456},
    "versions": {"sklformat": "0.9"},
}


def fields_of(text, directory):
    """The YAML header, as a parser reads it."""
    (directory / "head.yaml").write_text(re.match(r"---\n(.*?)---\n\n# ", text, re.DOTALL)[1])
    return read_settings(directory / "head.yaml")


def test_card(tmp_path, capfd):
    """The file holds the card: a header with the fields of a hub, what the cache is, how to load and check it."""
    path = write(tmp_path / "my cache|1", 4, capture=CAPTURE, columns=("entropy",))
    out = tmp_path / "new" / "README.md"
    assert 0 == main(
        ["card", str(path), "--out", str(out), "--license", "cc-by-4.0", "--name", "Big: 語 #1", "--text", "org/news"]
    )
    printed = capfd.readouterr()
    assert (f"{out}: the card of {path}\n", "") == printed
    text = out.read_text()
    assert {
        "license": "cc-by-4.0",
        "pretty_name": "Big: 語 #1",
        "tags": ["knowledge-distillation", "sparse-logits", "sklformat", "counts", "multinomial"],
        "task_categories": ["text-generation"],
        "size_categories": ["n<1K"],
        "viewer": False,
    } == fields_of(text, tmp_path)
    for said in (
        "What `org/big` predicts at each position of a text, as a few (token id, count) records of 20 draws",
        "| Teacher | org/big, revision main; fingerprint unknown |",
        "| Text | org/news, as whoever published this says; 12 documents, 3,456 tokens; ",
        "| Sequences | 4, each of 8 positions |",
        'Author of the text | {"name": "teacher"} |',
        "| Made with | sklformat 0.9 |",
        'skl.open("my-cache-1")',
        "sklformat train --cache my-cache-1 --tokenizer org/big --out my-student",
        "sklformat verify my-cache-1",
        f"`{skl.open(path).fingerprint}`",
        "`cc-by-4.0`, as whoever published this says.",
        "@inproceedings{anshumann2025sparse,",
    ):
        assert said in text
    assert str(tmp_path) not in text
    assert 1 == main(["card", str(path), "--out", str(out)])
    assert f"{out}: is there, and may hold what somebody wrote; remove it" in capfd.readouterr().err
    assert text == out.read_text()


def test_the_licence_is_a_blank_that_is_said(tmp_path, capfd):
    """Without a licence the card has a value that no hub takes, says so in its text, and the verb says it too."""
    path = write(tmp_path / "a", 1)
    assert 0 == main(["card", str(path)])
    out, err = capfd.readouterr()
    assert "FILL-IN" == fields_of(out, tmp_path)["license"]
    assert "**Not stated yet.** Fill in `license: FILL-IN` above before you publish this" in out
    assert (
        "sklformat card: the licence is left as FILL-IN, which a hub refuses; fill it in, or give --license; the cache "
        "does not name its teacher; give --teacher; no cache names its text; give --text\n"
    ) == err
    assert 0 == main(["card", str(path), "--json"])
    assert out == json.loads(capfd.readouterr().out)["text"]


def test_hostile_names(tmp_path):
    """A teacher's name is no markup, no command of the shell, no YAML and no escape of a terminal."""
    name = "a`b|c\n---\nlicense: mit\x1b[2J$(rm)"
    path = write(tmp_path / "a", 1, capture={"teacher": {"name": name}})
    card = write_card(CardConfig(path=str(path)))
    assert all(line.isprintable() for line in card.text.splitlines())
    fields = fields_of(card.text, tmp_path)
    assert "FILL-IN" == fields["license"]
    assert "Sparse logits of a`b|c\\n---\\nlicense: mit\\x1b[2J$(rm)" == fields["pretty_name"]
    assert "--tokenizer THE-TOKENIZER --out" in card.text
    plain = r"a\`b\|c\\n---\\nlicense: mit\\x1b\[2J\$(rm)"
    assert f"| Teacher | {plain}; " in card.text
    assert f"\n# Sparse logits of {plain}\n" in card.text


def test_a_heading_is_no_markup(tmp_path):
    """Whatever a teacher is called, its name in the heading and in the table is text."""
    name = "<script>alert(1)</script> [x](javascript:y) &lt; ~~z~~ $1$ a_b_c"
    card = write_card(CardConfig(path=str(write(tmp_path / "a", 1, capture={"teacher": {"name": name}}))))
    (heading,) = [line for line in card.text.splitlines() if line.startswith("# ")]
    rows = [line for line in card.text.splitlines() if line.startswith(("| Teacher", "| Tokenizer"))]
    for line in (heading, *rows):
        assert not re.search(r"(?<!\\)[<>\[\]&~$_*`]", line), line


def test_names_that_the_cache_has_not(tmp_path):
    """The teacher's may be given where the cache has none, and the card says by whom; another is refused."""
    path = str(write(tmp_path / "a", 1, capture={"teacher": {"dtype": "float32"}}))
    card = write_card(CardConfig(path=path, license="mit", teacher="org/big", text="org/news"))
    assert "" == card.blanks
    assert "| Teacher | org/big, as whoever published this says; " in card.text
    assert "| Tokenizer | org/big, 300 ids; " in card.text
    assert "pretty_name: Sparse logits of org/big\n" in card.text
    assert "--tokenizer org/big --out" in card.text
    path = str(write(tmp_path / "b", 1, capture={"teacher": {"name": "org/big"}}))
    assert write_card(CardConfig(path=path)).text == write_card(CardConfig(path=path, teacher="org/big")).text
    with pytest.raises(ValueError, match="b: the cache names its teacher, org/big, not org/small; leave out --teacher"):
        write_card(CardConfig(path=path, teacher="org/small"))


@pytest.mark.parametrize(
    ("count", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10_000, "10K<n<100K"), (10**12 - 1, "100B<n<1T"),
     (10**12, "n>1T"), (10**15, "n>1T")],
)  # fmt: skip
def test_sizes(tmp_path, monkeypatch, count, category):
    """The category is that of the number of sequences, by the hub's names."""
    path = str(write(tmp_path / "a", 1))
    whole = skl.cache.report.inspect(path)
    monkeypatch.setattr("sklformat.views.overview.inspect", lambda _: whole | {"sequences": count})
    assert [category] == fields_of(write_card(CardConfig(path=path)).text, tmp_path)["size_categories"]


def test_what_has_no_card(tmp_path, capfd):
    """A licence that is no identifier, an empty name and an unfinished cache are refused."""
    writer = skl.CacheWriter(tmp_path, header=header(), sequences_per_shard=3)
    writer.append(*sequence(header(), 0))
    assert 1 == main(["card", str(tmp_path)])
    assert "the cache is unfinished, and a card says how large it is; finish it first" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"the licence must be as the hub names it.*got 'Apache 2\.0'"):
        CardConfig(path="a", license="Apache 2.0")
    for of, settings in (("dataset", {"name": " "}), ("teacher", {"teacher": ""}), ("text", {"text": "\n"})):
        with pytest.raises(ValueError, match=f"the name of the {of} is empty; give one, or leave it out"):
            CardConfig(path="a", **settings)
