import subprocess
import sys

import pytest

from sklformat.plot import plot_comparison, plot_noise


def make_row(method, lm_loss=4.5, skew=0.0):
    bins = [
        {"confidence": (i + 0.5) / 15, "accuracy": max(0.0, (i + 0.5) / 15 - skew), "share": 1 / 15} for i in range(15)
    ]
    return {"method": method, "lm_loss": lm_loss, "calibration_error": skew, "reliability": bins}


def test_comparison_is_a_png_file(tmp_path):
    """The comparison of four methods is written as a PNG of a size that a person can read."""
    path = tmp_path / "comparison.png"
    rows = [make_row("CE", 5.0), make_row("Top-K 12", 6.6, 0.14), make_row("random sampling", 4.7), make_row("FullKD")]
    plot_comparison(rows, path, title="three words here")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert width > 1000
    assert height > 500


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_any_number_of_methods(tmp_path, count):
    """Any number of methods from 1 to 24 is drawn, also with equal losses and with few bins."""
    path = tmp_path / "comparison.svg"
    rows = [make_row(f"method {i}") for i in range(count)]
    rows[0]["reliability"] = rows[0]["reliability"][:1]
    plot_comparison(rows, path)
    text = path.read_text()
    assert text.startswith("<?xml")


def test_no_rows_are_refused(tmp_path):
    """Nothing to draw is the caller's mistake and leaves no file."""
    with pytest.raises(ValueError, match="1 to 24 methods, got 0"):
        plot_comparison([], tmp_path / "x.png")
    assert [] == list(tmp_path.iterdir())


def test_plot_loads_no_torch():
    """Drawing needs neither torch nor transformers, so that a plot opens fast and anywhere."""
    code = "import sys, sklformat.plot; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[]" == result.stdout.strip()


def test_noise_of_each_student(tmp_path):
    """A panel for each student, a line for each sampler and the limit; errors larger than a share are drawn as well."""
    rows = [
        {"sampler": sampler, "bytes_per_position": 4.0 * n, "shares": [1 / n, 2 / n], "share_errors": [0.1, 0.1]}
        for sampler in ("multinomial", "systematic")
        for n in (1, 4, 50)
    ]
    plot_noise(rows, ["early", "late"], 0.1, tmp_path / "noise.svg")
    assert (tmp_path / "noise.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match="plot_noise draws 1 to 8 students, got 0"):
        plot_noise(rows, [], 0.1, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
