"""
The losses as operators of torch, with their gradient computed in the forward pass and without a second derivative.

``torch.compile`` and whatever else traces a program sees one opaque operation of known shapes.  What an operator is
given are tensors and settings alone; it makes a ``LossRows`` of them, which checks them, and runs it.

Shape letters: P positions, V vocabulary, D hidden size, C positions of a chunk, K columns of low-rank parts, X of those
columns of a weight that learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sklformat.distill.losses.heads import OutputHead, Shape, Shard, joined
from sklformat.distill.losses.rows import LossRows
from sklformat.distill.losses.targets import AnyTargets, DenseTargets, DenseTeacher, Ragged

# A mixed product that a CPU has not got goes over so many rows of its sum at once.
_PRODUCT_ROWS = 2048

Parts = tuple[str, Tensor, Tensor | None, Tensor | None, float, float | None]
"""Targets as an operator takes them: their kind, their tensors, and scale and cap of a teacher's head."""


def parts_of(targets: AnyTargets) -> Parts:
    """Targets in parts; a teacher's head has no low-rank part left."""
    if isinstance(targets, DenseTargets):
        return "probabilities", targets.probs_PV.detach(), None, None, 1.0, None
    if isinstance(targets, DenseTeacher):
        head = targets.head if isinstance(targets.head, OutputHead) else OutputHead(targets.head)
        bias = None if head.bias is None else head.bias.detach()
        return "teacher", targets.hidden_PD.detach(), head.weight.detach(), bias, head.scale, head.softcap
    if isinstance(targets, tuple):
        ids, probs = targets
        return "padded", ids, probs.detach(), None, 1.0, None
    return "ragged", targets.token_ids, targets.probs.detach(), targets.offsets, 1.0, None


def _targets_of(
    kind: str, first: Tensor, second: Tensor | None, third: Tensor | None, scale: float, softcap: float | None
) -> AnyTargets:
    if second is None:
        return DenseTargets(first)
    if kind == "teacher":
        return DenseTeacher(first, OutputHead(second, third, softcap, scale))
    return (first, second) if third is None else Ragged(first, second, third)


_SHARDS: dict[str, Shard] = {}


def named(shard: Shard | None) -> str:
    """The name by which an operator knows a shard, which is no tensor; "" for None."""
    if shard is None:
        return ""
    name = f"{shard.first} of {shard.vocab_size} in {'all' if shard.group is None else shard.group.group_name}"
    _SHARDS[name] = shard
    return name


@torch.library.custom_op("sklformat::sparse_kl", mutates_args=())
def sparse_kl_operator(
    logits_PV: Tensor,
    kind: str,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    method: str,
    divergence: str,
    temperature: float,
    labels_P: Tensor | None,
    ce_weight: float,
    weights_P: Tensor | None,
    normaliser: Tensor | None,
    shard: str,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, what it was divided by, and the gradient before that division, empty where it is not wanted."""
    with torch.autocast(logits_PV.device.type, enabled=False):
        rows = LossRows(
            _targets_of(kind, first, second, third, teacher_scale, teacher_softcap),
            method,
            labels_P,
            ce_weight,
            weights_P,
            num_positions=logits_PV.shape[0],
            vocab_size=_SHARDS[shard].vocab_size if shard else logits_PV.shape[1],
            width=logits_PV.shape[1],
            like=logits_PV,
            normaliser=normaliser,
            divergence=divergence,
            temperature=temperature,
            shard=_SHARDS.get(shard),
        )
        grad_PV = logits_PV.new_empty(logits_PV.shape if want_grad else (0,))
        loss = torch.zeros((), dtype=rows.dtype, device=rows.device)
        for _, blocks in rows.chunks(max(1, rows.num_positions)):
            rows.run_chunk(blocks, logits_PV, grad_PV if want_grad else None, loss)
    return loss / rows.total, rows.total, grad_PV


@sparse_kl_operator.register_fake
def _(logits_PV: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    want_grad = rest[-1]
    scalar = logits_PV.new_empty((), dtype=_accumulation(logits_PV))
    return scalar, torch.empty_like(scalar), logits_PV.new_empty(logits_PV.shape if want_grad else (0,))


def _keep_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, total, grad_PV = output
    ctx.set_materialize_grads(False)  # nobody asks for gradients of gradients
    ctx.mark_non_differentiable(total, grad_PV)
    ctx.save_for_backward(total, grad_PV)
    ctx.num_inputs = len(inputs)


def _scale_grad(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    total, grad_PV = ctx.saved_tensors
    rest = [None] * (ctx.num_inputs - 1)
    if upstream is None:
        return None, *rest
    with torch.no_grad():
        grad_PV = grad_PV * (upstream / total)
    return _without_second_derivative(grad_PV), *rest


sparse_kl_operator.register_autograd(_scale_grad, setup_context=_keep_grad)


@torch.library.custom_op("sklformat::linear_sparse_kl", mutates_args=())
def linear_sparse_kl_operator(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    up_VK: Tensor | None,
    bias_V: Tensor | None,
    scale: float,
    softcap: float | None,
    kind: str,
    first: Tensor,
    second: Tensor | None,
    third: Tensor | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    method: str,
    divergence: str,
    temperature: float,
    labels_P: Tensor | None,
    ce_weight: float,
    weights_P: Tensor | None,
    normaliser: Tensor | None,
    shard: str,
    chunk_positions: int,
    compute: torch.dtype,
    accumulate: str,
    want_grads: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """
    Loss, what it was divided by, and the gradients before that division, empty where they are not wanted.

    Those are of hidden states, of the columns of weight and low-rank part that learn, and of the bias; ``want_grads``
    says which, in the order of the first four arguments, ``accumulate`` the type of the columns' sum.
    """
    with torch.autocast(hidden_PD.device.type, enabled=False):
        rows = LossRows(
            _targets_of(kind, first, second, third, teacher_scale, teacher_softcap),
            method,
            labels_P,
            ce_weight,
            weights_P,
            num_positions=hidden_PD.shape[0],
            vocab_size=_SHARDS[shard].vocab_size if shard else weight_VD.shape[0],
            width=weight_VD.shape[0],
            like=hidden_PD,
            normaliser=normaliser,
            divergence=divergence,
            temperature=temperature,
            shard=_SHARDS.get(shard),
            shape=Shape.of(OutputHead(weight_VD, bias_V, softcap, scale)),
        )
        grad_hidden_PD, grad_columns_VX, grad_bias_V = _empty_grads(
            hidden_PD, weight_VD, bias_V, accumulate, want_grads
        )
        widths = _widths(hidden_PD, weight_VD, want_grads)
        width = weight_VD.shape[1]
        learning = slice(0 if want_grads[1] else width, hidden_PD.shape[1] if want_grads[2] else width)
        if rows.num_positions == 0:  # else the first chunk writes it
            grad_columns_VX.zero_()
        grad_bias_V.zero_()
        loss = torch.zeros((), dtype=rows.dtype, device=rows.device)
        weight_VX = joined(weight_VD, up_VK).to(compute)
        buffer_CV = torch.empty(chunk_positions, len(weight_VD), dtype=compute, device=rows.device)
        for span, blocks in rows.chunks(chunk_positions):
            hidden_CX = hidden_PD[span].to(compute)
            x_CV = buffer_CV[: len(hidden_CX)]
            torch.mm(hidden_CX, weight_VX.t(), out=x_CV)
            rows.run_chunk(blocks, x_CV, x_CV if any(want_grads) else None, loss)
            if want_grads[0]:
                grad_hidden_PD[span] = torch.mm(x_CV, weight_VX)
            if any(widths):
                _add_product(grad_columns_VX, x_CV, hidden_CX[:, learning], is_first=span.start == 0)
            if want_grads[3]:
                grad_bias_V += x_CV.sum(0, dtype=rows.dtype)
        if rows.shard is not None and want_grads[0]:  # each part of the head has its share of it
            grad_hidden_PD = rows.shard.sums(grad_hidden_PD)[0]
    return loss / rows.total, rows.total, grad_hidden_PD, grad_columns_VX, grad_bias_V


@linear_sparse_kl_operator.register_fake
def _(
    hidden_PD: Tensor, weight_VD: Tensor, _up_VK: Tensor | None, bias_V: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    scalar = hidden_PD.new_empty((), dtype=_accumulation(hidden_PD))
    return scalar, torch.empty_like(scalar), *_empty_grads(hidden_PD, weight_VD, bias_V, rest[-2], rest[-1])


def _accumulation(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _widths(hidden_PD: Tensor, weight_VD: Tensor, want_grads: Sequence[bool]) -> list[int]:
    """Columns of weight and low-rank part that learn; a frozen weight under an adapter takes no room."""
    width = weight_VD.shape[1]
    return [width if want_grads[1] else 0, hidden_PD.shape[1] - width if want_grads[2] else 0]


def _empty_grads(
    hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, accumulate: str, want_grads: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    # The accumulation type, unless memory counts more: a sum over many chunks in half precision loses what is small.
    dtype = _accumulation(hidden_PD)
    of_columns = weight_VD.dtype if accumulate == "weight" else dtype
    columns = sum(_widths(hidden_PD, weight_VD, want_grads))
    bias = bias_V.shape if want_grads[3] and bias_V is not None else (0,)
    return (
        hidden_PD.new_empty(hidden_PD.shape if want_grads[0] else (0,)),
        weight_VD.new_empty((weight_VD.shape[0], columns), dtype=of_columns),
        weight_VD.new_empty(bias, dtype=dtype),
    )


def _keep_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_PD, weight_VD, up_VK, bias_V = inputs[:4]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.accumulate, ctx.want_grads = inputs[-2:]
    ctx.widths = _widths(hidden_PD, weight_VD, inputs[-1])
    ctx.dtypes = [None if part is None else part.dtype for part in (weight_VD, up_VK, bias_V)]
    ctx.num_inputs = len(inputs)


def _scale_grads(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    total, grad_hidden_PD, grad_columns_VX, grad_bias_V = ctx.saved_tensors
    rest = [None] * (ctx.num_inputs - 4)
    if upstream is None:
        return None, None, None, None, *rest
    with torch.no_grad():
        scale = upstream / total
        grads: list[Tensor | None] = [grad_hidden_PD * scale if ctx.want_grads[0] else None]
        parts = [*grad_columns_VX.split(ctx.widths, 1), grad_bias_V]
        for part, dtype, wanted in zip(parts, ctx.dtypes, ctx.want_grads[1:], strict=True):
            if not wanted:
                grads.append(None)
            elif ctx.accumulate == "weight" and part.dtype == dtype and type(part) is Tensor:  # not traced
                grads.append(part.mul_(scale))  # where it is; a second backward pass notices
            else:  # straight into the parameter's type: there is no second gradient in float32
                grads.append(torch.mul(part, scale, out=part.new_empty(part.shape, dtype=dtype)))
    return *(_without_second_derivative(grad) for grad in grads), *rest


linear_sparse_kl_operator.register_autograd(_scale_grads, setup_context=_keep_grads)


def _add_product(sum_VD: Tensor, x_CV: Tensor, hidden_CD: Tensor, *, is_first: bool) -> None:
    """sum_VD += x_CV^T hidden_CD, accumulated in the type of sum_VD; the first is written over whatever is there."""
    beta = 0 if is_first else 1
    if x_CV.dtype == sum_VD.dtype:
        sum_VD.addmm_(x_CV.t(), hidden_CD, beta=beta)
    elif x_CV.device.type == "cuda":
        torch.addmm(sum_VD, x_CV.t(), hidden_CD, out_dtype=sum_VD.dtype, beta=beta, out=sum_VD)
    else:
        # No mixed product here: a chunk's product is rounded once to half precision, the sum over chunks is not.
        for start in range(0, len(sum_VD), _PRODUCT_ROWS):
            span = slice(start, start + _PRODUCT_ROWS)
            part = torch.mm(x_CV[:, span].t(), hidden_CD)
            sum_VD[span] = part if is_first else sum_VD[span] + part


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
