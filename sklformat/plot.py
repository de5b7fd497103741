"""
Draws what other modules computed; the only door to matplotlib.

It computes no figure itself, loads no torch and needs no screen. The plots follow Figure 1 and Table 5 of the paper:
the LM loss of each method, and how far its confidence can be trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import matplotlib as mpl
from matplotlib.figure import Figure

BASELINE_COLOUR = "#7f7f7f"
COLOURS = ("#4477aa", "#cc6677", "#228833", "#aa7733", "#66ccee", "#aa3377", "#999933", "#332288")


class ReliabilityBin(TypedDict):
    """One confidence bin of a reliability diagram."""

    confidence: float
    """Mean confidence of the predictions in the bin, 0..1."""

    accuracy: float
    """Share of them that were right, 0..1."""

    share: float
    """Share of all predictions that fell into the bin, 0..1."""


class ComparisonRow(TypedDict):
    """What is drawn of one method."""

    method: str
    """Name next to the bar."""

    lm_loss: float
    """Nats per token on held-out text."""

    calibration_error: float
    """Expected calibration error, a fraction in 0..1."""

    reliability: Sequence[ReliabilityBin]
    """Bins in rising order of confidence; empty bins may be left out."""


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
    # A fixed style: what a user has in matplotlibrc must not change the project's figures.
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
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
        figure.savefig(path)


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
        axis.text(
            loss - 0.02 * span,
            place,
            f"{loss:.3f}",
            va="center",
            ha="right",
            fontsize=12,
            fontweight="bold",
            color="white",
            zorder=5,
        )
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
