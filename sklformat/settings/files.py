"""Which files a verb reads as text, and how: the flags that ``cache``, ``eval`` and ``estimate`` share."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

OnBadFile = Literal["refuse", "skip"]

MAX_UNPACK_RATIO = 100
"""A compressed file may unpack to this many times its size, unless its user allows more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """
    Files of text, or of rows that hold text, and how to read them.

    Attributes:
        text: Files and directories.
        field: Name of the field, or column, of a row that holds the text; of the text itself in a plain text file.
        encoding: Of plain text, .jsonl and .json; Parquet and Arrow hold UTF-8.
        include: Globs: only files that match one of them; empty: all.
        exclude: Globs: no file that matches one of them.
        on_bad_file: What to do about a file that cannot be read as what it should be.
        max_unpack_ratio: Bound of unpacked by packed bytes of a compressed file.
    """

    text: tuple[Path, ...]
    field: str = "text"
    encoding: str = "utf-8"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    on_bad_file: OnBadFile = "refuse"
    max_unpack_ratio: int = MAX_UNPACK_RATIO

    def __post_init__(self) -> None:
        try:
            known = _is_of_text(codecs.lookup(self.encoding))
        except LookupError:
            known = False
        if not known:
            raise ValueError(
                f"encoding {self.encoding!r} is not one of text; such are utf-8, utf-16, latin-1, cp1252, gb18030"
            )
        of_rows = ("text", "field")  # a dataset has the field too
        unused = [f.name for f in fields(self) if f.name not in of_rows and getattr(self, f.name) != f.default]
        if unused and not self.text:
            raise ValueError(f"{unused[0]} belongs to text, which is not given")
        if self.max_unpack_ratio < 1:
            raise ValueError(f"max_unpack_ratio must be >= 1, got {self.max_unpack_ratio}")
        if not self.field:
            raise ValueError("field is empty; give the name of the field that holds the text")

    @classmethod
    def of(cls, config: Any) -> TextFiles:
        """
        What the flags of a verb say, which has all of them.

        Raises:
            ValueError: A value that cannot be.
        """
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})


def _is_of_text(codec: Any) -> bool:
    """Whether a codec goes from bytes to text, piece by piece; Python also has some from text to text."""
    return codec._is_text_encoding and codec.incrementaldecoder is not None  # noqa: SLF001  its only place
