"""
Distillation losses of the student, with the gradient computed in the forward pass.

Knows tensors only: no files, no models, no training loop.
Source: Anshumann et al. 2025 (arXiv 2503.16870), sections 2, 3 and 5.3, appendix A.

Shape letters: P positions (sequences times positions each), V vocabulary, D hidden size, C positions of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sklformat.distill.kernels import run_on
from sklformat.distill.losses.arguments import IGNORED_LABEL, matmul_dtype
from sklformat.distill.losses.divergences import DIVERGENCES
from sklformat.distill.losses.heads import OutputHead, Shard, joined, refuse_sharded
from sklformat.distill.losses.methods import METHODS
from sklformat.distill.losses.operators import Parts, linear_sparse_kl_operator, named, parts_of, sparse_kl_operator
from sklformat.distill.losses.rows import knows_kernel
from sklformat.distill.losses.targets import AnyTargets, DenseTargets, DenseTeacher, PaddedTargets, RaggedTargets

__all__ = [
    "DIVERGENCES",
    "IGNORED_LABEL",
    "METHODS",
    "AnyTargets",
    "DenseTargets",
    "DenseTeacher",
    "OutputHead",
    "PaddedTargets",
    "RaggedTargets",
    "Shard",
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
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    labels_P: Tensor | None = None,
    ce_weight: float = 0.0,
    position_weights_P: Tensor | None = None,
    normaliser: Tensor | float | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """
    KL(target || student), or another divergence, in nats, the mean over the positions that count.

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

    Divergences of the method's target q from p, summed over all V ids (6.3); q is 0 where a method names no target:

    * "forward_kl": q log(q / p), as above.
    * "reverse_kl": p log(p / q).  Where q is 0 it is infinite, so that all ids outside K are one bucket there, as the
      ghost token: P_rest log(P_rest / max(1 - S, 1e-6)) for "ghost_token", with 1e-6 alone where q is 0 outside K, as
      for sampled targets; "naive_fix" and "label_smoothing" likewise count a rest 1 - S as at least 1e-6.  Of dense
      targets a q below the least normal number of the type of the computation (1.2e-38 in float32) counts as that.
    * "forward_reverse_kl": the mean of both.
    * "jsd": [q log(q / m) + p log(p / m)] / 2 with m = (q + p) / 2; an id with q = 0 adds p log(2) / 2.  Of
      "ghost_token" over K and the bucket.
    * "mse": (q - p)², the sum and not the mean over ids; of "ghost_token" over K and the bucket.
    * "l1": |q - p|; "total_variation": half of that.  At p = q, where it has no derivative, the entry's is 0.

    "topk" names no distribution where S < 1, and has no reverse KL or JSD.
    Under sampled targets t with mean q, the gradient is the one to q in expectation where it is linear in t:

        forward_kl: d/dx_j = S p_j - t_j         mse: d/dx_j = 2 p_j [(p_j - t_j) - sum_i p_i (p_i - t_i)]

    so of these two for "random_sampling", and for "label_smoothing" and "naive_fix" as above.  It is biased for all
    others: a logarithm or sign of t is not linear, and K is random.  "full" samples nothing.
    CE mixing and position weights keep what the method keeps, as long as the weights do not depend on the same draws.

    At a temperature T both distributions are those of logits over T, and the divergence is taken T² times, so that its
    gradient stays as large (Hinton et al. 2015): alpha CE(x) + (1 - alpha) T² D(q_T || softmax(x / T)); cross-entropy
    stays at temperature 1.  The target q_T is a teacher's at T for "full" (of DenseTargets q^(1/T) over its sum), and
    on K alone for "topk_normalised", t^(1/T) over its sum.  Other records stay as they are, since what was drawn at
    another temperature cannot be undone: they must be a teacher's at T (proposal_temperature is none of it).

    A position counts if it has records (dense: always) and, where labels are used (ce_weight > 0 or "naive_fix"), a
    label.  All others give neither value nor gradient, with CE mixing too; where none counts, both are exactly 0.

    Args:
        logits_PV: Student's raw logits, [P, V], float16, bfloat16, float32 or float64; left as they are.
            Computed in float32, float64 for float64.
        targets: See RaggedTargets, or the pair PaddedTargets; DenseTargets or DenseTeacher for "full".  On the device
            of the logits.
        method: One of METHODS.
        divergence: One of DIVERGENCES.
        temperature: T > 0, as above.
        labels_P: Token that follows each position, [P] integer in [0, V) or -100 for none; read only where used.
        ce_weight: Weight alpha in [0, 1] of cross-entropy to the label: alpha CE + (1 - alpha) divergence (5.3).
        position_weights_P: Weight w of each position, [P], >= 0; the result is then sum(w L) / sum(w) over the
            positions that count.  None: 1 everywhere.
        normaliser: What to divide sum(w L) by instead of sum(w), one number: the positions that count in all
            micro-batches and processes of a step, whose losses then add up to that of the whole step.  None: sum(w).
        shard: Which ids the columns are of, where processes have a part of each row; None: all.  Each process has the
            value then, and the gradient of its part.  Dense targets are of the same ids as the logits then.

    Returns:
        Scalar, float32 (float64 for float64), nats per position.  The gradient is computed here, together with the
        value, and held in the type of the logits; there is no second derivative (RuntimeError if asked).

    Raises:
        ValueError: Shapes, types or devices disagree, method or divergence is unknown or the two do not go together,
            the temperature is not above 0, labels are missing, logits are a DTensor, or (checked on the CPU alone,
            since reading them would stall an accelerator) ids or labels are outside the vocabulary, ids repeat within a
            position, probabilities, weights or the normaliser are negative or not finite, probabilities sum to what
            the method cannot take, or the normaliser is 0 where positions count.

    Source: Anshumann et al. 2025, sections 2, 3, 5.3, 6.3, A.1 to A.6.
    """
    if logits_PV.dim() != 2:
        raise ValueError(f"logits_PV has shape {list(logits_PV.shape)}; need [positions, V]: flatten the sequences")
    refuse_sharded("what the loss is taken of", logits_PV)
    if shard is not None:
        shard.check(logits_PV.shape[1])
    parts = parts_of(_prepared(targets, shard))
    _check_devices(logits_PV.device, parts, labels_P, position_weights_P)
    loss: Tensor
    loss, _, _ = sparse_kl_operator(
        logits_PV,
        *parts,
        method,
        divergence,
        float(temperature),
        labels_P,
        ce_weight,
        position_weights_P,
        None if normaliser is None else torch.as_tensor(normaliser),
        named(shard),
        torch.is_grad_enabled() and logits_PV.requires_grad,
    )
    return loss


def linear_sparse_kl(
    hidden_PD: Tensor,
    head: Tensor | OutputHead,
    targets: AnyTargets,
    /,
    *,
    method: str = "random_sampling",
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    labels_P: Tensor | None = None,
    ce_weight: float = 0.0,
    position_weights_P: Tensor | None = None,
    normaliser: Tensor | float | None = None,
    chunk_positions: int | None = None,
    accumulate: Literal["float32", "weight"] = "float32",
) -> Tensor:
    """
    ``sparse_kl`` of the logits that a head makes of hidden states, in chunks of positions; they never exist whole.

    Three matrix products per chunk: logits, gradient of the hidden states, gradient of the weight.  Beyond the results
    it holds one chunk's logits and, until the backward pass ends, the weight's gradient in float32; of a frozen weight
    under an adapter the adapter's alone.
    Under autocast the products take autocast's type; bias, scale and cap are applied in float32.
    On a GPU the Triton kernels know forward KL, at any temperature without cross-entropy; other losses run there by
    torch operations, in the chunks that they have elsewhere.

    Args:
        hidden_PD: Student's last hidden states, [P, D], float16, bfloat16, float32 or float64.  At positions that do
            not count they must be finite too: the weight's gradient has them times 0, as it has under torch's own
            ``cross_entropy``, and 0 times NaN is NaN.
        head: Weight of the output layer, [V, D], or an OutputHead, as ``output_head(model)`` gives it.  The weight is
            of the type of the hidden states unless autocast is on, and may be tied to the embedding.
        targets: As in ``sparse_kl``.
        method: As in ``sparse_kl``.
        divergence: As in ``sparse_kl``.
        temperature: As in ``sparse_kl``.
        labels_P: As in ``sparse_kl``.
        ce_weight: As in ``sparse_kl``.
        position_weights_P: As in ``sparse_kl``.
        normaliser: As in ``sparse_kl``.
        chunk_positions: Positions per chunk, >= 1.  None: equal chunks of at most 2048 positions and about 1 GiB of
            logits, not below 256 positions; with Triton on a GPU of a quarter of the positions, at least 2048, at most
            8192 and about 2 GiB.
        accumulate: In what the weight's gradient is summed over chunks.  "float32": float64 for float64.  "weight": in
            the weight's own type, in the very tensor that becomes its gradient: of bfloat16 a third of the memory, of
            float32 half; what is small beside the sum so far is lost in bfloat16, and the backward pass runs only once.

    Returns:
        Scalar as ``sparse_kl`` returns.  The gradients of weight and bias are summed over chunks in float32 (float64
        for float64), unless ``accumulate`` says otherwise; for half precision on a CPU each chunk's product is rounded
        to that precision first.

    Raises:
        ValueError: As ``sparse_kl``, or hidden states and head do not fit each other, or a part is a DTensor.

    Source: As ``sparse_kl``; the paper's section D.2 asks for a manual forward and backward pass.
    """
    head = head if isinstance(head, OutputHead) else OutputHead(head)
    if head.weight.device != hidden_PD.device:
        raise ValueError(f"the head's weight is on {head.weight.device}, hidden_PD on {hidden_PD.device}")
    compute = matmul_dtype("hidden_PD", hidden_PD, head.weight)
    num_positions, vocab_size = hidden_PD.shape[0], head.weight.shape[0]
    if chunk_positions is None:
        in_kernel = run_on(hidden_PD.device) and knows_kernel(divergence, temperature, ce_weight)
        chunk_positions = _chunk_of(num_positions, vocab_size * compute.itemsize, in_kernel=in_kernel)
    elif chunk_positions < 1:
        raise ValueError(f"chunk_positions is {chunk_positions}; need at least 1")
    chunk_positions = max(1, min(chunk_positions, num_positions))
    if accumulate not in ("float32", "weight"):
        raise ValueError(f"accumulate is {accumulate!r}; one of 'float32', 'weight'")
    if accumulate == "weight" and head.weight.dtype == torch.float16:
        raise ValueError("accumulate='weight' of a float16 weight: sums over positions pass 65504; use 'float32'")
    hidden_PD, up_VK = head.widened(hidden_PD)
    enabled = torch.is_grad_enabled()
    inputs = (hidden_PD, head.weight, up_VK, head.bias)
    parts = parts_of(_prepared(targets, head.shard))
    _check_devices(hidden_PD.device, parts, labels_P, position_weights_P)
    loss: Tensor
    loss, *_ = linear_sparse_kl_operator(
        *inputs,
        head.scale,
        head.softcap,
        *parts,
        method,
        divergence,
        float(temperature),
        labels_P,
        ce_weight,
        position_weights_P,
        None if normaliser is None else torch.as_tensor(normaliser),
        named(head.shard),
        chunk_positions,
        compute,
        accumulate,
        [enabled and tensor is not None and tensor.requires_grad for tensor in inputs],
    )
    return loss


def _prepared(targets: AnyTargets, shard: Shard | None) -> AnyTargets:
    """A teacher in the type of its products, which autocast decides here, its head one weight with what bends it."""
    if not isinstance(targets, DenseTeacher):
        return targets
    head = targets.head if isinstance(targets.head, OutputHead) else OutputHead(targets.head)
    if head.shard not in (None, shard):
        raise ValueError(f"the teacher's head is {head.shard}, the student's {shard}; divide both in the same way")
    with torch.no_grad():
        hidden_PD = targets.hidden_PD.detach()
        compute = matmul_dtype("the teacher's hidden_PD", hidden_PD, head.weight)
        hidden_PD, up_VK = head.widened(hidden_PD)
        weight = joined(head.weight, up_VK).detach().to(compute)
    return DenseTeacher(hidden_PD.to(compute), replace(head, weight=weight, low_rank=()))


def _check_devices(
    device: torch.device, parts: Parts, labels_P: Tensor | None, position_weights_P: Tensor | None
) -> None:
    """All of it must be where the student is, but for offsets, which may stay on the CPU."""
    kind, first, second, third, *_ = parts
    names = {"probabilities": ("probs_PV", "", ""), "teacher": ("the teacher's hidden_PD", "its head", "its bias")}
    named = dict(zip(names.get(kind, ("token_ids", "probs", "")), (first, second, third), strict=True))
    named |= {"labels_P": labels_P, "position_weights_P": position_weights_P}
    for name, tensor in named.items():
        if name and tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the student on {device}; move it there first")
