"""
What verbs print, whatever the terminal: results as tables or JSON, on streams that lack characters or are closed.

Knows no verb.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from sklformat.progress import harmless
from sklformat.views.characters import is_writable

_WIDEST_NAME = 36  # a longer one stands out of its column


def prepare_streams() -> None:
    """Let no stream fail: a character that it lacks is escaped, and what a closed one is given goes nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  as long as the process is
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_result(result: Any, *, as_json: bool) -> None:
    """What a verb returns: as JSON, as it prints itself, or a table of its fields that are single values."""
    if as_json:
        print_json(result if isinstance(result, dict) else dataclasses.asdict(result))
    elif "__str__" in vars(type(result)):
        print_line(str(result))
    else:
        values = {f.name.replace("_", " "): getattr(result, f.name) for f in dataclasses.fields(result)}
        print_table({n: v for n, v in values.items() if v is not None and not isinstance(v, list | dict)})


def print_line(text: str) -> None:
    """A line, or several, in which no name commands the terminal."""
    sys.stdout.write(f"{harmless(text)}\n")


def print_json(value: Any) -> None:
    """JSON, which has no number that is not finite: null stands for it."""
    text = json.dumps(_finite(value), indent=1, default=str, ensure_ascii=False, allow_nan=False)
    encoding = sys.stdout.encoding or "utf-8"
    # What shows no ink, such as an escape of a terminal in a corpus, stays an escape of JSON.
    sys.stdout.write(
        "".join(c if c == "\n" or (c.isprintable() and is_writable(c, encoding)) else _escaped(c) for c in text) + "\n"
    )


def print_table(values: dict[str, Any]) -> None:
    """Name and value of each line."""
    width = max((len(name) for name in values if len(name) <= _WIDEST_NAME), default=0) + 2
    for name, value in values.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        print_line(f"{name:<{width}}{text}" if len(name) < width else f"{name}  {text}")


def _escaped(c: str) -> str:
    return json.dumps(c)[1:-1]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
