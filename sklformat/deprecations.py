"""What still works and will go: every warning of it is made here, docs/compatibility.md says for how long."""

import sys
import warnings


def warn_of(old: str, new: str, *, until: str, command: str | None = None) -> None:
    """
    Say that something goes, where it is used.

    Args:
        old: What goes: a name, argument or flag.
        new: What to use instead.
        until: The version that will be without it, such as "0.3".
        command: Who used a flag, such as "sklformat train", which gets a line on stderr; None: a program, which gets a
            DeprecationWarning that names the line that called the function that calls this one.
    """
    said = f"{old} goes with version {until}; use {new}"
    if command is None:
        warnings.warn(said, DeprecationWarning, stacklevel=3)
    else:
        sys.stderr.write(f"{command}: {said}\n")
