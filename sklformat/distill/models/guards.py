"""
Around transformers: its log kept quiet, and what it cannot load said in one line.

Loads nothing itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from sklformat.distill.models import hub
from sklformat.errors import is_memory_short

FAILURES = (
    AssertionError, AttributeError, ImportError, KeyError, OSError, RuntimeError, SafetensorError, TypeError,
    ValueError,
)  # fmt: skip
"""What a broken config, a library that is missing, or code that came with a model, may end with."""
_OF_A_MODEL = ("*config.json", "tokenizer*", "*.model", "*.safetensors", "model/config.json")
_MOST_CHARACTERS = 300


class RefusedError(ValueError):
    """A model that is there and is not taken; the message says all."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' log lines and progress bars out of ours; what matters in them is checked here instead."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def named(path: Path | str, what: str) -> Iterator[bool]:
    """
    Say in one line what could not be loaded from where; gives whether the hub must not be asked for it.

    Raises:
        RefusedError: Code would have to be run that came with it.
        OSError: In place of what else was raised inside, memory that is short and our own sentences apart.
    """
    not_asked = ""
    try:
        not_asked = hub.why_not_asked(str(path))
        yield bool(not_asked)
    except RefusedError:
        raise
    except FAILURES as error:
        if is_memory_short(error):
            raise
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise RefusedError(
                f"{path}: cannot load a {what}; it needs the code that came with it: look at that, then give "
                "trust_remote_code to run it"
            ) from error
        raise OSError(f"{path}: cannot load a {what}{_reason(path, not_asked, error)}") from error


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """
    Say of a full disk where it is, which safetensors tells without a number, a kind or a name.

    Raises:
        OSError: In place of safetensors' own error.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{directory}: the weights cannot be written: {error}; make room or fix the disk") from error


def _reason(path: Path | str, not_asked: str, error: Exception) -> str:
    """Why nothing can be loaded from a path or name, and what the user may have meant by it."""
    if isinstance(error, FileNotFoundError) and error.filename == str(path):
        return f"; {error.strerror}"
    if not_asked:
        return f"; there is no such directory, it is not (or not whole) in the Hugging Face cache, and {not_asked}"
    # A first line that ends in a colon says nothing without what it announces.
    first, _, rest = str(error).strip().partition("\n")
    reason = " ".join(f"{first} {rest}".split()) if first.rstrip().endswith(":") else first
    reason = reason[:_MOST_CHARACTERS]
    if not isinstance(error, (OSError, ValueError, ImportError, SafetensorError)):  # a name by itself says little
        reason = f"{type(error).__name__}: {reason}"
    if not Path(path).exists():
        return f"; there is no such directory, and the Hugging Face hub does not give it ({reason})"
    if Path(path).is_dir() and not any(any(Path(path).glob(name)) for name in _OF_A_MODEL):
        return "; the directory holds neither a model nor a tokenizer (no config.json, no tokenizer.json)"
    inside = Path(path) / "model"  # of a directory that sklformat train made
    return (f"; did you mean {inside}?" if (inside / "config.json").exists() else "") + f" ({reason})"


def division(processes: int) -> Any:
    """
    What tells transformers to give each process a part of a model.

    Raises:
        RefusedError: It is too old.
    """
    try:
        return transformers.distributed.DistributedConfig(tp_size=processes)
    except (AttributeError, TypeError):
        raise RefusedError(
            f"transformers {transformers.__version__} does not divide models as tensor_parallel needs it; install a "
            "newer one"
        ) from None
