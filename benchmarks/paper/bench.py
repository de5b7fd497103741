"""
What the scripts of the paper's claims share: arguments, figures with standard errors, the verdict, what is written.

Each script tries one claim of Anshumann et al. 2025 (arXiv 2503.16870) and prints the paper's figure beside ours.  A
verdict is computed from the figures by the rule that the script states; it is one of ``SHOWN``, ``NOT_SHOWN`` and
``CONTRADICTED``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # timing.py, which all benchmarks share

from timing import processor

from sklformat.files.disk import write_atomically

SHOWN, NOT_SHOWN, CONTRADICTED = "shown", "not shown at this scale", "contradicted"
STYLE = {**mpl.rcParamsDefault, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True, kw_only=True)
class Options:
    """
    How a script was called.

    Attributes:
        scale: "quick" (seconds; shows that it runs), "standard" (minutes on two cores) or "thorough".
        device: "cpu" or "cuda"; on a GPU models are larger.
        seeds: What is repeated, each with its own start, order and draws.
        out: Directory of results, plots and whatever scripts share, such as the teacher.
    """

    scale: str
    device: str
    seeds: tuple[int, ...]
    out: Path

    @property
    def is_quick(self) -> bool:
        return self.scale == "quick"


def options(about: str | None, *, seeds: int = 3, thorough: int | None = None) -> Options:
    """
    The arguments of a script.

    Args:
        about: Its docstring.
        seeds: How many by default.
        thorough: How many with --thorough; None: twice as many.
    """
    parser = argparse.ArgumentParser(description=(about or "").strip().split("\n\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="seconds: only shows that the script runs")
    size.add_argument("--thorough", action="store_true", help="more seeds and, where it says so, longer runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: with larger models")
    parser.add_argument("--seeds", type=int, default=0, help="how many seeds; 0: as the size says")
    parser.add_argument("--out", type=Path, default=Path("build/paper"), help="results, plots, and the shared teacher")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here: leave --device out")
    scale = "quick" if given.quick else "thorough" if given.thorough else "standard"
    count = given.seeds or {"quick": 2, "standard": seeds, "thorough": thorough or 2 * seeds}[scale]
    if given.device == "cpu":
        torch.set_num_threads(1)  # figures depend on the seed then, and not on how busy the machine is
    given.out.mkdir(parents=True, exist_ok=True)
    return Options(scale=scale, device=given.device, seeds=tuple(range(count)), out=given.out)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What an earlier run left at a path, as JSON holds it; else what ``make`` returns, kept for the next."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(make()).encode())
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Mean:
    """Mean and its standard error over seeds; the error of a single value is not known."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        return cls(tuple(float(value) for value in values))

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        if len(self.values) < 2:
            return math.nan
        return statistics.stdev(self.values) / math.sqrt(len(self.values))

    def __sub__(self, other: Mean) -> Mean:
        """Paired differences: both are over the same seeds."""
        return Mean.of([a - b for a, b in zip(self.values, other.values, strict=True)])

    def within(self, level: float = 0.95) -> tuple[float, float]:
        """The confidence interval of the mean, by Student's t."""
        half = student_t(len(self.values) - 1, level) * self.error
        return self.mean - half, self.mean + half

    def text(self, digits: int = 3) -> str:
        if len(self.values) < 2:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.error:.{digits}f}"


def student_t(degrees: int, level: float) -> float:
    """Where the middle ``level`` of Student's t with so many degrees of freedom ends; by bisection of its integral."""
    if degrees < 1:
        return math.nan

    def inside(limit: float) -> float:
        # The substitution t = sqrt(degrees) tan(a) leaves cos(a)^(degrees - 1), smooth and short.
        steps, end = 512, math.atan(limit / math.sqrt(degrees))
        angles = [end * (i + 0.5) / steps for i in range(steps)]
        area = sum(math.cos(a) ** (degrees - 1) for a in angles) * end / steps
        whole = math.sqrt(math.pi) * math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2))
        return 2 * area / whole

    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return high


@dataclass
class Claim:
    """
    One claim of the paper, tried.

    Args:
        name: Of the script; its results are ``name.json`` and ``name.png``.
        says: What the paper claims, one sentence.
        options: How the script was called.
    """

    name: str
    says: str
    options: Options
    rows: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        print(f"{self.name}: {self.says}")
        print(f"{len(self.options.seeds)} seeds, {self.options.scale}, {self.options.device}, {processor()}\n")

    def add(self, row: str, /, *, paper: dict[str, Any] | None = None, **ours: Mean | float | str) -> None:
        """Note a row of the table: the paper's figures and ours, under the same names where they are of one thing."""
        self.rows.append({"row": row, "paper": paper or {}, "ours": ours})

    def table(self, digits: dict[str, int] | None = None) -> str:
        """The rows as Markdown; the paper's figure, where there is one, behind ours in brackets."""
        names = list(dict.fromkeys(name for row in self.rows for name in (*row["ours"], *row["paper"])))
        lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for row in self.rows:
            cells = []
            for name in names:
                value, paper = row["ours"].get(name, ""), row["paper"].get(name, "")
                value = value if isinstance(value, str) else _as_mean(value).text((digits or {}).get(name, 3))
                cells.append(
                    f"{value} [{paper}]" if value and paper != "" else value or (paper != "" and f"[{paper}]") or ""
                )
            lines.append(f"| {row['row']} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def end(
        self,
        rule: str,
        verdict: str,
        draw: Callable[[Figure], None] | None = None,
        *,
        digits: dict[str, int] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """
        Print the table and the verdict; write JSON and plot.

        Args:
            rule: By which the verdict follows from the figures.
            verdict: One of the three.
            draw: Fills the plot's figure.
            digits: Behind the point, by column; 3 where nothing is said.
            notes: What else a reader must know.
        """
        assert verdict in (SHOWN, NOT_SHOWN, CONTRADICTED)
        print(self.table(digits) + "\n\nours [the paper's]; ± standard error over seeds")
        for note in notes:
            print(f"* {note}")
        seconds = time.monotonic() - self.started
        print(f"{verdict}: {rule}  ({seconds:.0f} s)")
        if self.options.is_quick:
            print("--quick: too small to say anything of the claim")
        values = {
            "claim": self.says, "verdict": verdict, "rule": rule, "notes": list(notes), "seconds": seconds,
            "scale": self.options.scale, "device": self.options.device, "seeds": len(self.options.seeds),
            "table": self.table(digits),
            "rows": [
                {**row, "ours": {k: v if isinstance(v, str) else _as_mean(v).values for k, v in row["ours"].items()}}
                for row in self.rows
            ],
        }  # fmt: skip
        (self.options.out / f"{self.name}.json").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
        if draw is not None:
            with mpl.rc_context(STYLE):
                figure = Figure(figsize=(8, 4.5), layout="constrained")
                draw(figure)
                figure.savefig(self.options.out / f"{self.name}.png", dpi=120)


def _as_mean(value: Mean | float) -> Mean:
    return value if isinstance(value, Mean) else Mean.of([value])
