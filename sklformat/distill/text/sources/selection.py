"""Which files a user chose: those of the paths given, less what globs and dots leave out."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path
from typing import NamedTuple

from sklformat.settings.files import TextFiles


class File(NamedTuple):
    """
    One file.

    Attributes:
        name: Path relative to the directory given, with forward slashes; of a file given, its own name.
        path: Where it is.
    """

    name: str
    path: Path


def find_files(files: TextFiles) -> list[File]:
    """
    The files that are chosen, in the order of the paths given; those of a directory by their relative paths.

    Hidden files of directories, and what hidden directories hold, are left out.  A glob with a slash is compared
    with the relative path, any other with the file's own name; ``*`` takes slashes too.

    Raises:
        FileNotFoundError, PermissionError: A path, or a directory below one, does not exist or cannot be read.
        ValueError: There is none, or a directory is a dataset that was saved to disk.
    """
    found: list[File] = []
    num_hidden = 0
    for path in files.text:
        if not path.is_dir():
            path.stat()  # raises, with the path, when there is none
            found.append(File(path.name, path))
            continue
        if is_saved_dataset(path):
            raise ValueError(f"{path} is a dataset that save_to_disk wrote; give it as --dataset, not as --text")
        below, hidden = _walk(path)
        found += sorted(below)
        num_hidden += hidden
    chosen = [file for file in found if _is_chosen(file.name, files)]
    if not chosen:
        raise ValueError(
            f"no text found: no files in {', '.join(map(str, files.text))} beside {len(found)} that --include and "
            f"--exclude leave out and {num_hidden} hidden ones; give text, .jsonl, .json, .parquet or .arrow files, or "
            "directories of them"
        )
    return chosen


def is_saved_dataset(path: Path) -> bool:
    """Whether a directory is what ``save_to_disk`` of datasets leaves: of one dataset, or of several splits."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _walk(directory: Path) -> tuple[list[File], int]:
    """The files of a directory and of those below it, and the number of files and directories that are hidden."""

    def refuse(error: OSError) -> None:
        raise error

    files: list[File] = []
    num_hidden = 0
    for folder, folders, names in os.walk(directory, onerror=refuse):
        num_hidden += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        files += [File(path.relative_to(directory).as_posix(), path) for path in paths if path.is_file()]
    return files, num_hidden


def _is_chosen(name: str, files: TextFiles) -> bool:
    def matches(globs: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(name if "/" in glob else name.rpartition("/")[2], glob) for glob in globs)

    return (not files.include or matches(files.include)) and not matches(files.exclude)
