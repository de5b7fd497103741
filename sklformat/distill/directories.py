"""
Directories that appear whole or not at all: token stores, models, checkpoints.

Knows nothing of what is inside them. Shards have their own protocol (SPEC.md, what a writer must do).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sklformat.errors import InUseError


@contextlib.contextmanager
def published(directory: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """
    Fill a directory under another name and give it its own name when it is complete.

    The body writes into the empty directory it is given, ``<directory>.partial``. When the body ends, every file is
    synced, the directory is renamed and its parent synced, so that a crash leaves the old state or the new one.
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
    if not replace and directory.exists():
        raise FileExistsError(f"{directory} exists already; remove it or choose another path")
    partial = directory.with_name(directory.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        for entry in partial.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        try:
            yield partial
            for folder, _, names in os.walk(partial):
                for name in names:
                    fsync_path(Path(folder) / name)
                fsync_path(Path(folder))
            _rename(partial, directory, replace=replace)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def fsync_path(path: Path | str) -> None:
    """Wait until a file's bytes, or a directory's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(partial: Path, directory: Path, *, replace: bool) -> None:
    """Rename onto the final name; a directory with files cannot be replaced in one step, so it steps aside first."""
    old = directory.with_name(directory.name + ".old")
    if replace and directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    partial.rename(directory)
    fsync_path(directory.parent)
    if replace:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's advisory lock; it goes with the process, so a killed one blocks nobody."""
    try:
        import fcntl  # noqa: PLC0415  (POSIX only; elsewhere there is no such lock)
    except ImportError:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(f"{directory}: another process is writing here; wait for it, or stop it") from None
        yield
    finally:
        os.close(handle)
