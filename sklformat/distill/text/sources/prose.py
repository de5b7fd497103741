"""Plain text: one text per file, or parts of a large one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sklformat.distill.text.sources.streams import not_text

MAX_CHARS = 1 << 19
"""Characters of one text; to tokenise them takes some hundred times as many bytes of memory."""


def read_prose(pieces: Iterable[str]) -> Iterator[tuple[int | None, str]]:
    """
    The text of a file; one of more than ``MAX_CHARS`` characters is cut at line ends, a longer line anywhere.

    Args:
        pieces: Of the text, each shorter than ``MAX_CHARS``.

    Yields:
        The text with None; or parts of at most ``MAX_CHARS`` with their numbers. Joined, they are the text.

    Raises:
        ValueError: A NUL character: the file is binary.
    """
    held: list[str] = []
    length = done = 0
    number = None
    for piece in pieces:
        if "\0" in piece:
            at = done + length + piece.index("\0")
            raise not_text(f"character {at} is NUL, so it is no text", "".join([*held, piece])[:16].encode())
        held.append(piece)
        length += len(piece)
        if length > MAX_CHARS:
            text = "".join(held)
            end = text.rfind("\n", 0, MAX_CHARS) + 1 or MAX_CHARS
            number = 0 if number is None else number + 1
            yield number, text[:end]
            held, length, done = [text[end:]], length - end, done + end
    if length:
        yield None if number is None else number + 1, "".join(held)
