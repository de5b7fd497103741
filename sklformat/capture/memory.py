"""
How much memory is free, asked before a ring takes its share: later the system only says no, or ends a process.

For Linux: where nothing is known, nothing is refused.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

_MEMORY = Path("/proc/meminfo")
# What a container may have and has, by the two versions of the interface; memory.stat lies beside them.
_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
_MIN_CAPACITY = 4096
_AVAILABLE = re.compile(r"MemAvailable: +(\d+) kB")
# Copies of files, which the system drops where memory is short; the first version says "total_" where it adds all up.
_COPIES = re.compile(r"^(total_|)(?:in|)active_file (\d+)$", re.MULTILINE)


def capacity_of(size_bytes: int) -> int:
    """Bytes of a ring that takes this many: the next power of two, 4096 at least."""
    return max(_MIN_CAPACITY, 1 << (size_bytes - 1).bit_length())


def check_room(size_bytes: int, given: str) -> None:
    """
    Make sure that a ring fits into memory.

    Args:
        size_bytes: That are asked for, >= 1.
        given: The argument that says so, for the message.

    Raises:
        ValueError: It does not; says what is free.
    """
    free, capacity = _free_bytes(), capacity_of(size_bytes)
    if free is not None and capacity > free:
        raise ValueError(
            f"{given} is too large: a ring of {_size(capacity)} takes as much memory at once, and {_size(free)} are "
            "free here"
        )


def _free_bytes() -> int | None:
    """What the system has left, or a container of its limit where that is less; None: unknown."""
    known = []
    with contextlib.suppress(OSError):
        known += [int(kibibytes) << 10 for kibibytes in _AVAILABLE.findall(_MEMORY.read_text())]
    for limit, used in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not this kind of container, or no limit: "max"
            known.append(max(0, int(limit.read_text()) - int(used.read_text()) + _copies_bytes(limit)))
    return min(known, default=None)


def _copies_bytes(limit: Path) -> int:
    copies = _COPIES.findall(limit.with_name("memory.stat").read_text())
    prefix = max((prefix for prefix, _ in copies), default="")
    return sum(int(size) for own, size in copies if own == prefix)


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
