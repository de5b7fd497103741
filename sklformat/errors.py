"""
Every exception of sklformat, and the one place where a C status becomes one.

Wrong arguments raise ``ValueError`` or ``TypeError``; operating system errors pass through as ``OSError``.
"""

from __future__ import annotations

import sys
from pathlib import Path


class SklError(Exception):
    """Base of all sklformat errors; never raised itself."""


class FormatError(SklError):
    """
    A file is at fault; base of the ways in which it can be.

    Attributes:
        path: The file (a string where it is a URL), or None while only its bytes are known.
        offset: Byte offset of the fault in the file, or None.
        section: Part of the file: "header", "block", "index", "trailer" or "manifest", or None.
        sequence: Index of the affected sequence in the shard, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        path: Path | str | None = None,
        offset: int | None = None,
        section: str | None = None,
        sequence: int | None = None,
    ) -> None:
        self.message = message
        self.path = path if path is None or "://" in str(path) else Path(path)
        self.offset = offset
        self.section = section
        self.sequence = sequence
        super().__init__(message)

    def __str__(self) -> str:
        where = [] if self.path is None else [str(self.path)]
        if self.section is not None:
            where.append(self.section if self.sequence is None else f"{self.section} {self.sequence}")
        if self.offset is not None:
            where.append(f"byte {self.offset}")
        return ": ".join([*where, self.message])


class CorruptError(FormatError):
    """Bytes contradict SPEC.md or their checksum."""


class TruncatedError(FormatError):
    """The file ends early: an unsealed shard, or one that lost its end; ``recover`` can help."""


class UnsupportedError(FormatError):
    """Valid, but of a newer version or with an unknown flag; the message says which."""


class UnreadableError(FormatError, OSError):
    """The system gives no bytes of a path: no regular file, a link to nothing, no permission, or a bad disk."""


class MissingShardError(FormatError):
    """A shard of a cache is missing; the message names the range of sequences."""


class UnfinishedError(MissingShardError):
    """A shard is not sealed yet, or the capture of the whole cache has not ended; nothing is damaged."""


class AlignmentError(SklError):
    """Records are not about these tokens; ``sequence_index`` says where."""

    def __init__(self, message: str, *, sequence_index: int) -> None:
        self.sequence_index = sequence_index
        super().__init__(message)


class WriteError(OSError):
    """
    The system could not write a shard; what was flushed is kept in the file.

    A program is told the argument that resumes; a command, which has none, says after ``reason`` what to do.
    """

    def __str__(self) -> str:
        return f"{self.reason}; fix the cause, then open it again with resume=True"

    @property
    def reason(self) -> str:
        """What happened where, and what is kept."""
        return f"{self.filename}: {self.strerror}; what was flushed is kept there"


class SettingsError(SklError):
    """A cache or run exists that was made with other settings; the message shows the differing values."""


class InUseError(SklError):
    """Another process is writing here, or serves at this port."""


class ResumeError(SklError):
    """A loader's state belongs to another cache or another order."""


class RingClosedError(SklError):
    """The other side of the ring is gone."""


class RingTimeoutError(SklError, TimeoutError):
    """No slot of the ring became free, or filled, in time."""


class CaptureError(SklError):
    """The writer process failed; the message is its own."""


class EngineError(SklError):
    """An engine that runs a teacher is missing, has ended, or does not show what is needed; names its version."""


class RemoteError(SklError):
    """A store behind a URL failed, or gives back other bytes than it was given; names the URL and what to do."""


# The values are pinned in skl.h; a test walks both lists.
STATUS_ERRORS: dict[str, type[Exception]] = {
    "SKL_ERR_ARG": ValueError,
    "SKL_ERR_DST_SMALL": AssertionError,
    "SKL_ERR_TRUNCATED": TruncatedError,
    "SKL_ERR_CORRUPT": CorruptError,
    "SKL_ERR_UNSUPPORTED": UnsupportedError,
    "SKL_ERR_CLOSED": RingClosedError,
    "SKL_ERR_TIMEOUT": RingTimeoutError,
}


def describe_bad_json(error: Exception, what: str | None = None) -> str:
    """What is wrong with a text, the part ``what`` of it, in which a parser of JSON met ``error``."""
    return f"not JSON: {error}" if what is None else f"{what} is not JSON: {error}"


def is_memory_short(error: BaseException) -> bool:
    """Whether memory ran out: torch says it with an error of its own on a GPU, with a RuntimeError on the CPU."""
    torch = sys.modules.get("torch")  # not loaded: the error is not torch's
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)
