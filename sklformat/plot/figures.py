"""
Draws what other modules computed; the only door to matplotlib.

It computes no figure itself, loads no torch and needs no screen. The plots follow Figure 1 and Table 5 of the paper:
the LM loss of each method, and how far its confidence can be trusted.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from sklformat.plot.rows import CacheRow, ComparisonRow, NoiseRow, RunRow

BASELINE_COLOUR = "#7f7f7f"
COLOURS = ("#4477aa", "#cc6677", "#228833", "#aa7733", "#66ccee", "#aa3377", "#999933", "#332288")
# One of each for a run, so that runs differ without colour.
STYLES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++")
_WIDE = 128  # an axis that reaches beyond is logarithmic
_NO_EVALUATION = "no evaluation.json in the run;\nsklformat eval --out writes it"
_NO_LABELS = "no tokens in the cache,\nso no labels are known"
# What a user has in matplotlibrc must not change the project's figures; a $ in a run's name begins no formula.
_STYLE: dict[str, Any] = {
    **mpl.rcParamsDefault,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}


def plot_comparison(rows: Sequence[ComparisonRow], path: Path | str, *, title: str = "") -> None:
    """
    Draw the LM loss and the reliability of each method into one PNG, SVG or PDF file.

    Left: one bar per method, in the order given. Right: one small diagram per method, accuracy against confidence;
    points below the diagonal are over-confident, and the area of a point is the share of predictions it stands for.

    Args:
        rows: One entry per method, 1 to 24.
        path: File to write; its ending chooses the format.
        title: Line above the plots; empty for none.

    Raises:
        ValueError: No rows, more than 24, or a file ending that matplotlib cannot write.
        OSError: The file cannot be written.
    """
    if not 1 <= len(rows) <= 24:
        raise ValueError(f"plot_comparison draws 1 to 24 methods, got {len(rows)}")
    path = Path(path)
    columns = 1 if len(rows) == 1 else 2 if len(rows) <= 4 else 4
    lines = -(-len(rows) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.0 + 2.9 * columns, max(4.2, 2.9 * lines + 0.9)), dpi=130, layout="constrained")
        parts: Any = figure.subfigures(1, 2, width_ratios=(6.0, 2.9 * columns))
        left, right = parts
        colours = [_colour(index, row["method"]) for index, row in enumerate(rows)]
        _draw_losses(left.subplots(), rows, colours)
        axes = right.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for axis, row, colour in zip(axes, rows, colours, strict=False):
            _draw_reliability(axis, row, colour)
        for axis in axes[len(rows) :]:
            axis.set_visible(False)
        right.supxlabel("confidence in the top token (%)", fontsize=11)
        right.supylabel("how often it was right (%)", fontsize=11)
        right.suptitle("Reliability: on the line is honest, below it over-confident", fontsize=12, fontweight="bold")
        if title:
            figure.suptitle(title, fontsize=12)
        _save(figure, path)


def plot_runs(rows: Sequence[RunRow], path: Path | str) -> None:
    """
    Draw training runs into one PNG, SVG or PDF file: losses, KL, calibration error and reliability.

    Args:
        rows: One entry per run, 1 to 8.
        path: File to write; its ending chooses the format.

    Raises:
        ValueError: No rows, more than 8, or a file ending that matplotlib cannot write.
        OSError: The file cannot be written.
    """
    with mpl.rc_context(_STYLE):
        _save(draw_runs(rows), path)


def draw_runs(rows: Sequence[RunRow]) -> Figure:
    """The sheet of ``plot_runs``, not yet written; arguments and errors as there."""
    if not 1 <= len(rows) <= len(MARKERS):
        raise ValueError(f"plot_runs draws 1 to {len(MARKERS)} runs, got {len(rows)}")
    by_teacher = any(row["curves"]["kl"] for row in rows)
    panels = (
        ("loss", "Training loss", "nats, as each method has it", 1),
        ("lm_loss", "Held-out LM loss", "nats per token", 1),
        ("kl", "KL to the teacher", "nats per position, estimated", 1)
        if by_teacher
        else ("kl_to_records", "KL to the records", "nats per position", 1),
        ("calibration_error", "Calibration error (ECE)", "%", 100),
    )
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(13.5, 8.0), dpi=130, layout="constrained")
        axes: Any = figure.subplots(2, 3).flatten()
        for axis, (curve, title, unit, factor) in zip(axes, panels, strict=False):
            axis.set_title(title, fontsize=12, fontweight="bold")
            drawn = [
                axis.plot(
                    [step for step, _ in row["curves"][curve]],
                    [factor * value for _, value in row["curves"][curve]],
                    **_look(index),
                    markevery=max(1, len(row["curves"][curve]) // 8),
                )
                for index, row in enumerate(rows)
                if row["curves"][curve]
            ]
            if not drawn:
                _say_empty(axis, "not in the log; train with\n--eval-cache or --hold-out,\nand --eval-every")
                continue
            axis.set_xlabel("step")
            axis.set_ylabel(unit)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        words = "confidence in the top token (%), below the line too high", "how often it was right (%)"
        _draw_reliabilities(axes[4], "Reliability", words, _NO_EVALUATION, rows)
        _draw_names(axes[5], [(row["name"], []) for row in rows])
    return figure


def plot_caches(rows: Sequence[CacheRow], path: Path | str, *, by_weight: bool = False) -> None:
    """
    Draw caches into one PNG, SVG or PDF file: unique tokens, reliability, labels in support, bytes and sizes.

    Args:
        rows: One entry per cache, 1 to 8.
        path: File to write; its ending chooses the format.
        by_weight: Whether ``sizes`` are weights, from each power of two to the next, in place of counts.

    Raises:
        ValueError: No rows, more than 8, or a file ending that matplotlib cannot write.
        OSError: The file cannot be written.
    """
    with mpl.rc_context(_STYLE):
        _save(draw_caches(rows, by_weight=by_weight), path)


def draw_caches(rows: Sequence[CacheRow], *, by_weight: bool = False) -> Figure:
    """The sheet of ``plot_caches``, not yet written; arguments and errors as there."""
    if not 1 <= len(rows) <= len(MARKERS):
        raise ValueError(f"plot_caches draws 1 to {len(MARKERS)} caches, got {len(rows)}")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(13.5, 8.0), dpi=130, layout="constrained")
        axes: Any = figure.subplots(2, 3).flatten()
        uniques, sizes = [row["uniques"] for row in rows], [row["sizes"] for row in rows]
        _draw_shares(axes[0], "Unique tokens", "records of a position", "positions that have records (%)", uniques)
        words = "share of the largest record (%),\nbelow the line too high", "how often it was the label (%)"
        _draw_reliabilities(axes[1], "Confidence against correctness", words, _NO_LABELS, rows)
        _draw_support(axes[2], rows)
        _draw_bytes(axes[3], rows)
        unit = "weight, from here to twice as much" if by_weight else "count"
        _draw_shares(axes[4], "Weights" if by_weight else "Counts", unit, "records (%)", sizes, is_log=True)
        _draw_names(axes[5], [(row["name"], row["notes"]) for row in rows], hatched=True)
    return figure


def plot_noise(rows: Sequence[NoiseRow], students: Sequence[str], limit: float, path: Path | str) -> None:
    """
    Draw the noise that draws add against their bytes into one PNG, SVG or PDF file: a panel for each student.

    Args:
        rows: Of all samplers, each in rising rounds.
        students: Names, 1 to 8.
        limit: Share that is allowed.
        path: File to write; its ending chooses the format.

    Raises:
        ValueError: No students, more than 8, or a file ending that matplotlib cannot write.
        OSError: The file cannot be written.
    """
    if not 1 <= len(students) <= len(MARKERS):
        raise ValueError(f"plot_noise draws 1 to {len(MARKERS)} students, got {len(students)}")
    with mpl.rc_context(_STYLE):
        columns = min(4, len(students))
        lines = -(-len(students) // columns)
        figure = Figure(figsize=(0.8 + 4.4 * columns, 0.9 + 3.9 * lines), dpi=130, layout="constrained")
        axes: Any = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for number, (axis, name) in enumerate(zip(axes, students, strict=False)):
            axis.set_title("\n".join(textwrap.wrap(_shortened(name), 40)), fontsize=11, fontweight="bold")
            for index, sampler in enumerate(dict.fromkeys(row["sampler"] for row in rows)):
                own = [row for row in rows if row["sampler"] == sampler]
                axis.errorbar(
                    [row["bytes_per_position"] for row in own],
                    [row["shares"][number] for row in own],
                    [row["share_errors"][number] for row in own],
                    **_look(index),
                    capsize=3,
                    label=sampler,
                )
            axis.axhline(limit, color=BASELINE_COLOUR, linewidth=1.2, linestyle=":", label=f"limit {limit:g}")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", nonpositive="clip")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.grid(color="#dddddd", linewidth=0.6)
        for axis in axes[len(students) :]:
            axis.set_visible(False)
        axes[0].legend(frameon=False, fontsize=10, loc="lower left")
        figure.supxlabel("bytes per position, with tokens and index", fontsize=11)
        figure.supylabel("noise by draws, share of the text's own", fontsize=11)
        _save(figure, path)


def _save(figure: Figure, path: Path | str) -> None:
    """A character of a name that the font lacks is a box, as anybody sees."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path)


def _look(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index],
        "linestyle": STYLES[index],
        "marker": MARKERS[index],
        "markersize": 5,
        "linewidth": 1.6,
    }


def _shortened(name: str, length: int = 100) -> str:
    half = length // 2 - 2
    return name if len(name) <= length else f"{name[:half]} … {name[-half:]}"


def _draw_names(axis: Any, rows: Sequence[tuple[str, Sequence[str]]], *, hatched: bool = False) -> None:
    """Name and notes of each row beside its look; the more there are, the shorter."""
    length = 102 if len(rows) <= 2 else 34
    names = [
        "\n".join(
            [*textwrap.wrap(_shortened(name, length), 34), *([", ".join(notes)] if len(rows) > 4 and notes else notes)]
        )
        for name, notes in rows
    ]
    handles: list[Any] = [Line2D([], [], **_look(index)) for index in range(len(rows))]
    if hatched:
        handles = [(Patch(**_fill(index)), handle) for index, handle in enumerate(handles)]
    axis.set_axis_off()
    axis.legend(
        handles,
        names,
        loc="upper left",
        frameon=False,
        fontsize=11 if len(rows) <= 2 else 9 if len(rows) <= 4 else 8,
        handlelength=4,
    )


def _fill(index: int) -> dict[str, Any]:
    return {"facecolor": COLOURS[index], "alpha": 0.6, "hatch": HATCHES[index], "edgecolor": "black", "linewidth": 0.5}


def _say_empty(axis: Any, why: str) -> None:
    axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", va="center", color="#555555")
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_shares(
    axis: Any, title: str, unit: str, of: str, lines: Sequence[Sequence[tuple[float, float]]], *, is_log: bool = False
) -> None:
    axis.set_title(title, fontsize=12, fontweight="bold")
    if not any(lines):
        _say_empty(axis, "no records")
        return
    for index, points in enumerate(lines):
        shown = [(x, 100 * share) for x, share in points if share or not is_log]
        axis.plot(*zip(*shown, strict=True), **_look(index), markevery=max(1, len(shown) // 16))
    if is_log:
        shares = [share for points in lines for _, share in points if share]
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylim(10.0 ** math.floor(math.log10(100 * min(shares))) / 2, 130)
    if is_log or max(points[-1][0] for points in lines if points) > _WIDE:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(LogLocator(base=2, numticks=4))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_xlabel(unit)
    axis.set_ylabel(of)


def _draw_reliabilities(
    axis: Any, title: str, words: tuple[str, str], without: str, rows: Sequence[RunRow] | Sequence[CacheRow]
) -> None:
    axis.set_title(title, fontsize=12, fontweight="bold")
    if not any(row["reliability"] for row in rows):
        _say_empty(axis, without)
        return
    axis.plot([0, 100], [0, 100], color="#bbbbbb", linewidth=1.2)
    for index, row in enumerate(rows):
        confidence, accuracy = (
            [100 * each[name] for each in row["reliability"]] for name in ("confidence", "accuracy")
        )
        axis.plot(confidence, accuracy, **_look(index))
    axis.set_xlim(-3, 103)  # so that markers on the border are whole
    axis.set_ylim(-3, 103)
    axis.set_xlabel(words[0])
    axis.set_ylabel(words[1])


def _draw_support(axis: Any, rows: Sequence[CacheRow]) -> None:
    axis.set_title("Labels among the records", fontsize=12, fontweight="bold")
    if not any(row["in_support"] for row in rows):
        _say_empty(axis, _NO_LABELS)
        return
    for index, row in enumerate(rows):
        for points, look in ((row["in_support"], {}), (row["chance"], {"linestyle": "", "markerfacecolor": "none"})):
            if points:
                axis.plot([x for x, _ in points], [100 * share for _, share in points], **(_look(index) | look))
        if row["in_support"] and row["expected"] is not None:
            axis.axhline(100 * row["expected"], color=COLOURS[index], linestyle=STYLES[index], linewidth=0.8)
    axis.set_ylim(-3, 103)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_xlabel(
        "position in the sequence\n● measured, ○ by chance,\nthin line: expected,\nof systematic draws at least"
    )
    axis.set_ylabel("labels that have a record (%)")


def _draw_bytes(axis: Any, rows: Sequence[CacheRow]) -> None:
    axis.set_title("Bytes", fontsize=12, fontweight="bold")
    columns = list(dict.fromkeys(column for row in rows for column in row["bytes"]))
    if not columns:
        _say_empty(axis, "no positions")
        return
    height = 0.8 / len(rows)
    for index, row in enumerate(rows):
        places = [place + (index + 0.5) * height - 0.4 for place in range(len(columns))]
        axis.barh(places, [row["bytes"].get(column, 0) for column in columns], height, **_fill(index))
    axis.set_yticks(range(len(columns)), ["\n".join(textwrap.wrap(column, 15)) for column in columns], fontsize=10)
    axis.invert_yaxis()
    axis.set_xlabel("bytes per position")


def _colour(index: int, method: str) -> str:
    return BASELINE_COLOUR if method.upper() == "CE" else COLOURS[index % len(COLOURS)]


def _draw_losses(axis: Any, rows: Sequence[ComparisonRow], colours: Sequence[str]) -> None:
    losses = [row["lm_loss"] for row in rows]
    places = list(range(len(rows)))
    low, high = min(losses), max(losses)
    # Bars that start at zero would hide the differences; the axis starts below the best and says so by its ticks.
    start = max(0.0, low - 0.5 * max(high - low, 0.02 * low))
    axis.barh(places, [loss - start for loss in losses], left=start, color=colours, height=0.62)
    span = high - start
    for place, loss in zip(places, losses, strict=True):
        look: dict[str, Any] = {"fontsize": 12, "fontweight": "bold", "color": "white", "zorder": 5}
        axis.text(loss - 0.02 * span, place, f"{loss:.3f}", va="center", ha="right", **look)
    baseline = next((row["lm_loss"] for row in rows if row["method"].upper() == "CE"), None)
    if baseline is not None:
        axis.axvline(baseline, color=BASELINE_COLOUR, linestyle="--", linewidth=1.2)
    axis.set_yticks(places, [row["method"] for row in rows], fontsize=12)
    axis.invert_yaxis()
    axis.set_xlim(start, high + 0.03 * span)
    axis.set_xlabel(
        "nats per token on held-out text, axis not from 0" + (", dashed: CE" if baseline is not None else "")
    )
    axis.set_title("LM loss: shorter is better", fontsize=12, fontweight="bold")


def _draw_reliability(axis: Any, row: ComparisonRow, colour: str) -> None:
    bins = row["reliability"]
    axis.plot([0, 100], [0, 100], color="#bbbbbb", linewidth=1.2, zorder=1)
    confidence = [100 * entry["confidence"] for entry in bins]
    accuracy = [100 * entry["accuracy"] for entry in bins]
    axis.fill_between(confidence, accuracy, confidence, color=colour, alpha=0.18, linewidth=0, zorder=2)
    axis.plot(confidence, accuracy, color=colour, linewidth=1.4, zorder=3)
    axis.scatter(confidence, accuracy, s=[12 + 320 * entry["share"] for entry in bins], color=colour, zorder=4)
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 100)
    axis.set_aspect("equal")
    axis.set_xticks([0, 50, 100])
    axis.set_yticks([0, 50, 100])
    axis.set_title(f"{row['method']}: ECE {100 * row['calibration_error']:.1f} %", fontsize=11, color=colour)
