"""
One dense pass over blocks of logits that turns them into the loss and, in place, into its gradient.

Serves block after block.  Which rows exist, and where they come from, is its caller's.
On a GPU a kernel does the pass, a program for each row (``kernels.loss_rows``); what is here is its oracle.
Entries of a position's records are formed in float32 (float64 for float64) and overwrite what the dense pass left:
near the optimum they are small differences of large numbers, and rounding first would lose them.

Shape letters: P positions, V vocabulary, D hidden size, C positions of a chunk, R positions of a block, N records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sklformat.distill import kernels
from sklformat.distill.losses.arguments import Arguments
from sklformat.distill.losses.methods import SPARSE_METHODS, Block, mix_ce, segment_sum
from sklformat.distill.losses.targets import DenseTargets, DenseTeacher

# Elements of the block that the passes of the row form go over: small enough for a CPU's cache, large enough to hide
# the cost of the ragged operations (CPU) or of the launches (accelerators).
BLOCK_ELEMENTS_CPU = 1 << 20
BLOCK_ELEMENTS_DEVICE = 1 << 26


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


class LossRows(Arguments):
    """The loss as a function of the rows of the logits; serves block after block."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        limit = BLOCK_ELEMENTS_CPU if self.device.type == "cpu" else BLOCK_ELEMENTS_DEVICE
        # The same on all processes of a group, which meet at each block.
        self.block_positions = max(1, limit // self.vocab_size)
        # A kernel accumulates in float32, and has no need of a teacher's distributions that are whole in memory.
        self.in_kernel = (
            kernels.run_on(self.device)
            and self.dtype == torch.float32
            and self.shard is None
            and not isinstance(self.dense, DenseTargets)
        )

    def chunks(self, chunk_positions: int) -> Iterator[tuple[slice, list[tuple[int, int, int, int]]]]:
        """Chunks of positions, each with its blocks (start, stop, first record, end record)."""
        starts = range(0, self.num_positions, chunk_positions)
        if self.in_kernel:  # which knows by itself where records are
            for start in starts:
                stop = min(start + chunk_positions, self.num_positions)
                yield slice(start, stop), [(start, stop, 0, 0)]
            return
        edges = []
        for start in starts:
            stop = min(start + chunk_positions, self.num_positions)
            edges.append([*range(start, stop, self.block_positions), stop])
        flat = torch.tensor([edge for chunk in edges for edge in chunk], dtype=torch.int64)
        # One transfer for all blocks, and the only point where the host waits for an accelerator.
        offsets = None if self.ragged is None else self.ragged.offsets
        records = iter([0] * len(flat) if offsets is None else offsets[flat.to(offsets.device)].tolist())
        for chunk in edges:
            of_chunk = [next(records) for _ in chunk]
            blocks = list(zip(chunk[:-1], chunk[1:], of_chunk[:-1], of_chunk[1:], strict=True))
            yield slice(chunk[0], chunk[-1]), blocks

    def run_chunk(
        self, blocks: list[tuple[int, int, int, int]], x_CV: Tensor, grad_CV: Tensor | None, loss: Tensor
    ) -> None:
        """
        Add the chunk's weighted losses to loss; its gradient goes to grad_CV (which may be x_CV), None: not wanted.

        Neither is divided by the total weight yet: half-precision gradients stay clear of underflow that way.
        """
        chunk_start = blocks[0][0]
        if self.in_kernel:
            loss += self._run_kernel(slice(chunk_start, blocks[-1][1]), x_CV, grad_CV)
            return
        for block in blocks:
            span = slice(block[0] - chunk_start, block[1] - chunk_start)
            loss += self._run_block(block, x_CV[span], None if grad_CV is None else grad_CV[span])

    def _run_kernel(self, span: slice, x_CV: Tensor, grad_CV: Tensor | None) -> Tensor:
        from sklformat.distill.kernels import dense_rows, loss_rows  # noqa: PLC0415  they load Triton

        rows_CV = x_CV
        if grad_CV is not None and grad_CV is not x_CV:
            rows_CV = grad_CV.copy_(x_CV)
        elif grad_CV is None and (self.method == "ghost_token" or x_CV.stride(1) != 1):
            rows_CV = x_CV.clone(memory_format=torch.contiguous_format)  # the kernel writes into it
        settings: dict[str, Any] = {
            "labels_C": None if self.labels_P is None else self.labels_P[span],
            "ce_weight": self.ce_weight,
            "want_grad": grad_CV is not None,
        }
        if self.shape is not None:
            settings |= {"bias_V": self.shape.bias_V, "scale": self.shape.scale, "softcap": self.shape.softcap}
        weights_C = self.weights_P[span]
        if self.ragged is not None:
            offsets = self.ragged.offsets[span.start : span.stop + 1].to(self.device, non_blocking=True)
            records = self.ragged.token_ids.contiguous(), self.ragged.probs.contiguous(), offsets.contiguous()
            return loss_rows.run_sparse(rows_CV, *records, weights_C, method=self.method, **settings).sum()
        if self.teacher_shape is not None:
            bent = self.teacher_shape
            settings |= {"teacher_bias_V": bent.bias_V, "teacher_scale": bent.scale, "teacher_softcap": bent.softcap}
        return dense_rows.run_dense(rows_CV, self._teacher_product(span), weights_C, **settings).sum()

    def _run_block(self, block: tuple[int, int, int, int], x_RV: Tensor, grad_RV: Tensor | None) -> Tensor:
        start, stop, _, _ = block
        weights_R = self.weights_P[start:stop]
        # z is x less its row's maximum, then exp(z), then the gradient: one buffer, in the accumulation type.
        z_RV = (
            grad_RV
            if grad_RV is not None and grad_RV.dtype == self.dtype
            else x_RV.new_empty(x_RV.shape, dtype=self.dtype)
        )
        tanh_RV = None
        teacher_RV = self._own_teacher_logits(start, stop)
        if self.shape is not None:
            tanh_RV = self.shape.bend(z_RV.copy_(x_RV))
            z_RV.sub_(self._row_maxima(z_RV, teacher_RV))
        elif x_RV.dtype == self.dtype:
            torch.sub(x_RV, self._row_maxima(x_RV, teacher_RV), out=z_RV)
        else:
            z_RV.copy_(x_RV).sub_(self._row_maxima(x_RV, teacher_RV))
        # A position without label has weight 0, so that any id will do.
        labels_R = None if self.labels_P is None else self.labels_P[start:stop].clamp(min=0)
        if self.dense is None:
            loss_R = self._run_sparse(z_RV, block, weights_R, labels_R, want_grad=grad_RV is not None)
        else:
            made = self._teacher_probs(start, stop) if teacher_RV is None else _exponentials(teacher_RV)
            loss_R = self._run_dense(z_RV, made, weights_R, labels_R, want_grad=grad_RV is not None)
        if grad_RV is not None and self.shape is not None:
            self.shape.unbend(z_RV, tanh_RV)
        if grad_RV is not None:
            _clear(z_RV, weights_R == 0)
            if grad_RV is not z_RV:
                grad_RV.copy_(z_RV)
        return torch.where(weights_R > 0, loss_R * weights_R, 0).sum()

    def _row_maxima(self, x_RV: Tensor, teacher_RV: Tensor | None) -> Tensor:
        """
        [R, 1] in the accumulation type, over all processes that have a part of the rows.

        From a teacher's logits, of which a process has a part, their rows' maxima are taken off.
        """
        largest_R1 = x_RV.amax(1, keepdim=True).to(self.dtype)
        if self.shard is None:
            return largest_R1
        if teacher_RV is None:
            return self.shard.largest(largest_R1)
        both_R2 = self.shard.largest(torch.cat([largest_R1, teacher_RV.amax(1, keepdim=True)], 1))
        teacher_RV.sub_(both_R2[:, 1:])
        return both_R2[:, :1]

    def _entries(self, z_RV: Tensor, rows: Tensor, ids: Tensor) -> Entries:
        """Those of these ids in these rows."""
        width = z_RV.shape[1]
        if self.shard is None:
            return Entries(rows * width + ids, None)
        local = ids - self.shard.first
        return Entries(rows * width + local.clamp(0, width - 1), (local >= 0) & (local < width))

    def _run_sparse(
        self,
        z_RV: Tensor,
        block: tuple[int, int, int, int],
        weights_R: Tensor,
        labels_R: Tensor | None,
        *,
        want_grad: bool,
    ) -> Tensor:
        assert self.ragged is not None
        start, stop, first, end = block
        flat = z_RV.view(-1)
        offsets = self.ragged.offsets[start : stop + 1].to(self.device, non_blocking=True) - first
        rows_N = torch.repeat_interleave(offsets.diff(), output_size=end - first)
        ids_N = self.ragged.token_ids[first:end].long()
        records = self._entries(z_RV, rows_N, ids_N)
        labels = None
        if labels_R is not None:
            labels = self._entries(z_RV, torch.arange(stop - start, device=self.device), labels_R)
        z_N = records.take(flat)
        z_label_R = None if labels is None else labels.take(flat)
        sum_z_R = z_RV.sum(1) if self.method == "label_smoothing" else None
        z_RV.exp_()
        # With the records' entries out, the row sums to the mass outside K without the cancellation of 1 - P_K.
        records.put(flat, torch.zeros_like(z_N))
        rest_R = z_RV.sum(1)
        if self.shard is not None:
            z_N, z_label_R, sum_z_R, rest_R = self.shard.sums(z_N, z_label_R, sum_z_R, rest_R)
        e_N = z_N.exp()
        e_label_R = None if z_label_R is None else z_label_R.exp()
        sum_R = rest_R + segment_sum(e_N, offsets)
        log_sum_R = sum_R.log()
        is_label_N = None if labels_R is None else (ids_N == labels_R[rows_N]).to(self.dtype)
        # Masked ids have a logit of minus infinity: under a target of 0 they must give 0, not NaN.
        lowest = torch.finfo(self.dtype).min
        b = Block(
            t_N=self.ragged.probs[first:end].detach().to(self.dtype),
            logp_N=(z_N - log_sum_R[rows_N]).clamp_(min=lowest),
            p_N=e_N / sum_R[rows_N],
            rows_N=rows_N,
            offsets=offsets,
            log_rest_R=rest_R.clamp(min=torch.finfo(self.dtype).tiny).log() - log_sum_R,
            sum_logp_R=None if sum_z_R is None else (sum_z_R - self.vocab_size * log_sum_R).clamp_(min=lowest),
            logp_label_R=None if z_label_R is None else (z_label_R - log_sum_R).clamp_(min=lowest),
            is_label_N=is_label_N,
            vocab_size=self.vocab_size,
        )
        form = SPARSE_METHODS[self.method](b)
        if self.ce_weight > 0:
            mix_ce(form, b, self.ce_weight)
        if want_grad:
            a_R = form.a_R * weights_R
            z_RV.mul_((a_R / sum_R).unsqueeze(1))
            if form.u_R is not None:
                z_RV.add_((form.u_R * weights_R).unsqueeze(1))
            if labels is not None and form.label_R is not None and e_label_R is not None:
                g_label_R = form.a_R * (e_label_R / sum_R) + form.label_R
                if form.u_R is not None:
                    g_label_R = g_label_R + form.u_R
                labels.put(flat, g_label_R * weights_R)
            # After the label: where it is one of the records, the record's entry already holds its share.
            records.put(flat, form.grad_N * weights_R[rows_N])
        return form.loss_R

    def _run_dense(
        self,
        z_RV: Tensor,
        made: tuple[Tensor, Tensor],
        weights_R: Tensor,
        labels_R: Tensor | None,
        *,
        want_grad: bool,
    ) -> Tensor:
        t_RV, negative_entropy_R = made
        # As above: a masked id under a target of 0 gives 0.
        z_RV.clamp_(min=torch.finfo(self.dtype).min)
        alpha, beta, flat = self.ce_weight, 1 - self.ce_weight, z_RV.view(-1)
        target_sum_R = t_RV.sum(1)
        cross_R = torch.linalg.vecdot(t_RV, z_RV)
        labels = None
        if labels_R is not None:
            labels = self._entries(z_RV, torch.arange(len(z_RV), device=self.device), labels_R)
        z_label_R = None if labels is None else labels.take(flat)
        z_RV.exp_()
        sum_R = z_RV.sum(1)
        if self.shard is not None:
            parts = self.shard.sums(negative_entropy_R, target_sum_R, cross_R, z_label_R, sum_R)
            negative_entropy_R, target_sum_R, cross_R, z_label_R, sum_R = parts
            if isinstance(self.dense, DenseTeacher):  # whose exponentials are probabilities from here on
                t_RV.div_(target_sum_R.unsqueeze(1))
                negative_entropy_R = negative_entropy_R / target_sum_R - target_sum_R.log()
                cross_R, target_sum_R = cross_R / target_sum_R, torch.ones_like(target_sum_R)
        log_sum_R = sum_R.log()
        loss_R: Tensor = beta * (negative_entropy_R - cross_R + target_sum_R * log_sum_R)
        if z_label_R is not None:
            loss_R = loss_R - alpha * (z_label_R - log_sum_R)
        if want_grad:
            z_RV.mul_((weights_R * (beta * target_sum_R + alpha) / sum_R).unsqueeze(1))
            z_RV.sub_(t_RV.mul_((weights_R * beta).unsqueeze(1)))
            if labels is not None:
                labels.put(flat, labels.take(flat) - alpha * weights_R)
        return loss_R

    def _teacher_probs(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A fresh [R, V] block of teacher probabilities in the accumulation type, and their sum of t log t, [R]."""
        if isinstance(self.dense, DenseTargets):
            t_RV = self.dense.probs_PV[start:stop].detach().to(self.dtype, copy=True)
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


def _exponentials(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """exp(x) of logits less their maxima, and its sum with x, [R]: up to their sum, what ``_teacher_probs`` gives."""
    e_RV = logits_RV.clamp_(min=torch.finfo(logits_RV.dtype).min).exp()
    return e_RV, torch.linalg.vecdot(e_RV, logits_RV)


def _clear(grad_RV: Tensor, skipped_R: Tensor) -> None:
    """Leave no gradient to rows that do not count, also where their logits are no numbers."""
    if grad_RV.device.type == "cpu":  # touches these rows alone
        grad_RV.index_fill_(0, skipped_R.nonzero()[:, 0], 0)
    else:  # without waiting for their number
        grad_RV.masked_fill_(skipped_R.unsqueeze(1), 0)
