"""
Files, datasets and the standard library's source as documents, and their split into training and held-out ones.

Knows no tokens.
"""

from __future__ import annotations

import fnmatch
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from sklformat.distill.text.sources.json_rows import kind_of
from sklformat.distill.text.sources.rows import Row, read_made
from sklformat.settings.files import TextFiles

# Parts of the standard library that are not its source proper: tests, tables, other people's packages.
_NOT_LIBRARY = frozenset(
    {
        *("site-packages", "dist-packages", "distutils", "ensurepip", "msilib", "__pycache__"),
        *("test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "encodings"),
    }
)
_NOT_LIBRARY_FILES = "_sysconfigdata*"
_LIBRARY_MIN_CHARS = 200


Made = TypeVar("Made")


class Document(NamedTuple):
    """
    One text with its name.

    Attributes:
        name: Path relative to the directory given, with forward slashes, and the row's number; decides the held-out
            split.
        text: The text, not empty.
    """

    name: str
    text: str


def read_documents(files: TextFiles | Iterable[Path | str] | Path | str) -> Iterator[Document]:
    """
    Read files, and all files of directories, as documents: each row is one, and so is each plain text file.

    A directory is read recursively in the order of relative paths; hidden files and directories are left out.
    A file is what its name ends in: .jsonl, .json (an array of rows), .parquet, .arrow, else plain text; .gz and .zst
    behind that are unpacked.  A plain text file of more than 2^19 characters becomes several documents.  Empty texts
    are left out.

    Args:
        files: The choice, or files and directories, read as UTF-8 with rows whose field is "text".

    Yields:
        Documents, in the order of the paths; a row of ``name`` is ``name#0``, ``name#1``, … by its line or row.

    Raises:
        FileNotFoundError, PermissionError: A path does not exist or cannot be read; at the call for the paths given.
        ValueError: No text found; a file that is not text of its encoding, is damaged, or has a row without the field.
            Names file and place.
        CorruptError: A damaged Parquet or Arrow file.
        ModuleNotFoundError: A kind of file that needs pyarrow or zstandard, which is not installed.
    """
    if isinstance(files, (str, Path)):
        files = TextFiles(text=(Path(files),))
    elif not isinstance(files, TextFiles):
        files = TextFiles(text=tuple(Path(path) for path in files))
    field, source = files.text_field, ", ".join(map(str, files.text))
    documents = read_made(files, lambda row: document_of(row, field), wanted={field})
    return some(documents, f"every file in {source} is empty, or cannot be read and is skipped")


def document_of(row: Row, field: str) -> Document | None:
    """A row's text; None: it is empty."""
    if field not in row.values:
        raise ValueError(f"{row.place} has no field {field!r}; it has {', '.join(map(repr, row.values)) or 'none'}")
    text = row.values[field]
    if not isinstance(text, str):
        raise ValueError(f"{row.place} has {kind_of(text)} in field {field!r}, must be text")  # noqa: TRY004  the data is wrong
    check_characters(text, row.place)
    return Document(row.name, text) if text else None


def check_characters(text: str, place: str) -> None:
    """
    Make sure that a text can be written.

    Raises:
        ValueError: It holds half a surrogate pair; names the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place} holds half a surrogate pair, which is no character") from None


def some(documents: Iterable[Made], otherwise: str) -> Iterator[Made]:
    """The documents, or chats; there must be one."""
    found = False
    for document in documents:
        found = True
        yield document
    if not found:
        raise ValueError(f"no text found: {otherwise}")


def standard_library_documents() -> Iterator[Document]:
    """
    Read the source of the running Python's standard library: real text that every machine with Python has.

    Tests, generated tables, vendored and installed packages are left out, and so are files below 200 characters.

    Yields:
        Documents named by their path inside the library, in the order of these.

    Raises:
        ValueError: This Python came without its library's source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        (file.relative_to(root).as_posix(), file)
        for file in root.rglob("*.py")
        if _NOT_LIBRARY.isdisjoint(file.relative_to(root).parts) and not fnmatch.fnmatch(file.name, _NOT_LIBRARY_FILES)
    ]
    documents = (Document(name, path.read_bytes().decode()) for name, path in sorted(files))
    return some((one for one in documents if len(one.text) >= _LIBRARY_MIN_CHARS), f"{root} holds no source")


def is_held_out(name: str, *, one_in: int = 20) -> bool:
    """Say whether a document is held out from training; depends on its name alone (SHA-1 mod ``one_in`` is 0)."""
    digest = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % one_in == 0


def split_documents(documents: Iterable[Document], *, one_in: int = 20) -> tuple[list[Document], list[Document]]:
    """
    Split documents into training and held-out ones, about one in ``one_in`` by ``is_held_out``.

    Raises:
        ValueError: One of the two would be empty; ``cut_documents`` makes smaller documents.
    """
    parts: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        parts[is_held_out(document.name, one_in=one_in)].append(document)
    if not all(parts):
        raise ValueError(
            f"a split of {len(parts[0]) + len(parts[1])} documents gives {len(parts[0])} to train on and "
            f"{len(parts[1])} held out; give more documents"
        )
    return parts


def cut_documents(documents: Iterable[Document], *, max_chars: int) -> Iterator[Document]:
    """
    Cut long documents at line ends into pieces of at most ``max_chars`` characters (a longer line stays whole).

    Args:
        documents: Any documents.
        max_chars: Upper bound of a piece, characters, >= 1.

    Yields:
        Short documents as they are; pieces as ``name#0``, ``name#1``, … Joined, the pieces give the text back.
    """
    if max_chars < 1:
        raise ValueError(f"max_chars must be >= 1, got {max_chars}")
    for document in documents:
        if len(document.text) <= max_chars:
            yield document
            continue
        pieces: list[list[str]] = [[]]
        length = 0
        for line in document.text.splitlines(keepends=True):
            if pieces[-1] and length + len(line) > max_chars:
                pieces.append([])
                length = 0
            pieces[-1].append(line)
            length += len(line)
        for number, piece in enumerate(pieces):
            yield Document(f"{document.name}#{number}", "".join(piece))
