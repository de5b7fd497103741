"""
How much memory is free, asked before a ring takes its share: later the system only says no, or ends a process.

For Linux: where nothing is known, nothing is refused.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

_MEMORY = Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of a container
_MIN_CAPACITY = 4096
_AVAILABLE = re.compile(r"MemAvailable: +(\d+) kB")


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
    """What the system has left, or a container's limit where that is less; None: unknown."""
    known = []
    with contextlib.suppress(OSError):
        known += [int(kibibytes) << 10 for kibibytes in _AVAILABLE.findall(_MEMORY.read_text())]
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not this kind of container, or no limit: "max"
            known.append(int(path.read_text()))
    return min(known, default=None)


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
