"""
Directories that appear whole or not at all: token stores, models, checkpoints.

Knows nothing of what is inside them. Shards have their own protocol (SPEC.md, what a writer must do).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from sklformat.errors import SettingsError
from sklformat.files.disk import lock, naming


@contextlib.contextmanager
def published(directory: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """
    Fill a directory under another name and give it its own name when it is complete.

    The body writes into the empty directory it is given, ``<directory>.partial``. When the body ends, every file is
    synced, the directory is renamed and its parent synced, so that a crash leaves the old state or the new one. (To
    replace a directory takes two renames. A crash between them leaves the old one as ``<directory>.old``; the next
    call puts it back.)
    When the body raises, the partial directory is removed. What a killed process left is removed by the next one.

    Args:
        directory: The final path; its parents are made.
        replace: Whether an existing directory may be replaced. The old one is there until the new one is complete.

    Yields:
        The partial directory.

    Raises:
        FileExistsError: ``directory`` exists and ``replace`` is false.
        InUseError: Another process is filling this directory.
        OSError: As the operating system reports it (disk full, no permission).
    """
    directory = Path(directory)
    if not directory.exists() and _old(directory).exists():
        _old(directory).rename(directory)
    if not replace and directory.exists():
        raise FileExistsError(f"{directory} exists already; remove it or choose another path")
    partial = directory.with_name(directory.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    # The lock is on the directory itself: it goes with the process, and no file of it is published.
    handle = os.open(partial, os.O_RDONLY)
    try:
        lock(handle, partial)
        try:
            for entry in partial.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            with naming(directory):
                yield partial
            for folder, _, names in os.walk(partial):
                for name in names:
                    fsync_path(Path(folder) / name)
                fsync_path(Path(folder))
            _rename(partial, directory, replace=replace)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def refuse_foreign(place: Path | str, names: Iterable[str], what: str, own: re.Pattern[str]) -> None:
    """
    Make sure that a directory holds nothing but files of ours, so that these never mix with someone's own.

    Args:
        place: The directory or URL, for the message.
        names: What is in it.
        what: That it should hold, for the message.
        own: Names that may be there.

    Raises:
        SettingsError: It holds another file; the message names the first.
    """
    foreign = sorted(name for name in names if not own.fullmatch(name))
    if foreign:
        raise SettingsError(f"{place} is not empty and holds no {what} ({foreign[0]} is there); use another one")


def fsync_path(path: Path | str) -> None:
    """Wait until a file's bytes, or a directory's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(partial: Path, directory: Path, *, replace: bool) -> None:
    """Rename onto the final name; a directory with files cannot be replaced in one step, so it steps aside first."""
    stepped_aside = replace and directory.exists()
    if stepped_aside:
        shutil.rmtree(_old(directory), ignore_errors=True)
        directory.rename(_old(directory))
    partial.rename(directory)
    fsync_path(directory.parent)
    if stepped_aside:
        shutil.rmtree(_old(directory), ignore_errors=True)


def _old(directory: Path) -> Path:
    return directory.with_name(directory.name + ".old")
