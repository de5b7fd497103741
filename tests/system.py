"""What tests ask of the system, and how they wait: as long as it takes, and not for ever."""

import os
import re
import time
from pathlib import Path

HANGS = 1200  # seconds; a guard, not a figure: what takes so long on the busiest machine never ends

_PROGRESS = re.compile(r"(cache|check|convert|eval|rescore|stats|train|verify)( [^:]+)?: .+\n")


def complaint(stderr):
    """What a command said beside its progress, which is in whole lines: one line at most."""
    lines = [line for line in stderr.splitlines(keepends=True) if not _PROGRESS.fullmatch(line)]
    assert len(lines) <= 1, stderr
    return "".join(lines)


def wait_for(condition):
    """Until it holds, in another process's own time."""
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end, "this never came true"
        time.sleep(0.001)


def alive(pid):
    """Whether a process still runs; one whose parent has not asked for its status yet does not."""
    return _state_and_group(pid)[0] not in "ZX"


def members(group):
    """Ids of the processes of a process group that still run."""
    found = {path.name: _state_and_group(path.name) for path in Path("/proc").glob("[0-9]*")}
    return [int(pid) for pid, (state, its_group) in found.items() if state not in "ZX" and its_group == group]


def _state_and_group(pid):
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return state, int(group)


def open_descriptors():
    """
    Numbers of the descriptors of this process, as words.

    Compare with <=, and collect garbage before the first of two calls where many tests ran before: what they left to
    the collector may go at any moment.
    """
    return set(os.listdir("/proc/self/fd"))
