"""What tests ask of the system, and how they wait: as long as it takes, and not for ever."""

import os
import time
from pathlib import Path

HANGS = 1200  # seconds; a guard, not a figure: what takes so long on the busiest machine never ends


def wait_for(condition):
    """Until it holds, in another process's own time."""
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end, "this never came true"
        time.sleep(0.001)


def alive(pid):
    """Whether a process still runs; one whose parent has not asked for its status yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def open_descriptors():
    """
    Numbers of the descriptors of this process, as words.

    Compare with <=, and collect garbage before the first of two calls where many tests ran before: what they left to
    the collector may go at any moment.
    """
    return set(os.listdir("/proc/self/fd"))
