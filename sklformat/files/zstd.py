"""The only door to zstandard: streams of bytes, packed and unpacked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def unpack(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """
    The bytes that were packed, of one frame or several; a small piece may give much.

    Raises:
        ValueError: The pieces are no Zstandard, are damaged, or end too early.
        ModuleNotFoundError: zstandard is missing.
    """
    import zstandard  # noqa: PLC0415  an extra, needed only here

    # The reader that zstandard has for streams takes a file that was cut short for a whole one; this tells.
    frame = None
    for piece in pieces:
        packed = piece
        while packed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                unpacked = frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise ValueError(f"cannot be unpacked as Zstandard: {error}") from None
            packed = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
            if unpacked:
                yield unpacked
    if frame is not None:
        raise ValueError("cannot be unpacked as Zstandard: it ends too early")


def pack(content: bytes) -> bytes:
    """
    One frame with its content's size and checksum, always the same for the same version of zstandard.

    Raises:
        ModuleNotFoundError: zstandard is missing.
    """
    import zstandard  # noqa: PLC0415  an extra, needed only here

    packed: bytes = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(content)
    return packed
