"""
The only door to fsspec: files behind URLs (s3://, gs://, hf://, memory://, …), read by ranges, written whole, checked.

Knows nothing of the format.  Holds no connection and no state, so that callers may be pickled and forked; fsspec, of
the extra ``remote``, is imported only when a URL is used.  Credentials and endpoints are what the store's own library
reads.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from sklformat.checksums import fingerprint_of
from sklformat.errors import RemoteError

_CHUNK = 16 << 20
_WAITS = (0.5, 2.0, 6.0)
"""Seconds before a request is made again that the store's library has given up, or that brought fewer bytes."""
_PATIENCE = 60.0
"""Seconds of failing after which it is not made again: the library has its own waits, some of them long."""
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_FINAL_NUMBERS = {errno.EINVAL, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSYS}
_Answer = TypeVar("_Answer")


def size(url: str) -> int:
    """
    Bytes of a file.

    Raises:
        FileNotFoundError: No such file.
        RemoteError: The store failed, or does not report the size.
    """
    with _failures(url, "be looked at"):
        fs, path = _open(url)
        fs.invalidate_cache(path)
        try:
            found = _persistently(lambda: fs.info(path))
        except NotADirectoryError as error:  # nor is anything in a file
            raise FileNotFoundError from error
    if found.get("type") == "directory":
        raise FileNotFoundError(f"{url}: is a directory, not a file")
    if not isinstance(found.get("size"), int):
        raise RemoteError(f"{url}: the store does not report the file's size; use another kind of store")
    return int(found["size"])


def exists(url: str) -> bool:
    """
    Say whether a file is there.

    Raises:
        RemoteError: The store failed.
    """
    try:
        size(url)
    except FileNotFoundError:
        return False
    return True


def list_names(url: str) -> list[str]:
    """
    Names of the files directly in the directory ``url``, sorted; none where there is no such directory.

    Raises:
        RemoteError: The store failed.
    """
    with _failures(url, "be listed"):
        fs, path = _open(url)
        fs.invalidate_cache(path)
        try:
            found = _persistently(lambda: fs.ls(path, detail=True))
        except FileNotFoundError:
            return []
    names = (entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "file")
    return sorted(name for name in names if name)


def read_range(url: str, offset: int, length: int) -> bytes:
    """
    Bytes ``offset`` to ``offset + length`` of a file, in one request; in more if the store cuts its answers short.

    Raises:
        FileNotFoundError: No such file.
        RemoteError: The store failed, or gave another number of bytes each time.
    """
    if length == 0:  # a range that HTTP cannot say
        return b""
    data = _asked_once(url, offset, length)
    for wait in _WAITS:
        if len(data) == length:
            return data
        if (there := size(url)) < offset + length:
            raise RemoteError(
                f"{url}: asked for {length} bytes from byte {offset} on, got {len(data)}; the file has {there} bytes "
                f"there, which should be {offset + length} or more: upload it again"
            )
        time.sleep(wait)
        data = _asked_once(url, offset, length)
    if len(data) != length:
        raise RemoteError(
            f"{url}: asked {1 + len(_WAITS)} times for {length} bytes from byte {offset} on, got {len(data)}; "
            "the store cuts its answers short, or takes no ranges: run the same command again, or use another store"
        )
    return data


def _asked_once(url: str, offset: int, length: int) -> bytes:
    with _failures(url, "be read"):
        fs, path = _open(url)
        return bytes(_persistently(lambda: fs.cat_file(path, start=offset, end=offset + length)))


def read(url: str) -> bytes:
    """
    All bytes of a small file.

    Raises:
        FileNotFoundError, RemoteError: As ``read_range``.
    """
    return read_range(url, 0, size(url))


def upload(local: Path, url: str) -> None:
    """
    Put a copy of a local file at a URL, replacing what is there, and check it: size, and XXH3-128 of what comes back.

    Raises:
        RemoteError: The store failed, or gives back other bytes; the local file is as it was.
        OSError: The local file cannot be read.
    """
    local_size, local_digest = _local_facts(local)
    with _failures(url, "be written", f"{local} is kept; fix the cause, then run the same command again"):
        fs, path = _open(url)
        _put(fs, path, url, lambda: fs.put_file(str(local), path))
    for what, wanted, read_back in (
        ("bytes", local_size, size),
        ("XXH3-128", local_digest, lambda url: digest(url, local_size)),
    ):
        try:
            found = read_back(url)
        except FileNotFoundError:
            found = "nothing"
        if found != wanted:
            raise RemoteError(
                f"{url}: the upload of {local} was not kept: {what} {found} there, {wanted} here; "
                f"{local} is kept, run the same command again"
            )


def check_writable(url: str) -> None:
    """
    Write an empty file and remove it, so that what cannot be written to is named before there is anything to upload.

    A store in which nobody may remove keeps the file.

    Raises:
        RemoteError: The store failed.
    """
    with _failures(url, "be written"):
        fs, path = _open(url)
        _put(fs, path, url, lambda: fs.pipe_file(path, b""))
    with suppress(RemoteError, FileNotFoundError), _failures(url, "be removed"):
        fs.rm_file(path)


def _put(fs: Any, path: str, url: str, put: Callable[[], None]) -> None:
    try:
        _persistently(put)
    except FileNotFoundError:  # a store with directories needs them made first; others have none
        _check_root(fs, path, url)
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        _persistently(put)


def _check_root(fs: Any, path: str, url: str) -> None:
    """The first folder of a path, which is the bucket of a store that has buckets, is not made by us."""
    slash = path[: len(path) - len(path.lstrip("/"))]  # of some stores paths begin with one
    root = slash + path.lstrip("/").partition("/")[0]
    if not _persistently(lambda: fs.exists(root)):
        raise RemoteError(f"{url}: there is no {root} in the store; make it, or correct the URL")


def digest(url: str, num_bytes: int) -> str:
    """
    XXH3-128 of the first ``num_bytes`` bytes of a file, all of them read: 32 hexadecimal digits.

    Raises:
        FileNotFoundError, RemoteError: As ``read_range``.
    """
    starts = range(0, num_bytes, _CHUNK)
    return fingerprint_of(read_range(url, start, min(_CHUNK, num_bytes - start)) for start in starts)


def _local_facts(local: Path) -> tuple[int, str]:
    with local.open("rb") as file:
        return os.fstat(file.fileno()).st_size, fingerprint_of(iter(lambda: file.read(_CHUNK), b""))


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it; fsspec keeps one per process, and makes another after a fork."""
    import fsspec  # noqa: PLC0415  an extra, needed only where a URL is given

    fs, path = fsspec.core.url_to_fs(url)
    return fs, str(path)


def _persistently(ask: Callable[[], _Answer]) -> _Answer:
    """
    What a store answers, which is asked again after a failure that may pass: each but those that tell of the request.

    Its library has repeated most requests by itself then, but not all, and not for long: s3fs gives up a HEAD that is
    answered 503 after three seconds, and an answer whose checksum is wrong at once.
    """
    begin = time.monotonic()
    for wait in _WAITS:
        try:
            return ask()
        except (*_FINAL, ImportError, ValueError, TypeError, NotImplementedError):
            raise
        except Exception as error:
            is_final = isinstance(error, OSError) and error.errno in _FINAL_NUMBERS
            if is_final or time.monotonic() - begin > _PATIENCE:
                raise
        time.sleep(wait)
    return ask()


@contextmanager
def _failures(url: str, what: str, action: str = "fix the cause, then run the same command again") -> Iterator[None]:
    """Each store's library raises errors of its own; here they become one, with the URL and what to do."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"{url}: no such file in the store") from error
    except ModuleNotFoundError as error:
        if error.name == "fsspec":
            raise
        raise _failed(url, what, error, f"pip install {error.name}") from error
    except ImportError as error:  # fsspec's own words, which name the package
        raise _failed(url, what, error, "then run the same command again") from error
    except RemoteError:
        raise
    except Exception as error:
        raise _failed(url, what, error, action) from error


def _failed(url: str, what: str, error: Exception, action: str) -> RemoteError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return RemoteError(f"{url}: cannot {what} ({reason}); {action}")
