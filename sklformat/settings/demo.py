"""The settings of ``sklformat demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sklformat.settings.limits import check_least


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Text, teacher, caches, students and the paper's table in one go. If stopped, the same command resumes it."""

    out: Path = Path("demo-run")
    """Directory for everything that the demo makes."""

    text: Path | None = None
    """Text to learn from, a file or a directory, as for cache; none: the source of this Python's standard library."""

    field: str | None = None
    """Field, or column, of the rows that holds the text; none: text."""

    seed: int = 0
    """Seed of everything random: packing, weights, order, draws."""

    size: Literal["standard", "tiny"] = "standard"
    """standard: shows the paper's order in minutes on 2 cores; tiny: seconds, shows only that everything runs."""

    processes: int = 0
    """Processes that work at once, each on one core; 0: one for each core, at most 4."""

    def __post_init__(self) -> None:
        check_least(self, 0, "seed", "processes")
        if self.text is None and self.field is not None:
            raise ValueError("field belongs to text, which is not given")
