"""
Names of models that are not here: told from mistyped paths, and asked of the Hugging Face hub only where it answers.

Loads nothing.  By itself transformers asks a hub that cannot be reached a dozen times, for most of a minute.
"""

from __future__ import annotations

import difflib
import errno
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub

_PATIENCE_SECONDS = 5.0  # for one connection


def why_not_asked(name: str) -> str:
    """
    Say why the hub cannot be asked for a name; "" where it can, or where the name is a path that is here.

    Args:
        name: Of a model or tokenizer, as the user gave it.

    Raises:
        FileNotFoundError: It is a path where nothing is; names the one that was likely meant.
    """
    path, hub = Path(name), huggingface_hub.constants
    if path.exists():
        return ""
    if _is_path(name):
        raise FileNotFoundError(errno.ENOENT, f"there is no such directory{_meant(path)}", name)
    if hub.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE says not to ask the hub"
    return "" if _is_reachable(hub.ENDPOINT) else f"the hub ({hub.ENDPOINT}) cannot be reached"


def find_directory(name: str, *, revision: str | None, local: bool) -> Path:
    """
    Where the files of a model are: a directory as it is, of a name on the hub its snapshot, fetched if it must be.

    Args:
        name: Path or name.
        revision: Of a name on the hub.
        local: The hub must not be asked.

    Raises:
        OSError: It is not there.
    """
    if Path(name).is_dir():
        return Path(name)
    return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=local))


def _is_path(name: str) -> bool:
    """Whether the hub can have no such name, or it begins with a directory that is here."""
    if name[:1] in ("", ".", "~") or "\\" in name:
        return True
    first, slash, rest = name.partition("/")
    return bool(slash) and (not first or not rest or "/" in rest or Path(first).is_dir())


def _meant(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _is_reachable(endpoint: str) -> bool:
    """Whether one connection to the hub can be made; a proxy is taken to reach it."""
    if {"all", "http", "https"} & urllib.request.getproxies().keys():
        return True
    url = urlsplit(endpoint)
    try:
        socket.create_connection((url.hostname, url.port or url.scheme), _PATIENCE_SECONDS).close()
    except OSError:
        return False
    return True
