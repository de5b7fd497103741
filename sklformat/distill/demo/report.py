"""
The demo's report: the table in the form of the paper's Table 5, what it should show, and the commands behind it.

Runs nothing; turns results and configs into text.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklformat.distill.student.measures.evaluation import Evaluation
from sklformat.settings.cache import CacheConfig
from sklformat.settings.eval import EvalConfig
from sklformat.settings.inspection import ViewConfig
from sklformat.settings.train import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """
    One line of the table.

    Attributes:
        method: Its name in the table.
        evaluation: On held-out text.
        unique_tokens: Records per position in its cache; None without one.
        bytes_per_position: Of its cache, tokens and checksums included; None without one.
        percent_ce_to_full: Share of the gap between CE and FullKD that it closes, percent; None where there is none.
    """

    method: str
    evaluation: Evaluation
    unique_tokens: float | None
    bytes_per_position: float | None
    percent_ce_to_full: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """
    One thing that the paper shows, and whether this run shows it too.

    Attributes:
        claim: In words, with the bar.
        found: What this run found, in words.
        passed: Whether it is shown.
    """

    claim: str
    found: str
    passed: bool


def check_order(rows: Sequence[Row]) -> list[Check]:
    """
    Check the rows of CE, Top-K, random sampling and FullKD (in this order) against what the paper shows.

    Source: Anshumann et al. 2025, Tables 1, 2 and 5.
    """
    ce, topk, random, full = rows[:4]
    closed = random.percent_ce_to_full
    worse = topk.evaluation.lm_loss - ce.evaluation.lm_loss
    errors = [100 * row.evaluation.calibration_error for row in (topk, random, full)]
    times = errors[0] / max(errors[1], 1e-9)
    apart = abs(errors[1] - errors[2])
    overlap = 100 * ((random.evaluation.acceptance_rate or 0.0) - (topk.evaluation.acceptance_rate or 0.0))
    gap = ce.evaluation.lm_loss - full.evaluation.lm_loss
    return [
        Check(
            claim="Top-K's bias costs more than the teacher gives: LM loss of Top-K >= that of CE + 0.3",
            found=f"{worse:+.3f} nats",
            passed=worse >= 0.3,
        ),
        Check(
            claim="Random sampling is nearly FullKD: it closes >= 65 % of the gap between CE and FullKD",
            found="no gap to close" if closed is None or gap <= 0 else f"{closed:.0f} % of {gap:.3f} nats",
            passed=closed is not None and gap > 0 and closed >= 65,
        ),
        Check(
            claim="Top-K's confidence is not to be trusted: its ECE >= 4 times that of random sampling",
            found=f"{errors[0]:.1f} % against {errors[1]:.1f} %, {times:.1f} times",
            passed=times >= 4,
        ),
        Check(
            claim="Random sampling's confidence is FullKD's: their ECE differ by <= 1.5 percentage points",
            found=f"{apart:.1f} points",
            passed=apart <= 1.5,
        ),
        Check(
            claim="Random sampling is closer to the teacher: sum min(p, q) >= Top-K's + 6 percentage points",
            found=f"{overlap:+.1f} points",
            passed=overlap >= 6,
        ),
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("Method", "Unique tokens", "LM loss", "% CE to FullKD", "ECE %", "Top-1 agreement %", "Σ min(p, q) %",
            "Bytes per position")  # fmt: skip
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in cells
    ]
    rule = (
        "|" + "|".join("-" * (width + 2) if n == 0 else "-" * (width + 1) + ":" for n, width in enumerate(widths)) + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    found = row.evaluation
    return (
        row.method,
        _number(row.unique_tokens, 1),
        _number(found.lm_loss, 3),
        _number(row.percent_ce_to_full, 0),
        _number(100 * found.calibration_error, 1),
        _number(None if found.top1_agreement is None else 100 * found.top1_agreement, 1),
        _number(None if found.acceptance_rate is None else 100 * found.acceptance_rate, 1),
        _number(row.bytes_per_position, 1),
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def report(
    rows: Sequence[Row],
    checks: Sequence[Check],
    lines: Sequence[str],
    *,
    directory: Path,
    seed: int,
    seconds: float,
) -> str:
    """The whole report as Markdown: table, checks, commands."""
    verdicts = [f"- {'shown' if c.passed else 'NOT shown by this run'}: {c.claim} ({c.found})" for c in checks]
    missed = sum(not check.passed for check in checks)
    verdict = (
        "Nothing: a run of this size shows only that everything works."
        if not checks
        else "This run shows all of it:"
        if not missed
        else f"This run does not show {missed} of {len(checks)} (other or too little text, or too short a run):"
    )
    return "\n".join(
        [
            f"# Distillation from a cached teacher, seed {seed}",
            "",
            table(rows),
            "",
            "All students start from the same weights and see the same sequences in the same order.",
            "LM loss in nats per token on held-out text; ECE over 15 bins; Σ min(p, q) is the rate at which",
            "speculative decoding with this teacher accepts the student's tokens; bytes per position on disk,",
            "tokens and checksums included. FullKD ran the teacher at every step.",
            "Top-1 agreement misleads: it looks at the head of the distribution alone, which is all that Top-K learns.",
            "",
            "## What the paper shows",
            "",
            verdict,
            "",
            *verdicts,
            "",
            "## Each step by hand",
            "",
            "```sh",
            f"# {directory}/tokenizer, tokens and held-out: the demo made them from the text",
            *lines,
            "```",
            "",
            f"This call took {seconds:.0f} s. Plot: {directory / 'comparison.png'}",
            f"Page: {directory / 'page.html'}, for any browser: what the teacher said of each token, and its students",
            "",
        ]
    )


def commands(
    teacher: tuple[TrainConfig, EvalConfig],
    caches: Sequence[CacheConfig],
    students: Sequence[tuple[TrainConfig, EvalConfig]],
    page: ViewConfig,
) -> list[str]:
    """The shell commands that do each step of the demo, from the token stores on."""
    lines = [command("train", teacher[0]), command("eval", teacher[1])]
    for cache in caches:
        lines += [command("cache", cache), shlex.join(["sklformat", "verify", str(cache.out)])]
    for training, measuring in students:
        lines += [command("train", training), command("eval", measuring)]
    return [*lines, command("view", page, positional=True)]


def command(verb: str, config: Any, *, positional: bool = False) -> str:
    """A verb with the flags whose values are not the defaults; ``positional``: required fields are arguments."""
    words = ["sklformat", verb]
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), field.metadata.get("flag", field.name.replace("_", "-"))
        if value == field.default:
            continue
        said = list(map(str, value if isinstance(value, tuple) else (value,)))
        if positional and field.default is dataclasses.MISSING:
            words += said
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *said]
    return shlex.join(words)
