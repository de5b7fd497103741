"""
Bytes of files, unpacked, and their text, piece by piece.

Knows no rows.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from sklformat.files import zstd

PIECE_BYTES = 1 << 18
_ZSTD_BYTES = 1 << 9  # packed; at once these can unpack to 16 MiB (blocks of 4 bytes are 128 KiB of one byte)
_FREE_BYTES = 64 << 20  # what any compressed file may unpack to, be it as small as it likes

# What a file that is no text begins with, and what that is.
_KINDS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a ZIP archive",
    b"\x7fELF": "a program",
    b"\x1f\x8b": "gzip, whose name must end in .gz",
    b"\x28\xb5\x2f\xfd": "Zstandard, whose name must end in .zst",
    b"\xfd7zXZ": "xz, which must be unpacked first",
    b"BZh": "bzip2, which must be unpacked first",
    b"PAR1": "Parquet, whose name must end in .parquet",
    b"ARROW1": "Arrow, whose name must end in .arrow",
    b"\xff\xfe": "it may be UTF-16: --encoding utf-16",
    b"\xfe\xff": "it may be UTF-16: --encoding utf-16",
}


def read_text(path: Path, encoding: str, *, max_unpack_ratio: int) -> Iterator[str]:
    """
    Text of a file, piece by piece; a name that ends in .gz or .zst is unpacked on the way.

    Args:
        path: The file.
        encoding: Of its text.
        max_unpack_ratio: Bound of unpacked by packed bytes.

    Yields:
        Pieces, not empty; joined, they are the text.

    Raises:
        ValueError: Bytes that are not text of this encoding (with their offset in what is unpacked), a damaged
            compressed file, or one beyond the bound.
        ModuleNotFoundError: .zst without zstandard.
        OSError: The system's own.
    """
    return _decoded(_read_bytes(path, max_unpack_ratio), encoding)


def unpack_limit(path: Path, max_unpack_ratio: int) -> int:
    """Bytes that a compressed file may unpack to."""
    return max(_FREE_BYTES, max_unpack_ratio * path.stat().st_size)


def beyond_limit(limit: int, max_unpack_ratio: int) -> ValueError:
    """The error for a file that unpacks to more."""
    return ValueError(
        f"unpacks to more than {limit:,} bytes ({_FREE_BYTES >> 20} MiB, or {max_unpack_ratio} times its size); if it "
        "is no bomb, give a larger --max-unpack-ratio"
    )


def not_text(what: str, first: bytes) -> ValueError:
    """The error for a file that is no text; ``first``: its first bytes, which tell what it may be."""
    kind = next((f" ({kind})" for magic, kind in _KINDS.items() if first.startswith(magic)), "")
    return ValueError(
        f"{what}{kind}; give its --encoding, leave it out with --exclude, or skip such files with --on-bad-file skip"
    )


def _read_bytes(path: Path, max_unpack_ratio: int) -> Iterator[bytes]:
    unpack = {".gz": _unpack_gzip, ".zst": _unpack_zstd}.get(path.suffix.lower())
    if unpack is None:
        yield from _pieces(path, PIECE_BYTES)
        return
    limit = unpack_limit(path, max_unpack_ratio)
    size = 0
    for piece in unpack(path):
        size += len(piece)
        if size > limit:
            raise beyond_limit(limit, max_unpack_ratio)
        for start in range(0, len(piece), PIECE_BYTES):
            yield piece[start : start + PIECE_BYTES]


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(size):
            yield piece


def _unpack_gzip(path: Path) -> Iterator[bytes]:
    with gzip.open(path) as file:
        while True:
            try:
                piece = file.read(PIECE_BYTES)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"cannot be unpacked as gzip: {error}") from None
            if not piece:
                return
            yield piece


def _unpack_zstd(path: Path) -> Iterator[bytes]:
    return zstd.unpack(_pieces(path, _ZSTD_BYTES))


def _decoded(pieces: Iterable[bytes], encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    first, size = b"", 0

    def decode(piece: bytes, *, final: bool) -> str:
        try:
            return decoder.decode(piece, final)
        except UnicodeDecodeError as error:  # of what was held back from the piece before, and this one
            offset = size - len(error.object) + error.start
            raise not_text(f"byte {offset} is not {encoding.upper()} text", first) from None
        except UnicodeError as error:  # such as UTF-16 without its mark
            raise not_text(f"is not {encoding.upper()} text: {error}", first) from None

    for piece in pieces:
        first = first or piece[:16]
        size += len(piece)
        if text := decode(piece, final=False):
            yield text
    if text := decode(b"", final=True):
        yield text
