from pathlib import Path

import pytest

from sklformat.distill.demo.report import Row, check_order, command, commands, report, table
from sklformat.distill.student.measures.evaluation import Evaluation
from sklformat.settings.eval import EvalConfig
from sklformat.settings.inspection import ViewConfig
from sklformat.settings.train import TrainConfig


def row(method, lm_loss, percent=None, ece=0.01, overlap=0.7):
    evaluation = Evaluation(
        num_sequences=1,
        num_tokens=16,
        bos="none",
        lm_loss=lm_loss,
        accuracy=0.3,
        calibration_error=ece,
        confidence_gap=0.0,
        reliability=[],
        top1_agreement=0.5,
        acceptance_rate=overlap,
        percent_ce_to_full=None,
    )
    return Row(
        method=method, evaluation=evaluation, unique_tokens=None, bytes_per_position=None, percent_ce_to_full=percent
    )


def rows(topk_loss=5.3, percent=65.0, topk_ece=0.04, full_ece=0.025, overlap=0.76):
    return [
        row("CE", 5.0, 0.0),
        row("Top-K 12", topk_loss, ece=topk_ece, overlap=0.7),
        row("Random sampling", 4.7, percent, ece=0.01, overlap=overlap),
        row("FullKD", 4.5, 100.0, ece=full_ece),
    ]


def test_all_is_shown_where_every_bar_is_passed():
    """A run a little better than every bar shows all of the paper's order, and the report says so."""
    checks = check_order(rows(5.3001, 65.1, 0.0401, 0.0249, 0.7601))
    assert [True] * 5 == [check.passed for check in checks]
    text = report(rows(), checks, [], directory=Path("d"), seed=0, seconds=1.0)
    assert "This run shows all of it:" in text
    assert "NOT" not in text


@pytest.mark.parametrize(
    ("missed", "changes"),
    [
        (0, {"topk_loss": 5.29}),
        (1, {"percent": 64.0}),
        (1, {"percent": None}),
        (2, {"topk_ece": 0.039}),
        (3, {"full_ece": 0.026}),
        (4, {"overlap": 0.759}),
    ],
)
def test_a_bar_that_is_missed_is_named(missed, changes):
    """Missing one bar is reported as that one, and only that one."""
    good = {"topk_loss": 5.4, "percent": 70.0, "topk_ece": 0.05, "full_ece": 0.02, "overlap": 0.8}
    checks = check_order(rows(**(good | changes)))
    assert [number != missed for number in range(5)] == [check.passed for check in checks]
    text = report(rows(), checks, [], directory=Path("d"), seed=0, seconds=1.0)
    assert f"NOT shown by this run: {checks[missed].claim}" in text
    assert "does not show 1 of 5" in text


def test_a_gap_the_wrong_way_round_shows_nothing():
    """Where FullKD is worse than CE there is no gap to close, whatever the percentage."""
    swapped = rows(percent=80.0)
    swapped[3] = row("FullKD", 5.2, 100.0)
    assert not check_order(swapped)[1].passed


def test_the_table_is_aligned_markdown():
    """All lines have one length and eight columns; what a method does not have is a dash."""
    lines = table(rows()).splitlines()
    assert {len(lines[0])} == {len(line) for line in lines}
    assert [9] * 6 == [line.count("|") for line in lines]
    assert ["CE", "-", "5.000", "0", "1.0", "50.0", "70.0", "-"] == [cell.strip() for cell in lines[2].split("|")[1:-1]]


def test_commands_have_the_flags_that_are_not_defaults():
    """A command names each setting that differs from its default, quoted for a shell, and no other."""
    config = TrainConfig(out=Path("my runs"), cache=(Path("c"), Path("d")), steps=5, shard=True, keep_checkpoint=False)
    expected = "sklformat train --out 'my runs' --cache c d --steps 5 --no-keep-checkpoint --shard"
    assert expected == command("train", config)
    measuring = EvalConfig(student="s", tokens=Path("t"), seq_len=8)
    page = ViewConfig(caches=("a", "b"), out=Path("p.html"), students=("x", "y"))
    assert [
        "sklformat eval --student s --seq-len 8 --tokens t",
        "sklformat view a b --out p.html --student x y",
    ] == commands((config, measuring), [], [], page)[1:]
