"""Caches on one sheet: what is drawn of them, that the sheet can be read, and what is refused."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from sheet_data import make_run, overlaps

import sklformat as skl
from sklformat.cli import main
from sklformat.errors import CorruptError, MissingShardError, UnsupportedError
from sklformat.plot import draw_caches, plot_caches
from sklformat.settings.inspection import PlotConfig
from sklformat.views.sheets import plot, row_of


def make(path, *, kind="counts", shift=0, seed=0, rounds=20, k=6):
    """12 sequences of 64 positions; the label is drawn as often as it is right."""
    rng = np.random.default_rng(seed)
    rounds = rounds if kind == "counts" else 0
    sampler = "multinomial" if kind == "counts" else "topk"
    header = skl.Header(vocab_size=400, seq_len=64, kind=kind, rounds=rounds, sampler=sampler)
    with skl.ShardWriter(path, header=header) as writer:
        for _ in range(12):
            tokens = rng.integers(0, 400, 65)
            ids, values, offsets = [], [], [0]
            for label in np.roll(tokens, shift)[1:]:
                others = rng.choice(np.delete(np.arange(400), label), k, replace=False)
                own = rng.dirichlet(0.3 * np.ones(k))
                others[rng.choice(k, p=own)] = label
                said = dict(zip(others.tolist(), rng.multinomial(rounds, own) if rounds else own, strict=True))
                said = {token: value for token, value in sorted(said.items()) if value > 1e-5}
                ids += said
                values += said.values()
                offsets.append(len(ids))
            given = {"counts": np.array(values)} if rounds else {"weights": np.array(values) / (1 + 1e-3)}
            writer.append(tokens, skl.SparseTargets(token_ids=np.array(ids), offsets=np.array(offsets), **given))
    return path


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """One of counts, and one of ratios."""
    place = tmp_path_factory.mktemp("caches")
    return [make(place / "counts.skl"), make(place / "ratios.skl", kind="ratios")]


def rows_of(paths, *, by_weight=False):
    return [row_of(skl.stats(path), path.stem, by_weight=by_weight) for path in paths]


def test_the_notes_of_one_sequence(tmp_path):
    """In the singular; bytes of a thousand or more without a power of ten."""
    of = skl.Header(vocab_size=9, seq_len=0, kind="counts", rounds=20)
    with skl.ShardWriter(tmp_path / "a.skl", header=of) as writer:
        writer.append(
            [0, 1], skl.SparseTargets(token_ids=np.array([1]), counts=np.array([20]), offsets=np.array([0, 1]))
        )
    assert ["1 sequence", "4,416 bytes per position"] == row_of(skl.stats(tmp_path / "a.skl"), "a")["notes"]


def test_what_is_drawn_of_a_cache(caches):
    """The figures of stats, as shares and for each position."""
    found = skl.stats(caches[0])
    row = row_of(found, "mine")
    assert "mine" == row["name"]
    assert "12 sequences" == row["notes"][0]
    assert 1 == pytest.approx(sum(share for _, share in row["uniques"])) == sum(share for _, share in row["sizes"])
    mean = sum(number * share for number, share in row["uniques"])
    assert found["unique_tokens"]["mean"] == pytest.approx(mean)
    assert 20 * 12 * 64 / found["records"] == pytest.approx(sum(count * share for count, share in row["sizes"]))
    assert found["bytes"]["total"] == pytest.approx(12 * 64 * sum(row["bytes"].values()))
    assert [*range(0, 64, 4)] == [position for position, _ in row["in_support"]]
    assert found["labels"]["expected"]["mean"] == row["expected"]
    assert found["labels"]["reliability"] == row["reliability"]


def test_counts_beside_ratios_are_weights(caches):
    """Both from each power of two to the next."""
    for row in rows_of(caches, by_weight=True):
        assert all(np.log2(weight).is_integer() for weight, _ in row["sizes"])
        assert 1 == pytest.approx(sum(share for _, share in row["sizes"]))
    counts = dict(row_of(skl.stats(caches[0]), "a")["sizes"])
    weights = dict(rows_of(caches, by_weight=True)[0]["sizes"])
    assert weights[0.5] == pytest.approx(sum(share for count, share in counts.items() if 10 <= count < 20))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("by_weight", [False, True])
def test_no_labels_overlap(caches, count, by_weight):
    """With any number of caches and long names."""
    rows = (rows_of(caches, by_weight=True) if by_weight else rows_of(caches[:1])) * 8
    rows = [{**row, "name": f"${i}$-a-long-name-of-everything-" * 5} for i, row in enumerate(rows[:count])]
    assert [] == overlaps(draw_caches(rows, by_weight=by_weight))


def test_caches_differ_without_colour(caches):
    """Each of eight caches has a colour, a line, a marker and a hatch of its own."""
    figure = draw_caches(rows_of(caches[:1]) * 8)
    lines = figure.axes[0].get_lines()
    bars = [patch for patch in figure.axes[3].patches if isinstance(patch, Rectangle)]
    assert 8 == len({to_hex(line.get_color()) for line in lines}) == len({line.get_marker() for line in lines})
    assert 8 == len({str(line._unscaled_dash_pattern) for line in lines}) == len({bar.get_hatch() for bar in bars})


def test_what_is_not_known_is_said():
    """Panels without figures say why, inside their frames."""
    nothing = {"uniques": [], "reliability": [], "in_support": [], "chance": [], "bytes": {}, "sizes": []}
    figure = draw_caches([{"name": "a", "notes": [], "expected": None, **nothing}])
    assert [] == overlaps(figure)
    said = [text.get_text() for text in figure.findobj(Text)]
    assert 2 == sum("no labels are known" in text for text in said) == sum("no records" == text for text in said)


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plot_by_the_command_line(caches, tmp_path, capsys, ending, magic):
    """What the paths are decides; the ending chooses the format; a directory that is missing is made."""
    out = tmp_path / "new" / f"sheet.{ending}"
    assert 0 == main(["plot", *map(str, caches), "-o", str(out), "--sample", "5", "--json"])
    assert {"out": str(out), "names": ["counts.skl", "ratios.skl"]} == json.loads(capsys.readouterr().out)
    assert out.read_bytes().startswith(magic)


def test_a_sample_and_misaligned_records_are_said(caches, tmp_path):
    """Below the name."""
    row = row_of(skl.stats(caches[0], sample=5), "a")
    assert "12 sequences, 5 of them read" == row["notes"][0]
    row = row_of(skl.stats(make(tmp_path / "a.skl", shift=1)), "a")
    assert "suspicious: looks misaligned" == row["notes"][-1]


def test_what_is_refused(caches, tmp_path):
    """A mix of runs and caches, neither of them, nothing at all; and no sheet is left."""
    out = tmp_path / "x.png"
    run = make_run(tmp_path / "run")
    with pytest.raises(UnsupportedError, match=rf"{run}: a training run, and {caches[0]} is a cache; plot them on"):
        plot(PlotConfig(paths=(str(caches[0]), str(run)), out=out))
    (tmp_path / "none").mkdir()
    with pytest.raises(UnsupportedError, match="none: neither a training run nor a cache: it has no metrics"):
        plot(PlotConfig(paths=(str(caches[0]), str(tmp_path / "none")), out=out))
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        plot(PlotConfig(paths=(str(tmp_path / "nowhere"),), out=out))
    with pytest.raises(ValueError, match="plot_caches draws 1 to 8 caches, got 0"):
        plot_caches([], out)
    with pytest.raises(ValueError, match="sample must be >= 2, got 1"):
        PlotConfig(paths=("a",), out=out, sample=1)
    assert not out.exists()


def test_an_empty_a_damaged_and_an_unfinished_cache(caches, tmp_path):
    """Each is named."""
    header = skl.Header(vocab_size=400, seq_len=64, kind="counts", rounds=8, sampler="multinomial")
    with skl.ShardWriter(tmp_path / "empty.skl", header=header):
        pass
    with pytest.raises(ValueError, match=r"empty\.skl: holds no sequence, so there is nothing to draw"):
        plot(PlotConfig(paths=(str(tmp_path / "empty.skl"),), out=tmp_path / "x.png"))
    damaged = bytearray(caches[0].read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "bad.skl").write_bytes(damaged)
    with pytest.raises(CorruptError, match=r"bad\.skl: block \d+"):
        plot(PlotConfig(paths=(str(caches[0]), str(tmp_path / "bad.skl")), out=tmp_path / "x.png"))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "shard-00000.skl.partial").touch()
    with pytest.raises(MissingShardError, match="the capture has written no sequence yet"):
        plot(PlotConfig(paths=(str(tmp_path / "begun"),), out=tmp_path / "x.png"))
