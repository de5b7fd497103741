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
from sklformat.distill.loader.dataset import SparseLogitDataset
from sklformat.distill.loader.packed import PackedTargets
from sklformat.distill.losses.confidence import label_confidence, weights_of_step
from sklformat.distill.losses.kl import IGNORED_LABEL
from sklformat.distill.student import streams
from sklformat.distill.student.inputs import take_confidence
from sklformat.distill.student.processes import Process
from sklformat.integrations.arguments import LossArguments
from sklformat.progress import say

_ON_HOST = ("offsets", "counted")  # which reads them
_PACKED = "packed"


def inputs_of(batches: list[Batch], *, loss: LossArguments, isolated: bool) -> dict[str, Any]:
    """
    The one batch of a list by the names of its tensors.

    Args:
        batches: As a loader has them whose sampler makes the batches.
        loss: With method "ce" the targets are the labels.
        isolated: Whether documents must not see each other.

    Returns:
        input_ids, labels and the fields of ``Targets``, or as "packed" what a device makes them of; "counted": the
        positions that the loss counts, [] int64; position_ids where they matter; "confidence" with an lr_ratio: how
        sure the teacher is of each label, [P], by the column of the cache where the batch has it, else by the records.
    """
    (batch,) = batches
    targets = streams.one_hot(batch.labels) if loss.method == "ce" else batch.targets
    counted_P = (batch.labels.flatten() != IGNORED_LABEL) & (targets.offsets.diff() > 0)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "labels": batch.labels, "counted": counted_P.sum()}
    inputs |= {_PACKED: targets} if isinstance(targets, PackedTargets) else _fields(targets)
    if loss.lr_ratio != 1:
        said = batch.label_logprob
        own = label_confidence(batch.targets, batch.labels.flatten()) if said is None else said.flatten().exp()
        inputs["confidence"] = own
    if isolated and batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    return inputs


def with_confidence(dataset: SparseLogitDataset, loss: LossArguments, *, is_first: bool) -> None:
    """Let batches say how sure the teacher is of each label, where that matters and the caches do; else a note."""
    note = "" if loss.lr_ratio == 1 else take_confidence(dataset)
    if note and is_first:
        say(f"note: {note}")


def weigh(batches: list[dict[str, Any]], loss: LossArguments, process: Process) -> None:
    """Put "weights" [P] in place of the "confidence" of a step's micro-batches, as ``weights_of_step`` has them."""
    if loss.lr_ratio == 1:
        return
    labels = [batch["labels"].flatten() for batch in batches]
    sure = [batch.pop("confidence") for batch in batches]
    rates = {"lr_ratio": loss.lr_ratio, "easy_percentile": loss.easy_percentile}
    for batch, weights_P in zip(batches, weights_of_step(sure, labels, process.together, **rates), strict=True):
        batch["weights"] = weights_P


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
