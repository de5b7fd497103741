"""Every script of the paper's claims at its smallest size, and what they share."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

PAPER = Path(__file__).parents[2] / "benchmarks" / "paper"
PARTS = {"bench", "classifiers", "drawing", "students", "summary", "teacher"}
SCRIPTS = sorted({path.stem for path in PAPER.glob("*.py")} - PARTS)
RUN_ALL = """
import pathlib, runpy, sys
paper, out, *scripts = sys.argv[1:]
sys.path.insert(0, paper)
def students():
    return {str(path): path.stat().st_mtime_ns for path in pathlib.Path(out).glob("teacher-quick/students/*")}
def run(name):
    sys.argv = [name, "--quick", "--out", out]
    runpy.run_path(f"{paper}/{name}.py", run_name="__main__")
for name in scripts:
    run(name)
made = students()
run("table5")
print("students", len(made), "trained again", len(dict(students().items() ^ made.items())))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All scripts, one after the other in one process, and table5 a second time: what they wrote, and said."""
    directory = tmp_path_factory.mktemp("paper")
    command = [sys.executable, "-c", RUN_ALL, str(PAPER), str(directory), *SCRIPTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return directory, done.stdout


@pytest.fixture(scope="module")
def out(ran):
    return ran[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_found(out, script):
    found = json.loads((out / f"{script}.json").read_text())
    assert found["scale"] == "quick"
    assert found["verdict"] in ("shown", "not shown at this scale", "contradicted")
    assert len(found["rows"]) >= 1
    assert found["table"].count("\n") == len(found["rows"]) + 1
    for row in found["rows"]:
        values = [value for one in row["ours"].values() if not isinstance(one, str) for value in one]
        assert values, row
        assert (out / f"{script}.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_trains_no_student_again(ran):
    words = ran[1].splitlines()[-1].split()
    assert int(words[1]) > 50
    assert words[2:] == ["trained", "again", "0"]


def test_the_page_names_every_script(out):
    sys.path.insert(0, str(PAPER))
    try:
        import summary
    finally:
        sys.path.remove(str(PAPER))
    assert set(SCRIPTS) <= set(summary.ORDER)
    results = {name: json.loads((out / f"{name}.json").read_text()) for name in SCRIPTS}
    page = summary.page(results)
    for name, one in results.items():
        assert f"| {name} | {one['claim']} | **{one['verdict']}** |" in page
        assert one["table"] in page
    text = (PAPER / "README.md").read_text()
    assert text.index(summary.BEGIN) < text.index(summary.END)


@pytest.fixture(scope="module")
def found(out):
    return {name: json.loads((out / f"{name}.json").read_text()) for name in SCRIPTS}


def mean(found, script, row, column):
    rows = {one["row"]: one["ours"] for one in found[script]["rows"]}
    return sum(rows[row][column]) / len(rows[row][column])


def test_appendix_k_as_printed_loses_half_of_the_head(found):
    """The probability that a token of p = 0.083 is drawn at all in 22 rounds is 0.46 of the draws it is owed."""
    p = 1 / sum(1 / i for i in range(1, 100_001))
    exact = (1 - (1 - p) ** 22) / (22 * p)
    assert mean(found, "figure2a", "Appendix K, scatter_", "top token x teacher") == pytest.approx(exact, abs=0.03)
    assert mean(found, "figure2a", "Appendix K, scatter_add_", "row sum") == pytest.approx(1, abs=1e-5)
    assert mean(found, "figure2a", "Appendix K, scatter_", "row sum") < 0.95


def test_draws_are_not_scaled_and_top_k_is(found):
    assert found["figure2a"]["verdict"] == "shown"
    assert mean(found, "figure2a", "Top-K", "top token x teacher") == pytest.approx(3.36, abs=0.01)
    assert mean(found, "figure2a", "naive fix", "top token x teacher") == pytest.approx(1.70, abs=0.01)
    assert mean(found, "figure2a", "random sampling, systematic", "top token x teacher") == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("script", ["figure2b", "figure2c"])
def test_top_k_is_surer_than_full_kd_and_draws_are_not(found, script):
    """Confidence less accuracy, in points, of students that hardly learned anything yet."""
    gap = {m: mean(found, script, m, "confidence less accuracy") for m in ("FullKD", "Top-K", "random sampling")}
    assert gap["Top-K"] > gap["FullKD"] + 2
    assert abs(gap["random sampling"] - gap["FullKD"]) < (gap["Top-K"] - gap["FullKD"]) / 2


def test_unique_tokens_are_a_power_of_rounds(found):
    for row in found["figure5"]["rows"]:
        (low, high) = min(row["ours"]["exponent"]), max(row["ours"]["exponent"])
        assert 0.4 < low <= high <= 1
    sharpened = next(row for row in found["figure5"]["rows"] if row["row"].startswith("sharpened"))
    assert sum(sharpened["ours"]["unique of 50"]) / 2 == pytest.approx(12, abs=1)


def test_gradients_have_an_angle_and_a_norm(found):
    """A student of six steps is too far from its teacher to tell methods apart; many draws are nearer than few."""
    for row in found["table3"]["rows"]:
        for column, values in row["ours"].items():
            assert all(0 < value < (180 if column.startswith("angle") else 20) for value in values), (row, column)
    last = [name for name in found["table3"]["rows"][0]["ours"] if name.startswith("angle")][-1]
    assert mean(found, "table3", "random sampling", last) < mean(found, "table3", "CE", last)


def test_a_step_of_each_method_is_timed(found):
    """No figure is asserted: the machine may do anything."""
    assert [len(row["ours"]["x FullKD"]) for row in found["table4"]["rows"]] == [2, 2, 2, 2]


def test_the_ratio_code_is_nearer_than_equal_steps(found):
    assert found["d1"]["verdict"] == "shown"
    for k in (12, 50):
        ratio, equal = (
            mean(found, "d1", f"K = {k}, {name}", "KL") for name in ("ratio code of SPEC 4.3", "equal steps, q / 127")
        )
        assert ratio < equal / 10


@pytest.fixture
def bench():
    sys.path.insert(0, str(PAPER))
    try:
        import bench
    finally:
        sys.path.remove(str(PAPER))
    return bench


@pytest.mark.parametrize(
    ("degrees", "level", "limit"),
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (7, 0.95, 2.365), (7, 0.60, 0.896), (30, 0.99, 2.750), (1000, 0.95, 1.962)],
)
def test_students_t_is_that_of_the_tables(bench, degrees, level, limit):
    assert bench.student_t(degrees, level) == pytest.approx(limit, abs=6e-4)


def test_a_mean_has_its_error_and_pairs_its_differences(bench):
    a, b = bench.Mean.of([1.0, 2.0, 4.0]), bench.Mean.of([0.5, 1.5, 3.5])
    assert a.mean == pytest.approx(7 / 3)
    assert a.error == pytest.approx(math.sqrt(7 / 3 / 3))
    assert (a - b).values == (0.5, 0.5, 0.5)
    assert (a - b).within() == (0.5, 0.5)
    assert math.isnan(bench.Mean.of([1.0]).error)
    with pytest.raises(ValueError, match="shorter"):
        a - bench.Mean.of([1.0])
