"""The page of ``sklformat view``: its data, what it escapes, its size, and what it says of bad sequences."""

import base64
import hashlib
import itertools
import json
import re

import numpy as np
import pytest
from operation_data import write
from page_data import write_beside

import sklformat as skl
from sklformat.cli import main
from sklformat.settings.inspection import ViewConfig
from sklformat.views.page import read_stretch, render, short_names

HOSTILE = "</script><script>window.hit = 1</script>\u2028<!--"


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def stretch_of(*caches, **settings):
    return read_stretch(ViewConfig(caches=tuple(map(str, caches)), **settings))


def parts_of(one):
    """Ids and weights of each position of a cache's sequence, as a dict."""
    values = one.targets.counts if one.targets.counts is not None else one.targets.weights
    offsets = one.targets.offsets
    return [
        dict(zip(one.targets.token_ids[a:b].tolist(), values[a:b].tolist(), strict=True))
        for a, b in itertools.pairwise(offsets.tolist())
    ]


def rows_of(shown, of):
    """Of each position the rows of a page: (id, value) by a teacher or student."""
    ends = list(itertools.accumulate(shown["sizes"], initial=0))
    return [list(zip(shown["ids"][a:b], of[a:b], strict=True)) for a, b in itertools.pairwise(ends)]


def test_data_is_what_the_caches_hold(tmp_path):
    """Each position has a row for its label, then one for each id of any cache, with each cache's count or 0."""
    caches = [skl.open(write(tmp_path / "a", 4)), skl.open(write_beside(tmp_path / "b", tmp_path / "a"))]
    data = data_of(render(stretch_of(tmp_path / "a", tmp_path / "b")))
    assert [("a", True, 20), ("b", True, 7)] == [(one["name"], one["drawn"], one["scale"]) for one in data["teachers"]]
    assert [0, 1, 2, 3] == [one["number"] for one in data["sequences"]]
    for number, shown in enumerate(data["sequences"]):
        held = [parts_of(cache[number]) for cache in caches]
        assert caches[0][number].tokens.tolist() == shown["tokens"]
        for c, teacher in enumerate(shown["teachers"]):
            assert {"weights"} == set(teacher)
            for t, rows in enumerate(rows_of(shown, teacher["weights"])):
                label = shown["tokens"][t + 1]
                ids = [label, *sorted((set(held[0][t]) | set(held[1][t])) - {label})]
                assert [(token, held[c][t].get(token, 0)) for token in ids] == rows


def test_exact_confidence_and_rest(tmp_path):
    """The column decides where it is; what the records of ratios leave out is the rest; no weight is shown as 0."""
    cache = skl.open(write(tmp_path / "a", 1, kind="ratios", rounds=0, columns=("label_logprob",)))
    data = data_of(render(stretch_of(tmp_path / "a")))
    shown = data["sequences"][0]
    teacher = shown["teachers"][0]
    assert (False, 10_000) == (data["teachers"][0]["drawn"], data["teachers"][0]["scale"])
    exact = np.exp(cache[0].columns["label_logprob"].astype(float))
    np.testing.assert_allclose(exact, np.array(teacher["label"]) / 10_000, atol=6e-5)
    held = parts_of(cache[0])
    np.testing.assert_allclose(
        [max(1 - sum(part.values()), 0) for part in held], np.array(teacher["rest"]) / 10_000, atol=6e-5
    )
    for part, rows in zip(held, rows_of(shown, teacher["weights"]), strict=True):
        assert set(part) == {token for token, value in rows if value}
        np.testing.assert_allclose(
            [part[token] for token, value in rows if value], [v / 10_000 for _, v in rows if v], atol=6e-5
        )


def test_students_have_a_value_for_each_row(tmp_path):
    """What students say stands beside what teachers say, row for row; one that was not asked says nothing."""
    stretch = stretch_of(write(tmp_path / "a", 2))
    first = [np.linspace(0, 1, rows.ids.size, dtype=np.float32) for rows in stretch.rows]
    page = render(stretch, students=["runs/x/model", "runs/y/model"], answers=[first, [None, first[1]]])
    data = data_of(page)
    assert [("x", "runs/x/model"), ("y", "runs/y/model")] == [(one["name"], one["path"]) for one in data["students"]]
    told = [shown["students"] for shown in data["sequences"]]
    assert [len(one["ids"]) for one in data["sequences"]] == [len(of[0]) for of in told]
    assert None is told[0][1]
    assert [10_000, 10_000] == [of[0][-1] for of in told]
    assert told[1][0] == told[1][1]


def test_sequences_without_tokens_are_shown_by_their_records(tmp_path):
    """Where nobody stores tokens there is a row for each id of a record, and no other."""
    cache = skl.open(write(tmp_path / "a", 1, store_tokens=False))
    shown = data_of(render(stretch_of(tmp_path / "a")))["sequences"][0]
    assert shown["tokens"] is None
    assert parts_of(cache[0]) == [dict(rows) for rows in rows_of(shown, shown["teachers"][0]["weights"])]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["my-cache"], ["my-cache"]),
        (["runs/my-cache"], ["my-cache"]),
        (["."], ["."]),
        (["/data/runs/student/model"], ["student/model"]),
        (["run/students/ce/model", "run/students/full/model"], ["ce", "full"]),
        (["a", "a/b"], ["a", "a/b"]),
        (["s3://x/one", "s3://x/two"], ["one", "two"]),
        (["same", "same"], ["same", "same"]),
        ([], []),
    ],
)
def test_names_are_what_tells_paths_apart(paths, names):
    """Of several paths what they share is left out; of one its end is shown."""
    assert names == short_names(paths)


def test_the_page_allows_nothing_but_itself(tmp_path):
    """Its policy names the digests of its own style and script, and no other source."""
    page = render(stretch_of(write(tmp_path / "a", 1)))
    said = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    for kind, pattern in (("style", r"<style>(.*?)</style>"), ("script", r"<script>(.*?)</script>")):
        digest = base64.b64encode(hashlib.sha256(re.search(pattern, page, re.DOTALL)[1].encode()).digest()).decode()
        said = said.replace(f" {kind}-src 'sha256-{digest}';", "")
    assert "default-src 'none'; base-uri 'none'; form-action 'none'" == said


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
    shown = data_of(render(stretch_of(tmp_path / "a", tmp_path / "b")))["sequences"]
    said = [one["teachers"] for one in shown]
    assert said[0][0]["fault"].startswith("damaged: ")
    assert "weights" in said[1][0]
    assert said[1][1]["fault"].startswith("misaligned: alignment checksum 0x")
    assert "sequence 3 is not here; this cache has 3" == said[3][1]["fault"]


def test_ten_thousand_positions_are_small(tmp_path):
    """10 000 positions of 12 records with text, another teacher and two students stay below 5 MB."""
    rng = np.random.default_rng(0)
    header = skl.Header(vocab_size=100_000, seq_len=1000, kind="counts", rounds=12)
    tokens = rng.integers(0, 100_000, (10, 1001))
    for name in "ab":
        with skl.CacheWriter(tmp_path / name, header=header, sequences_per_shard=10) as writer:
            for number in range(10):
                # As teachers do, both have most of their records in common.
                ids = np.sort(
                    np.random.default_rng(number).integers(0, 8000, (1000, 12)) + np.arange(12) * 8000, axis=1
                )
                ids[:, :3] += name == "b"
                targets = skl.SparseTargets(
                    token_ids=ids.ravel(), counts=np.ones(12_000, np.uint8), offsets=np.arange(1001) * 12
                )
                writer.append(tokens[number], targets)
    stretch = stretch_of(tmp_path / "a", tmp_path / "b")
    answers = [rng.random(rows.ids.size, np.float32) / 10 for rows in stretch.rows]
    page = render(stretch, {token: f" token{token}" for token in stretch.ids()}, ["x", "y"], [answers, answers])
    assert 10 == len(stretch.numbers)
    assert len(page.encode()) <= 5_000_000


def test_command(tmp_path, capsys, monkeypatch):
    """The verb writes the page, to page.html where nothing else is said; it refuses in one line."""
    write(tmp_path / "a", 4)
    write(tmp_path / "empty", 0)
    monkeypatch.chdir(tmp_path)
    assert 0 == main(["view", "a", "--first", "2", "--json"])
    expected = {"page": "page.html", "sequences": 2, "bytes": (tmp_path / "page.html").stat().st_size}
    expected["tokens"] = "as ids; --tokenizer shows their text"
    assert expected == json.loads(capsys.readouterr().out)
    assert 0 == main(["view", "a", "-o", "new/b.html"])
    assert "new/b.html" in capsys.readouterr().out
    assert 0 == main(["view", "a", "--positions", "1"])
    assert "sequences  1 of 4, from number 0; --positions shows more\n" in capsys.readouterr().out
    assert 0 == main(["view", "a", "--first", "3"])
    assert "sequences  1 of 4, from number 3\n" in capsys.readouterr().out
    for words, said in {
        ("a", "--first", "4"): "a: --first 4 is beyond its last sequence, 3",
        ("empty",): "empty: holds no sequence, so a page has nothing to show",
        ("a", "--port", "8000"): "port 8000 belongs to --serve, which is not given",
        ("a", "--serve", "--port", "65536"): "port must be <= 65535, got 65536",
    }.items():
        assert main(["view", *words])
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="a page shows one cache or more, got none"):
        ViewConfig(caches=())
