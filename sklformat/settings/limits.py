"""What numbers a setting may have, said in the same words for every verb."""

from __future__ import annotations

import math


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
