"""What the plots of the claims have in common: curves and levels with error bars, horizontal bars, logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import Mean

# Of each curve one: they differ in grey by dash, marker and lightness too.
COLOURS = ("#332288", "#cc6677", "#228833", "#999933", "#66ccee", "#aa3377", "#bbbbbb", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
BARS, ZERO = COLOURS[4], "0.4"


def curve(
    axes: Any, number: int, x: Sequence[Any], values: Sequence[Mean], label: str = "", *, level: float | None = None
) -> None:
    """
    A curve with error bars.

    Args:
        axes: Of matplotlib.
        number: Which of the plot's curves; colour, dash and marker follow.
        x: Numbers or names.
        values: One for each ``x``.
        label: In the legend.
        level: Bars are the confidence interval of this level; None: the standard error.
    """
    errors = [one.error if level is None else one.within(level)[1] - one.mean for one in values]
    axes.errorbar(
        x, [one.mean for one in values], errors, color=COLOURS[number], linestyle=DASHES[number],
        marker=MARKERS[number], markersize=5, capsize=4, label=label,
    )  # fmt: skip


def levels(axes: Any, values: dict[str, Mean], *, first: int = 1) -> None:
    """Horizontal lines, such as those of CE and FullKD; the first has the number ``first`` among the plot's curves."""
    for number, (label, value) in enumerate(values.items(), first):
        axes.axhline(value.mean, color=COLOURS[number], linestyle=DASHES[number], label=label)


def bars(axes: Any, values: dict[str, Mean], *, room: float | None = None) -> None:
    """Horizontal bars by name, the first on top; with ``room`` the axis begins so far below the least, not at 0."""
    found = list(values.values())
    axes.barh(list(values), [one.mean for one in found], xerr=[one.error for one in found], color=BARS, capsize=4)
    axes.invert_yaxis()
    if room is not None:
        axes.set_xlim(left=min(one.mean for one in found) - room)


def logarithmic(axes: Any, ticks: Sequence[float], *, axis: str = "x", base: int = 10) -> None:
    """A logarithmic axis that names these numbers alone."""
    getattr(axes, f"set_{axis}scale")("log", base=base)
    getattr(axes, f"set_{axis}ticks")(ticks, [f"{tick:,g}" for tick in ticks])
    getattr(axes, f"{axis}axis").minorticks_off()
