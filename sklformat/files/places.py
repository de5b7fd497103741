"""Where a file lies, as a path of this machine or as a URL: names only, nothing is opened."""

from __future__ import annotations

import re
from pathlib import Path

Place = Path | str
"""A path of this machine, or a URL as a string."""

_URL = re.compile(r"([A-Za-z][\w+.-]*::)*[A-Za-z][\w+.-]*://")
_PATH_OF_URL = re.compile(r"[A-Za-z][\w+.-]+:/")  # two letters at least: "C:/" is a drive


def is_url(path: Path | str) -> bool:
    """
    Say whether ``path`` is a URL, which ``files.remote`` takes, rather than a path of this machine.

    Raises:
        ValueError: It is a ``Path`` made from a URL, which lost one of its slashes.
    """
    if isinstance(path, Path):
        if _PATH_OF_URL.match(str(path)):
            raise ValueError(f"{path}: a URL must be given as a string; a Path loses one of its slashes")
        return False
    return _URL.match(path) is not None


def join(directory: Place, name: str) -> Place:
    """The file ``name`` of a directory."""
    return directory / name if isinstance(directory, Path) else url_of(directory, name)


def url_of(directory: str, name: str) -> str:
    """URL of the file ``name`` of the directory at a URL."""
    return f"{directory.rstrip('/')}/{name}"


def directory_of(place: Place) -> Place:
    """The directory of a file."""
    return place.parent if isinstance(place, Path) else place.rpartition("/")[0]


def name_of(place: Place) -> str:
    """Name of a file in its directory."""
    return place.name if isinstance(place, Path) else place.rpartition("/")[2]
