"""
Adapters of peft: the model that one was trained on, found or named, with the adapter merged into its weights.

The only door to peft.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from sklformat.distill.models.guards import RefusedError

_WHOLE = "config.json"


def find_adapter(path: str, *, revision: str | None, local: bool) -> dict[str, Any] | None:
    """
    What ``adapter_config.json`` says where a path or name is an adapter; None: it is none.

    Args:
        path: A directory, or a name on the hub.
        revision: Of a name on the hub.
        local: The hub must not be asked.

    Raises:
        RefusedError: An adapter and a whole model in one directory, of which one would be left out silently.
        OSError, ValueError: It cannot be read.
    """
    place = transformers.utils.find_adapter_config_file(path, revision=revision or "main", local_files_only=local)
    if place is None:
        return None
    if (Path(path) / _WHOLE).is_file():
        raise RefusedError(
            f"{path}: holds a whole model ({_WHOLE}) and an adapter ({Path(place).name}); "
            "give each a directory of its own, or remove the one that is not meant"
        )
    values: Any = json.loads(Path(place).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise RefusedError(f"{path}: {Path(place).name} holds no JSON object")
    return values


def base_of(path: str, values: dict[str, Any], given: str | None) -> str:
    """
    Path or name of the model that an adapter belongs to.

    Args:
        path: Of the adapter.
        values: What its config says: a path may be missing here, or stand relative to the adapter.
        given: By the user, who knows better.

    Raises:
        RefusedError: Nobody says it.
    """
    recorded = given or values.get("base_model_name_or_path")
    if not recorded:
        raise RefusedError(
            f"{path}: is an adapter that does not say of which model; give adapter_base, its path or name"
        )
    recorded = str(recorded)
    if given or Path(recorded).exists():
        return recorded
    beside = [Path(path) / recorded, Path(path).parent / recorded, Path(path).parent / Path(recorded).name]
    found = [place for place in beside if (place / _WHOLE).is_file()]
    return os.path.normpath(found[0]) if found and Path(path).is_dir() else recorded


@contextlib.contextmanager
def of_another(path: str) -> Iterator[None]:
    """
    Say of what could not be loaded that an adapter needs it.

    Raises:
        RefusedError: In place of an OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise RefusedError(f"{path}: is an adapter of another model: {error}; adapter_base may name it") from error


def merged(model: Any, path: str, values: dict[str, Any], *, revision: str | None, local: bool) -> Any:
    """
    A model with an adapter merged into its weights, by peft, in the model's type.

    Raises:
        ModuleNotFoundError: peft is not installed.
        RefusedError: The adapter adds tokens or states instead of changing weights, or lacks some of its weights.
        OSError, RuntimeError, ValueError: As peft sees fit.
    """
    require_peft()
    import peft  # noqa: PLC0415 -- optional, and slow to import

    source = {} if Path(path).is_dir() else {"revision": revision or "main", "local_files_only": local}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(model, path, **source)
    missing = [str(warning.message) for warning in said if "missing adapter keys" in str(warning.message)]
    if missing:
        raise RefusedError(f"{path}: not all weights of the adapter are there ({' '.join(missing[0].split())[:200]})")
    if not hasattr(adapted, "merge_and_unload") or not hasattr(adapted.base_model, "merge_and_unload"):
        kind = values.get("peft_type")
        raise RefusedError(
            f"{path}: an adapter of type {kind} cannot be merged into weights; use one that can, such as LoRA"
        )
    model = adapted.merge_and_unload(safe_merge=True)
    for parameter in filter(torch.is_floating_point, model.parameters()):
        parameter.requires_grad_(True)  # peft has frozen them for its own training
    return model


def require_peft() -> None:
    """
    Make sure that peft is installed.

    Raises:
        ModuleNotFoundError: It is not.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError("an adapter needs peft", name="peft")
