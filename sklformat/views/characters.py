"""
Text as a terminal can show it: nothing in it commands the terminal, and its width is known.

Knows no cache.
"""

from __future__ import annotations

import unicodedata

_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\"}
_JAMO = range(0x1160, 0x1200)  # vowels and ends of Korean syllables, which join the letter before


def visible(text: str, encoding: str = "utf-8") -> str:
    """
    A text with everything that shows no ink, or that an encoding lacks, written as Python escapes it.

    What comes out has printable characters only: no line end, no escape of a terminal, no mark that turns the direction
    of writing, no half of a surrogate pair.  A mark that would join what stands before the text is escaped too.
    """
    shown = [_SHORT.get(c) or (c if c.isprintable() and _is_in(c, encoding) else _escaped(c)) for c in text]
    if shown and len(shown[0]) == 1 and _columns_of(shown[0]) == 0:
        shown[0] = _escaped(shown[0])
    return "".join(shown)


def columns(text: str) -> int:
    """Columns of a terminal that a visible text takes: 2 for a wide character, 0 for one that joins another."""
    return len(text) if text.isascii() else sum(map(_columns_of, text))


def padded(text: str, width: int, end: str = "…") -> str:
    """A visible text in exactly so many columns: filled with spaces, or cut, with ``end`` in place of the rest."""
    excess = columns(text) - width
    if excess <= 0:
        return text + " " * -excess
    kept, room = [], max(width - columns(end), 0)
    for c in text:
        room -= _columns_of(c)
        if room < 0:
            break
        kept.append(c)
    cut = "".join(kept) + end[:width]
    return cut + " " * (width - columns(cut))


def is_writable(text: str, encoding: str) -> bool:
    """Whether an encoding has every character of a text."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _is_in(c: str, encoding: str) -> bool:
    return c < "\x7f" or is_writable(c, encoding)


def _escaped(c: str) -> str:
    code = ord(c)
    return f"\\x{code:02x}" if code < 1 << 8 else f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def _columns_of(c: str) -> int:
    if unicodedata.category(c) in ("Mn", "Me") or ord(c) in _JAMO:
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1
