"""
A row of logits becomes its loss against a teacher's whole row and, in place, the gradient of its loss.

Each program has one row of both and reads them once from memory, as in ``loss_rows``.

Shape letters: C positions of a chunk, V vocabulary.
Source: Anshumann et al. 2025 (arXiv 2503.16870), sections 2 and 5.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sklformat.distill.kernels.loss_rows import BELOW_ALL, LOWEST, bent, launch, unbent, zero_row


@triton.jit
def _dense_rows(
    x, stride, V, teacher, teacher_stride, labels, weights, bias, teacher_bias, losses,
    scale, softcap, teacher_scale, teacher_softcap, ce_weight,
    HAS_LABEL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_CAP: tl.constexpr,
    WANT_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = x + number * stride
    teachers = teacher + number * teacher_stride
    weight = tl.load(weights + number)
    if weight == 0:
        tl.store(losses + number, 0.0)
        if WANT_GRAD:
            zero_row(row, V, BLOCK)
        return
    label = tl.zeros((), tl.int64)
    y_label = 0.0
    if HAS_LABEL:
        label = tl.load(labels + number).to(tl.int64)
        y_label = bent(tl.load(row + label).to(tl.float32), label, True, bias, scale, softcap, HAS_BIAS, HAS_CAP)

    # Both rows at once; the teacher's mean of (its logit - the student's) is summed against its maximum so far.
    top = BELOW_ALL
    sum_e = 0.0
    teacher_top = BELOW_ALL
    teacher_e = 0.0
    apart = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < V
        y = bent(tl.load(row + at, mask=inside, other=0.0).to(tl.float32), at, inside, bias, scale, softcap,
                  HAS_BIAS, HAS_CAP)  # fmt: skip
        z = bent(tl.load(teachers + at, mask=inside, other=0.0).to(tl.float32), at, inside, teacher_bias,
                  teacher_scale, teacher_softcap, TEACHER_BIAS, TEACHER_CAP)  # fmt: skip
        y = tl.where(inside, y, -float("inf"))
        z = tl.where(inside, z, -float("inf"))
        higher = tl.maximum(top, tl.max(y, 0))
        sum_e = sum_e * tl.exp(top - higher) + tl.sum(tl.exp(y - higher), 0)
        top = higher
        higher = tl.maximum(teacher_top, tl.max(z, 0))
        shrunk = tl.exp(teacher_top - higher)
        e = tl.exp(z - higher)
        gap = tl.maximum(z, LOWEST) - tl.maximum(y, LOWEST)
        apart = apart * shrunk + tl.sum(tl.where(e > 0, e * gap, 0.0), 0)
        teacher_e = teacher_e * shrunk + tl.sum(e, 0)
        teacher_top = higher
    log_sum = top + tl.log(sum_e)
    teacher_log_sum = teacher_top + tl.log(teacher_e)
    kept = 1 - ce_weight
    loss = kept * (apart / teacher_e - teacher_log_sum + log_sum)
    if HAS_LABEL:
        loss -= ce_weight * tl.maximum(y_label - log_sum, LOWEST)
    tl.store(losses + number, loss * weight)

    if WANT_GRAD:
        tl.debug_barrier()
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < V
            y = bent(tl.load(row + at, mask=inside, other=0.0).to(tl.float32), at, inside, bias, scale, softcap,
                      HAS_BIAS, HAS_CAP)  # fmt: skip
            z = bent(tl.load(teachers + at, mask=inside, other=0.0).to(tl.float32), at, inside, teacher_bias,
                      teacher_scale, teacher_softcap, TEACHER_BIAS, TEACHER_CAP)  # fmt: skip
            grad = tl.exp(y - log_sum) - kept * tl.exp(z - teacher_log_sum)
            if HAS_LABEL:
                grad -= tl.where(at == label, ce_weight, 0.0)
            grad = unbent(grad * weight, y, scale, softcap, HAS_CAP)
            tl.store(row + at, grad.to(row.dtype.element_ty), mask=inside)


def run_dense(
    x_CV: Tensor,
    teacher_CV: Tensor,
    weights_C: Tensor,
    *,
    labels_C: Tensor | None = None,
    ce_weight: float = 0.0,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    teacher_bias_V: Tensor | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    want_grad: bool = True,
) -> Tensor:
    """
    The losses of rows against a teacher's whole rows; as ``loss_rows.run_sparse``.

    Args:
        x_CV: As for ``loss_rows.run_sparse``.
        teacher_CV: The teacher's product, [C, V] of any of the types, rows contiguous; left as it is.
        weights_C: As for ``loss_rows.run_sparse``.
        labels_C: As for ``loss_rows.run_sparse``.
        ce_weight: As for ``loss_rows.run_sparse``.
        bias_V: As for ``loss_rows.run_sparse``.
        scale: As for ``loss_rows.run_sparse``.
        softcap: As for ``loss_rows.run_sparse``.
        teacher_bias_V: Of the teacher's head.
        teacher_scale: Of the teacher's head.
        teacher_softcap: Of the teacher's head.
        want_grad: Whether the rows of x_CV become gradients.
    """
    rows, vocab_size = x_CV.shape
    losses_C = x_CV.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return losses_C
    with torch.cuda.device_of(x_CV):
        _dense_rows[(rows,)](
            x_CV, x_CV.stride(0), vocab_size, teacher_CV, teacher_CV.stride(0),
            labels_C.clamp(min=0) if labels_C is not None else weights_C,
            weights_C, x_CV if bias_V is None else bias_V, x_CV if teacher_bias_V is None else teacher_bias_V, losses_C,
            float(scale), 1.0 if softcap is None else float(softcap),
            float(teacher_scale), 1.0 if teacher_softcap is None else float(teacher_softcap), float(ce_weight),
            HAS_LABEL=labels_C is not None, HAS_BIAS=bias_V is not None, HAS_CAP=softcap is not None,
            TEACHER_BIAS=teacher_bias_V is not None, TEACHER_CAP=teacher_softcap is not None,
            WANT_GRAD=want_grad, **launch(vocab_size, has_room=False),
        )  # fmt: skip
    return losses_C
