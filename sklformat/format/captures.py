"""
What the header says of a capture beyond its fields: a JSON object in the one form that its bytes may have.

SPEC.md section 7.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sklformat.format import layout

_INTEGERS = range(-(1 << 63), 1 << 64)


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """Canonical JSON: sorted keys, no white space, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def plain_capture(value: Mapping[str, Any]) -> dict[str, Any]:
    """
    A capture as it will be read again: of dicts, lists, strings, numbers, booleans and None.

    Raises:
        TypeError: It is no JSON object, or holds what JSON does not have.
        ValueError: It holds what a capture may not, or is nested too deep.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"capture must be a JSON object (a dict), got {type(value).__name__}")
    if _depth(value) > layout.MAX_CAPTURE_DEPTH:
        raise ValueError(f"capture has objects and lists nested more than {layout.MAX_CAPTURE_DEPTH} deep")
    plain: dict[str, Any] = _loaded(canonical_json(value))
    return plain


def parse_capture(text: bytes) -> dict[str, Any]:
    """
    The capture that canonical JSON says.

    Raises:
        ValueError: It is not what SPEC section 7 says; the message says why.
    """
    if (depth := _text_depth(text)) > layout.MAX_CAPTURE_DEPTH:  # before a parser meets it
        raise ValueError(f"capture is nested {depth} deep, the limit is {layout.MAX_CAPTURE_DEPTH}")
    try:
        capture = _loaded(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"capture is not JSON: {error}") from error
    if not isinstance(capture, dict):
        raise ValueError("capture is not a JSON object")  # noqa: TRY004  bytes were given, and their value is wrong
    if canonical_json(capture) != text:
        raise ValueError("capture is not in canonical form")
    return capture


def is_isolated(capture: Mapping[str, Any]) -> bool:
    """Whether documents did not see each other when the teacher ran, as ``sklformat cache`` says it."""
    packing = capture.get("packing")
    return isinstance(packing, Mapping) and packing.get("isolated") is True


def _loaded(text: bytes) -> Any:
    value = json.loads(text.decode("utf-8"), parse_int=_integer)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"capture holds U+{ord(error.object[error.start]):04X}, half of a surrogate pair, which is no character; "
            "replace it"
        ) from None
    return value


def _integer(digits: str) -> int:
    # So few digits also where the interpreter limits how many it converts.
    if len(digits) > 20 or int(digits) not in _INTEGERS:
        shown = digits if len(digits) <= 24 else f"{digits[:20]}… of {len(digits)} digits"
        raise ValueError(
            f"capture holds the integer {shown}, which is not in -2**63..2**64 - 1; write it as a string or a float"
        )
    return int(digits)


def _depth(value: Any, limit: int = layout.MAX_CAPTURE_DEPTH) -> int:
    """Objects and lists inside each other, counted up to one more than ``limit``."""
    if limit < 0 or not isinstance(value, Mapping | list | tuple):
        return 0
    parts = value.values() if isinstance(value, Mapping) else value
    return 1 + max((_depth(part, limit - 1) for part in parts), default=0)


def _text_depth(text: bytes) -> int:
    """The same of JSON as bytes, whatever else is wrong with it."""
    deepest = depth = 0
    for token in re.findall(rb'"(?:[^"\\]|\\.)*"|[\[{\]}]', text, re.DOTALL):
        depth += (token in b"[{") - (token in b"]}")
        deepest = max(deepest, depth)
    return deepest
