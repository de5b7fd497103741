"""
A model's head as a loss takes it: what its logits are, given hidden states.

Knows tensors only.
Shape letters: P positions, V vocabulary, D hidden size, R positions of a block, K rank of a low-rank part.
"""

# ruff: noqa: N815 - shape suffixes

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """
    The part of a vocabulary that one process of a group has, of a head or of logits that are divided among them.

    Attributes:
        first: Its first id; it has as many as there are rows of the weight, or columns of the logits.
        vocab_size: V of all processes together.
        group: Those that have the parts, in which every process takes each loss, of the same positions and targets;
            None: all processes.
    """

    first: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    def check(self, width: int) -> None:
        """Refuse a part that is not one of the vocabulary."""
        if not 0 <= self.first <= self.first + width <= self.vocab_size:
            raise ValueError(
                f"a shard of ids {self.first} to {self.first + width - 1} is no part of a vocabulary of "
                f"{self.vocab_size}"
            )

    def largest(self, values: Tensor) -> Tensor:
        """The largest of all processes, entry by entry, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def sums(self, *tensors: Tensor | None) -> list[Any]:
        """Their sums over all processes, by one collective; None stays None."""
        there = [tensor for tensor in tensors if tensor is not None]
        packed = torch.cat([tensor.flatten() for tensor in there])
        dist.all_reduce(packed, group=self.group)
        parts = iter(torch.split(packed, [tensor.numel() for tensor in there]))
        return [None if tensor is None else next(parts).view(tensor.shape) for tensor in tensors]


@dataclass(frozen=True)
class OutputHead:
    """
    logits = softcap · tanh(scale · (h Wᵀ + bias) / softcap); without a cap scale · (h Wᵀ + bias).

    Gradients flow into each tensor that wants one; scale and cap are fixed.

    Attributes:
        weight: W, [V, D]; it may be tied to the embedding, and have more rows than the tokenizer has ids.
        bias: [V], or None.
        softcap: > 0, the bound of the logits' magnitude; None: no cap.
        scale: Factor of the logits, not 0; of a head that divides them the inverse.
        low_rank: Triples of down [K, D], up [V, K] and a factor: each adds factor · up down to the weight.  The sum is
            never formed, so that a small adapter is not lost in the rounding of a half-precision weight.
        shard: Which ids the rows of the weight are of, where processes have a part of the head each; None: all.

    Raises:
        ValueError: A part does not fit the weight, or scale or cap is no such number.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    low_rank: tuple[tuple[Tensor, Tensor, float], ...] = ()
    shard: Shard | None = None

    def __post_init__(self) -> None:
        for name, tensor in self._tensors():
            refuse_sharded(f"the head's {name}", tensor)
            if tensor.device != self.weight.device:
                raise ValueError(f"the head's {name} is on {tensor.device}, its weight on {self.weight.device}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"the head's bias has shape {list(self.bias.shape)}, its weight {list(self.weight.shape)}")
        for down, up, _ in self.low_rank:
            if up.dim() != 2 or down.shape != (up.shape[1], *self.weight.shape[1:]) or len(up) != len(self.weight):
                raise ValueError(
                    f"the head's low rank has shapes {list(down.shape)} and {list(up.shape)}, its weight "
                    f"{list(self.weight.shape)}; need [K, D], [V, K] and [V, D]"
                )
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"the head's softcap is {self.softcap}; need a number above 0, or None for no cap")
        if self.shard is not None:
            self.shard.check(len(self.weight))
        if self.scale == 0 or not math.isfinite(self.scale):
            raise ValueError(f"the head's scale is {self.scale}; need a finite number that is not 0")

    def _tensors(self) -> list[tuple[str, Tensor]]:
        low_rank = [("low rank", tensor) for down, up, _ in self.low_rank for tensor in (down, up)]
        bias = [] if self.bias is None else [("bias", self.bias)]
        return [("weight", self.weight), *bias, *low_rank]

    @property
    def is_plain(self) -> bool:
        """Whether hidden states times the weight are the logits."""
        return not self.low_rank and Shape.of(self) is None

    def narrowed(self, vocab_size: int) -> OutputHead:
        """The head of the first ids alone, as a view: of a padded teacher those that the student has too."""
        if len(self.weight) < vocab_size:
            raise ValueError(f"the head has {len(self.weight)} ids; {vocab_size} of them cannot be taken")
        low_rank = tuple((down, up[:vocab_size], factor) for down, up, factor in self.low_rank)
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias, low_rank=low_rank)

    def widened(self, hidden_PD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states with low-rank parts as more columns, and what these are to the weight, [V, K] or None."""
        if not self.low_rank:
            return hidden_PD, None
        low = [(hidden_PD.to(down.dtype) @ down.T) * factor for down, _, factor in self.low_rank]
        hidden = torch.cat([hidden_PD, *(low_PK.to(hidden_PD.dtype) for low_PK in low)], 1)
        return hidden, torch.cat([up.to(self.weight.dtype) for _, up, _ in self.low_rank], 1)

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """[P, V] in the hidden states' type, without gradient: for a look at few positions."""
        with torch.no_grad():
            hidden, up_VK = self.widened(hidden_PD)
            logits_PV = hidden @ joined(self.weight, up_VK).T
            shape = Shape.of(self)
            if shape is not None:
                shape.bend(logits_PV)
        return logits_PV


@dataclass(frozen=True)
class Shape:
    """What becomes of a block of the product h Wᵀ: bias, scale and cap, in the accumulation type."""

    bias_V: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, head: OutputHead) -> Shape | None:
        """None: the product is the logits."""
        if head.bias is None and head.scale == 1 and head.softcap is None:
            return None
        return cls(None if head.bias is None else head.bias.detach().contiguous(), head.scale, head.softcap)

    @classmethod
    def tempered(cls, shape: Shape | None, temperature: float) -> Shape | None:
        """What makes logits that are divided by a temperature; ``shape`` makes them without, None: the product does."""
        if temperature == 1:
            return shape
        bias_V, scale, softcap = (None, 1.0, None) if shape is None else (shape.bias_V, shape.scale, shape.softcap)
        return cls(bias_V, scale / temperature, None if softcap is None else softcap / temperature)

    def bend(self, z_RV: Tensor) -> Tensor | None:
        """Turn the product into logits, in place; what ``unbend`` needs of it, [R, V], or None."""
        if self.bias_V is not None:
            z_RV.add_(self.bias_V)
        if self.softcap is None:
            z_RV.mul_(self.scale)
            return None
        tanh_RV = z_RV.mul_(self.scale / self.softcap).tanh_().clone()
        z_RV.mul_(self.softcap)
        return tanh_RV

    def unbend(self, grad_RV: Tensor, tanh_RV: Tensor | None) -> None:
        """Turn the gradient of the logits into that of the product, in place."""
        if tanh_RV is not None:
            grad_RV.mul_(tanh_RV.square_().neg_().add_(1))
        grad_RV.mul_(self.scale)


def joined(weight_VD: Tensor, up_VK: Tensor | None) -> Tensor:
    """The weight that widened hidden states are multiplied by."""
    return weight_VD if up_VK is None else torch.cat([weight_VD, up_VK], 1)


def refuse_sharded(name: str, tensor: Tensor) -> None:
    """
    Refuse what is only a part of a tensor on each process.

    Raises:
        ValueError: The tensor is a DTensor.
    """
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{name} is a DTensor, of which each process holds a part; call the sharded model itself first: "
            "run_to_head(model, input_ids) does, and gives the head while it is whole "
            '(docs/trainers.md, "FSDP2")'
        )
