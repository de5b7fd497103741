"""
What a trainer's checkpoint says of the stream: where it stood, and what the steps were made of.

Knows no trainer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sklformat.errors import ResumeError
from sklformat.files.disk import write_atomically

LOADER_STATE = "sklformat_loader.json"
"""The file of a checkpoint that says it."""

WHOLE = "optimizer"
"""Among its settings: whether the checkpoint has an optimizer, too."""


def write(directory: Path, stream: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """
    Add to a checkpoint, which may not be there yet.

    Args:
        directory: The checkpoint.
        stream: State of the stream after the last batch that was trained on.
        settings: What the sequences of a step and their loss depend on beside it, and WHOLE.
    """
    directory.mkdir(parents=True, exist_ok=True)
    saved = {"stream": stream, "settings": settings}
    write_atomically(directory / LOADER_STATE, (json.dumps(saved, indent=1) + "\n").encode())


def read(directory: Path) -> dict[str, Any]:
    """
    What ``write`` added.

    Raises:
        ResumeError: It added nothing, or the checkpoint has weights alone.
    """
    path = directory / LOADER_STATE
    if not path.exists():
        raise ResumeError(
            f"{directory}: has no {LOADER_STATE}, so that nothing says which sequences were seen; give a checkpoint "
            "that SparseKDTrainer saved, or ignore_data_skip=True to begin the epoch again"
        )
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not saved["settings"].get(WHOLE, True):
        raise ResumeError(
            f"{directory}: has weights alone (save_only_model), so that optimizer and learning rate would begin again; "
            "begin a new run from its model, or resume a checkpoint that has them"
        )
    return saved


def check_settings(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """
    Make sure that a run has the settings of the one that was saved.

    Raises:
        ResumeError: Says both values of what differs.
    """
    differing = [
        f"{name}: {saved.get(name)!r} in the checkpoint, {value!r} here"
        for name, value in here.items()
        if saved.get(name) != value
    ]
    if differing:
        raise ResumeError(
            f"the settings of the run that was saved differ ({'; '.join(differing)}); resume with those, or begin a "
            "new run from its model"
        )
