"""
How good a student is: LM loss, calibration, agreement with its teacher.

Tensors in, numbers out; sums over many batches are in ``sums``.  Runs no model and draws no plot.
Source: Anshumann et al. 2025 (arXiv 2503.16870), sections 2.1 and 4; calibration error: Guo et al. 2017.

Shape letters: P positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sklformat.distill.losses.sums import EvaluationSums, Reliability, ReliabilitySums

__all__ = [
    "EvaluationSums",
    "Reliability",
    "ReliabilitySums",
    "acceptance_rate",
    "calibration_error",
    "lm_loss",
    "percent_ce_to_full",
    "reliability",
    "top1_agreement",
]


def lm_loss(logits_PV: Tensor, labels_P: Tensor) -> float:
    """
    Mean negative log-likelihood of the labels, nats per token; label -100 is left out.

    Args:
        logits_PV: Raw logits, [P, V], any float type.
        labels_P: [P] integer in [0, V), or -100.

    Raises:
        ValueError: Shapes disagree, or no label counts.
    """
    evaluation = EvaluationSums()
    evaluation.update(logits_PV, labels_P)
    return evaluation.lm_loss


def calibration_error(confidences: Tensor, correct: Tensor, bins: int = 15) -> float:
    """
    Expected calibration error with equal-width bins, a fraction in [0, 1].

    Args:
        confidences: Probability that the model gave to its prediction, any shape, in [0, 1].
        correct: Whether the prediction was right, same shape, bool or 0 / 1.
        bins: Number of bins, >= 1.

    Raises:
        ValueError: Shapes differ, a confidence is outside [0, 1], there is no prediction, or bins < 1.

    Source: Guo et al. 2017, Eq. 3; Anshumann et al. 2025, section 2.1.
    """
    return reliability(confidences, correct, bins).calibration_error


def reliability(confidences: Tensor, correct: Tensor, bins: int = 15) -> Reliability:
    """The table behind ``calibration_error``, for plots; arguments and errors as there."""
    sums = ReliabilitySums(bins)
    sums.update(confidences, correct)
    return sums.table()


def acceptance_rate(student_logits_PV: Tensor, teacher_logits_PV: Tensor) -> float:
    """
    Mean over positions of sum_v min(p_v, q_v), in [0, 1].

    It is the share of the student's proposals that speculative decoding with this teacher accepts.

    Args:
        student_logits_PV: Raw logits, [P, V], any float type.
        teacher_logits_PV: The teacher's at the same positions, [P, V].

    Raises:
        ValueError: Shapes disagree, or there is no position.

    Source: Leviathan et al. 2023, the acceptance rate alpha; Anshumann et al. 2025, section 4.
    """
    return _against_teacher(student_logits_PV, teacher_logits_PV).acceptance_rate


def top1_agreement(student_logits_PV: Tensor, teacher_logits_PV: Tensor) -> float:
    """Share of positions where both have the same most likely token; arguments and errors as ``acceptance_rate``."""
    return _against_teacher(student_logits_PV, teacher_logits_PV).top1_agreement


def percent_ce_to_full(ce_loss: float, full_loss: float, loss: float) -> float:
    """
    Share of the gap between CE and FullKD that a method closes, percent: 0 is CE, 100 is FullKD, any value may occur.

    Args:
        ce_loss: LM loss of the student trained with cross-entropy alone, nats.
        full_loss: LM loss of the student trained on the whole teacher distribution, nats.
        loss: LM loss of the method, nats.

    Raises:
        ValueError: CE and FullKD have the same loss: there is no gap.

    Source: Anshumann et al. 2025, Table 1.
    """
    if ce_loss == full_loss:
        raise ValueError(f"CE and FullKD have the same loss, {ce_loss}: there is no gap to close")
    return (ce_loss - loss) / (ce_loss - full_loss) * 100


def _against_teacher(student_logits_PV: Tensor, teacher_logits_PV: Tensor) -> EvaluationSums:
    evaluation = EvaluationSums()
    # Any label will do: what depends on it is not read.
    labels_P = torch.zeros(student_logits_PV.shape[:1], dtype=torch.int64, device=student_logits_PV.device)
    evaluation.update(student_logits_PV, labels_P, teacher_logits_PV)
    return evaluation
