"""
How good a student is: LM loss, calibration, agreement with its teacher.

Tensors in, numbers out; sums over many batches are kept in float64.  Runs no model and draws no plot.
Source: Anshumann et al. 2025 (arXiv 2503.16870), sections 2.1 and 4; calibration error: Guo et al. 2017.

Shape letters: P positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sklformat.distill.losses.kl import IGNORED_LABEL

# Elements of the float32 block in which probabilities are formed.
BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Reliability:
    """
    Confidence against accuracy in equal-width bins; bin i covers confidences in (i / bins, (i + 1) / bins].

    Attributes:
        confidence: Mean confidence of each bin, NaN where the bin is empty.
        accuracy: Share of correct predictions of each bin, NaN where the bin is empty.
        share: Share of all predictions that fall into each bin; sums to 1.
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    share: tuple[float, ...]

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean over predictions of |accuracy - confidence| of their bin, a fraction."""
        bins = zip(self.confidence, self.accuracy, self.share, strict=True)
        return sum(share * abs(accuracy - confidence) for confidence, accuracy, share in bins if share > 0)


class ReliabilitySums:
    """Accumulates predictions into bins over many batches."""

    def __init__(self, bins: int = 15) -> None:
        if bins < 1:
            raise ValueError(f"bins is {bins}; need at least 1")
        self.bins = bins
        # Rows: number of predictions, sum of confidences, number correct.
        self._sums = torch.zeros(3, bins, dtype=torch.float64)

    def update(self, confidences: Tensor, correct: Tensor) -> None:
        """
        Add predictions.

        Args:
            confidences: Probability that the model gave to its prediction, any shape, in [0, 1].
            correct: Whether the prediction was right, same shape, bool or 0 / 1.

        Raises:
            ValueError: Shapes differ, or a confidence is outside [0, 1].
        """
        if confidences.shape != correct.shape:
            raise ValueError(f"confidences has shape {list(confidences.shape)}, correct {list(correct.shape)}")
        confidence = confidences.detach().double().cpu().flatten()
        # Rounding may carry a float32 softmax a hair above 1.
        if not bool(((confidence >= 0) & (confidence <= 1 + 1e-5)).all()):
            raise ValueError("confidences holds a value outside [0, 1]")
        index = ((confidence * self.bins).ceil().long() - 1).clamp(0, self.bins - 1)
        right = correct.detach().double().cpu().flatten()
        self._sums.index_add_(1, index, torch.stack([torch.ones_like(confidence), confidence, right]))

    def table(self) -> Reliability:
        """The bins so far; ValueError before the first prediction."""
        number, confidence, right = self._sums
        if float(number.sum()) == 0:
            raise ValueError("no predictions: a reliability table needs at least one")
        means = (confidence / number).tolist(), (right / number).tolist(), (number / number.sum()).tolist()
        return Reliability(*(tuple(column) for column in means))


class EvaluationSums:
    """
    All metrics of a student over many batches; those that need the teacher exist once a batch brought its logits.

    Positions with label -100 are left out of every metric.
    """

    def __init__(self, bins: int = 15) -> None:
        self.num_positions = 0
        self._num_with_teacher = 0
        self._loss_nats = 0.0
        self._correct = 0.0
        self._overlap = 0.0
        self._agreed = 0.0
        self._reliability = ReliabilitySums(bins)

    def update(self, logits_PV: Tensor, labels_P: Tensor, teacher_logits_PV: Tensor | None = None) -> None:
        """
        Add one batch.

        Args:
            logits_PV: Student's raw logits, [P, V], any float type.
            labels_P: Tokens that follow, [P] integer in [0, V), or -100 for none.
            teacher_logits_PV: Teacher's raw logits at the same positions, [P, V].

        Raises:
            ValueError: Shapes disagree.
        """
        _check_logits(logits_PV, labels_P.shape, "labels_P")
        if teacher_logits_PV is not None and teacher_logits_PV.shape != logits_PV.shape:
            raise ValueError(
                f"teacher_logits_PV has shape {list(teacher_logits_PV.shape)}, logits_PV {list(logits_PV.shape)}"
            )
        step = _block_rows(logits_PV)
        for start in range(0, len(labels_P), step):
            span = slice(start, start + step)
            keep = labels_P[span] != IGNORED_LABEL
            teacher_RV = None if teacher_logits_PV is None else teacher_logits_PV[span][keep]
            self._update_block(logits_PV[span][keep], labels_P[span][keep], teacher_RV)

    def _update_block(self, logits_RV: Tensor, labels_R: Tensor, teacher_RV: Tensor | None) -> None:
        logp_RV = torch.log_softmax(logits_RV.detach(), 1, dtype=_float(logits_RV))
        best_logp_R, best_R = logp_RV.max(1)
        right_R = best_R == labels_R
        self.num_positions += len(labels_R)
        self._loss_nats -= float(logp_RV.gather(1, labels_R.long().unsqueeze(1)).double().sum())
        self._correct += float(right_R.sum())
        self._reliability.update(best_logp_R.exp(), right_R)
        if teacher_RV is not None:
            self._num_with_teacher += len(labels_R)
            teacher_p_RV = torch.softmax(teacher_RV.detach(), 1, dtype=_float(teacher_RV))
            self._overlap += float(torch.minimum(logp_RV.exp(), teacher_p_RV).sum(1).double().sum())
            self._agreed += float((best_R == teacher_p_RV.argmax(1)).sum())

    @property
    def lm_loss(self) -> float:
        """Mean negative log-likelihood of the labels, nats per token."""
        return self._loss_nats / _counted(self.num_positions, "a label")

    @property
    def accuracy(self) -> float:
        """Share of positions whose most likely token is the label."""
        return self._correct / _counted(self.num_positions, "a label")

    @property
    def reliability(self) -> Reliability:
        """Confidence of the most likely token against its accuracy."""
        return self._reliability.table()

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the most likely token, a fraction."""
        return self.reliability.calibration_error

    @property
    def acceptance_rate(self) -> float:
        """Mean over positions of the overlap sum_v min(student, teacher): share of proposals the teacher accepts."""
        return self._overlap / _counted(self._num_with_teacher, "the teacher's logits")

    @property
    def top1_agreement(self) -> float:
        """Share of positions where student and teacher have the same most likely token."""
        return self._agreed / _counted(self._num_with_teacher, "the teacher's logits")


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


def _check_logits(logits_PV: Tensor, shape_P: torch.Size, name: str) -> None:
    if logits_PV.dim() != 2 or logits_PV.shape[:1] != shape_P:
        raise ValueError(f"logits have shape {list(logits_PV.shape)}, {name} {list(shape_P)}; need [P, V] and [P]")


def _block_rows(logits_PV: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS // max(1, logits_PV.shape[1]))


def _float(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _counted(number: int, what: str) -> int:
    if number == 0:
        raise ValueError(f"no position with {what} was seen: there is nothing to average")
    return number
