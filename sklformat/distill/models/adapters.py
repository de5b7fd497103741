"""
Adapters of peft: the model that one was trained on, found or named, with the adapter merged into its weights; and
adapters that learn beside them.

The only door to peft.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from sklformat.distill.models.guards import RefusedError

ALL_LINEAR = "all-linear"
"""What peft calls every linear layer below the head."""

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
    adapted = _loaded(model, path, revision=revision, local=local)
    if not hasattr(adapted, "merge_and_unload") or not hasattr(adapted.base_model, "merge_and_unload"):
        kind = values.get("peft_type")
        raise RefusedError(
            f"{path}: an adapter of type {kind} cannot be merged into weights; use one that can, such as LoRA"
        )
    model = adapted.merge_and_unload(safe_merge=True)
    for parameter in filter(torch.is_floating_point, model.parameters()):
        parameter.requires_grad_(True)  # peft has frozen them for its own training
    return model


def _loaded(model: Any, path: str, *, revision: str | None, local: bool, **how: Any) -> Any:
    """A model with an adapter beside its weights, all of it there."""
    require_peft()
    import peft  # noqa: PLC0415 -- optional, and slow to import

    source = {} if Path(path).is_dir() else {"revision": revision or "main", "local_files_only": local}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(model, path, **source, **how)
    missing = [str(warning.message) for warning in said if "missing adapter keys" in str(warning.message)]
    if missing:
        raise RefusedError(f"{path}: not all weights of the adapter are there ({' '.join(missing[0].split())[:200]})")
    return adapted


@dataclass(frozen=True, kw_only=True)
class Lora:
    """
    An adapter that is to learn.

    Attributes:
        rank: Of its two matrices.
        alpha: The factor of their product is alpha / rank; 0: twice the rank.
        targets: Ends of the names of the layers that get one; ``all-linear`` among them: every linear layer below the
            head.  None: that.
        seed: Of its first matrices; the second ones are 0.
    """

    rank: int
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    seed: int = 0


def with_lora(model: Any, lora: Lora, *, base: str) -> Any:
    """
    A model with a new adapter, which alone learns.

    Args:
        model: A causal language model; its layers are changed in place.
        lora: The adapter.
        base: Path or name of the model, which the adapter's files will name.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: The model has no such layers.
    """
    require_peft()
    import peft  # noqa: PLC0415 -- optional, and slow to import

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        target_modules=_targets(model, lora.targets or (ALL_LINEAR,)),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).absolute()) if Path(base).is_dir() else base,
    )
    # What peft warns of (a tied head) is refused where the head is looked at.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(lora.seed)
        return peft.get_peft_model(model, config)


def _targets(model: Any, wanted: Sequence[str]) -> list[str]:
    """Names of the layers that are meant."""
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    linear = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    body = [name for name in linear if model.get_submodule(name) is not head]
    found: set[str] = set()
    for end in wanted:
        fitting = body if end == ALL_LINEAR else [n for n in linear if n == end or n.endswith(f".{end}")]
        if not fitting:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(
                f"no linear layer of {type(model).__name__} has a name that ends in {end!r}; --lora-targets may name "
                f"{ALL_LINEAR}, {ends}"
            )
        found.update(fitting)
    return sorted(found)


def with_adapter(
    model: Any, path: str, values: dict[str, Any], lora: Lora, *, revision: str | None, local: bool
) -> Any:
    """
    A model with an adapter that was trained before, which alone learns.

    Args:
        model: What the adapter belongs to; its layers are changed in place.
        path: Of the adapter.
        values: What its config says.
        lora: What is asked for; the adapter must be that.
        revision: Of a name on the hub.
        local: The hub must not be asked.

    Raises:
        ModuleNotFoundError: peft is not installed.
        RefusedError: The adapter is another one, or lacks some of its weights.
        OSError, RuntimeError, ValueError: As peft sees fit.
    """
    has = f"{values.get('peft_type')} of rank {values.get('r')} and alpha {values.get('lora_alpha')}"
    asked = f"LORA of rank {lora.rank} and alpha {lora.alpha or values.get('lora_alpha')}"
    if has != asked or lora.targets:
        layers = f" on {', '.join(lora.targets)}" if lora.targets else ""
        raise RefusedError(
            f"{path}: the adapter is {has}, asked for is {asked}{layers}; leave out --lora-alpha and --lora-targets "
            "and give its own rank to train it further, or leave out all three to merge it and train every weight"
        )
    adapted = _loaded(model, path, revision=revision, local=local, is_trainable=True)
    adapted.peft_config["default"].base_model_name_or_path = values.get("base_model_name_or_path")
    return adapted


def is_adapted(model: Any) -> bool:
    """Whether it is a model of peft, with an adapter beside its weights."""
    return hasattr(model, "get_base_model")


def unwrapped(model: Any) -> Any:
    """The model of transformers in one of peft, with the adapter in its layers; any other is itself."""
    return model.get_base_model() if is_adapted(model) else model


def require_peft() -> None:
    """
    Make sure that peft is installed.

    Raises:
        ModuleNotFoundError: It is not.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError("an adapter needs peft", name="peft")
