"""
A row of logits becomes its loss and, in place, the gradient of its loss: one read from memory and one write.

Each program has one row: it reads the logits of the position's records, then the whole row once for its maximum and
sum, forms the loss and the gradient at the records from float32, and goes over the row again, which is still in the
cache.  The laws are those of ``losses.methods``, in the same words; sums are of float32.

Shape letters: C positions of a chunk, V vocabulary, N records of the chunk.
Source: Anshumann et al. 2025 (arXiv 2503.16870), sections 2, 3 and 5.3, appendix A.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sklformat.distill.kernels import AS_WRITTEN

_NAMES = (("random_sampling", "topk"), ("topk_normalised",), ("label_smoothing",), ("ghost_token",), ("naive_fix",))
METHODS = {name: number for number, names in enumerate(_NAMES) for name in names}
"""Number of each method that reads records."""

_NORMALISED, _SMOOTHING, _GHOST, _NAIVE = (tl.constexpr(number) for number in (1, 2, 3, 4))
LOWEST = tl.constexpr(-1e30)  # stands for a logit of minus infinity where a product with 0 must be 0
BELOW_ALL = tl.constexpr(-3.4028234663852886e38)  # a maximum so far that even of masked entries alone is a number
_LEAST = tl.constexpr(2.0**-126)  # the least normal number
_LOG_LEAST = tl.constexpr(-87.33654475)
_LARGEST_BLOCK = 32768
_RECORDS = 64


@triton.jit
def bent(x, at, inside, bias, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Logits of entries ``at`` of the product h Wᵀ."""
    if HAS_BIAS:
        x += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_CAP:
        # tanh by exp of what is not positive, which cannot overflow.
        u = x * (scale / softcap)
        e = tl.exp(-2 * tl.abs(u))
        x = softcap * tl.where(u < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    else:
        x *= scale
    return x


@triton.jit
def unbent(grad, y, scale, softcap, HAS_CAP: tl.constexpr):
    """The gradient of the product where that of its logits y is ``grad``."""
    if HAS_CAP:
        tanh = y / softcap
        grad *= 1 - tanh * tanh
    return grad * scale


@triton.jit
def _x_log_x(x):
    return tl.where(x > 0, x * tl.log(tl.where(x > 0, x, 1.0)), 0.0)


@triton.jit
def zero_row(row, V, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(row + at, tl.zeros((BLOCK,), tl.float32).to(row.dtype.element_ty), mask=at < V)


@triton.jit
def _sparse_rows(
    x, stride, V, ids, probs, offsets, labels, weights, bias, logits_N, losses,
    scale, softcap, ce_weight,
    METHOD: tl.constexpr, HAS_LABEL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    WANT_GRAD: tl.constexpr, BLOCK: tl.constexpr, RECORDS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = x + number * stride
    weight = tl.load(weights + number)
    if weight == 0:  # whatever its logits are
        tl.store(losses + number, 0.0)
        if WANT_GRAD:
            zero_row(row, V, BLOCK)
        return
    first, last = tl.load(offsets + number), tl.load(offsets + number + 1)

    # The logits of the records, before the row is written.
    top = BELOW_ALL
    total_t = 0.0
    for start in range(first, last, RECORDS):
        n = start + tl.arange(0, RECORDS)
        inside = n < last
        at = tl.load(ids + n, mask=inside, other=0).to(tl.int64)
        raw = tl.load(row + at, mask=inside, other=-float("inf")).to(tl.float32)
        y = tl.where(inside, bent(raw, at, inside, bias, scale, softcap, HAS_BIAS, HAS_CAP), -float("inf"))
        tl.store(logits_N + n, y, mask=inside)
        top = tl.maximum(top, tl.max(y, 0))
        total_t += tl.sum(tl.load(probs + n, mask=inside, other=0.0).to(tl.float32), 0)
    label = tl.zeros((), tl.int64)
    y_label = 0.0
    if HAS_LABEL:
        label = tl.load(labels + number).to(tl.int64)
        y_label = bent(tl.load(row + label).to(tl.float32), label, True, bias, scale, softcap, HAS_BIAS, HAS_CAP)
    tl.debug_barrier()  # logits_N may be read by other threads than wrote it
    if METHOD == _GHOST:
        # With the records' entries out, the row sums to the mass outside K without the cancellation of 1 - P_K.
        for start in range(first, last, RECORDS):
            n = start + tl.arange(0, RECORDS)
            at = tl.load(ids + n, mask=n < last, other=0).to(tl.int64)
            out = tl.full((RECORDS,), -float("inf"), tl.float32).to(x.dtype.element_ty)
            tl.store(row + at, out, mask=n < last)
        tl.debug_barrier()

    # The row: maximum, sum of exponentials, and the sum of the logits where all of them are in the loss.
    sum_e = 0.0
    sum_y = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        raw = tl.load(row + at, mask=at < V, other=-float("inf")).to(tl.float32)
        y = bent(raw, at, at < V, bias, scale, softcap, HAS_BIAS, HAS_CAP)
        y = tl.where((raw == -float("inf")) | (at >= V), -float("inf"), y)
        higher = tl.maximum(top, tl.max(y, 0))
        sum_e = sum_e * tl.exp(top - higher) + tl.sum(tl.exp(y - higher), 0)
        top = higher
        if METHOD == _SMOOTHING:
            sum_y += tl.sum(tl.where(at < V, tl.maximum(y, LOWEST), 0.0), 0)
    rest_e = sum_e
    if METHOD == _GHOST:
        for start in range(first, last, RECORDS):
            n = start + tl.arange(0, RECORDS)
            sum_e += tl.sum(tl.exp(tl.load(logits_N + n, mask=n < last, other=-float("inf")) - top), 0)
    log_sum = top + tl.log(sum_e)

    # The form: what each record's target is, and the loss over all of them.
    residual = tl.maximum(1 - total_t, 0.0)
    share = residual / V
    loss = 0.0
    of_label = 0.0  # the label's target among the records
    has_label = 0.0
    for start in range(first, last, RECORDS):
        n = start + tl.arange(0, RECORDS)
        inside = n < last
        t = tl.load(probs + n, mask=inside, other=0.0).to(tl.float32)
        log_p = tl.maximum(tl.load(logits_N + n, mask=inside, other=0.0) - log_sum, LOWEST)
        is_label = inside & False
        if HAS_LABEL:
            is_label = inside & (tl.load(ids + n, mask=inside, other=-1).to(tl.int64) == label)
            has_label += tl.sum(tl.where(is_label, 1.0, 0.0), 0)
        if METHOD == _NORMALISED:
            t = t / total_t
        if METHOD == _NAIVE:
            t = tl.where(is_label, t + residual, t)
        whole = t
        if METHOD == _SMOOTHING:
            whole = tl.where(inside, t + share, 0.0)
        loss += tl.sum(tl.where(inside, _x_log_x(whole) - t * log_p, 0.0), 0)
        of_label += tl.sum(tl.where(is_label, t, 0.0), 0)
    a = total_t
    u = 0.0
    to_label = 0.0
    log_p_label = tl.maximum(y_label - log_sum, LOWEST)
    if METHOD == _NORMALISED:
        a = 1.0
    if METHOD == _SMOOTHING:
        loss += (V - (last - first)) * _x_log_x(share) - share * (sum_y - V * log_sum)
        a += residual
        u = -share
    if METHOD == _GHOST:
        log_rest = tl.log(tl.maximum(rest_e, _LEAST)) + (top - log_sum)
        loss += _x_log_x(residual) - residual * log_rest
        a = 1 - tl.exp(tl.minimum(tl.log(tl.maximum(residual, _LEAST)) - log_rest, -_LOG_LEAST))
    if METHOD == _NAIVE:
        joins = 1 - has_label
        loss += joins * (_x_log_x(residual) - residual * log_p_label)
        a += residual
        to_label = -residual
    kept = 1 - ce_weight
    if HAS_LABEL:
        loss = kept * loss - ce_weight * log_p_label
        a = kept * a + ce_weight
        u = kept * u
        to_label = kept * to_label - ce_weight
    tl.store(losses + number, loss * weight)

    if WANT_GRAD:
        # Everybody has read the row by now; the last sweep writes it, and then the records' entries once more.
        tl.debug_barrier()
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            raw = tl.load(row + at, mask=at < V, other=-float("inf")).to(tl.float32)
            y = bent(raw, at, at < V, bias, scale, softcap, HAS_BIAS, HAS_CAP)
            grad = (a * tl.exp(y - log_sum) + u) * weight
            grad = unbent(grad, y, scale, softcap, HAS_CAP)
            tl.store(row + at, grad.to(row.dtype.element_ty), mask=at < V)
        tl.debug_barrier()
        if HAS_LABEL:
            grad_label = (a * tl.exp(log_p_label) + u + to_label) * weight
            grad_label = unbent(grad_label, y_label, scale, softcap, HAS_CAP)
            tl.store(row + label, grad_label.to(row.dtype.element_ty), mask=has_label == 0)
        for start in range(first, last, RECORDS):
            n = start + tl.arange(0, RECORDS)
            inside = n < last
            at = tl.load(ids + n, mask=inside, other=0).to(tl.int64)
            t = tl.load(probs + n, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(logits_N + n, mask=inside, other=0.0)
            p = tl.exp(y - log_sum)
            own = total_t
            if METHOD == _NORMALISED:
                t = t / total_t
                own = 1.0
            if METHOD == _SMOOTHING:
                t += share
                own = total_t + residual
            if METHOD == _GHOST:
                own = 1.0  # inside K the gradient is the full teacher's (A.5)
            if METHOD == _NAIVE:
                t = tl.where(at == label, t + residual, t)
                own = total_t + residual
            grad = own * p - t
            if HAS_LABEL:
                grad = kept * grad + ce_weight * (p - tl.where(at == label, 1.0, 0.0))
            grad = unbent(grad * weight, y, scale, softcap, HAS_CAP)
            tl.store(row + at, grad.to(row.dtype.element_ty), mask=inside)


def run_sparse(
    x_CV: Tensor,
    token_ids: Tensor,
    probs: Tensor,
    offsets: Tensor,
    weights_C: Tensor,
    *,
    method: str,
    labels_C: Tensor | None = None,
    ce_weight: float = 0.0,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    want_grad: bool = True,
) -> Tensor:
    """
    The losses of rows against sparse targets; the rows become their gradients, or are spoilt where none is wanted.

    Args:
        x_CV: The product h Wᵀ, [C, V] float32, bfloat16 or float16, rows contiguous.
        token_ids: [N'] integers of at least these rows, in [0, V), distinct within a row.
        probs: [N'] floats.
        offsets: [C + 1] int64; the records of row c are offsets[c] to offsets[c + 1].
        weights_C: [C] float32; rows of weight 0 are not looked at.
        method: One of ``METHODS``.
        labels_C: [C] integers, those of rows of weight 0 anything; needed for ce_weight > 0 and "naive_fix".
        ce_weight: Weight of cross-entropy, in [0, 1].
        bias_V: [V], what is added to the product; None: nothing.
        scale: Its factor then.
        softcap: The cap of what it has become, as ``OutputHead`` has it; None: no cap.
        want_grad: Whether the rows become gradients.

    Returns:
        [C] float32, each times its weight.
    """
    rows, vocab_size = x_CV.shape
    losses_C = x_CV.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return losses_C
    logits_N = x_CV.new_empty(token_ids.shape, dtype=torch.float32)
    with torch.cuda.device_of(x_CV):
        _sparse_rows[(rows,)](
            x_CV, x_CV.stride(0), vocab_size, token_ids, probs, offsets,
            labels_C.clamp(min=0) if labels_C is not None else offsets,
            weights_C, x_CV if bias_V is None else bias_V, logits_N, losses_C,
            float(scale), 1.0 if softcap is None else float(softcap), float(ce_weight),
            METHOD=METHODS[method], HAS_LABEL=labels_C is not None, HAS_BIAS=bias_V is not None,
            HAS_CAP=softcap is not None, WANT_GRAD=want_grad, RECORDS=_RECORDS,
            **launch(vocab_size, has_room=bias_V is None and softcap is None),
        )  # fmt: skip
    return losses_C


def launch(vocab_size: int, *, has_room: bool) -> dict[str, Any]:
    """
    Entries that a program has in hand at once, and its warps: 32 768 and 32 were the fastest measured on an H100.

    Of two rows, or with bias or cap, registers have no room for as many: the compiler spills up to 584 bytes.
    """
    block = min(_LARGEST_BLOCK if has_room else _LARGEST_BLOCK // 2, triton.next_power_of_2(vocab_size))
    return {"BLOCK": block, "num_warps": min(32, max(4, block // 512)), **AS_WRITTEN}
