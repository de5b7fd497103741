"""
One dense pass over blocks of logits that turns them into the loss and, in place, into its gradient.

Serves block after block.  Which rows exist, and where they come from, is its caller's.
On a GPU a kernel does the pass, a program for each row (``kernels.loss_rows``); what is here is its oracle, and what
runs where the kernel does not know the loss: ``knows_kernel``.
Entries of a position's records are formed in float32 (float64 for float64) and overwrite what the dense pass left:
near the optimum they are small differences of large numbers, and rounding first would lose them.

Shape letters: P positions, V vocabulary, D hidden size, C positions of a chunk, R positions of a block, N records.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sklformat.distill import kernels
from sklformat.distill.losses.dense import TargetRows, exponentials
from sklformat.distill.losses.divergences import dense_form, form_of, is_dense
from sklformat.distill.losses.methods import Block, mix_ce, segment_sum
from sklformat.distill.losses.targets import DenseTargets, DenseTeacher

# Elements of the block that the passes of the row form go over: small enough for a CPU's cache, large enough to hide
# the cost of the ragged operations (CPU) or of the launches (accelerators).
BLOCK_ELEMENTS_CPU = 1 << 20
BLOCK_ELEMENTS_DEVICE = 1 << 26
# What stands for log 0 where products with it must be numbers: no logit is as far from another, and times the least
# target it is 0.
_MASKED_LOG = -1e6


def knows_kernel(divergence: str, temperature: float, ce_weight: float) -> bool:
    """Whether the Triton kernels know a loss: forward KL, at one temperature with the cross-entropy beside it."""
    return divergence == "forward_kl" and (temperature == 1 or ce_weight == 0)


class LossRows(TargetRows):
    """The loss as a function of the rows of the logits; serves block after block."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        limit = BLOCK_ELEMENTS_CPU if self.device.type == "cpu" else BLOCK_ELEMENTS_DEVICE
        self.is_dense = self.dense is not None or is_dense(self.divergence, self.method)
        # Cross-entropy stays at temperature 1, and needs a pass of its own beside another temperature.
        self.has_hard_part = self.ce_weight > 0 and self.temperature != 1
        if self.divergence != "forward_kl" and self.is_dense:  # which has several blocks at once
            limit //= 4
        # The same on all processes of a group, which meet at each block.
        self.block_positions = max(1, limit // self.vocab_size)
        # A kernel accumulates in float32, and has no need of a teacher's distributions that are whole in memory.
        self.in_kernel = (
            kernels.run_on(self.device)
            and self.dtype == torch.float32
            and self.shard is None
            and knows_kernel(self.divergence, self.temperature, self.ce_weight)
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
        hard = self._cross_entropy(z_RV, labels_R) if self.has_hard_part else None
        own_R = weights_R if hard is None else weights_R * (1 - self.ce_weight)
        if not self.is_dense:
            loss_R = self._run_sparse(z_RV, block, own_R, labels_R, want_grad=grad_RV is not None)
        elif self.divergence == "forward_kl":
            made = self._teacher_probs(start, stop) if teacher_RV is None else exponentials(teacher_RV)
            loss_R = self._run_dense(z_RV, made, own_R, labels_R, want_grad=grad_RV is not None)
        else:
            log_q_RV = self._log_targets(block, teacher_RV)
            loss_R = self._run_divergence(z_RV, log_q_RV, own_R, labels_R, want_grad=grad_RV is not None)
        if hard is not None:
            loss_R = self._mix_hard(loss_R, z_RV if grad_RV is not None else None, hard, weights_R)
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
        rest_pp_R = torch.linalg.vecdot(z_RV, z_RV) if self.divergence == "mse" else None
        if self.shard is not None:
            parts = self.shard.sums(z_N, z_label_R, sum_z_R, rest_R, rest_pp_R)
            z_N, z_label_R, sum_z_R, rest_R, rest_pp_R = parts
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
            rest_pp_R=None if rest_pp_R is None else rest_pp_R / sum_R.square(),
        )
        form = form_of(self.divergence, self.method, b)
        if self.ce_weight > 0 and not self.has_hard_part:
            mix_ce(form, b, self.ce_weight)
        if want_grad:
            a_R = (form.a_R * weights_R).clamp_(min=lowest)  # finite, as its entries may all have underflowed to 0
            if form.d == 0:
                z_RV.mul_((a_R / sum_R).unsqueeze(1))
            else:
                z_RV.div_(sum_R.unsqueeze(1))
                z_RV.mul_(z_RV.mul((form.d * weights_R).unsqueeze(1)).add_(a_R.unsqueeze(1)))
            if form.u_R is not None:
                z_RV.add_((form.u_R * weights_R).unsqueeze(1))
            if labels is not None and form.label_R is not None and e_label_R is not None:
                p_label_R = e_label_R / sum_R
                g_label_R = form.a_R * p_label_R + form.label_R
                if form.d != 0:
                    g_label_R = g_label_R + form.d * p_label_R.square()
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
        alpha = 0.0 if self.has_hard_part else self.ce_weight
        beta, flat = 1 - alpha, z_RV.view(-1)
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
        if z_label_R is not None and alpha > 0:
            loss_R = loss_R - alpha * (z_label_R - log_sum_R)
        if want_grad:
            z_RV.mul_((weights_R * (beta * target_sum_R + alpha) / sum_R).unsqueeze(1))
            z_RV.sub_(t_RV.mul_((weights_R * beta).unsqueeze(1)))
            if labels is not None:
                labels.put(flat, labels.take(flat) - alpha * weights_R)
        return loss_R

    def _run_divergence(
        self,
        z_RV: Tensor,
        log_q_RV: Tensor,
        weights_R: Tensor,
        labels_R: Tensor | None,
        *,
        want_grad: bool,
    ) -> Tensor:
        alpha = 0.0 if self.has_hard_part else self.ce_weight
        log_p_RV, p_RV = self._normalised(z_RV.clone(), _MASKED_LOG), None
        ce_R = None
        if alpha > 0 and labels_R is not None:
            labels = self._entries(z_RV, torch.arange(len(z_RV), device=self.device), labels_R)
            (ce_R,) = self._sums(-labels.take(log_p_RV.view(-1)))
            p_RV = log_p_RV.exp()
            labels.put(p_RV.view(-1), labels.take(p_RV.view(-1)) - 1)
        loss_R, grad_RV = dense_form(self.divergence, log_q_RV, log_p_RV, self._sums)
        if ce_R is not None and p_RV is not None:
            loss_R = (1 - alpha) * loss_R + alpha * ce_R
            grad_RV.mul_(1 - alpha).add_(p_RV, alpha=alpha)
        if want_grad:
            torch.mul(grad_RV, weights_R.unsqueeze(1), out=z_RV)
        return loss_R

    def _cross_entropy(self, z_RV: Tensor, labels_R: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the label at temperature 1, [R], and its gradient, [R, V]; z has been divided by the temperature."""
        assert labels_R is not None
        hard_RV = z_RV * self.temperature
        labels = self._entries(hard_RV, torch.arange(len(z_RV), device=self.device), labels_R)
        z_label_R = labels.take(hard_RV.view(-1))
        z_label_R, sum_R = self._sums(z_label_R, hard_RV.exp_().sum(1))
        hard_RV.div_(sum_R.unsqueeze(1))
        labels.put(hard_RV.view(-1), labels.take(hard_RV.view(-1)) - 1)
        return sum_R.log() - z_label_R.clamp(min=torch.finfo(self.dtype).min), hard_RV

    def _mix_hard(
        self, loss_R: Tensor, grad_RV: Tensor | None, hard: tuple[Tensor, Tensor], weights_R: Tensor
    ) -> Tensor:
        """
        The mixture alpha CE + (1 - alpha) T² D, over the T² that the weights carry.

        The gradient, which has its 1 - alpha already, is of the logits over T, and T times that of the logits.
        """
        alpha, temperature = self.ce_weight, self.temperature
        ce_R, hard_RV = hard
        if grad_RV is not None:
            grad_RV.addcmul_(hard_RV, (weights_R * (alpha / temperature)).unsqueeze(1))
        return (1 - alpha) * loss_R + alpha / temperature**2 * ce_R


def _clear(grad_RV: Tensor, skipped_R: Tensor) -> None:
    """Leave no gradient to rows that do not count, also where their logits are no numbers."""
    if grad_RV.device.type == "cpu":  # touches these rows alone
        grad_RV.index_fill_(0, skipped_R.nonzero()[:, 0], 0)
    else:  # without waiting for their number
        grad_RV.masked_fill_(skipped_R.unsqueeze(1), 0)
