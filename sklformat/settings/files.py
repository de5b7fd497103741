"""Which files a verb reads as text, and how: the flags that ``cache``, ``eval`` and ``estimate`` share."""

from __future__ import annotations

import codecs
import dataclasses
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

OnBadFile = Literal["refuse", "skip"]

TEXT_FIELD = "text"
"""Field of a row that holds its text, unless its user names another."""

MAX_UNPACK_RATIO = 100
"""A compressed file may unpack to this many times its size, unless its user allows more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles:
    """Files of text, or of rows that hold text, and how to read them; the settings of a verb are these and more."""

    text: tuple[Path, ...] = ()
    """Files and directories."""

    field: str | None = dataclasses.field(default=None, metadata={"was": "dataset-field"})
    """Field, or column, of the rows that holds the text; none: text."""

    encoding: str = "utf-8"
    """Encoding of plain text, .jsonl and .json, such as latin-1, cp1252, utf-16."""

    include: tuple[str, ...] = ()
    """Only the files that match one of these globs, by name, or by path where a glob has a slash. None: all."""

    exclude: tuple[str, ...] = ()
    """Leave out the files that match one of these globs."""

    on_bad_file: OnBadFile = "refuse"
    """skip: leave files out that cannot be read, and name them at the end; each is read twice then."""

    max_unpack_ratio: int = MAX_UNPACK_RATIO
    """A compressed file may unpack to this many times its size (or to 64 MiB); beyond, it is taken for a bomb."""

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
        unused = [f.name for f in fields(TextFiles) if f.name not in of_rows and getattr(self, f.name) != f.default]
        if unused and not self.text:
            raise ValueError(f"{unused[0]} belongs to text, which is not given")
        if self.max_unpack_ratio < 1:
            raise ValueError(f"max_unpack_ratio must be >= 1, got {self.max_unpack_ratio}")
        if self.field == "":
            raise ValueError("field is empty; give the name of the field that holds the text")

    @property
    def text_field(self) -> str:
        """Name of the field that holds the text; of a plain text file, of the text itself."""
        return TEXT_FIELD if self.field is None else self.field


def _is_of_text(codec: Any) -> bool:
    """Whether a codec goes from bytes to text, piece by piece; Python also has some from text to text."""
    return codec._is_text_encoding and codec.incrementaldecoder is not None  # noqa: SLF001  its only place
