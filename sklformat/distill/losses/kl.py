"""
Distillation losses of the student, with the gradient computed in the forward pass.

Knows tensors only: no files, no models, no training loop.
Source: Anshumann et al. 2025 (arXiv 2503.16870), sections 2, 3 and 5.3, appendix A.

Shape letters: P positions (sequences times positions each), V vocabulary, D hidden size, C positions of a chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sklformat.distill.losses.heads import OutputHead, Shape, joined
from sklformat.distill.losses.methods import METHODS
from sklformat.distill.losses.rows import IGNORED_LABEL, LossRows, matmul_dtype
from sklformat.distill.losses.targets import AnyTargets, DenseTargets, DenseTeacher, PaddedTargets, RaggedTargets

__all__ = [
    "IGNORED_LABEL",
    "METHODS",
    "AnyTargets",
    "DenseTargets",
    "DenseTeacher",
    "OutputHead",
    "PaddedTargets",
    "RaggedTargets",
    "linear_sparse_kl",
    "sparse_kl",
]

# A chunk's logits stay within both; below MIN_CHUNK_POSITIONS reading and writing the weight's gradient would cost more
# than the matrix products.
MAX_CHUNK_POSITIONS = 2048
MIN_CHUNK_POSITIONS = 256
MAX_CHUNK_BYTES = 1 << 30
# Where a kernel does the pass, the weight's gradient is what chunks cost: a quarter of the positions was the best that
# an H100 showed, 2048 of 8192 (1.12 x the products) and 4096 to 8192 of 32 768 (1.08 x).
MAX_CHUNK_POSITIONS_KERNEL = 8192
MAX_CHUNK_BYTES_KERNEL = (1 << 31) + (1 << 28)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, grad: Tensor, _anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(_ctx: Any, _upstream: Tensor) -> Any:
        raise RuntimeError(
            "sparse_kl and linear_sparse_kl cannot be differentiated twice: they compute their gradient "
            "together with the value; use dense logits and torch.nn.functional.kl_div for second derivatives"
        )


def _without_second_derivative(grad: Tensor | None) -> Tensor | None:
    """The gradient as it is, but under create_graph one that raises when differentiated, not one that is constant."""
    if grad is None or not torch.is_grad_enabled():
        return grad
    anchor = torch.ones((), device=grad.device, requires_grad=True)
    sealed: Tensor = _NoSecondDerivative.apply(grad, anchor)  # type: ignore[no-untyped-call]
    return sealed


class _SparseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_PV: Tensor, rows: LossRows, want_grad: bool) -> Tensor:
        grad_PV = torch.empty_like(logits_PV, memory_format=torch.contiguous_format) if want_grad else None
        loss = torch.zeros((), dtype=rows.dtype, device=rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            for _, blocks in rows.chunks(rows.num_positions):
                rows.run_chunk(blocks, logits_PV, grad_PV, loss)
        ctx.save_for_backward(grad_PV, rows.total)
        return loss / rows.total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        grad_PV, total = ctx.saved_tensors
        with torch.no_grad():
            grad_PV = grad_PV * (upstream / total)
        return _without_second_derivative(grad_PV), None, None


class _LinearSparseKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        weight_VD: Tensor,
        up_VK: Tensor | None,
        bias_V: Tensor | None,
        rows: LossRows,
        chunk_positions: int,
        compute: torch.dtype,
        want_grads: tuple[bool, bool, bool, bool],
    ) -> Tensor:
        ctx.dtypes = [None if part is None else part.dtype for part in (weight_VD, up_VK, bias_V)]
        grad_hidden_PD = torch.empty_like(hidden_PD) if want_grads[0] else None
        # The columns of what learns alone: a frozen weight under an adapter takes no room.
        width = weight_VD.shape[1]
        learning = slice(0 if want_grads[1] else width, hidden_PD.shape[1] if want_grads[2] else width)
        ctx.widths = [width if want_grads[1] else 0, hidden_PD.shape[1] - width if want_grads[2] else 0]
        # The accumulation type, whatever the weight's: a sum over many chunks in half precision would stall.
        grad_columns_VX = weight_VD.new_zeros(len(weight_VD), sum(ctx.widths), dtype=rows.dtype)
        grad_bias_V = torch.zeros_like(bias_V, dtype=rows.dtype) if want_grads[3] and bias_V is not None else None
        loss = torch.zeros((), dtype=rows.dtype, device=rows.device)
        weight_VX = joined(weight_VD, up_VK).to(compute)
        buffer_CV = torch.empty(chunk_positions, rows.vocab_size, dtype=compute, device=rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            for span, blocks in rows.chunks(chunk_positions):
                hidden_CD = hidden_PD[span].to(compute)
                x_CV = buffer_CV[: len(hidden_CD)]
                torch.mm(hidden_CD, weight_VX.t(), out=x_CV)
                rows.run_chunk(blocks, x_CV, x_CV if any(want_grads) else None, loss)
                if grad_hidden_PD is not None:
                    grad_hidden_PD[span] = torch.mm(x_CV, weight_VX)
                if any(ctx.widths):
                    _add_product(grad_columns_VX, x_CV, hidden_CD[:, learning])
                if grad_bias_V is not None:
                    grad_bias_V += x_CV.sum(0, dtype=rows.dtype)
        ctx.save_for_backward(grad_hidden_PD, grad_columns_VX, grad_bias_V, rows.total)
        return loss / rows.total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        grad_hidden_PD, grad_columns_VX, grad_bias_V, total = ctx.saved_tensors
        with torch.no_grad():
            scale = upstream / total
            if grad_hidden_PD is not None:
                grad_hidden_PD = grad_hidden_PD * scale
            parts = [part if part.shape[1] else None for part in grad_columns_VX.split(ctx.widths, 1)]
            grads = [grad_hidden_PD]
            for part, dtype in zip([*parts, grad_bias_V], ctx.dtypes, strict=True):
                # Straight into the parameter's type: there is no second gradient in float32.
                out = None if part is None else torch.empty(part.shape, dtype=dtype, device=part.device)
                grads.append(None if part is None else torch.mul(part, scale, out=out))
        return *(_without_second_derivative(grad) for grad in grads), None, None, None, None


def _add_product(sum_VD: Tensor, x_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum_VD += x_CV^T hidden_CD, accumulated in the type of sum_VD."""
    if x_CV.dtype == sum_VD.dtype:
        sum_VD.addmm_(x_CV.t(), hidden_CD)
    elif x_CV.device.type == "cuda":
        torch.addmm(sum_VD, x_CV.t(), hidden_CD, out_dtype=sum_VD.dtype, out=sum_VD)
    else:
        # No mixed product here: a chunk's product is rounded once to half precision, the sum over chunks is not.
        for start in range(0, len(sum_VD), MAX_CHUNK_POSITIONS):
            span = slice(start, start + MAX_CHUNK_POSITIONS)
            sum_VD[span] += torch.mm(x_CV[:, span].t(), hidden_CD)


def _chunk_of(num_positions: int, row_bytes: int, *, in_kernel: bool) -> int:
    """Positions per chunk where nobody says: equal chunks that stay within the limits above."""
    most, room = MAX_CHUNK_POSITIONS, MAX_CHUNK_BYTES
    if in_kernel:
        most = min(max(most, num_positions // 4), MAX_CHUNK_POSITIONS_KERNEL)
        room = MAX_CHUNK_BYTES_KERNEL
    most = min(most, max(MIN_CHUNK_POSITIONS, room // row_bytes))
    return math.ceil(num_positions / max(1, math.ceil(num_positions / most)))


def sparse_kl(
    logits_PV: Tensor,
    targets: AnyTargets,
    /,
    *,
    method: str = "random_sampling",
    labels_P: Tensor | None = None,
    ce_weight: float = 0.0,
    position_weights_P: Tensor | None = None,
    normaliser: Tensor | float | None = None,
) -> Tensor:
    """
    KL(target || student) in nats, the mean over the positions that count.

    Methods, with t the stored probabilities on the ids K of a position, S their sum, p the student:

    * "random_sampling": sum of t log(t / p) over K (3.4).
      Value up to a constant and gradient are linear in t: with targets sampled without bias, the gradient is full
      distillation's in expectation (A.6).  The value itself is not an unbiased one: t log t is not linear.
    * "topk": the same sum; S < 1, t not normalised (2, Eq. 5).  Biased: the optimum is t / S on K, 0 elsewhere (A.4).
    * "topk_normalised": t / S for t.  Biased likewise; linear in t only where S is always the same.
    * "label_smoothing": 1 - S spread over all V ids equally (3.1).  Linear in t, so that sampled targets keep their
      mean while S <= 1; for Top-K targets the tail is flattened.
    * "ghost_token": one more token with 1 - S against the student's 1 - P_K (3.2, A.5).  Biased under sampled targets:
      K is random, and the student's mass outside K joins the gradient.  Where S = 1 the ghost's target is 0.
    * "naive_fix": 1 - S added to the label (3.3).  Linear in t while S <= 1; biased towards the label for Top-K.
    * "full": a dense teacher, given as DenseTargets or DenseTeacher.  The exact loss and gradient.

    The divergence is forward KL.  CE mixing and position weights keep what the method keeps, as long as the weights do
    not depend on the same draws.

    A position counts if it has records (dense: always) and, where labels are used (ce_weight > 0 or "naive_fix"), a
    label.  All others give neither value nor gradient, with CE mixing too; where none counts, both are exactly 0.

    Args:
        logits_PV: Student's raw logits, [P, V], float16, bfloat16, float32 or float64; left as they are.
            Computed in float32, float64 for float64.
        targets: See RaggedTargets, or the pair PaddedTargets; DenseTargets or DenseTeacher for "full".  On the device
            of the logits.
        method: One of METHODS.
        labels_P: Token that follows each position, [P] integer in [0, V) or -100 for none; read only where used.
        ce_weight: Weight alpha in [0, 1] of cross-entropy to the label: alpha CE + (1 - alpha) KL (5.3).
        position_weights_P: Weight w of each position, [P], >= 0; the result is then sum(w L) / sum(w) over the
            positions that count.  None: 1 everywhere.
        normaliser: What to divide sum(w L) by instead of sum(w), one number: the positions that count in all
            micro-batches and processes of a step, whose losses then add up to that of the whole step.  None: sum(w).

    Returns:
        Scalar, float32 (float64 for float64), nats per position.  The gradient is computed here, together with the
        value, and held in the type of the logits; there is no second derivative (RuntimeError if asked).

    Raises:
        ValueError: Shapes, types or devices disagree, the method is unknown, labels are missing, logits are a DTensor,
            or (checked on the CPU alone, since reading them would stall an accelerator) ids or labels are outside
            the vocabulary, ids repeat within a position, probabilities, weights or the normaliser are negative or not
            finite, or the normaliser is 0 where positions count.

    Source: Anshumann et al. 2025, sections 2, 3, 5.3, A.1 to A.6.
    """
    if logits_PV.dim() != 2:
        raise ValueError(f"logits_PV has shape {list(logits_PV.shape)}; need [positions, V]: flatten the sequences")
    rows = LossRows(
        targets,
        method,
        labels_P,
        ce_weight,
        position_weights_P,
        num_positions=logits_PV.shape[0],
        vocab_size=logits_PV.shape[1],
        like=logits_PV,
        normaliser=normaliser,
    )
    want_grad = torch.is_grad_enabled() and logits_PV.requires_grad
    loss: Tensor = _SparseKL.apply(logits_PV, rows, want_grad)  # type: ignore[no-untyped-call]
    return loss


def linear_sparse_kl(
    hidden_PD: Tensor,
    head: Tensor | OutputHead,
    targets: AnyTargets,
    /,
    *,
    method: str = "random_sampling",
    labels_P: Tensor | None = None,
    ce_weight: float = 0.0,
    position_weights_P: Tensor | None = None,
    normaliser: Tensor | float | None = None,
    chunk_positions: int | None = None,
) -> Tensor:
    """
    ``sparse_kl`` of the logits that a head makes of hidden states, in chunks of positions; they never exist whole.

    Three matrix products per chunk: logits, gradient of the hidden states, gradient of the weight.  Beyond the results
    it holds one chunk's logits and, until the backward pass ends, the weight's gradient in float32; of a frozen weight
    under an adapter the adapter's alone.
    Under autocast the products take autocast's type; bias, scale and cap are applied in float32.

    Args:
        hidden_PD: Student's last hidden states, [P, D], float16, bfloat16, float32 or float64.
        head: Weight of the output layer, [V, D], or an OutputHead, as ``output_head(model)`` gives it.  The weight is
            of the type of the hidden states unless autocast is on, and may be tied to the embedding.
        targets: As in ``sparse_kl``.
        method: As in ``sparse_kl``.
        labels_P: As in ``sparse_kl``.
        ce_weight: As in ``sparse_kl``.
        position_weights_P: As in ``sparse_kl``.
        normaliser: As in ``sparse_kl``.
        chunk_positions: Positions per chunk, >= 1.  None: equal chunks of at most 2048 positions and about 1 GiB of
            logits, not below 256 positions; with Triton on a GPU of a quarter of the positions, at least 2048, at most
            8192 and about 2 GiB.

    Returns:
        Scalar as ``sparse_kl`` returns.  The gradients of weight and bias are summed over chunks in float32 (float64
        for float64); for half precision on a CPU each chunk's product is rounded to that precision first.

    Raises:
        ValueError: As ``sparse_kl``, or hidden states and head do not fit each other, or a part is a DTensor.

    Source: As ``sparse_kl``; the paper's section D.2 asks for a manual forward and backward pass.
    """
    head = head if isinstance(head, OutputHead) else OutputHead(head)
    if head.weight.device != hidden_PD.device:
        raise ValueError(f"the head's weight is on {head.weight.device}, hidden_PD on {hidden_PD.device}")
    compute = matmul_dtype("hidden_PD", hidden_PD, head.weight)
    num_positions, vocab_size = hidden_PD.shape[0], head.weight.shape[0]
    rows = LossRows(
        targets,
        method,
        labels_P,
        ce_weight,
        position_weights_P,
        num_positions=num_positions,
        vocab_size=vocab_size,
        like=hidden_PD,
        normaliser=normaliser,
        shape=Shape.of(head),
    )
    if chunk_positions is None:
        chunk_positions = _chunk_of(num_positions, vocab_size * compute.itemsize, in_kernel=rows.in_kernel)
    elif chunk_positions < 1:
        raise ValueError(f"chunk_positions is {chunk_positions}; need at least 1")
    chunk_positions = max(1, min(chunk_positions, num_positions))
    hidden_PD, up_VK = head.widened(hidden_PD)
    enabled = torch.is_grad_enabled()
    inputs = (hidden_PD, head.weight, up_VK, head.bias)
    want_grads = tuple(enabled and tensor is not None and tensor.requires_grad for tensor in inputs)
    loss: Tensor = _LinearSparseKL.apply(  # type: ignore[no-untyped-call]
        *inputs, rows, chunk_positions, compute, want_grads
    )
    return loss
