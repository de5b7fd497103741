"""Training runs on one sheet: what is read of them, and that the sheet can be read."""

import os

import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from operation_data import write
from sheet_data import BINS, make_run, overlaps

from sklformat.cli import main
from sklformat.errors import CorruptError, UnsupportedError
from sklformat.plot import draw_runs, plot_runs
from sklformat.settings.inspection import PlotConfig
from sklformat.views.curves import plot, read_run


def test_what_is_read_of_a_run(tmp_path):
    """Every figure of log and evaluation, and not the line that is being written."""
    row = read_run(make_run(tmp_path / "run", end='{"step": 30, "lo'), "mine")
    assert "mine" == row["name"]
    assert {
        "loss": [(10, 4.5), (20, 4.25)],
        "lm_loss": [(20, 3.5)],
        "kl": [(20, 0.25)],
        "kl_to_records": [(20, 1.5)],
        "calibration_error": [(20, 0.04)],
    } == row["curves"]
    assert row["reliability"] == BINS


@pytest.mark.parametrize("count", [1, 3, 8])
def test_no_labels_overlap(tmp_path, count):
    """With any number of runs, long names and names that look like formulas included."""
    names = ["$ce$", "a-long-name-of-everything-" * 5, *map(str, range(6))][:count]
    rows = [read_run(make_run(tmp_path / str(i)), name) for i, name in enumerate(names)]
    assert [] == overlaps(draw_runs(rows))


def test_no_labels_overlap_where_nothing_was_evaluated(tmp_path):
    """Panels without figures say how to get them, inside their frames."""
    figure = draw_runs([read_run(make_run(tmp_path / "run", evaluated=False), "run")])
    assert [] == overlaps(figure)
    said = [text.get_text() for text in figure.findobj(Text)]
    assert 3 == sum("--eval-every" in text for text in said)
    assert any("sklformat eval --out" in text for text in said)


def test_runs_differ_without_colour(tmp_path):
    """Each of eight runs has a colour, a line and a marker of its own."""
    row = read_run(make_run(tmp_path / "run"), "run")
    lines = draw_runs([row] * 8).axes[0].get_lines()
    assert 8 == len({to_hex(line.get_color()) for line in lines})
    assert 8 == len({line.get_marker() for line in lines})
    assert 8 == len({str(line._unscaled_dash_pattern) for line in lines})


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plot_by_the_command_line(tmp_path, capsys, ending, magic):
    """The ending chooses the format; runs of one name are told apart by their paths."""
    runs = [str(make_run(tmp_path / name / "run")) for name in "ab"]
    out = tmp_path / f"sheet.{ending}"
    assert 0 == main(["plot", *runs, "-o", str(out)])
    assert f"{out}: {', '.join(runs)}\n" == capsys.readouterr().out
    assert out.read_bytes().startswith(magic)


def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    """Nothing is written then."""
    assert 1 == main(["plot", str(tmp_path), "-o", str(tmp_path / "x.png")])
    said = capsys.readouterr().err
    assert said == (
        f"sklformat plot: {tmp_path}: neither a training run nor a cache: it has no metrics.jsonl, "
        "which sklformat train writes, and no .skl shards\n"
    )
    assert [] == list(tmp_path.iterdir())


def test_bad_settings(tmp_path):
    """A wrong number of runs, and an ending that is not drawn."""
    with pytest.raises(ValueError, match="plot draws 1 to 8 runs or caches, got 9"):
        PlotConfig(paths=(str(tmp_path),) * 9, out=tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"out must end in \.png, \.svg or \.pdf, got 'x\.bmp'"):
        PlotConfig(paths=(str(tmp_path),), out=type(tmp_path)("x.bmp"))
    with pytest.raises(ValueError, match="plot_runs draws 1 to 8 runs, got 0"):
        plot_runs([], tmp_path / "x.png")


def test_names_of_any_characters(tmp_path, capfd, recwarn):
    """What a font or a terminal lacks, and what is no character at all, stops no sheet and says nothing beside it."""
    run = make_run(tmp_path / os.fsdecode(b"\xe8\xaa\x9e \x1b[31m\xff$x"))
    assert 0 == main(["plot", str(run), "-o", str(tmp_path / "sheet.png")])
    assert f"{tmp_path / 'sheet.png'}: 語 \\x1b[31m\\udcff$x\n" == capfd.readouterr().out
    cache = write(tmp_path / os.fsdecode(b"b\xff"), 2)
    assert 0 == main(["plot", str(cache), "-o", str(tmp_path / "caches.svg")])
    assert [] == [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"loss": 1}',
        '{"step": 1, "loss": "low"}',
        '{"step": 1e999}',
        f'{{"step": 1, "loss": {10**400}}}',
        "[" * 9999,
    ],
)
def test_a_damaged_log(tmp_path, line):
    """The line is named."""
    run = make_run(tmp_path / "run", end=line + "\n")
    with pytest.raises(CorruptError, match="line 4 of the log holds no step with its figures"):
        read_run(run, "run")


def test_a_damaged_evaluation(tmp_path):
    """Not JSON, or that of something else."""
    run = make_run(tmp_path / "run")
    (run / "evaluation.json").write_text("{")
    with pytest.raises(CorruptError, match="not JSON"):
        read_run(run, "run")
    for text in ("{}", "[" * 9999, f'{{"reliability": [{{"confidence": {10**400}}}]}}'):
        (run / "evaluation.json").write_text(text)
        with pytest.raises(CorruptError, match="holds no reliability bins as sklformat eval --out writes them"):
            read_run(run, "run")


def test_a_path_that_is_not_there(tmp_path):
    """And a file that is no run."""
    with pytest.raises(FileNotFoundError):
        plot(PlotConfig(paths=(str(tmp_path / "none"),), out=tmp_path / "x.png"))
    (tmp_path / "file").touch()
    with pytest.raises(UnsupportedError, match="not a training run"):
        plot(PlotConfig(paths=(str(tmp_path / "file"),), out=tmp_path / "x.png"))
