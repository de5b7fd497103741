"""
Training runs on one sheet: reads their logs and evaluations, which ``plot`` draws.

Computes no figure: what is drawn is what training and ``eval`` wrote.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklformat.errors import CorruptError, UnsupportedError, describe_bad_json
from sklformat.files.regular import check_exists
from sklformat.plot import ReliabilityBin, RunRow, plot_runs
from sklformat.settings.inspection import PlotConfig
from sklformat.views.characters import visible

LOG = "metrics.jsonl"
"""What makes a directory that of a run."""
_EVALUATION = "evaluation.json"
# Of what is no step, or no bins: another type, no such name, a number beyond float, or endless lists.
_BAD = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
# Of each curve, the name in the log.
_CURVES = {
    "loss": "loss",
    "lm_loss": "eval_lm_loss",
    "kl": "eval_kl",
    "kl_to_records": "eval_kl_to_records",
    "calibration_error": "eval_calibration_error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plotted:
    """The sheet that was drawn, and of which runs or caches."""

    out: Path
    names: list[str]

    def __str__(self) -> str:
        return f"{self.out}: {', '.join(self.names)}"


def plot(config: PlotConfig) -> Plotted:
    """
    Draw training runs side by side.

    Raises:
        FileNotFoundError: A path is not there.
        UnsupportedError: It is no directory of a run.
        CorruptError: Its log or its evaluation cannot be read; names the line.
        OSError: The sheet cannot be written.
    """
    names = [Path(path).resolve().name for path in config.paths]
    if len(set(names)) < len(names):
        names = [*config.paths]
    names = [visible(name) for name in names]
    rows = [read_run(Path(path), name) for path, name in zip(config.paths, names, strict=True)]
    plot_runs(rows, config.out)
    return Plotted(out=config.out, names=names)


def read_run(directory: Path, name: str) -> RunRow:
    """
    What is drawn of one run: the curves of its log, and the reliability of its ``evaluation.json``, if any.

    Args:
        directory: As ``sklformat train`` or ``sklformat demo`` made it; the run may still be going.
        name: In the legend.

    Raises:
        FileNotFoundError, UnsupportedError, CorruptError: As ``plot``.
    """
    check_exists(directory)
    log = directory / LOG
    if not log.is_file():
        raise UnsupportedError(f"not a training run: it has no {LOG}, which sklformat train writes", path=directory)
    curves: dict[str, list[tuple[int, float]]] = {curve: [] for curve in _CURVES}
    # A line without its end is being written, or was cut off by a crash.
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate((line for line in lines if line.endswith("\n")), 1):
        step, values = _figures_of(line, log, number)
        for curve, key in _CURVES.items():
            if key in values:
                curves[curve].append((step, values[key]))
    return RunRow(name=name, curves=curves, reliability=_reliability(directory / _EVALUATION))


def _figures_of(line: str, path: Path, number: int) -> tuple[int, dict[str, float]]:
    try:
        row = json.loads(line)
        values = {key: float(row[key]) for key in _CURVES.values() if row.get(key) is not None}
        return int(row["step"]), {key: value for key, value in values.items() if math.isfinite(value)}
    except _BAD:
        raise CorruptError(
            f"line {number} of the log holds no step with its figures: {line.strip()[:60]!r}; take it out to draw "
            "the others",
            path=path,
        ) from None


def _reliability(path: Path) -> list[ReliabilityBin]:
    if not path.is_file():
        return []
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return [
            {key: float(entry[key]) for key in ("confidence", "accuracy", "share")}  # type: ignore[misc]
            for entry in found["reliability"]
        ]
    except json.JSONDecodeError as error:
        raise CorruptError(describe_bad_json(error), path=path) from None
    except _BAD:
        raise CorruptError("holds no reliability bins as sklformat eval --out writes them", path=path) from None
