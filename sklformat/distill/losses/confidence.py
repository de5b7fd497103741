"""
Higher rates for hard tokens: position weights by how sure the teacher is of the label, with a mean of 1.

Knows tensors only.  Source: Anshumann et al. 2025 (arXiv 2503.16870), section 5.3.

Shape letters: P positions, M positions of the whole step that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sklformat.distill.losses.arguments import IGNORED_LABEL
from sklformat.distill.losses.targets import RaggedTargets


def check_rates(lr_ratio: float, easy_percentile: float) -> None:
    """
    Look at ratio and percentile.

    Raises:
        ValueError: The ratio is no number above 0, or the percentile none between 0 and 100.
    """
    if not 0 < lr_ratio < math.inf:
        raise ValueError(f"lr_ratio is {lr_ratio}; need a finite number above 0, 1 for one rate of all tokens")
    if not 0 < easy_percentile < 100:
        raise ValueError(f"easy_percentile is {easy_percentile}; need a number between 0 and 100, both excluded")


def label_confidence(targets: RaggedTargets, labels_P: Tensor) -> Tensor:
    """
    What the records say of the teacher's confidence in each label.

    Of records that were drawn without bias its mean over draws is the teacher's, one by one it is noisy: 0 wherever the
    label was not drawn.  The column ``label_logprob`` of a cache has the logarithm of the teacher's own.

    Args:
        targets: Records of P positions, on one device, their offsets too.
        labels_P: [P] integer, -100 for none.

    Returns:
        [P] float32 in [0, 1] or so; 0 where there is no label.
    """
    counts_P = targets.offsets.diff()
    rows_N = torch.repeat_interleave(counts_P, output_size=len(targets.token_ids))
    said_N = torch.where(targets.token_ids.long() == labels_P[rows_N], targets.probs.float(), 0)
    return torch.zeros(len(counts_P), device=said_N.device).index_add_(0, rows_N, said_N)


def easy_hard_weights(
    confidence_P: Tensor,
    labels_P: Tensor,
    *,
    lr_ratio: float,
    easy_percentile: float = 50.0,
    of_step_M: Tensor | None = None,
) -> Tensor:
    """
    Weights that let hard tokens learn at ``lr_ratio`` times the rate of easy ones; their mean over a step is 1.

    With n positions, a token is hard if its confidence is at most the ceil(n · easy_percentile / 100)-th smallest, so
    that of equal ones there none is easy.  With h hard ones the weights are

        easy: n / (lr_ratio h + n - h)      hard: lr_ratio times that.

    Give them to ``sparse_kl`` as ``position_weights_P``.

    What stays unbiased under sampled targets t: where the confidence is the teacher's own (``label_logprob``, or a
    teacher that runs alongside), the weights are constants of the gradient w (p - t), and E[w (p - t)] = w (p - q).
    Where it is ``label_confidence`` of the same t, E[w t] is not E[w] q: a label that was drawn counts as easy, and
    with a ratio above 1 its draw counts for less, so that the student learns to trust labels too little.

    Args:
        confidence_P: The teacher's confidence in each label, [P], or anything that rises with it, as its logarithm.
        labels_P: [P], -100 where a position does not count.
        lr_ratio: > 0; 1: all weights are 1.
        easy_percentile: In (0, 100), above which tokens are easy; the paper does not say which it took.
        of_step_M: The confidences of all positions that count, over the micro-batches and processes of a step, where
            these are a part of it: each part then has the weights that it has in one large batch.  None: those here.

    Returns:
        [P] float32; 0 where a position does not count.

    Raises:
        ValueError: Ratio or percentile is out of range, or shapes disagree.

    Source: Anshumann et al. 2025, section 5.3.
    """
    check_rates(lr_ratio, easy_percentile)
    if confidence_P.shape != labels_P.shape:
        raise ValueError(f"confidence_P has shape {list(confidence_P.shape)}, labels_P {list(labels_P.shape)}")
    counted_P = labels_P != IGNORED_LABEL
    if of_step_M is None:
        of_step_M = confidence_P[counted_P]
    number = len(of_step_M)
    if number == 0 or lr_ratio == 1:
        return counted_P.float()
    border = of_step_M.kthvalue(math.ceil(number * easy_percentile / 100)).values
    num_hard = (of_step_M <= border).sum()
    easy = number / (lr_ratio * num_hard + (number - num_hard))
    return torch.where(confidence_P <= border, easy * lr_ratio, easy).float() * counted_P


def weights_of_step(
    confidences: Sequence[Tensor],
    labels: Sequence[Tensor],
    together: Callable[[Tensor], Tensor],
    *,
    lr_ratio: float,
    easy_percentile: float,
) -> list[Tensor]:
    """
    ``easy_hard_weights`` of each of a step's micro-batches, as they are in one large batch of all processes.

    Args:
        confidences: Of each micro-batch, [P] with a P of its own.
        labels: Likewise.
        together: What makes of [M] of each process those of all of them, one after the other.
        lr_ratio: As there.
        easy_percentile: As there.
    """
    parts = list(zip(confidences, labels, strict=True))
    own = [confidence_P[labels_P != IGNORED_LABEL] for confidence_P, labels_P in parts]
    step_M = together(torch.cat(own) if own else torch.zeros(0))
    return [
        easy_hard_weights(confidence_P, labels_P, lr_ratio=lr_ratio, easy_percentile=easy_percentile, of_step_M=step_M)
        for confidence_P, labels_P in parts
    ]
