"""
Sums over many batches that the figures of a student are made of: LM loss, calibration, records, teacher.

Kept in one float64 tensor, so that processes add theirs up; runs no model.
Shape letters: P positions, V vocabulary, R positions of a block that count, N records of these.
"""

# ruff: noqa: N815 - shape suffixes

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sklformat.distill.losses.kl import IGNORED_LABEL
from sklformat.distill.losses.targets import RaggedTargets

# Elements of the float32 block in which probabilities are formed.
BLOCK_ELEMENTS_CPU = 1 << 22
BLOCK_ELEMENTS_DEVICE = 1 << 26
_FIGURES = (
    "positions", "loss", "correct",
    "with_teacher", "overlap", "agreed", "kl",
    "with_teacher_loss", "teacher_loss",
    "with_records", "cross_entropy", "kl_to_records",
    "with_entropy", "entropy",
)  # fmt: skip


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
    """
    Accumulates predictions into bins over many batches.

    Attributes:
        tensor: The sums, float64 on the CPU; those of several processes add up.
    """

    def __init__(self, bins: int = 15) -> None:
        if bins < 1:
            raise ValueError(f"bins is {bins}; need at least 1")
        self.bins = bins
        # Rows: number of predictions, sum of confidences, number correct.
        self.tensor = torch.zeros(3, bins, dtype=torch.float64)

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
        self.tensor.index_add_(1, index, torch.stack([torch.ones_like(confidence), confidence, right]))

    def table(self) -> Reliability:
        """The bins so far; ValueError before the first prediction."""
        number, confidence, right = self.tensor
        if float(number.sum()) == 0:
            raise ValueError("no predictions: a reliability table needs at least one")
        means = (confidence / number).tolist(), (right / number).tolist(), (number / number.sum()).tolist()
        return Reliability(*(tuple(column) for column in means))


class EvaluationSums:
    """
    All figures of a student over many batches; those that need a teacher, or its records, exist once all batches
    brought them.

    A position counts if it has a label and, where a batch brings records, records; all others are in no figure.

    Args:
        bins: Confidence bins of the calibration error, of equal width.

    Attributes:
        tensor: The sums, float64 on the CPU.  ``sums.tensor += other.tensor`` adds those of other batches with as many
            bins, ``torch.distributed.all_reduce(sums.tensor)`` those of other processes.
    """

    def __init__(self, bins: int = 15) -> None:
        reliability = ReliabilitySums(bins)
        self.tensor = torch.cat([torch.zeros(len(_FIGURES), dtype=torch.float64), reliability.tensor.flatten()])
        reliability.tensor = self.tensor[len(_FIGURES) :].view(3, bins)
        self._reliability = reliability

    def update(
        self,
        logits_PV: Tensor,
        labels_P: Tensor,
        teacher_logits_PV: Tensor | None = None,
        *,
        targets: RaggedTargets | None = None,
        entropy_P: Tensor | None = None,
        label_logprob_P: Tensor | None = None,
    ) -> None:
        """
        Add one batch.

        Args:
            logits_PV: Student's raw logits, [P, V], any float type.
            labels_P: Tokens that follow, [P] integer in [0, V), or -100 for none.
            teacher_logits_PV: Teacher's raw logits at the same positions, [P, V].
            targets: Records of the P positions.
            entropy_P: Entropy of the teacher's distributions, [P], nats.
            label_logprob_P: Log-probability that the teacher gave to each label, [P], <= 0; read where no teacher's
                logits are given.

        Raises:
            ValueError: Shapes disagree, or a label's or record's id is outside [0, V).
        """
        _check_logits(logits_PV, labels_P.shape, "labels_P")
        if teacher_logits_PV is not None and teacher_logits_PV.shape != logits_PV.shape:
            raise ValueError(
                f"teacher_logits_PV has shape {list(teacher_logits_PV.shape)}, logits_PV {list(logits_PV.shape)}"
            )
        for name, column in (("entropy_P", entropy_P), ("label_logprob_P", label_logprob_P)):
            if column is not None:
                _check_logits(logits_PV, column.shape, name)
        device = logits_PV.device
        counted_P = labels_P != IGNORED_LABEL
        _check_ids("labels", labels_P[counted_P], logits_PV.shape[1])
        records = None
        if targets is not None:
            records = _Records.of(targets, counted_P, logits_PV.shape[1])
            counted_P = counted_P & (targets.offsets.diff() > 0).to(device)
        places = counted_P.nonzero()[:, 0]
        step = _block_rows(logits_PV)
        for start in range(0, len(places), step):
            at_R = places[start : start + step]
            logp_RV = torch.log_softmax(_rows(logits_PV, at_R).detach(), 1, dtype=_float(logits_PV))
            labels_R = labels_P[at_R].long()
            best_logp_R, best_R = logp_RV.max(1)
            right_R = best_R == labels_R
            self._reliability.update(best_logp_R.exp(), right_R)
            loss_R = -logp_RV.gather(1, labels_R.unsqueeze(1))[:, 0]
            found = {"positions": _count(labels_R), "loss": loss_R, "correct": right_R}
            if teacher_logits_PV is not None:
                teacher_RV = torch.log_softmax(_rows(teacher_logits_PV, at_R).detach(), 1, dtype=_float(logits_PV))
                found |= _of_teacher(logp_RV, best_R, teacher_RV, labels_R)
            elif label_logprob_P is not None:
                found |= {"with_teacher_loss": _count(labels_R), "teacher_loss": -label_logprob_P[at_R]}
            if records is not None:
                found |= {"with_records": _count(labels_R)} | records.figures(logp_RV, start)
            if entropy_P is not None:
                found |= {"with_entropy": _count(labels_R), "entropy": entropy_P[at_R]}
            sums = [values.double().sum() for values in found.values()]
            indices = torch.tensor([_FIGURES.index(name) for name in found])
            self.tensor.index_add_(0, indices, torch.stack(sums).cpu())

    def _mean(self, name: str, count: str, what: str) -> float:
        number = float(self.tensor[_FIGURES.index(count)])
        if number == 0:
            raise ValueError(f"no position with {what} was seen: there is nothing to average")
        if number != self.num_positions:
            raise ValueError(f"{number:.0f} of {self.num_positions} positions came with {what}; give it to all")
        return float(self.tensor[_FIGURES.index(name)]) / number

    def has(self, name: Literal["teacher", "teacher_loss", "records", "entropy"]) -> bool:
        """Whether every position came with it: the teacher's logits, its log-prob of the label, records, entropy."""
        return 0 < self.num_positions == int(self.tensor[_FIGURES.index(f"with_{name}")])

    @property
    def num_positions(self) -> int:
        """Positions that count."""
        return int(self.tensor[_FIGURES.index("positions")])

    @property
    def lm_loss(self) -> float:
        """Mean negative log-likelihood of the labels, nats per token."""
        return self._mean("loss", "positions", "a label")

    @property
    def accuracy(self) -> float:
        """Share of positions whose most likely token is the label."""
        return self._mean("correct", "positions", "a label")

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
        return self._mean("overlap", "with_teacher", "the teacher's logits")

    @property
    def top1_agreement(self) -> float:
        """Share of positions where student and teacher have the same most likely token."""
        return self._mean("agreed", "with_teacher", "the teacher's logits")

    @property
    def kl(self) -> float:
        """KL(teacher || student) over the whole vocabulary, nats per position."""
        return self._mean("kl", "with_teacher", "the teacher's logits")

    @property
    def teacher_loss(self) -> float:
        """Mean negative log-likelihood of the labels under the teacher, nats per token."""
        return self._mean("teacher_loss", "with_teacher_loss", "the teacher's logits or label_logprob")

    @property
    def cross_entropy(self) -> float:
        """Mean over positions of -sum t log(student) over the records, t as stored, nats per position."""
        return self._mean("cross_entropy", "with_records", "records")

    @property
    def kl_to_records(self) -> float:
        """The same less the records' own entropy: sum t log(t / student), nats per position."""
        return self._mean("kl_to_records", "with_records", "records")

    @property
    def entropy(self) -> float:
        """Mean entropy of the teacher's whole distributions, nats per position."""
        return self._mean("entropy", "with_entropy", "entropy")


@dataclass(frozen=True)
class _Records:
    """Records of the positions that count: probabilities t, ids, and the number of each one's position among these."""

    t_N: Tensor
    ids_N: Tensor
    rows_N: Tensor

    @classmethod
    def of(cls, targets: RaggedTargets, labelled_P: Tensor, vocab_size: int) -> _Records:
        device = labelled_P.device
        counts_P = targets.offsets.diff().to(device)
        first, num_records = int(targets.offsets[0]), int(targets.offsets[-1])
        if counts_P.shape != labelled_P.shape or (first, num_records) != (0, len(targets.token_ids)):
            raise ValueError(
                f"targets are {len(counts_P)} positions with records {first} to {num_records}, of which "
                f"{len(targets.token_ids)} are there; labels_P has {len(labelled_P)} positions"
            )
        kept_N = labelled_P.repeat_interleave(counts_P)
        rows_P = (labelled_P & (counts_P > 0)).cumsum(0) - 1
        ids_N = targets.token_ids.to(device)[kept_N].long()
        _check_ids("token_ids", ids_N, vocab_size)
        return cls(targets.probs.to(device)[kept_N].detach(), ids_N, rows_P.repeat_interleave(counts_P)[kept_N])

    def figures(self, logp_RV: Tensor, start: int) -> dict[str, Tensor]:
        """Of the positions from ``start`` on that the rows are."""
        first, last = torch.searchsorted(self.rows_N, torch.tensor([start, start + len(logp_RV)]).to(self.rows_N))
        t_N = self.t_N[first:last].to(logp_RV.dtype)
        # An id that a model masks has probability 0: under a target of 0 it gives 0, under any other infinity.
        logp_N = logp_RV[self.rows_N[first:last] - start, self.ids_N[first:last]]
        cross_N = torch.where(t_N > 0, -t_N * logp_N, 0)
        return {"cross_entropy": cross_N, "kl_to_records": cross_N + torch.xlogy(t_N, t_N)}


def _of_teacher(logp_RV: Tensor, best_R: Tensor, teacher_RV: Tensor, labels_R: Tensor) -> dict[str, Tensor]:
    """Of log-probabilities of student and teacher, and of what the student prefers."""
    q_RV = teacher_RV.exp()
    number_R = _count(labels_R)
    kl_R = torch.linalg.vecdot(q_RV, teacher_RV - logp_RV)
    if not bool(
        kl_R.isfinite().all()
    ):  # ids that a model masks: of the teacher's they give 0, of the student's alone inf
        kl_R = torch.where(q_RV > 0, q_RV * (teacher_RV - logp_RV), 0).sum(1)
    return {
        "with_teacher": number_R,
        "overlap": torch.minimum(logp_RV.exp(), q_RV).sum(1),
        "agreed": best_R == teacher_RV.argmax(1),
        "kl": kl_R,
        "with_teacher_loss": number_R,
        "teacher_loss": -teacher_RV.gather(1, labels_R.unsqueeze(1))[:, 0],
    }


def _rows(logits_PV: Tensor, at_R: Tensor) -> Tensor:
    """Some rows in rising order; those that follow each other are not copied."""
    first, last = int(at_R[0]), int(at_R[-1])
    return logits_PV[first : last + 1] if last - first + 1 == len(at_R) else logits_PV.index_select(0, at_R)


def _count(labels_R: Tensor) -> Tensor:
    return torch.ones_like(labels_R)


def _check_logits(logits_PV: Tensor, shape_P: torch.Size, name: str) -> None:
    if logits_PV.dim() != 2 or logits_PV.shape[:1] != shape_P:
        raise ValueError(f"logits have shape {list(logits_PV.shape)}, {name} {list(shape_P)}; need [P, V] and [P]")


def _check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    low, high = (int(value) for value in ids.aminmax()) if len(ids) else (0, 0)
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} go from {low} to {high}; the logits have {vocab_size} ids")


def _block_rows(logits_PV: Tensor) -> int:
    limit = BLOCK_ELEMENTS_CPU if logits_PV.device.type == "cpu" else BLOCK_ELEMENTS_DEVICE
    return max(1, limit // max(1, logits_PV.shape[1]))


def _float(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
