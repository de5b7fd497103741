"""Every script of the paper's claims at its smallest size, and what they share."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

PAPER = Path(__file__).parents[2] / "benchmarks" / "paper"
PARTS = {"bench", "students", "summary", "teacher"}
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


@pytest.fixture
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
