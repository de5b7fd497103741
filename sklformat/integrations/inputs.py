"""
Batches as the tensors by name that a trainer hands around, and the way of these to its device.

Knows no trainer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from sklformat.distill.loader.batches import Batch, Targets
from sklformat.distill.loader.packed import PackedTargets
from sklformat.distill.losses.kl import IGNORED_LABEL
from sklformat.distill.student import streams

_ON_HOST = ("offsets", "counted")  # which reads them
_PACKED = "packed"


def inputs_of(batches: list[Batch], *, method: str, isolated: bool) -> dict[str, Any]:
    """
    The one batch of a list by the names of its tensors.

    Args:
        batches: As a loader has them whose sampler makes the batches.
        method: "ce": the targets are the labels.
        isolated: Whether documents must not see each other.

    Returns:
        input_ids, labels and the fields of ``Targets``, or as "packed" what a device makes them of; "counted": the
        positions that the loss counts, [] int64; position_ids where they matter.
    """
    (batch,) = batches
    targets = streams.one_hot(batch.labels) if method == "ce" else batch.targets
    counted_P = (batch.labels.flatten() != IGNORED_LABEL) & (targets.offsets.diff() > 0)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "labels": batch.labels, "counted": counted_P.sum()}
    inputs |= {_PACKED: targets} if isinstance(targets, PackedTargets) else _fields(targets)
    if isolated and batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    return inputs


def moved(inputs: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], Callable[[], None] | None]:
    """
    Inputs on a device, and what raises a bad record that was decoded there; None: the host had looked at them.

    Raises:
        CorruptError: A record of the batch that was moved before is bad.
    """
    there = {name: x if name in _ON_HOST else x.to(device, non_blocking=True) for name, x in inputs.items()}
    decoded = there.pop(_PACKED, None)
    if decoded is None:
        return there, None
    return there | _fields(decoded) | {"offsets": inputs[_PACKED].offsets}, decoded.check


def _fields(targets: Targets) -> dict[str, Any]:
    return {f.name: getattr(targets, f.name) for f in dataclasses.fields(Targets)}
