"""
The forms of target distributions that the losses take: ragged, padded, dense.

Shape letters: P positions, V vocabulary, N records of all positions together, K records that a position has room for.
"""

# ruff: noqa: N815 - shape suffixes

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from sklformat.distill.losses.heads import OutputHead


class RaggedTargets(Protocol):
    """
    Sparse target distributions of P positions; what a batch of the cache carries.

    Attributes:
        token_ids: [N], any integer type, in [0, V), distinct within a position, in any order.
        probs: [N] float32, >= 0: the target probabilities.
        offsets: [P + 1] int64: position i owns records offsets[i] to offsets[i + 1]; may stay on the CPU, which saves
            an accelerator one synchronisation per step.
    """

    @property
    def token_ids(self) -> Tensor: ...
    @property
    def probs(self) -> Tensor: ...
    @property
    def offsets(self) -> Tensor: ...


PaddedTargets: TypeAlias = tuple[Tensor, Tensor]
"""
The same with equal room for each position: token_ids and probs, both [..., K]; what is before K makes P positions.

Where probs is 0 there is no record, whatever the id.  An accelerator synchronises once to pick the records.
"""


@dataclass(frozen=True)
class DenseTargets:
    """Whole teacher distributions for method "full": probs_PV [P, V], any float type, rows summing to 1."""

    probs_PV: Tensor


@dataclass(frozen=True)
class DenseTeacher:
    """
    A teacher's last layer for method "full"; its probabilities are formed block by block and never held whole.

    No gradient flows into it.

    Attributes:
        hidden_PD: [P, D_teacher].
        head: Weight [V, D_teacher] of the type of the hidden states, or an OutputHead, as ``output_head(teacher)``
            gives it; one padded beyond the student's V ids is cut first, with ``head.narrowed(V)``.
    """

    hidden_PD: Tensor
    head: Tensor | OutputHead


AnyTargets: TypeAlias = RaggedTargets | PaddedTargets | DenseTargets | DenseTeacher


@dataclass(frozen=True)
class Ragged:
    """Ragged targets made of others."""

    token_ids: Tensor
    probs: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, padded: PaddedTargets) -> Ragged:
        """
        The records of padded targets.

        Raises:
            ValueError: Not two tensors of one shape.
        """
        if len(padded) != 2 or padded[0].shape != padded[1].shape or padded[0].dim() == 0:
            shapes = [list(getattr(part, "shape", ())) for part in padded]
            raise ValueError(f"padded targets have the shapes {shapes}; need token_ids and probs, both [..., K]")
        ids_PK, probs_PK = (part.flatten(0, -2) if part.dim() > 1 else part[None] for part in padded)
        held_PK = probs_PK != 0
        offsets = torch.zeros(len(held_PK) + 1, dtype=torch.int64, device=held_PK.device)
        torch.cumsum(held_PK.sum(1), 0, out=offsets[1:])
        return cls(ids_PK[held_PK], probs_PK[held_PK], offsets)
