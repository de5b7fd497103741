"""The page of ``sklformat view``: its data, what it escapes, its size, and what it says of bad sequences."""

import json
import re

import numpy as np
import pytest
from operation_data import write

import sklformat as skl
from sklformat.cli import main
from sklformat.settings.inspection import ViewConfig
from sklformat.views.page import read_stretch, render

HOSTILE = "</script><script>window.hit = 1</script>\u2028<!--"


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def stretch_of(*caches, **settings):
    return read_stretch(ViewConfig(caches=tuple(map(str, caches)), **settings))


def test_data_is_what_the_cache_holds(tmp_path):
    """Ids, weights and rest of each position, and the label's confidence from the records where nothing is exact."""
    cache = skl.open(write(tmp_path / "a", 4))
    data = data_of(render(stretch_of(tmp_path / "a")))
    assert [0, 1, 2, 3] == [one["number"] for one in data["sequences"]]
    for shown, held in zip(data["sequences"], cache, strict=True):
        said = shown["said"][0]
        assert held.tokens.tolist() == shown["tokens"]
        assert held.targets.token_ids.tolist() == said["ids"]
        np.testing.assert_allclose(held.targets.counts / 20, said["weights"], atol=1e-4)
        assert [0] * 8 == said["rest"]
        for t, label in enumerate(said["label"]):
            part = slice(*held.targets.offsets[t : t + 2])
            is_label = held.targets.token_ids[part] == held.tokens[t + 1]
            expected = None if part.start == part.stop else held.targets.counts[part][is_label].sum() / 20
            assert expected == pytest.approx(label, abs=1e-4)


def test_exact_confidence_and_rest(tmp_path):
    """The column decides where it is; what ratios leave out is the rest."""
    cache = skl.open(write(tmp_path / "a", 1, kind="ratios", rounds=0, columns=("label_logprob",)))
    said = data_of(render(stretch_of(tmp_path / "a")))["sequences"][0]["said"][0]
    assert said["exact"]
    has = np.diff(cache[0].targets.offsets) > 0
    np.testing.assert_allclose(
        np.exp(cache[0].columns["label_logprob"].astype(float))[has],
        [p for p in said["label"] if p is not None],
        atol=1e-4,
    )
    offsets = cache[0].targets.offsets
    kept = [sum(cache[0].targets.weights[offsets[t] : offsets[t + 1]]) for t in range(8)]
    np.testing.assert_allclose(np.where(has, np.maximum(1 - np.array(kept), 0), 0), said["rest"], atol=1e-4)


def test_text_cannot_be_markup(tmp_path):
    """Hostile text ends no script element, comes back whole, and leaves the page plain ASCII data."""
    stretch = stretch_of(write(tmp_path / "a", 1))
    page = render(stretch, dict.fromkeys(stretch.ids(), HOSTILE))
    assert 2 == page.count("</script>")
    assert "window.hit" in page
    assert "\u2028" not in page
    assert {HOSTILE} == set(data_of(page)["texts"].values())
    assert not re.search(r"(src|href)=|https?://", page)


def test_bad_sequences_are_named(tmp_path):
    """Damage, other tokens and a missing sequence are said in place of the records; the others are shown."""
    write(tmp_path / "a", 4)
    write(tmp_path / "b", 3, first=1)
    shard = tmp_path / "a" / "shard-00000.skl"
    content = bytearray(shard.read_bytes())
    content[4096 + 80] ^= 1
    shard.write_bytes(content)
    said = [one["said"] for one in data_of(render(stretch_of(tmp_path / "a", tmp_path / "b")))["sequences"]]
    assert said[0][0]["fault"].startswith("damaged: ")
    assert "ids" in said[1][0]
    assert said[1][1]["fault"].startswith("misaligned: alignment checksum 0x")
    assert "sequence 3 is not here; this cache has 3" == said[3][1]["fault"]


def test_ten_thousand_positions_are_small(tmp_path):
    """10 000 positions of 12 records with text stay below 5 MB."""
    rng = np.random.default_rng(0)
    header = skl.Header(vocab_size=100_000, seq_len=1000, kind="counts", rounds=12)
    with skl.CacheWriter(tmp_path / "a", header=header, sequences_per_shard=10) as writer:
        for _ in range(10):
            ids = np.sort(rng.integers(0, 8000, (1000, 12)) + np.arange(12) * 8000, axis=1)
            targets = skl.SparseTargets(
                token_ids=ids.ravel(), counts=np.ones(12_000, np.uint8), offsets=np.arange(1001) * 12
            )
            writer.append(rng.integers(0, 100_000, 1001), targets)
    stretch = stretch_of(tmp_path / "a")
    page = render(stretch, {token: f" token{token}" for token in stretch.ids()})
    assert 10 == len(stretch.numbers)
    assert len(page.encode()) <= 5_000_000


def test_command(tmp_path, capsys):
    """The verb writes the page; a sequence that is not there and no cache at all are refused in one line."""
    write(tmp_path / "a", 4)
    out = tmp_path / "page.html"
    assert 0 == main(["view", str(tmp_path / "a"), "--out", str(out), "--first", "2", "--json"])
    expected = {"page": str(out), "sequences": 2, "bytes": out.stat().st_size}
    expected["tokens"] = "as ids; --tokenizer shows their text"
    assert expected == json.loads(capsys.readouterr().out)
    assert 1 == main(["view", str(tmp_path / "a"), "--out", str(out), "--first", "4"])
    assert "first is sequence 4 of 4; give less" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a page shows one cache or more, got none"):
        ViewConfig(caches=())
