"""
How far a long run is, on stderr: a bar on a terminal; elsewhere whole lines, at the beginning and then each minute.

Knows no verb.  tqdm is loaded only where a terminal watches, so that a log holds lines and nothing else.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

Reach = Callable[..., None]
"""Called with what is done so far and, if there is one, a note on it."""
Unit = Literal["byte", "sequence", "step", "student"]

clock = time.monotonic
_SOON, _BETWEEN = 10.0, 60.0  # seconds: until the first line that has a figure, and between two after it


def harmless(text: str) -> str:
    """Lines with each character that shows no ink escaped: a path in them may hold commands of the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def say(words: str) -> None:
    """Write a line at once."""
    sys.stderr.write(f"{harmless(words)}\n")
    sys.stderr.flush()


@contextmanager
def show(name: str, total: int | None, *, unit: Unit, first: int = 0, shown: bool = True) -> Iterator[Reach]:
    """
    Show how far a run is, for the time of the block.

    Args:
        name: Of what is done.
        total: How much there is to do, in units; None: nobody knows.
        unit: Of what is counted, in the singular.
        first: How much was done before.
        shown: False: show nothing.

    Yields:
        Whom to tell: ``reach(done)`` or ``reach(done, "loss 3.21")``, as often as there is something to tell.
    """
    if not shown:
        yield lambda _done, _note="": None
        return
    display = (_Bar if sys.stderr.isatty() else _Lines)(harmless(name), total, unit, first)
    try:
        yield display.reach
    finally:
        display.close()


class _Bar:
    """tqdm's, redrawn in its place."""

    def __init__(self, name: str, total: int | None, unit: Unit, first: int) -> None:
        from tqdm import tqdm  # noqa: PLC0415  an extra

        scaled: dict[str, Any] = {"unit": "B", "unit_scale": True} if unit == "byte" else {"unit": unit}
        self._bar = tqdm(desc=name, total=total, initial=first, **scaled)

    def reach(self, done: int, note: str = "") -> None:
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """Whole lines, which a log can hold; the last one of a run that took long says how far it came in what time."""

    def __init__(self, name: str, total: int | None, unit: Unit, first: int) -> None:
        self._name, self._total, self._unit, self._first = name, total, unit, first
        self._done, self._begin = first, clock()
        self._next, self._followed = self._begin + _SOON, False
        self._say()

    def reach(self, done: int, note: str = "") -> None:
        self._done, now = done, clock()
        if now >= self._next:
            self._followed = True
            self._next = now + _BETWEEN
            self._say(note, self._left(now))

    def close(self) -> None:
        if self._followed:  # else it was over before anybody asked
            self._say(f"in {describe_duration(clock() - self._begin)}")

    def _left(self, now: float) -> str:
        if self._total is None or self._done == self._first:
            return ""
        seconds = (now - self._begin) * (self._total - self._done) / (self._done - self._first)
        return f"about {describe_duration(seconds)} left"

    def _say(self, *notes: str) -> None:
        numbers = [self._done] if self._total is None else [self._done, self._total]
        large = self._unit == "byte" and numbers[-1] >= 10**6
        counted = " of ".join(f"{n / 1e6:,.1f}" if large else f"{n:,}" for n in numbers)
        unit = "MB" if large else self._unit + "s" * (numbers[-1] != 1)
        say(", ".join([f"{self._name}: {counted} {unit}", *filter(None, notes)]))


def describe_duration(seconds: float) -> str:
    """A time in the unit that people say it in."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 72 else f"{hours // 24:,} days {hours % 24} h"
