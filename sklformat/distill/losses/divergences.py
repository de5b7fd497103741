"""
How far the student p = softmax(x) is from a target q: each divergence as a sum over ids of f(q_j, p_j).

With φ_j = ∂f/∂p_j the gradient of each is p_j (φ_j - sum_i p_i φ_i).  Where q is 0 outside the ids K of the records,
all other ids are one bucket of the target's rest, and the row form of ``methods`` holds with

    g_k = c_k + a p_k,   c_k = p_k (φ_k - φ_rest),   a = -sum_K c_k.

Squares alone are no bucket's, since (p_i + p_j)² is not p_i² + p_j²: they add d p_j² with d = 2 to the row form.
Source: Anshumann et al. 2025 (arXiv 2503.16870), section 6.3, names them; Lin 1991 for the Jensen-Shannon divergence.

Shape letters: V vocabulary, N records of all positions together (ragged), R positions of the block at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sklformat.distill.losses.methods import SPARSE_METHODS, Block, Form

DIVERGENCES = ("forward_kl", "reverse_kl", "forward_reverse_kl", "jsd", "mse", "l1", "total_variation")

LEAST_REST = 1e-6
"""What a target's rest counts as at least under the logarithm of a reverse divergence; float32 sums resolve no less."""

_OF_DISTRIBUTIONS = ("reverse_kl", "forward_reverse_kl", "jsd")


def check_divergence(divergence: str, method: str) -> None:
    """
    Make sure that a divergence has a meaning for a method's targets.

    Raises:
        ValueError: There is no such divergence, or it is of distributions and the method's targets are none.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence {divergence!r} is unknown; one of {', '.join(DIVERGENCES)}")
    if method == "topk" and divergence in _OF_DISTRIBUTIONS:
        raise ValueError(
            f"divergence {divergence!r} with method 'topk': its targets leave 1 - S to no id, and so are no "
            "distribution; 'topk_normalised' gives it to the records, 'ghost_token' to all other ids together"
        )


def check_temperature(temperature: float) -> None:
    """
    Look at a temperature.

    Raises:
        ValueError: It is no number above 0.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; logits are divided by it: above 0, and finite")


def is_dense(divergence: str, method: str) -> bool:
    """Whether records become a target of every id: the rest is on each of them, and f is not linear in p there."""
    return method == "label_smoothing" and divergence != "forward_kl"


def terms(divergence: str, q: Tensor, p: Tensor, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """f(q, p) and φ = ∂f/∂p, up to a constant that all ids share, entry by entry; not of the two with forward KL."""
    if divergence == "reverse_kl":
        gap = log_p - log_q
        return p * gap, gap
    if divergence == "jsd":
        log_m = torch.logaddexp(log_q, log_p) - math.log(2)
        gap = (log_p - log_m) / 2
        return q * (log_q - log_m) / 2 + p * gap, gap
    gap = p - q
    if divergence == "mse":
        return gap.square(), 2 * gap
    scale = 1.0 if divergence == "l1" else 0.5
    return scale * gap.abs(), scale * gap.sign()


# --- records ---------------------------------------------------------------------------------------------------------


def form_of(divergence: str, method: str, b: Block) -> Form:
    """The row form of a method's records under a divergence; of those that ``is_dense`` says no."""
    if divergence == "forward_kl":
        return SPARSE_METHODS[method](b)
    if divergence == "forward_reverse_kl":
        return _mean(SPARSE_METHODS[method](b), _bucket_form("reverse_kl", method, b))
    if divergence == "mse" and method != "ghost_token":
        return _square_form(method, b)
    return _bucket_form(divergence, method, b)


def _mean(one: Form, other: Form) -> Form:
    label_R = None
    if one.label_R is not None and other.label_R is not None:
        label_R = (one.label_R + other.label_R) / 2
    a_R, grad_N = (one.a_R + other.a_R) / 2, (one.grad_N + other.grad_N) / 2
    return Form((one.loss_R + other.loss_R) / 2, a_R, grad_N, label_R=label_R)


def _targets(method: str, b: Block) -> tuple[Tensor, Tensor | None]:
    """The target of each record, [N], and that of the label where it is none of them, [R]."""
    if method == "topk_normalised":
        return b.t_N / b.sum(b.t_N)[b.rows_N], None
    if method != "naive_fix":
        return b.t_N, None
    assert b.is_label_N is not None
    rest_R = b.residual()
    return b.t_N + b.is_label_N * rest_R[b.rows_N], rest_R


def _bucket_form(divergence: str, method: str, b: Block) -> Form:
    tiny = torch.finfo(b.p_N.dtype).tiny
    least_rest = LEAST_REST if divergence == "reverse_kl" else tiny
    q_N, q_label_R = _targets(method, b)
    p_rest_R, logp_rest_R = b.log_rest_R.exp(), b.log_rest_R
    loss_R, joined_R, slope_label_R = torch.zeros_like(p_rest_R), None, None
    if q_label_R is not None:  # one more record where the label is none
        assert b.is_label_N is not None
        assert b.logp_label_R is not None
        joins_R, p_label_R = 1 - b.sum(b.is_label_N), b.logp_label_R.exp()
        p_rest_R = p_rest_R - joins_R * p_label_R
        logp_rest_R = p_rest_R.clamp_(min=tiny).log()
        value_R, slope_R = terms(divergence, q_label_R, p_label_R, _log(q_label_R, least_rest), b.logp_label_R)
        loss_R, joined_R, slope_label_R = joins_R * value_R, joins_R * p_label_R, slope_R
    q_rest_R = b.residual() if method == "ghost_token" else torch.zeros_like(p_rest_R)
    value_R, slope_rest_R = terms(divergence, q_rest_R, p_rest_R, _log(q_rest_R, least_rest), logp_rest_R)
    value_N, slope_N = terms(divergence, q_N, b.p_N, _log(q_N, tiny), b.logp_N)
    loss_R = loss_R + value_R + b.sum(value_N)
    c_N = b.p_N * (slope_N - slope_rest_R[b.rows_N])
    a_R, label_R = -b.sum(c_N), None
    if joined_R is not None and slope_label_R is not None:
        label_R = joined_R * (slope_label_R - slope_rest_R)
        a_R = a_R - label_R
    return Form(loss_R, a_R, c_N + a_R[b.rows_N] * b.p_N, label_R=label_R)


def _square_form(method: str, b: Block) -> Form:
    """Of the sum over all of V of (p - q)², with q = 0 outside the records."""
    assert b.rest_pp_R is not None
    q_N, q_label_R = _targets(method, b)
    gap_N = b.p_N - q_N
    loss_R = b.sum(gap_N.square()) + b.rest_pp_R
    mean_R = b.sum(b.p_N * gap_N) + b.rest_pp_R
    label_R = None
    if q_label_R is not None:
        assert b.is_label_N is not None
        assert b.logp_label_R is not None
        p_label_R = b.logp_label_R.exp()
        q_label_R = (1 - b.sum(b.is_label_N)) * q_label_R
        loss_R = loss_R + q_label_R * (q_label_R - 2 * p_label_R)
        mean_R = mean_R - p_label_R * q_label_R
        label_R = -2 * p_label_R * q_label_R
    return Form(loss_R, -2 * mean_R, 2 * b.p_N * (gap_N - mean_R[b.rows_N]), label_R=label_R, d=2.0)


def _log(q: Tensor, least: float) -> Tensor:
    return q.clamp(min=least).log()


# --- whole distributions ---------------------------------------------------------------------------------------------


def dense_form(
    divergence: str,
    log_q_RV: Tensor,
    log_p_RV: Tensor,
    sums: Callable[..., list[Any]],
) -> tuple[Tensor, Tensor]:
    """
    The divergence of whole rows, [R], and its gradient, [R, V], in the memory of ``log_p_RV``.

    Args:
        divergence: One of DIVERGENCES but for "forward_kl".
        log_q_RV: Logarithms of the target, finite.
        log_p_RV: Logarithms of the student, finite; spoilt.
        sums: Of [R] tensors over all processes that have a part of the rows.
    """
    q_RV, p_RV = log_q_RV.exp(), log_p_RV.exp()
    with_forward = divergence == "forward_reverse_kl"
    value_RV, slope_RV = terms("reverse_kl" if with_forward else divergence, q_RV, p_RV, log_q_RV, log_p_RV)
    if with_forward:  # q (log q - log p) is -q times the slope
        value_RV.addcmul_(q_RV, slope_RV, value=-1)
    loss_R, mean_R, q_R = sums(value_RV.sum(1), torch.linalg.vecdot(p_RV, slope_RV), q_RV.sum(1))
    if with_forward:  # whose gradient is p times the sum of q, less q
        mean_R = mean_R - q_R
    grad_RV = torch.sub(slope_RV, mean_R.unsqueeze(1), out=log_p_RV).mul_(p_RV)
    if with_forward:
        return loss_R / 2, grad_RV.sub_(q_RV).div_(2)
    return loss_R, grad_RV
