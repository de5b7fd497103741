"""
Whole distributions of a block of rows: a teacher's, given ones, or those that records are spread into.

Where processes have a part of each row, sums go over all of them.

Shape letters: P positions, V vocabulary, R positions of a block, N records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sklformat.distill.losses.arguments import Arguments
from sklformat.distill.losses.divergences import LEAST_REST
from sklformat.distill.losses.methods import segment_sum
from sklformat.distill.losses.targets import DenseTargets, DenseTeacher


@dataclass
class Entries:
    """Single entries of a block: where they lie in it, flattened, and which of them lie here; None: all."""

    index: Tensor
    own: Tensor | None

    def take(self, flat: Tensor) -> Tensor:
        """Their values; 0 of those that another process has."""
        return flat[self.index] if self.own is None else torch.where(self.own, flat[self.index], 0)

    def put(self, flat: Tensor, values: Tensor) -> None:
        """Overwrite those that are here."""
        if self.own is None:
            flat.index_copy_(0, self.index, values)
        else:
            flat.index_copy_(0, self.index[self.own], values[self.own])


class TargetRows(Arguments):
    """The arguments of a loss, with the targets of its rows, block by block."""

    def _entries(self, z_RV: Tensor, rows: Tensor, ids: Tensor) -> Entries:
        """Those of these ids in these rows."""
        width = z_RV.shape[1]
        if self.shard is None:
            return Entries(rows * width + ids, None)
        local = ids - self.shard.first
        return Entries(rows * width + local.clamp(0, width - 1), (local >= 0) & (local < width))

    def _sums(self, *tensors: Tensor) -> list[Any]:
        """Over all processes that have a part of the rows."""
        return list(tensors) if self.shard is None else self.shard.sums(*tensors)

    def _normalised(self, log_RV: Tensor, least: float) -> Tensor:
        """Logits less their maxima as logarithms of probabilities, in place; none below ``least``."""
        (sum_R,) = self._sums(log_RV.exp().sum(1))
        return log_RV.sub_(sum_R.log().unsqueeze(1)).clamp_(min=least)

    def _log_targets(self, block: tuple[int, int, int, int], teacher_RV: Tensor | None) -> Tensor:
        """
        A fresh [R, V] block of logarithms of the targets in the accumulation type, not below that of the least number.

        ``teacher_RV``: what ``_own_teacher_logits`` gave, less the rows' maxima; it becomes the block.
        """
        start, stop, first, end = block
        least = torch.finfo(self.dtype).tiny
        if teacher_RV is not None:
            return self._normalised(teacher_RV, math.log(least))
        if isinstance(self.dense, DenseTeacher):
            log_RV = self._teacher_logits(start, stop).log_softmax(1, dtype=self.dtype)
            return log_RV.clamp_(min=math.log(least))
        if isinstance(self.dense, DenseTargets):
            return self._tempered(self.dense.probs_PV[start:stop]).clamp_(min=least).log_()
        assert self.ragged is not None
        offsets = self.ragged.offsets[start : stop + 1].to(self.device, non_blocking=True) - first
        t_N = self.ragged.probs[first:end].detach().to(self.dtype)
        rest_R = (1 - segment_sum(t_N, offsets)).clamp_(min=0) / self.vocab_size
        q_RV = rest_R.unsqueeze(1).repeat(1, self.width)
        rows_N = torch.repeat_interleave(offsets.diff(), output_size=end - first)
        records = self._entries(q_RV, rows_N, self.ragged.token_ids[first:end].long())
        records.put(q_RV.view(-1), t_N + rest_R[rows_N])
        if self.divergence in ("reverse_kl", "forward_reverse_kl"):
            least = LEAST_REST / self.vocab_size
        return q_RV.clamp_(min=least).log_()

    def _tempered(self, probs_RV: Tensor) -> Tensor:
        """Whole distributions, fresh in the accumulation type, at the temperature."""
        t_RV = probs_RV.detach().to(self.dtype, copy=True)
        if self.temperature == 1:
            return t_RV
        (sum_R,) = self._sums(t_RV.pow_(1 / self.temperature).sum(1))
        return t_RV.div_(sum_R.unsqueeze(1))

    def _teacher_probs(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A fresh [R, V] block of teacher probabilities in the accumulation type, and their sum of t log t, [R]."""
        if isinstance(self.dense, DenseTargets):
            t_RV = self._tempered(self.dense.probs_PV[start:stop])
            return t_RV, torch.xlogy(t_RV, t_RV).sum(1)
        # From the logarithms: xlogy takes each of them again, many times slower than exp. A masked id, log 0, gives 0.
        log_RV = self._teacher_logits(start, stop).log_softmax(1, dtype=self.dtype)
        log_RV.clamp_(min=torch.finfo(self.dtype).min)
        t_RV = log_RV.exp()
        return t_RV, torch.linalg.vecdot(t_RV, log_RV)

    def _teacher_logits(self, start: int, stop: int) -> Tensor:
        """[R, V] in the type of the product, or of accumulation where more than a product makes them."""
        logits_RV = self._teacher_product(slice(start, stop))
        if self.teacher_shape is not None:
            logits_RV = logits_RV.to(self.dtype)
            self.teacher_shape.bend(logits_RV)
        return logits_RV

    def _own_teacher_logits(self, start: int, stop: int) -> Tensor | None:
        """The part of them that is here, in the accumulation type, where processes have parts; else None."""
        if self.shard is None or not isinstance(self.dense, DenseTeacher):
            return None
        return self._teacher_logits(start, stop).to(self.dtype)

    def _teacher_product(self, span: slice) -> Tensor:
        assert isinstance(self.dense, DenseTeacher)
        assert isinstance(self.dense.head, Tensor)
        return torch.mm(self.dense.hidden_PD[span], self.dense.head.t())


def exponentials(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """exp(x) of logits less their maxima, and its sum with x, [R]: up to their sum, what ``_teacher_probs`` gives."""
    e_RV = logits_RV.clamp_(min=torch.finfo(logits_RV.dtype).min).exp()
    return e_RV, torch.linalg.vecdot(e_RV, logits_RV)
