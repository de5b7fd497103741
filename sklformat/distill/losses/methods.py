"""
The distillation methods, each as one row form: ragged arithmetic on a position's records, nothing of vocabulary size.

With logits x, p = softmax(x) and K the ids of the position's records, the gradient of every method is

    g_j = a p_j + u  for j outside K,        g_k  for k in K (the label's own entry too, where a method names it),

where a, u and the g_k follow from log p on K.  So all methods share one dense pass over the logits (``rows``).
What is here is forward KL; other ``divergences`` have the same form, one of them with d p_j² beside.
Source: Anshumann et al. 2025 (arXiv 2503.16870), sections 2, 3 and 5.3, appendix A.

Shape letters: V vocabulary, N records of all positions together (ragged), R positions of the block at hand.
"""

# ruff: noqa: N815 - shape suffixes
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def segment_sum(values_N: Tensor, offsets: Tensor) -> Tensor:
    # unsafe: the offsets were checked; checking again would hold up an accelerator's host.
    return torch.segment_reduce(values_N, "sum", offsets=offsets, axis=0, unsafe=True)


@dataclass
class Block:
    """What a method may look at, for R positions with N records: everything in the accumulation type."""

    t_N: Tensor
    logp_N: Tensor
    p_N: Tensor
    rows_N: Tensor
    offsets: Tensor
    log_rest_R: Tensor
    sum_logp_R: Tensor | None
    logp_label_R: Tensor | None
    is_label_N: Tensor | None
    vocab_size: int
    rest_pp_R: Tensor | None = None  # sum of p² outside K

    def sum(self, values_N: Tensor) -> Tensor:
        """Sums of each position's records, [R]; deterministic on every device."""
        return segment_sum(values_N, self.offsets)

    def residual(self) -> Tensor:
        """Probability that the records leave over, [R], not below 0."""
        return (1 - self.sum(self.t_N)).clamp_(min=0)


@dataclass
class Form:
    """The row form of R positions: loss, a, gradient at the records, and what joins all entries or the label."""

    loss_R: Tensor
    a_R: Tensor
    grad_N: Tensor
    u_R: Tensor | None = None
    label_R: Tensor | None = None
    d: float = 0.0


def _forward_kl(b: Block) -> Form:
    loss_R = b.sum(torch.xlogy(b.t_N, b.t_N) - b.t_N * b.logp_N)
    a_R = b.sum(b.t_N)
    return Form(loss_R, a_R, a_R[b.rows_N] * b.p_N - b.t_N)


def _topk_normalised(b: Block) -> Form:
    b.t_N = b.t_N / b.sum(b.t_N)[b.rows_N]
    loss_R = b.sum(torch.xlogy(b.t_N, b.t_N) - b.t_N * b.logp_N)
    return Form(loss_R, torch.ones_like(loss_R), b.p_N - b.t_N)


def _label_smoothing(b: Block) -> Form:
    assert b.sum_logp_R is not None
    share_R = b.residual() / b.vocab_size
    t_N = b.t_N + share_R[b.rows_N]
    num_rest_R = b.vocab_size - b.offsets.diff()
    entropy_R = b.sum(torch.xlogy(t_N, t_N)) + num_rest_R * torch.xlogy(share_R, share_R)
    loss_R = entropy_R - b.sum(b.t_N * b.logp_N) - share_R * b.sum_logp_R
    a_R = b.sum(b.t_N) + share_R * b.vocab_size
    return Form(loss_R, a_R, a_R[b.rows_N] * b.p_N - t_N, u_R=-share_R)


def _ghost_token(b: Block) -> Form:
    rest_R = b.residual()
    loss_R = b.sum(torch.xlogy(b.t_N, b.t_N) - b.t_N * b.logp_N) + torch.xlogy(rest_R, rest_R) - rest_R * b.log_rest_R
    # Outside K the student's p_j is scaled by 1 - (1 - S) / (1 - P_K); inside, the full teacher's gradient (A.5).
    # The quotient is finite: 0 times infinity is no gradient, where all p_j have underflowed.
    log_least = math.log(torch.finfo(rest_R.dtype).tiny)
    log_quotient_R = rest_R.log().clamp_(min=log_least) - b.log_rest_R
    return Form(loss_R, 1 - log_quotient_R.clamp_(max=-log_least).exp(), b.p_N - b.t_N)


def _naive_fix(b: Block) -> Form:
    assert b.logp_label_R is not None
    assert b.is_label_N is not None
    rest_R = b.residual()
    t_N = b.t_N + b.is_label_N * rest_R[b.rows_N]
    joins_R = 1 - b.sum(b.is_label_N)
    loss_R = b.sum(torch.xlogy(t_N, t_N) - t_N * b.logp_N)
    loss_R = loss_R + joins_R * (torch.xlogy(rest_R, rest_R) - rest_R * b.logp_label_R)
    a_R = b.sum(b.t_N) + rest_R
    return Form(loss_R, a_R, a_R[b.rows_N] * b.p_N - t_N, label_R=-rest_R)


def mix_ce(form: Form, b: Block, ce_weight: float) -> None:
    """Turn the method's form into that of alpha CE(label) + (1 - alpha) of the method's, in place (5.3)."""
    assert b.logp_label_R is not None
    assert b.is_label_N is not None
    alpha, beta = ce_weight, 1 - ce_weight
    form.loss_R = beta * form.loss_R - alpha * b.logp_label_R
    form.a_R = beta * form.a_R + alpha
    form.grad_N = beta * form.grad_N + alpha * (b.p_N - b.is_label_N)
    form.u_R = None if form.u_R is None else beta * form.u_R
    form.d *= beta
    form.label_R = torch.full_like(form.a_R, -alpha) if form.label_R is None else beta * form.label_R - alpha


SPARSE_METHODS: dict[str, Callable[[Block], Form]] = {
    "random_sampling": _forward_kl,
    "topk": _forward_kl,
    "topk_normalised": _topk_normalised,
    "label_smoothing": _label_smoothing,
    "ghost_token": _ghost_token,
    "naive_fix": _naive_fix,
}
METHODS = (*SPARSE_METHODS, "full")
