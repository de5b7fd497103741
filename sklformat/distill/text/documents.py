"""
Text files and the standard library's source as documents, and their split into training and held-out ones.

Knows no tokens.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Parts of the standard library that are not its source proper: tests, tables, other people's packages.
_NOT_LIBRARY = frozenset(
    {
        *("site-packages", "dist-packages", "distutils", "ensurepip", "msilib", "__pycache__"),
        *("test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "encodings"),
    }
)
_NOT_LIBRARY_FILES = "_sysconfigdata*"
_LIBRARY_MIN_CHARS = 200


class Document(NamedTuple):
    """
    One text with its name.

    Attributes:
        name: Path relative to the directory given, with forward slashes; decides the held-out split.
        text: The text, not empty.
    """

    name: str
    text: str


def read_documents(paths: Iterable[Path | str] | Path | str) -> Iterator[Document]:
    """
    Read text files, and all files of directories, as documents.

    A directory is read recursively in the order of relative paths; hidden files and directories are left out.
    A file is one document of UTF-8 text; a ``.jsonl`` file is one document per line, its field "text".
    Empty texts are left out.

    Args:
        paths: Files and directories.

    Yields:
        Documents, in the order of ``paths``.

    Raises:
        FileNotFoundError, PermissionError: A path does not exist or cannot be read; at the call for the paths given.
        ValueError: No text found; bytes that are not UTF-8; a JSONL line without "text". Names the file.
    """
    given = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    files: list[tuple[str, Path]] = []
    for path in given:
        if path.is_dir():
            found = [(file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file()]
            files += sorted(pair for pair in found if not any(part.startswith(".") for part in pair[0].split("/")))
        else:
            path.stat()  # raises, with the path, when there is none
            files.append((path.name, path))
    return _read_files(files, source=", ".join(map(str, given)))


def read_dataset(words: Sequence[str], *, split: str = "train", field: str = "text") -> Iterator[Document]:
    """
    Read a Hugging Face dataset, one document per row; empty texts are left out.

    Args:
        words: A directory that ``save_to_disk`` wrote; or a name, as ``datasets.load_dataset`` knows it, and, where it
            has several, its configuration. A name is streamed, in its own order.
        split: Part of it.
        field: Column that holds the text.

    Yields:
        Documents named ``split#0``, ``split#1``, …

    Raises:
        ModuleNotFoundError: ``datasets`` is not installed.
        FileNotFoundError: There is no such dataset, split or configuration.
        ValueError: No such column, or no text in it.
    """
    import datasets  # noqa: PLC0415  an extra, needed only here

    try:
        if Path(words[0]).is_dir():
            loaded = datasets.load_from_disk(words[0])
            rows = loaded[split] if isinstance(loaded, dict) else loaded
        else:
            rows = datasets.load_dataset(*words, split=split, streaming=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(f"dataset {' '.join(words)}: cannot load split {split!r} ({reason})") from error
    return dataset_documents(rows, split=split, field=field, source=" ".join(words))


def dataset_documents(
    rows: Iterable[Mapping[str, Any]], *, split: str = "train", field: str = "text", source: str = "the dataset"
) -> Iterator[Document]:
    """
    Documents of anything that gives rows; as ``read_dataset``.

    Raises:
        ValueError: A row has no such column, or no text in it; no text at all.
    """
    found = False
    for number, row in enumerate(rows):
        text = row.get(field)
        if not isinstance(text, str):
            raise ValueError(  # noqa: TRY004  the data is wrong, not the call
                f"dataset {source}: row {number} of split {split!r} has no text in column {field!r}; "
                f"it has {', '.join(sorted(map(str, row)))}"
            )
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"dataset {source}: row {number} holds half a surrogate pair, which is no character")
        if text:
            found = True
            yield Document(f"{split}#{number}", text)
    if not found:
        raise ValueError(f"no text found: dataset {source} has none in column {field!r} of split {split!r}")


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
    return (
        document
        for document in _read_files(sorted(files), source=str(root))
        if len(document.text) >= _LIBRARY_MIN_CHARS
    )


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


def _read_files(files: Sequence[tuple[str, Path]], *, source: str) -> Iterator[Document]:
    if not files:
        raise ValueError(f"no text found: no files in {source}; give text files, .jsonl files or directories of them")

    def documents() -> Iterator[Document]:
        found = False
        for name, path in files:
            for document in _read_jsonl(name, path) if path.suffix == ".jsonl" else _read_text(name, path):
                found = True
                yield document
        if not found:
            raise ValueError(f"no text found: every file in {source} is empty")

    return documents()


def _read_text(name: str, path: Path) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8 text; convert the file, or leave it out of the paths"
        ) from None
    if text:
        yield Document(name, text)


def _read_jsonl(name: str, path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # not UTF-8, or not JSON
                raise ValueError(f"{path}: line {number + 1} is not JSON: {error}") from None
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise ValueError(f'{path}: line {number + 1} has no field "text" that is a string')  # noqa: TRY004
            if any("\ud800" <= char <= "\udfff" for char in text):
                raise ValueError(f"{path}: line {number + 1} holds half a surrogate pair, which is no character")
            if text:
                yield Document(f"{name}#{number}", text)
