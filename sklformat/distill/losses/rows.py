"""
One dense pass over blocks of logits that turns them into the loss and, in place, into its gradient.

Checks the arguments once, then serves block after block.  Which rows exist, and where they come from, is its caller's.
On a GPU a kernel does the pass, a program for each row (``kernels.loss_rows``); what is here is its oracle.
Entries of a position's records are formed in float32 (float64 for float64) and overwrite what the dense pass left:
near the optimum they are small differences of large numbers, and rounding first would lose them.

Shape letters: P positions, V vocabulary, D hidden size, C positions of a chunk, R positions of a block, N records.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sklformat.distill import kernels
from sklformat.distill.losses.heads import OutputHead, Shape, refuse_sharded
from sklformat.distill.losses.methods import METHODS, SPARSE_METHODS, Block, mix_ce, segment_sum
from sklformat.distill.losses.targets import AnyTargets, DenseTargets, DenseTeacher, Ragged, RaggedTargets

IGNORED_LABEL = -100
# Elements of the block that the passes of the row form go over: small enough for a CPU's cache, large enough to hide
# the cost of the ragged operations (CPU) or of the launches (accelerators).
BLOCK_ELEMENTS_CPU = 1 << 20
BLOCK_ELEMENTS_DEVICE = 1 << 26


class LossRows:
    """The loss as a function of the rows of the logits: checks the arguments once, then serves block after block."""

    def __init__(
        self,
        targets: AnyTargets,
        method: str,
        labels_P: Tensor | None,
        ce_weight: float,
        position_weights_P: Tensor | None,
        *,
        num_positions: int,
        vocab_size: int,
        like: Tensor,
        normaliser: Tensor | float | None = None,
        shape: Shape | None = None,
    ) -> None:
        refuse_sharded("what the loss is taken of", like)
        self.method, self.ce_weight, self.shape = method, ce_weight, shape
        self.num_positions, self.vocab_size = num_positions, vocab_size
        self.device = like.device
        self.dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if method not in METHODS:
            raise ValueError(f"method {method!r} is unknown; one of {', '.join(METHODS)}")
        if not 0 <= ce_weight <= 1:
            raise ValueError(f"ce_weight {ce_weight} is outside [0, 1]")
        if not like.is_floating_point():
            raise ValueError(f"logits or hidden states have type {like.dtype}; need a float type")
        self.dense: DenseTargets | DenseTeacher | None = None
        self.teacher_shape: Shape | None = None
        self.ragged: RaggedTargets | None = None
        if (method == "full") != isinstance(targets, DenseTargets | DenseTeacher):
            raise ValueError(
                f"method {method!r} with {type(targets).__name__}: DenseTargets, DenseTeacher go with 'full'"
            )
        if isinstance(targets, DenseTargets | DenseTeacher):
            counted_P = self._check_dense(targets)
        else:
            counted_P = self._check_ragged(Ragged.of(targets) if isinstance(targets, tuple) else targets)
        self.labels_P: Tensor | None = None
        if ce_weight > 0 or method == "naive_fix":
            self.labels_P = self._check_labels(labels_P)
            counted_P = counted_P & (self.labels_P != IGNORED_LABEL)
        weights_P = counted_P.to(self.dtype)
        if position_weights_P is not None:
            self._check_shape("position_weights_P", position_weights_P, (num_positions,))
            if self._checks_values and not bool(((position_weights_P >= 0) & position_weights_P.isfinite()).all()):
                raise ValueError("position_weights_P holds a weight that is negative or not finite")
            weights_P = torch.where(counted_P, position_weights_P.detach().to(self.dtype), weights_P)
        self.weights_P = weights_P
        own_total = weights_P.sum()
        total = own_total if normaliser is None else self._check_normaliser(normaliser, own_total)
        # Where nothing counts, value and gradients are 0, on every device without asking.
        self.total = torch.where(own_total > 0, total, torch.ones_like(total))
        limit = BLOCK_ELEMENTS_CPU if self.device.type == "cpu" else BLOCK_ELEMENTS_DEVICE
        self.block_positions = max(1, limit // vocab_size)
        # A kernel accumulates in float32, and has no need of a teacher's distributions that are whole in memory.
        self.in_kernel = (
            kernels.run_on(self.device) and self.dtype == torch.float32 and not isinstance(self.dense, DenseTargets)
        )

    @property
    def _checks_values(self) -> bool:
        # Reading a value of an accelerator's tensor would hold up the host at every step.
        return self.device.type == "cpu"

    def _check_shape(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; need {list(shape)}")

    def _check_normaliser(self, normaliser: Tensor | float, own_total: Tensor) -> Tensor:
        total = torch.as_tensor(normaliser).detach().to(own_total, non_blocking=True)
        if total.numel() != 1:
            raise ValueError(f"normaliser has shape {list(total.shape)}; need one number, the positions to divide by")
        if self._checks_values and not 0 <= float(total) < math.inf:
            raise ValueError(f"normaliser is {float(total)}; need a finite number of positions")
        if self._checks_values and float(total) == 0 < float(own_total):
            raise ValueError(
                f"normaliser is 0, and positions of weight {float(own_total):g} count here; "
                "sum what counts over all micro-batches and processes"
            )
        return total.reshape(())

    def _check_dense(self, targets: DenseTargets | DenseTeacher) -> Tensor:
        if isinstance(targets, DenseTargets):
            self._check_shape("probs_PV", targets.probs_PV, (self.num_positions, self.vocab_size))
        else:
            hidden_PD, head = targets.hidden_PD, targets.head
            assert isinstance(head, OutputHead)
            self._check_shape("the teacher's hidden_PD", hidden_PD, (self.num_positions, *hidden_PD.shape[1:]))
            self._check_shape("the teacher's head", head.weight, (self.vocab_size, *hidden_PD.shape[1:]))
            self.teacher_shape = Shape.of(head)
            targets = DenseTeacher(hidden_PD, head.weight)
        self.dense = targets
        return torch.ones(self.num_positions, dtype=torch.bool, device=self.device)

    def _check_ragged(self, targets: RaggedTargets) -> Tensor:
        ids, probs, offsets = targets.token_ids, targets.probs, targets.offsets
        if ids.is_floating_point() or not probs.is_floating_point() or offsets.dtype != torch.int64:
            raise ValueError(
                f"token_ids, probs, offsets have types {ids.dtype}, {probs.dtype}, {offsets.dtype}; "
                "need an integer, a float, int64"
            )
        self._check_shape("token_ids", ids, tuple(probs.shape[:1]))
        self._check_shape("probs", probs, tuple(ids.shape))
        if offsets.shape != (self.num_positions + 1,):
            raise ValueError(f"offsets has shape {list(offsets.shape)}; need [{self.num_positions + 1}], positions + 1")
        if self._checks_values:
            self._check_records(ids.long(), probs, offsets)
        self.ragged = targets
        return (offsets.diff() > 0).to(self.device, non_blocking=True)

    def _check_records(self, ids: Tensor, probs: Tensor, offsets: Tensor) -> None:
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(ids) or bool((offsets.diff() < 0).any()):
            raise ValueError(f"offsets must rise from 0 to the number of records, {len(ids)}")
        if len(ids) == 0:
            return
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"token_ids go from {low} to {high}; outside [0, {self.vocab_size})")
        if not bool(((probs >= 0) & probs.isfinite()).all()):
            raise ValueError("probs holds a value that is negative or not finite")
        rows_N = torch.repeat_interleave(offsets.diff(), output_size=len(ids))
        keys_N = rows_N * self.vocab_size + ids
        if bool((keys_N.diff() <= 0).any()) and bool((keys_N.sort().values.diff() == 0).any()):
            raise ValueError("token_ids repeat within a position; add up their probs first")
        if self.method in ("label_smoothing", "ghost_token", "naive_fix"):
            most = float(segment_sum(probs.float(), offsets).max())
            if most > 1 + 1e-3:
                raise ValueError(f"probs of a position sum to {most}; method {self.method!r} needs at most 1")

    def _check_labels(self, labels_P: Tensor | None) -> Tensor:
        if labels_P is None:
            raise ValueError(f"labels_P is missing; method {self.method!r} with ce_weight {self.ce_weight} needs it")
        self._check_shape("labels_P", labels_P, (self.num_positions,))
        if self._checks_values:
            bad = (labels_P != IGNORED_LABEL) & ((labels_P < 0) | (labels_P >= self.vocab_size))
            if bool(bad.any()):
                raise ValueError(f"label {int(labels_P[bad][0])} is outside [0, {self.vocab_size}) and not -100")
        return labels_P.long()

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
        from sklformat.distill.kernels import loss_rows  # noqa: PLC0415  it loads Triton

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
            records = self.ragged.token_ids, self.ragged.probs, offsets
            return loss_rows.run_sparse(rows_CV, *records, weights_C, method=self.method, **settings).sum()
        if self.teacher_shape is not None:
            bent = self.teacher_shape
            settings |= {"teacher_bias_V": bent.bias_V, "teacher_scale": bent.scale, "teacher_softcap": bent.softcap}
        return loss_rows.run_dense(rows_CV, self._teacher_product(span), weights_C, **settings).sum()

    def _run_block(self, block: tuple[int, int, int, int], x_RV: Tensor, grad_RV: Tensor | None) -> Tensor:
        start, stop, _, _ = block
        weights_R = self.weights_P[start:stop]
        # z is x less its row's maximum, then exp(z), then the gradient: one buffer, in the accumulation type.
        z_RV = (
            grad_RV if grad_RV is not None and grad_RV.dtype == self.dtype else torch.empty_like(x_RV, dtype=self.dtype)
        )
        tanh_RV = None
        if self.shape is not None:
            tanh_RV = self.shape.bend(z_RV.copy_(x_RV))
            z_RV.sub_(z_RV.amax(1, keepdim=True))
        elif x_RV.dtype == self.dtype:
            torch.sub(x_RV, x_RV.amax(1, keepdim=True), out=z_RV)
        else:
            z_RV.copy_(x_RV).sub_(x_RV.amax(1, keepdim=True).to(self.dtype))
        label_index_R = None
        if self.labels_P is not None:
            # A position without label has weight 0, so that any id will do.
            label_index_R = self._flat_rows(stop - start) + self.labels_P[start:stop].clamp(min=0)
        if self.dense is None:
            loss_R = self._run_sparse(z_RV, block, weights_R, label_index_R, want_grad=grad_RV is not None)
        else:
            loss_R = self._run_dense(z_RV, start, stop, weights_R, label_index_R, want_grad=grad_RV is not None)
        if grad_RV is not None and self.shape is not None:
            self.shape.unbend(z_RV, tanh_RV)
        if grad_RV is not None and grad_RV is not z_RV:
            grad_RV.copy_(z_RV)
        return torch.where(weights_R > 0, loss_R * weights_R, 0).sum()

    def _flat_rows(self, num_rows: int) -> Tensor:
        return torch.arange(num_rows, device=self.device) * self.vocab_size

    def _run_sparse(
        self,
        z_RV: Tensor,
        block: tuple[int, int, int, int],
        weights_R: Tensor,
        label_index_R: Tensor | None,
        *,
        want_grad: bool,
    ) -> Tensor:
        assert self.ragged is not None
        start, stop, first, end = block
        flat = z_RV.view(-1)
        offsets = self.ragged.offsets[start : stop + 1].to(self.device, non_blocking=True) - first
        rows_N = torch.repeat_interleave(offsets.diff(), output_size=end - first)
        index_N = self.ragged.token_ids[first:end].long() + rows_N * self.vocab_size
        z_N = flat[index_N]
        z_label_R = None if label_index_R is None else flat[label_index_R]
        sum_z_R = z_RV.sum(1) if self.method == "label_smoothing" else None
        z_RV.exp_()
        e_N = flat[index_N]
        e_label_R = None if label_index_R is None else flat[label_index_R]
        # With the records' entries out, the row sums to the mass outside K without the cancellation of 1 - P_K.
        flat.index_fill_(0, index_N, 0)
        rest_R = z_RV.sum(1)
        sum_R = rest_R + segment_sum(e_N, offsets)
        log_sum_R = sum_R.log()
        is_label_N = None if label_index_R is None else (index_N == label_index_R[rows_N]).to(self.dtype)
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
            if label_index_R is not None and form.label_R is not None and e_label_R is not None:
                g_label_R = form.a_R * (e_label_R / sum_R) + form.label_R
                if form.u_R is not None:
                    g_label_R = g_label_R + form.u_R
                flat.index_copy_(0, label_index_R, g_label_R * weights_R)
            # After the label: where it is one of the records, the record's entry already holds its share.
            flat.index_copy_(0, index_N, form.grad_N * weights_R[rows_N])
        return form.loss_R

    def _run_dense(
        self, z_RV: Tensor, start: int, stop: int, weights_R: Tensor, label_index_R: Tensor | None, *, want_grad: bool
    ) -> Tensor:
        t_RV, negative_entropy_R = self._teacher_probs(start, stop)
        # As above: a masked id under a target of 0 gives 0.
        z_RV.clamp_(min=torch.finfo(self.dtype).min)
        alpha, beta = self.ce_weight, 1 - self.ce_weight
        target_sum_R = t_RV.sum(1)
        loss_R: Tensor = negative_entropy_R - torch.linalg.vecdot(t_RV, z_RV)
        z_label_R = None if label_index_R is None else z_RV.view(-1)[label_index_R]
        z_RV.exp_()
        sum_R = z_RV.sum(1)
        log_sum_R = sum_R.log()
        loss_R = beta * (loss_R + target_sum_R * log_sum_R)
        if z_label_R is not None:
            loss_R = loss_R - alpha * (z_label_R - log_sum_R)
        if want_grad:
            z_RV.mul_((weights_R * (beta * target_sum_R + alpha) / sum_R).unsqueeze(1))
            z_RV.sub_(t_RV.mul_((weights_R * beta).unsqueeze(1)))
            if label_index_R is not None:
                z_RV.view(-1).index_add_(0, label_index_R, weights_R, alpha=-alpha)
        return loss_R

    def _teacher_probs(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A fresh [R, V] block of teacher probabilities in the accumulation type, and their sum of t log t, [R]."""
        if isinstance(self.dense, DenseTargets):
            t_RV = self.dense.probs_PV[start:stop].detach().to(self.dtype, copy=True)
            return t_RV, torch.xlogy(t_RV, t_RV).sum(1)
        logits_RV = self._teacher_product(slice(start, stop))
        if self.teacher_shape is not None:
            logits_RV = logits_RV.to(self.dtype)
            self.teacher_shape.bend(logits_RV)
        # From the logarithms: xlogy takes each of them again, many times slower than exp. A masked id, log 0, gives 0.
        log_RV = logits_RV.log_softmax(1, dtype=self.dtype).clamp_(min=torch.finfo(self.dtype).min)
        t_RV = log_RV.exp()
        return t_RV, torch.linalg.vecdot(t_RV, log_RV)

    def _teacher_product(self, span: slice) -> Tensor:
        assert isinstance(self.dense, DenseTeacher)
        assert isinstance(self.dense.head, Tensor)
        return torch.mm(self.dense.hidden_PD[span], self.dense.head.t())


def matmul_dtype(name: str, hidden_PD: Tensor, weight_VD: Tensor) -> torch.dtype:
    """Type of the products of hidden states and weight: autocast's where it is on, else the one type of both."""
    if hidden_PD.dim() != 2 or weight_VD.dim() != 2 or hidden_PD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"{name} has shape {list(hidden_PD.shape)}, its head's weight {list(weight_VD.shape)}; "
            "need [positions, D] and [V, D]"
        )
    device = hidden_PD.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden_PD.dtype, weight_VD.dtype):
        return torch.get_autocast_dtype(device)
    if hidden_PD.dtype != weight_VD.dtype:
        raise ValueError(f"{name} has type {hidden_PD.dtype}, its head's weight {weight_VD.dtype}; need one type")
    return hidden_PD.dtype
