"""What numbers a setting may have, said in the same words for every verb."""

from __future__ import annotations

import math
import re
from pathlib import Path

PICTURES = (".png", ".svg", ".pdf")
MAX_DRAWN = 8
"""Runs or students on one sheet."""
_PART = re.compile(r"(\d*):(\d*)")


def check_least(settings: object, least: int, *names: str) -> None:
    """
    The settings of these names are not below ``least``; None is none.

    Raises:
        ValueError: One is; shows it.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


def check_positive(settings: object, *names: str) -> None:
    """
    The settings of these names are positive and finite; None is none.

    Raises:
        ValueError: One is not; shows it.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_picture(name: str, path: Path) -> None:
    """
    A setting of this name is a file that matplotlib can write, by its ending.

    Raises:
        ValueError: It is not; shows it.
    """
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"{name} must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}, got {str(path)!r}")


def is_part(words: str) -> bool:
    """Whether words are A:B, one of both or none of it left out."""
    return _PART.fullmatch(words) is not None


def part_of(words: str, available: int) -> range | None:
    """What A:B means of so many: from A to before B; None: it is nothing, or not among these many."""
    match = _PART.fullmatch(words)
    begin, end = match.groups() if match is not None else ("0", "0")
    found = range(int(begin or 0), int(end) if end else available)
    return found if 0 <= found.start < found.stop <= available else None
