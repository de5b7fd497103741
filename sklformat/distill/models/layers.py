"""
The repeated layers of a model: found, compiled, and their activations recomputed instead of kept.

Changes no weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sklformat.distill.models.guards import quiet


def repeated_layers(model: Any) -> list[nn.Module]:
    """
    The layers that a model consists of, in their order: what transformers never splits over devices.

    Raises:
        ValueError: It names none.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if type(module).__name__ in names and module not in inside and any(True for _ in module.parameters()):
            found.append(module)
            inside |= set(module.modules())
    if not found:
        raise ValueError(
            f"transformers does not say what the layers of {type(model).__name__} are; train it without --shard and "
            "--compile"
        )
    return found


def has_separate_experts(model: Any) -> bool:
    """Whether its experts are modules of their own, of which a batch may leave some out of its gradients."""
    return any(isinstance(module, nn.ModuleList) for name, module in model.named_modules() if name.endswith("experts"))


def recompute_activations(model: Any) -> None:
    """
    Keep only the inputs of the layers for the backward pass, which runs each layer a second time.

    Raises:
        ValueError: The model cannot do it.
    """
    # The later name does the same; the earlier one warns there.
    enable = getattr(model, "activation_checkpointing_enable", None)
    kwargs = {"use_reentrant": False}
    with quiet():
        try:
            if enable is not None:
                enable(activation_checkpointing_kwargs=kwargs)
            else:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        except ValueError as error:
            raise ValueError(
                f"a {type(model).__name__} cannot recompute its activations; train it without --gradient-checkpointing"
            ) from error


def compile_layers(model: Any) -> None:
    """
    Let torch.compile make each layer's kernels when it is first called; a layer is compiled once for all that equal it.

    Raises:
        ValueError: As ``repeated_layers``.
    """
    # Otherwise torch runs a layer uncompiled, silently, once it met too many shapes.
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # noqa: SLF001
    for layer in repeated_layers(model):
        layer.compile()


@contextlib.contextmanager
def naming_compile_failures() -> Iterator[None]:
    """
    Say in one line what torch could not compile.

    Raises:
        ValueError: In place of torch's own errors of many lines.
    """
    from torch._dynamo import exc  # noqa: PLC0415  slow to import, and there where something was compiled

    try:
        yield
    except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
        # The first line may only say which backend it was.
        reason = " ".join(" ".join(str(error).split("\n")[:2]).split())[:300]
        raise ValueError(f"torch could not compile the student's layers ({reason}); train without --compile") from error
