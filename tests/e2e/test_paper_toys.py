"""The paper's claims that train no language model, at their smallest size: what already shows there."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

PAPER = Path(__file__).parents[2] / "benchmarks" / "paper"
SCRIPTS = ("figure2a", "figure2b", "figure2c", "figure5", "table3", "table4", "d1")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Each script's results, by its name; all ran one after the other in this process."""
    out = tmp_path_factory.mktemp("paper")
    threads, state, modules = torch.get_num_threads(), torch.random.get_rng_state(), set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PAPER))
        for name in SCRIPTS:
            patch.setattr(sys, "argv", [name, "--quick", "--out", str(out)])
            runpy.run_path(str(PAPER / f"{name}.py"), run_name="__main__")
    torch.set_num_threads(threads)
    torch.random.set_rng_state(state)
    for name in set(sys.modules) - modules:
        if str(PAPER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
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
